"""Group relative policy optimisation and related methods: completions that were sampled, weighed by their rewards.

One objective with axes; an `algorithm` is a name for a value on each. Per trained token t of a completion y, with the
advantage A of y (from the rewards of the step) and the ratio of the policy to the one that sampled,

    token               w_t = pi(t) / old(t)
    sequence            w = exp(the mean over y of log pi(t) / old(t))      GSPO, arXiv 2507.18071
    sequence_product    w = exp(the sum over y of log pi(t) / old(t))       RLOO, 2402.14740

the loss is, by gate (sg: no gradient; lo = 1 - epsilon, hi = 1 + epsilon_high):

    clip     -min(w A, clip(w, lo, hi) A), the first w at most delta        PPO, 1707.06347; delta: 2505.07291
    cispo    -sg(clip(w, lo, hi)) A log pi(t)                               2506.13585
    sapo     -(4 / k) sigmoid(k (w - 1)) A, k by the sign of A              2511.20347
    gmpo     -exp(the mean over y of l) A, l = min(log w_t, epsilon_high)   2507.20673
             where A > 0, else max(log w_t, -epsilon)
    none     -w A

and the step's loss, by aggregation (L: normalizer_length):

    sequence        the mean over completions of each one's mean over tokens          GRPO, 2402.03300
    token           the mean over all tokens of the step                              DAPO, 2503.14476
    constant        the sum over all tokens / (completions of the step x L)           Dr. GRPO, 2503.20783
    sequence_sum    the mean over completions of each one's sum
    prompt          the mean over prompts of each one's mean over tokens

`old` is the column `old_logps`; where there is none it is the policy itself, without a gradient: w is 1, and the
gradient that of the plain policy gradient. `sampler_correction` multiplies the loss by v = old / sampler, cut off or
masked. With beta, beta times the divergence from the reference is added, aggregated alike; with d = log ref(t) / pi(t)
k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1, multiplied by w (k2 and k3+: by sg(w)); or, `kl_in: reward`, beta times the
sum of log old(t) / ref(t) is taken off the reward. entropy_coef times the mean over all tokens of the step of
H(t) = - sum over the vocabulary of p log p, the policy's entropy, is taken off the loss, however that
is aggregated. Advantages are those of `advantages.py`. All is counted over the whole step. With
`mask_truncated_completions`, completions that were cut off are left out of all these sums and means, but for the fixed
count of `constant`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from strop.batch import Scores
from strop.columns import Columns, Structure, Unit, completions, groups, tokens
from strop.config.methods import GrpoSettings
from strop.errors import ConfigError
from strop.objectives.advantages import advantages, differ, group_sizes, group_stds
from strop.objectives.base import OLD_LOGPS, Mean, Objective, old_logps
from strop.objectives.truncated import counted
from strop.types import Group


class Grpo(Objective[GrpoSettings]):
    """Completions of one prompt, weighed by their rewards."""

    METRICS: ClassVar[Mapping[str, str]] = {
        "reward": "mean reward of a completion: what should rise",
        "reward_std": "standard deviation of the rewards of a group; at 0 there is nothing to learn",
        "frac_reward_zero_std": "share of groups whose rewards are all the same, which teach nothing; if it stays "
        "above 0.8, prompts are too hard or too easy, or there are too few completions per prompt",
        "completions/mean_length": "trained tokens of a completion",
        "clip_ratio/low_mean": "share of tokens whose ratio is below the lower bound, at a negative advantage",
        "clip_ratio/high_mean": "share of tokens whose ratio is above the upper bound, at a positive advantage",
        "clip_ratio/region_mean": "both; 0 where every step samples again; above 0.3, samples are too old",
        "kl": "divergence from the reference per token, by its estimator; above 2: lower the rate or raise beta",
        "entropy": "entropy of the policy's distribution per trained token, in nats, with entropy_coef; near 0, "
        "completions of a prompt are all alike",
        "sampling/sampling_logp_difference/mean": "how far the sampler's log-probs are from old_logps, per token, "
        "before any correction; above 0.1, they are two different models",
        "sampling/importance_sampling_ratio/mean": "mean of old / sampler per token before any correction; far from 1: "
        "the sampler draws from another distribution",
    }

    @property
    def reads(self) -> frozenset[str]:
        s, names = self.settings, {"rewards"}
        if s.beta:
            names |= {"ref_logps"} | ({OLD_LOGPS} if s.kl_in == "reward" else set())
        if s.sampler_correction != "none":
            names |= {"sampler_logps"}
        if s.entropy_coef:
            names |= {"entropies"}
        if s.mask_truncated_completions:
            names |= {"ended"}
        return frozenset(names | {self._compared})

    @property
    def may_read(self) -> frozenset[str]:
        return frozenset({OLD_LOGPS, "sampler_logps"}) - self.reads

    @property
    def _compared(self) -> str:
        """The column that advantages are made of."""
        return "normalised_rewards" if self.settings.advantage == "gdpo" else "rewards"

    @property
    def derives(self) -> frozenset[str]:
        s, names = self.settings, {"advantages"}
        if s.mask_truncated_completions:
            names |= {"counted"} | ({"explored"} if s.entropy_coef else set())
        return frozenset(names)

    def derive(self, structure: Structure, columns: Columns) -> Columns:
        s, costs = self.settings, None
        if s.beta and s.kl_in == "reward":
            costs = s.beta * (columns.find(OLD_LOGPS).double() - columns.find("ref_logps").double())
        found = {"advantages": advantages(s.advantage, columns.find(self._compared), structure, costs)}
        if s.mask_truncated_completions:
            ended = columns.find("ended") > 0
            found["counted"] = counted(s.aggregation, ended, structure)
            if s.entropy_coef:
                found["explored"] = counted("token", ended, structure)
        return Columns(per_token=found)

    def has_signal(self, group: Group) -> bool:
        return self.settings.compares is None or differ(group.numbers[self._compared])

    def describe(self) -> Iterator[str]:
        yield f"algorithm {self.settings.algorithm}: {self.settings.axes()}"

    @property
    def units(self) -> Mapping[str, Unit]:
        found = dict.fromkeys(("policy", "kl") if self._kl_is_a_term else ("policy",), self._unit)
        return {**found, "entropy": tokens} if self.settings.entropy_coef else found

    @property
    def _kl_is_a_term(self) -> bool:
        return bool(self.settings.beta) and self.settings.kl_in == "loss"

    @property
    def _unit(self) -> Unit:
        aggregation = self.settings.aggregation
        if aggregation == "constant":
            length = self.settings.normalizer_length
            if length is None:
                raise ConfigError(
                    "aggregation constant divides by a length, and there is none",
                    where="post_training.normalizer_length",
                    expected="a number of tokens, here or in training.max_completion_length",
                )
            return lambda structure: completions(structure) * length
        return {"token": tokens, "prompt": groups}.get(aggregation, completions)

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        weights = self._weights(scores)
        terms = {"policy": (weights * self.policy_losses(scores)).sum()}
        if self._kl_is_a_term:
            terms["kl"] = self.settings.beta * (weights * self.kl(scores)).sum()
        if self.settings.entropy_coef:
            entropies = scores["entropies"].double()
            explored = entropies * scores["explored"] if self.settings.mask_truncated_completions else entropies
            terms["entropy"] = -self.settings.entropy_coef * explored.sum()
        return terms

    def _weights(self, scores: Scores) -> Tensor | float:
        """What the loss of each token counts in the sum that is divided by the unit."""
        of_token, weights = scores.completion_index, scores.lengths.new_ones(())
        match self.settings.aggregation:
            case "sequence":
                weights = (1 / scores.lengths)[of_token]
            case "prompt":
                lengths = scores.lengths
                prompts = lengths.new_zeros(scores.structure.num_groups).index_add(0, scores.group_index, lengths)
                weights = (1 / prompts)[scores.group_index][of_token]
        return weights * scores["counted"] if self.settings.mask_truncated_completions else weights

    # -- per token ---------------------------------------------------------------------------------------------------

    def policy_losses(self, scores: Scores) -> Tensor:
        """[M] float64: the loss of each token; one of a completion as a whole stands at each of its tokens."""
        s, a = self.settings, scores["advantages"].double()
        if s.gate == "gmpo":
            losses = -self._over_completion(self._clipped_log_ratios(scores, a), scores, mean=True).exp() * a
        else:
            w = self._ratios(scores)
            losses = self._gated(w, a, scores)
        return losses if s.sampler_correction == "none" else losses * self._correction(scores)

    def _gated(self, w: Tensor, a: Tensor, scores: Scores) -> Tensor:
        s = self.settings
        if s.gate == "none":
            return -w * a
        if s.gate == "sapo":
            k = torch.where(a > 0, a.new_full((), s.sapo_temperature_pos), s.sapo_temperature_neg)
            return -torch.sigmoid(k * (w - 1)) * 4 / k * a
        assert s.epsilon is not None and s.epsilon_high is not None
        inside = w.clamp(1 - s.epsilon, 1 + s.epsilon_high)
        if s.gate == "cispo":
            return -inside.detach() * a * scores.logps.double()
        return -torch.minimum((w if s.delta is None else w.clamp(max=s.delta)) * a, inside * a)

    def _clipped_log_ratios(self, scores: Scores, a: Tensor) -> Tensor:
        assert self.settings.epsilon is not None and self.settings.epsilon_high is not None
        log_w = _log_ratios(scores)
        return torch.where(a > 0, log_w.clamp(max=self.settings.epsilon_high), log_w.clamp(min=-self.settings.epsilon))

    def _ratios(self, scores: Scores) -> Tensor:
        """[M] float64: policy to the one that sampled, at the level that is configured."""
        log_w = _log_ratios(scores)
        level = self.settings.importance_sampling_level
        if level in ("sequence", "sequence_product"):
            log_w = self._over_completion(log_w, scores, mean=level == "sequence")
        return log_w.exp()

    @staticmethod
    def _over_completion(per_token: Tensor, scores: Scores, *, mean: bool) -> Tensor:
        """[M] -> [M] the sum or mean over each one's completion."""
        sums = scores.sums(per_token)
        return (sums / scores.lengths if mean else sums)[scores.completion_index]

    def kl(self, scores: Scores) -> Tensor:
        """[M] float64: the estimate of the divergence from the reference at each token, times the ratio if asked."""
        s, d = self.settings, scores["ref_logps"].double() - scores.logps.double()
        k2, k3 = d**2 / 2, d.exp() - d - 1
        found = {"k1": -d, "k2": k2, "k3": k3, "k3+": k3.detach() + k2 - k2.detach()}[s.kl_estimator]
        if not s.use_bias_correction_kl:
            return found
        w = self._ratios(scores)
        return found * (w if s.kl_estimator in ("k1", "k3") else w.detach())

    def _correction(self, scores: Scores) -> Tensor:
        """[M] float64 without a gradient: what the sampler's own distribution changes."""
        s, log_v = self.settings, _log_corrections(scores)
        kind, _, how = s.sampler_correction.rpartition("_")
        weight = log_v if kind in ("token", "geometric") else self._over_completion(log_v, scores, mean=False)
        v, high, low = weight.exp(), s.sampler_correction_max, s.sampler_correction_min
        if how == "truncate":
            return v.clamp(max=high)
        judged = self._over_completion(log_v, scores, mean=True).exp() if kind == "geometric" else v
        return torch.where((judged >= low) & (judged <= high), v, 0.0)

    # -- metrics -----------------------------------------------------------------------------------------------------

    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        structure, rewards = scores.structure, scores["rewards"].double()
        index, num_groups = scores.group_index, structure.num_groups
        # divided by the size of its group, so that every group counts once
        stds, sizes = group_stds(rewards, index, num_groups), group_sizes(index, num_groups)
        compared = (
            stds if self._compared == "rewards" else group_stds(scores[self._compared].double(), index, num_groups)
        )
        metrics: dict[str, Mean] = {
            "reward": (rewards.sum(), structure.num_completions),
            "reward_std": ((stds / sizes).sum(), num_groups),
            "frac_reward_zero_std": (((compared == 0) / sizes).sum(), num_groups),
            "completions/mean_length": (scores.lengths.sum(), structure.num_completions),
        }
        num_tokens = structure.num_tokens
        if self.settings.epsilon is not None:
            low, high = self._outside(scores)
            metrics["clip_ratio/low_mean"] = (low.sum(), num_tokens)
            metrics["clip_ratio/high_mean"] = (high.sum(), num_tokens)
            metrics["clip_ratio/region_mean"] = ((low | high).sum(), num_tokens)
        if self._kl_is_a_term:
            metrics["kl"] = (self.kl(scores).sum(), num_tokens)
        if self.settings.entropy_coef:
            metrics["entropy"] = (scores["entropies"].double().sum(), num_tokens)
        if "sampler_logps" in scores.columns.names:
            log_v = _log_corrections(scores)
            metrics["sampling/sampling_logp_difference/mean"] = (log_v.abs().sum(), num_tokens)
            metrics["sampling/importance_sampling_ratio/mean"] = (log_v.exp().sum(), num_tokens)
        return metrics

    def _outside(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """[M] each: below the lower bound at a negative advantage, above the upper one at a positive one."""
        s, a = self.settings, scores["advantages"]
        assert s.epsilon is not None and s.epsilon_high is not None
        if s.gate == "gmpo":
            log_w = _log_ratios(scores)
            return (log_w < -s.epsilon) & (a < 0), (log_w > s.epsilon_high) & (a > 0)
        w = self._ratios(scores)
        return (w < 1 - s.epsilon) & (a < 0), (w > 1 + s.epsilon_high) & (a > 0)


def _log_ratios(scores: Scores) -> Tensor:
    return scores.logps.double() - old_logps(scores)


def _log_corrections(scores: Scores) -> Tensor:
    return old_logps(scores) - scores["sampler_logps"].double()
