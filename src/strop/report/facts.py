"""What the checks ask of a run: its method, windows of its series, and what follows from both. Floor 2."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

from strop.config.guidance import usual_rate
from strop.config.methods import METHODS, ReferenceSettings
from strop.readable import is_number
from strop.report.findings import Thresholds
from strop.report.json_lines import Column
from strop.report.run_record import RunRecord, Table
from strop.significance import Change, change_of_rows

LN2 = math.log(2)
WINDOW = 0.2
"""The end of a series is this share of it."""
FIRST_LINES = 10
"""The beginning of a series is at most this many logged lines."""


class Facts:
    """One run, with what is derived from it. Numbers are None where the run does not say."""

    def __init__(self, run: RunRecord, thresholds: Thresholds) -> None:
        self.run, self.thresholds = run, thresholds

    # -- what was asked for ------------------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        return self.run.method

    @property
    def samples(self) -> bool:
        """Whether the policy samples the completions, in evaluations too."""
        return self.run.value("rollout.enabled", False) is True

    @property
    def loss_type(self) -> str:
        return str(self.run.value("post_training.loss_type", ""))

    @property
    def has_reference(self) -> bool:
        """Whether rewards are log-ratios to a reference, times beta."""
        method = METHODS.get(self.method)
        return method is not None and issubclass(method, ReferenceSettings) and method.ROWS in ("pair", "labelled")

    @property
    def is_pairs(self) -> bool:
        """Whether it trains on a chosen and a rejected completion."""
        method = METHODS.get(self.method)
        return method is not None and method.ROWS == "pair"

    @property
    def trains_on_rewards(self) -> bool:
        """Whether completions have rewards: grpo, and methods on pairs whose completions are sampled."""
        return self.method == "grpo" or (self.samples and self.is_pairs)

    @property
    def starts_at_reference(self) -> bool:
        """Whether the policy is the reference before the first step."""
        return self.has_reference and self.run.value("post_training.ref_model_id") is None

    @property
    def beta(self) -> float | None:
        key = "post_training.simpo_beta" if self.method == "simpo" else "post_training.beta"
        found = self.run.number(key)
        return found if found and found > 0 else None

    @property
    def rate(self) -> float | None:
        return self.run.number("training.learning_rate")

    @property
    def usual_rate(self) -> float | None:
        """The learning rate that the method has by default."""
        return usual_rate(self.method, self.is_adapted) if self.method in METHODS else None

    @property
    def is_adapted(self) -> bool:
        return bool(self.run.value("lora.enabled", False)) or self.run.value("models.adapter") is not None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run: planned, or else done."""
        planned = self.run.plan.get("num_steps") or self.run.result.get("num_steps")
        return planned if isinstance(planned, int) and planned > 0 else self.run.last_step

    @property
    def second_half(self) -> tuple[float, float]:
        """First and last step of the second half of what was done."""
        return self.run.last_step / 2, float(self.run.last_step)

    # -- series ------------------------------------------------------------------------------------------------------

    def first(self, name: str, table: Table | None = None) -> float | None:
        """The median of the first logged lines: a tenth of them, from 1 to `FIRST_LINES`. Of evaluations, the first."""
        table = self.run.train if table is None else table
        _, values = table.series(name)
        if not len(values):
            return None
        return float(np.median(self.beginning(values, table)))

    def last(self, name: str, table: Table | None = None) -> float | None:
        """The median of the last `WINDOW` of the logged lines. Of evaluations, the last."""
        table = self.run.train if table is None else table
        _, values = table.series(name)
        if not len(values):
            return None
        return float(np.median(self.end(values, table)))

    def beginning(self, values: Column, table: Table) -> Column:
        """The first values of a series: a tenth of them, from 1 to `FIRST_LINES`; of evaluations, the first value."""
        count = 1 if table is self.run.eval else min(FIRST_LINES, max(1, len(values) // 10))
        return values[:count]

    def end(self, values: Column, table: Table) -> Column:
        """The last `WINDOW` of the values of a series, at least one; of evaluations, the last value."""
        count = 1 if table is self.run.eval else max(1, round(WINDOW * len(values)))
        return values[-count:]

    def noise(self, name: str) -> float:
        """Half the width of the 95 % interval of the change of a series of the training from its beginning to its end,
        by how much a logged line differs from the one before it; 0 where there are no two."""
        table = self.run.train
        _, values = table.series(name)
        if len(values) < 2:
            return 0.0
        spread = float(np.sqrt(np.mean(np.diff(values) ** 2) / 2))
        return 1.96 * spread * math.hypot(*(len(x(values, table)) ** -0.5 for x in (self.beginning, self.end)))

    @cached_property
    def watched(self) -> Table:
        """Where the course of rewards is read: evaluations, which are of the same rows each time, where there are at
        least two; else the training."""
        return self.run.eval if len(self.run.eval) >= 2 else self.run.train

    @property
    def watched_words(self) -> str:
        return "validation rows" if self.watched is self.run.eval else "training rows"

    @property
    def has_trend(self) -> bool:
        """Whether there are enough logged steps to speak of a trend."""
        return len(self.run.train) >= self.thresholds["trend_lines"] or len(self.run.eval) >= 5

    def ratio_per_token(self, side: str, table: Table | None = None) -> tuple[Column, Column]:
        """(steps, log-ratio of policy to reference per token) of the `chosen` or `rejected` completions."""
        table = self.watched if table is None else table
        rewards, lengths = (table.columns.get(f"{name}/{side}") for name in ("rewards", "lengths"))
        if rewards is None or lengths is None or self.beta is None or not self.has_reference:
            return np.zeros(0), np.zeros(0)
        with np.errstate(all="ignore"):
            values = np.asarray(rewards, np.float64) / self.beta / lengths
        kept = np.isfinite(values)
        return table.step[kept], values[kept]

    def change(self, first: float, last: float) -> Change | None:
        """How far the evaluation loss changed between two steps, by paired rows; None where the run does not say."""
        rows = self.last("num_groups", self.run.eval)
        found = change_of_rows(self.run.logs, int(first), int(last), int(rows) if rows else None)
        losses = dict(zip(*(column.tolist() for column in self.run.eval.series("loss")), strict=True))
        return None if found is None else found.of(losses[first], losses[last])

    @property
    def held_out_gain(self) -> tuple[float, float] | None:
        """(how much the reward of held-out prompts rose from the first to the last evaluation, half the width of the
        95 % interval of that); None without two evaluations. Both are of the same prompts, so the interval is rather
        too wide."""
        if not self.samples or "reward" not in self.run.eval:
            return None
        rewards, high = (self.run.eval.columns.get(name) for name in ("reward", "reward_high"))
        places = np.flatnonzero(np.isfinite(rewards)) if rewards is not None else np.zeros(0, int)
        if rewards is None or len(places) < 2:
            return None
        ends = places[[0, -1]]
        halves = np.zeros(2) if high is None else np.nan_to_num(high[ends] - rewards[ends])
        return float(rewards[ends[1]] - rewards[ends[0]]), float(np.hypot(*halves))

    def logp_gain(self, side: str) -> float | None:
        """How much likelier the `chosen` or `rejected` completions have become, in nats per token: against the
        reference where there is one, else against the beginning."""
        if self.has_reference:
            values = self.ratio_per_token(side)[1]
            return float(np.median(self.end(values, self.watched))) if len(values) else None
        name = f"logps_per_token/{side}"
        before, after = self.first(name, self.watched), self.last(name, self.watched)
        return None if before is None or after is None else after - before

    @staticmethod
    def loss_name(table: Table) -> str:
        """The column of the loss on the preference, which has its own where the loss is a sum of several terms."""
        return "loss/preference" if "loss/preference" in table else "loss"

    @property
    def raw_margin(self) -> float | None:
        """The difference of both sides at the end of the training, not times beta."""
        found = self.last("rewards/margins")
        return None if found is None or self.beta is None else found / self.beta

    # -- the data ----------------------------------------------------------------------------------------------------

    def split(self, name: str) -> dict[str, Any]:
        """What data.json says of a split."""
        splits = self.run.data.get("splits")
        found = splits.get(name) if isinstance(splits, dict) else None
        return found if isinstance(found, dict) else {}

    def count(self, split: str, *path: str) -> float | None:
        """A number of data.json, such as ("train", "findings", "duplicates")."""
        found: Any = self.split(split)
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return float(found) if is_number(found) else None

    def share(self, split: str, of: str, *path: str) -> tuple[float, float] | None:
        """(count, its share of the count `of`), both of data.json; None where one is missing."""
        part, whole = self.count(split, *path), self.count(split, of)
        return None if part is None or not whole else (part, part / whole)


def wilson(share: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927)."""
    if n <= 0:
        return 0.0, 1.0
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(max(0.0, share * (1 - share) / n + z * z / (4 * n * n))) / (1 + z * z / n)
    return middle - half, middle + half
