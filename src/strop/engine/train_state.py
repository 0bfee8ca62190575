"""The numbers that a run carries from step to step, besides weights and optimizer. Floor 3."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from strop.engine.metrics import MetricWindow
from strop.engine.step_records import StepRecord


@dataclass
class TrainState:
    """The state of a run after a step. Checkpoints hold it as JSON."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated_step: int | None = None
    """The step of the last evaluation that was completed."""
    best_value: float | None = None
    best_step: int | None = None
    stale_evals: int = 0
    skipped_in_a_row: int = 0
    num_skipped: int = 0
    micro_batch_tokens: int | None = None
    """The size of micro-batches that fitted into memory; None as long as the configured one fits."""
    window: dict[str, Any] = field(default_factory=lambda: MetricWindow().state_dict())

    def add(self, record: StepRecord) -> None:
        """Counts a step that is done."""
        self.step = record.step
        self.tokens += record.num_tokens
        self.seconds += record.seconds
        self.num_skipped += record.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record.skipped else 0
