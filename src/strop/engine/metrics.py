"""Metrics as sums and counts, which are added up between two log lines and divided once. Floor 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from strop.engine.step_records import StepRecord
from strop.errors import ConfigError
from strop.objectives.base import FetchedMean
from strop.policy.strategy import Strategy


class MetricWindow:
    """Means and totals over the steps since the last log line, and the digest of the weights that the last of these
    steps began with. Its state goes into checkpoints."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._weights: str | None = None

    def add(self, record: StepRecord) -> None:
        """Adds a step. A skipped step only adds to the counts, since its numbers are not finite."""
        if not record.skipped:
            if len(record.terms) > 1:
                self.add_means({f"loss/{term}": (share, 1) for term, share in record.terms.items()})
            self.add_means(
                {
                    "loss": (record.loss, 1),
                    "grad_norm": (record.grad_norm, 1),
                    "clipped": (float(record.clipped), 1),
                    **record.metrics,
                    **record.update,
                }
            )
        self.add_totals(
            num_groups=record.num_groups,
            num_zero_signal_groups=record.num_zero_signal_groups,
            num_scored_tokens=record.num_scored_tokens,
        )
        if record.skipped:
            self.add_totals(num_skipped_steps=1)
        self._weights = record.weights

    def add_means(self, metrics: Mapping[str, FetchedMean]) -> None:
        for name, (total, count) in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + count

    def add_totals(self, **totals: int) -> None:
        for name, value in totals.items():
            self._totals[name] = self._totals.get(name, 0) + value

    @property
    def is_empty(self) -> bool:
        return not (self._sums or self._totals)

    def flush(self) -> dict[str, float | int | str]:
        """Returns the metrics of the window and empties it."""
        record: dict[str, float | int | str] = {**means(self._sums, self._counts), **self._totals}
        if self._weights is not None:
            record["weights_digest"], self._weights = self._weights, None
        for part in (self._sums, self._counts, self._totals):
            part.clear()
        return record

    def state_dict(self) -> dict[str, Any]:
        sums = {"sums": dict(self._sums), "counts": dict(self._counts), "totals": dict(self._totals)}
        return {**sums, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums, self._counts, self._totals = dict(state["sums"]), dict(state["counts"]), dict(state["totals"])
        self._weights = state.get("weights")


def means(sums: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """Sum divided by count, for every metric with a count above 0."""
    return {name: sums[name] / counts[name] for name in sums if counts[name]}


class UpdateProbe:
    """Measures how far one optimizer step moves the weights, on a sample of at most `per_tensor` weights per tensor.

    update_ratio: norm of the change divided by norm of the weights. changed_fraction: share of weights whose bits
    changed; it is near 0 if the learning rate is too small for the precision of the weights.
    """

    def __init__(self, strategy: Strategy, per_tensor: int = 4096) -> None:
        self._strategy = strategy
        counted = [piece for piece in strategy.pieces.values() if piece.counts]
        self._views = [piece.every(max(1, piece.size // per_tensor))[0] for piece in counted]
        self._before = [v.clone() for v in self._views]

    def measure(self) -> dict[str, FetchedMean]:
        """Returns both measures; to be called after the step."""
        both = list(zip(self._views, self._before, strict=True))
        moved = torch.stack([(a - b).double().norm() for a, b in both]).norm()
        size = torch.stack([b.double().norm() for b in self._before]).norm()
        changed = torch.stack([(a != b).sum() for a, b in both]).sum()
        moved, size = self._strategy.norm(torch.stack([moved, size]))
        count = torch.stack([changed, changed.new_tensor(sum(v.numel() for v in self._views))])
        num_changed, num = self._strategy.sum(count).tolist()
        return {"update_ratio": (_ratio(moved, size), 1), "changed_fraction": (num_changed / num, 1)}


def _ratio(moved: Tensor, size: Tensor) -> float:
    return float(moved / size) if size > 0 else float(moved > 0)


SCORE, WIN_RATE = "samples/score", "samples/win_rate"
"""What an evaluation has where answers are scored: their mean score, and the share of them that score higher than the
answers of the start to the same prompts."""


def held_out_metrics(reward_names: Sequence[str], *, has_entropy: bool = True) -> list[str]:
    """Names of the numbers of an evaluation that samples: where there are rewards, the mean reward and where its 95 %
    interval lies. has_entropy: whether what samples knows the entropy of what it drew from."""
    of_completions = [f"completions/{name}" for name in ("mean_length", "mean_terminated_length", "clipped_ratio")]
    of_rewards = [f"rewards/{name}/{kind}" for name in reward_names for kind in ("mean", "std")]
    rewards = ["reward", "reward_low", "reward_high"] if reward_names else []
    entropy = ["entropy"] if has_entropy else []
    return [*rewards, *entropy, *of_completions, "rewards/failed", *of_rewards]


def no_such_metric(name: str, known: Sequence[str]) -> ConfigError:
    """The error for a `metric_for_best_model` that evaluations do not have."""
    return ConfigError(
        f"no evaluation has a metric {name!r}",
        where="finetuning.metric_for_best_model",
        expected="one of " + ", ".join(known),
        fix="name one of these",
    )
