"""`post_training` of the methods on groups of sampled completions. Floor 1, no torch.

There is one objective with axes; the name of an algorithm stands for a value on each axis. An axis that is given wins
over the algorithm's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator
from pydantic.config import JsonDict

from strop.config.base_section import Problem
from strop.config.method_base import Choice, Readers, ReferenceSettings
from strop.config.sections import RolloutSection
from strop.types import OF_COMPLETIONS, OF_TOKENS, RowShape

if TYPE_CHECKING:
    from strop.config.run import RunConfig

Algorithm = Literal[
    "grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo", "gmpo", "rloo", "reinforce++", "maxrl", "gdpo"
]  # fmt: skip
Advantage = Literal[
    "group", "mean", "batch", "rloo", "maxrl", "opo", "reinforce++", "reinforce++_baseline", "gdpo", "none"
]  # fmt: skip
Level = Literal["token", "sequence", "sequence_product"]
Gate = Literal["clip", "cispo", "sapo", "gmpo", "none"]
Aggregation = Literal["sequence", "token", "constant", "sequence_sum", "prompt"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]

ALONE = frozenset({"reinforce++", "none"})
"""Values of `advantage` by which a completion counts without the others of its group: one is enough, and groups whose
rewards are all the same teach something, too."""

ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage": "mean", "aggregation": "constant"},
    "dapo": {"aggregation": "token", "epsilon_high": 0.28},
    "bnpo": {"aggregation": "token"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"gate": "cispo", "aggregation": "token"},
    "sapo": {"gate": "sapo"},
    "gmpo": {"gate": "gmpo"},
    "rloo": {"advantage": "rloo", "importance_sampling_level": "sequence_product", "kl_in": "reward"},
    "reinforce++": {"advantage": "reinforce++", "aggregation": "token", "kl_in": "reward"},
    "maxrl": {"advantage": "maxrl", "aggregation": "sequence_sum"},
    "gdpo": {"advantage": "gdpo"},
}
"""What each algorithm sets where it differs from grpo."""

_GRPO: Mapping[str, Any] = {
    "advantage": "group",
    "importance_sampling_level": "token",
    "gate": "clip",
    "aggregation": "sequence",
    "kl_in": "loss",
}
_BOUNDS: Mapping[str, Mapping[str, float]] = {
    "clip": {"epsilon": 0.2, "epsilon_high": 0.2},
    "cispo": {"epsilon": 1.0, "epsilon_high": 4.0},
    "gmpo": {"epsilon": 0.4, "epsilon_high": 0.4},
}
"""Gate -> its bounds where the algorithm does not set them. Other gates read none."""

BY_ALGORITHM: JsonDict = {"x-default": "by algorithm"}
BY_GATE: JsonDict = {"x-default": "by algorithm and gate"}


def _axis(name: str) -> Callable[[dict[str, Any]], Any]:
    def value(data: dict[str, Any]) -> Any:
        return {**_GRPO, **ALGORITHMS.get(data.get("algorithm", "grpo"), {})}[name]

    return value


def _level(data: dict[str, Any]) -> Any:
    return None if data.get("gate") == "gmpo" else _axis("importance_sampling_level")(data)


def _bound(name: str) -> Callable[[dict[str, Any]], float | None]:
    def value(data: dict[str, Any]) -> float | None:
        gate, own = str(data.get("gate")), ALGORITHMS.get(data.get("algorithm", "grpo"), {})
        if gate not in _BOUNDS:
            return None
        of_algorithm = own if gate == own.get("gate", "clip") else {}
        return float(of_algorithm.get(name, _BOUNDS[gate][name]))

    return value


class GrpoSettings(ReferenceSettings):
    """Group relative policy optimisation (arXiv 2402.03300) and related methods: completions, weighted by rewards."""

    LEARNING_RATE: ClassVar[float] = 1e-6
    OBJECTIVE: ClassVar[str] = "grpo:Grpo"
    ROWS: ClassVar[RowShape] = "group"
    SAMPLES: ClassVar[bool] = True
    NUMBERS: ClassVar[tuple[str, ...]] = (*OF_COMPLETIONS, *OF_TOKENS, "sampling_temperature")
    USUAL_BETA: ClassVar[tuple[float, float]] = (0.0, math.inf)
    READ_BY: ClassVar[Mapping[str, Readers]] = {
        "importance_sampling_level": Readers("gate", tuple(g for g in get_args(Gate) if g != "gmpo")),
        "epsilon": Readers("gate", tuple(_BOUNDS)),
        "epsilon_high": Readers("gate", tuple(_BOUNDS)),
        "delta": Readers("gate", ("clip",)),
        "sapo_temperature_pos": Readers("gate", ("sapo",)),
        "sapo_temperature_neg": Readers("gate", ("sapo",)),
        "normalizer_length": Readers("aggregation", ("constant",)),
        "kl_estimator": Readers("kl_in", ("loss",)),
        "use_bias_correction_kl": Readers("kl_in", ("loss",)),
        "sampler_correction_max": Readers("sampler_correction", tuple(c for c in get_args(Correction) if c != "none")),
        "sampler_correction_min": Readers("sampler_correction", ("token_mask", "sequence_mask", "geometric_mask")),
    }

    method: Literal["grpo"] = "grpo"
    """Group relative policy optimisation and related methods."""
    algorithm: Algorithm = "grpo"
    """A name for a value on each axis below; the dry run prints them. An axis that is given wins."""
    advantage: Advantage = Field(default_factory=_axis("advantage"), json_schema_extra=BY_ALGORITHM)
    """How rewards become advantages. `group`: minus the group's mean, divided by its standard deviation. `mean`: minus
    the group's mean. `batch`: minus the group's mean, divided by the standard deviation of the step. `rloo`: minus the
    mean of the others of the group. `maxrl`: minus the group's mean, divided by it. `opo`: minus the group's mean
    weighted by length. `reinforce++`: whitened over the step. `reinforce++_baseline`: minus the group's mean, then
    whitened over the step. `gdpo`: each of several rewards minus the group's mean, divided by its standard deviation;
    their weighted sum, whitened over the completions of the step (arXiv 2601.05242). `none`: the reward itself."""
    gate: Gate = Field(default_factory=_axis("gate"), json_schema_extra=BY_ALGORITHM)
    """What holds the ratio of the policy to the one that sampled near 1. `clip`: of PPO. `cispo`: the ratio is a
    clipped weight without a gradient. `sapo`: a sigmoid. `gmpo`: the geometric mean of clipped ratios. `none`: nothing
    does."""
    importance_sampling_level: Level | None = Field(default_factory=_level, json_schema_extra=BY_ALGORITHM)
    """The ratio of each token, of a completion by its mean per token (`sequence`), or of a completion as a whole
    (`sequence_product`). Not read by gate gmpo, which has its own."""
    epsilon: float | None = Field(default_factory=_bound("epsilon"), gt=0, json_schema_extra=BY_GATE)
    """The ratio's lower bound is 1 - epsilon (with gate gmpo exp(-epsilon)); for cispo 1 means none."""
    epsilon_high: float | None = Field(default_factory=_bound("epsilon_high"), gt=0, json_schema_extra=BY_GATE)
    """The ratio's upper bound is 1 + epsilon_high (with gate gmpo exp(epsilon_high))."""
    delta: float | None = Field(default=None, gt=1)
    """Gate clip: the largest ratio that a completion with a negative advantage counts by (arXiv 2505.07291); null:
    none."""
    sapo_temperature_pos: float = Field(default=1.0, gt=0)
    """Gate sapo: steepness of the sigmoid where the advantage is positive."""
    sapo_temperature_neg: float = Field(default=1.05, gt=0)
    """Gate sapo: steepness of the sigmoid where the advantage is not positive."""
    aggregation: Aggregation = Field(default_factory=_axis("aggregation"), json_schema_extra=BY_ALGORITHM)
    """How the losses of tokens become that of a step. `sequence`: the mean of the completions' means. `token`: the mean
    over the step's tokens. `constant`: their sum, divided by the number of completions times normalizer_length.
    `sequence_sum`: the mean of the completions' sums. `prompt`: the mean of the prompts' means over tokens."""
    normalizer_length: int | None = Field(default=None, gt=0)
    """Aggregation constant: the length that each completion counts with; null: training.max_completion_length."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the reference; 0: there is no reference."""
    kl_in: Literal["loss", "reward"] = Field(default_factory=_axis("kl_in"), json_schema_extra=BY_ALGORITHM)
    """Where the divergence counts: as a term of the loss, or, per completion (reinforce++: per token, from there to the
    end), taken off the reward by the log-probs of sampling; this needs `old_logps`."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k3"
    """The estimate of the divergence per token in the loss. `k3+` has the value of k3 and the gradient of k2."""
    use_bias_correction_kl: bool = True
    """Multiply the divergence in the loss by the ratio, so that its gradient is right for tokens that another policy
    sampled (arXiv 2512.02556)."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut off (`ended`) out of the loss (overlong filtering of DAPO, arXiv 2503.14476);
    their rewards still count in the advantages of the others."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus: this times the mean entropy of the policy's distribution over all trained tokens of
    the step, in nats, is taken off the loss. 0: no entropy is computed in training."""
    sampler_correction: Correction = "none"
    """Weight for what sampled with other log-probs than the policy has (`sampler_logps`), by token or by completion:
    cut off above, or 0 outside of the bounds. `geometric_mask`: a token's weight, or 0 where the completion's geometric
    mean is outside."""
    sampler_correction_max: float = Field(default=3.0, gt=1)
    """Upper bound of that weight."""
    sampler_correction_min: float = Field(default=0.0, ge=0, lt=1)
    """Masks: lower bound of that weight."""

    @property
    def compares(self) -> Choice | None:
        return None if self.advantage in ALONE else Choice("advantage", self.advantage, "reinforce++")

    @model_validator(mode="before")
    @classmethod
    def _null_means_by_gate(cls, data: Any) -> Any:
        """These are null where the gate does not read them, and only there."""
        names = ("importance_sampling_level", "epsilon", "epsilon_high")
        if not isinstance(data, Mapping):
            return data
        return {name: value for name, value in data.items() if value is not None or name not in names}

    def axes(self) -> str:
        """The value on each axis, on one line."""
        bounds = f" {self.epsilon:g} / {self.epsilon_high:g}" if self.epsilon and self.epsilon_high else ""
        bounds += f", at most {self.delta:g}" if self.delta else ""
        sapo = f" {self.sapo_temperature_pos:g} / {self.sapo_temperature_neg:g}" if self.gate == "sapo" else ""
        level = f"{self.importance_sampling_level} ratios, " if self.importance_sampling_level else ""
        how = f" ({self.kl_estimator}{', times the ratio' if self.use_bias_correction_kl else ''})"
        kl = f"{self.beta:g} in the {self.kl_in}{how if self.kl_in == 'loss' else ''}" if self.beta else "none"
        return (
            f"advantage {self.advantage}, {level}gate {self.gate}{bounds}{sapo}, aggregation {self.aggregation}, "
            f"KL {kl}, entropy bonus {self.entropy_coef:g}, sampler correction {self.sampler_correction}"
        )

    def advice(self, config: RunConfig) -> Iterator[str]:
        yield from super().advice(config)
        own = ALGORITHMS[self.algorithm]
        if own and all(getattr(self, axis) != value for axis, value in own.items()):  # as in an edited config.yaml
            given = ", ".join(f"{axis}: {getattr(self, axis)}" for axis in own)
            yield f"post_training.algorithm {self.algorithm} changes nothing: what is given wins over it ({given})"

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.beta == 0 and self.ref_model_id is not None:
            yield Problem(
                ("ref_model_id", "beta"),
                f"ref_model_id names the reference model {self.ref_model_id!r}, and beta is 0: nothing reads it",
                "beta above 0, or no reference",
                "set beta, or remove ref_model_id",
            )
        if self.beta and self.kl_in == "loss" and self.kl_estimator == "k1" and not self.use_bias_correction_kl:
            yield Problem(
                ("kl_estimator", "use_bias_correction_kl"),
                "kl_estimator is k1 without the ratio, whose mean gradient is 0: it holds the policy to nothing",
                "k2, k3 or k3+, or k1 with use_bias_correction_kl: true",
                "set kl_estimator: k3+",
            )
        if self.advantage == "gdpo" and self.beta and self.kl_in == "reward":
            yield Problem(
                ("kl_in", "advantage"),
                "kl_in is reward, and advantage gdpo normalises each reward by itself: the divergence is none of them",
                "kl_in: loss",
                "set kl_in: loss, or choose another advantage",
            )
        if self.advantage == "maxrl" and self.beta and self.kl_in == "reward":
            yield Problem(
                ("kl_in", "advantage"),
                "kl_in is reward, and advantage maxrl divides by the mean of rewards that are at least 0: a divergence "
                "that is taken off a reward of 0 leaves less",
                "kl_in: loss",
                "set kl_in: loss, or choose another advantage",
            )
        if self.epsilon is not None and self.epsilon >= 1 and self.gate == "clip":
            yield Problem(
                ("epsilon",),
                f"epsilon is {self.epsilon:g}, so that the lower bound of the ratio is not above 0",
                "a number between 0 and 1",
            )

    def problems_in(self, config: RunConfig) -> Iterator[Problem]:
        rollout, defaults = config.rollout, RolloutSection.model_fields
        left_out = [name for name in ("top_k", "top_p", "min_p") if getattr(rollout, name) != defaults[name].default]
        if rollout.enabled and self.sampler_correction != "none" and left_out:
            yield Problem(
                ("post_training.sampler_correction", f"rollout.{left_out[0]}"),
                f"sampler_correction is {self.sampler_correction}, and with rollout.{left_out[0]} the sampler draws "
                "from a part of the vocabulary, while log-probs are those under all of it",
                "sampling from the whole vocabulary",
                f"remove rollout.{left_out[0]}, or sampler_correction",
            )
