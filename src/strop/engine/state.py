"""What a run knows at the end of a step, besides weights and optimizer. Floor 3."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from strop.engine.metrics import MetricWindow
from strop.engine.records import StepRecord


@dataclass
class TrainState:
    """Goes into every checkpoint, as JSON."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated_step: int | None = None
    """The step of the last evaluation that came to its end."""
    best_value: float | None = None
    best_step: int | None = None
    stale_evals: int = 0
    skipped_in_a_row: int = 0
    num_skipped: int = 0
    micro_batch_tokens: int | None = None
    """What fitted into memory, where the configured number did not."""
    window: dict[str, Any] = field(default_factory=lambda: MetricWindow().state_dict())

    def add(self, record: StepRecord) -> None:
        """A step is done."""
        self.step = record.step
        self.tokens += record.num_tokens
        self.seconds += record.seconds
        self.num_skipped += record.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record.skipped else 0
