"""Between a run in memory and a checkpoint: weights, optimizer, scaler, source and state. Floor 3."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from strop.engine.checkpoint import Checkpoint
from strop.engine.optim import optimizer_tensors, set_optimizer_numbers
from strop.engine.step_source import StepSource
from strop.engine.train_state import TrainState
from strop.policy.strategy import Strategy


class Snapshot:
    """Collects what a checkpoint of the run holds, and loads a checkpoint into the run. Tensors are not copied."""

    def __init__(
        self,
        strategy: Strategy,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        source: StepSource,
    ) -> None:
        self.strategy, self.optimizer, self.scaler, self.source = strategy, optimizer, scaler, source
        self.parameters = strategy.trained

    def take(self, state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The run's own tensors by name, and everything else as JSON values."""
        tensors, numbers = self._tensors()
        state_of = {"train": asdict(state), "optimizer": numbers, "scaler": self.scaler.state_dict()}
        return tensors, state_of | ({"source": source} if (source := self.source.state()) else {})

    def restore(self, checkpoint: Checkpoint) -> TrainState:
        """Loads everything, and returns the state that was saved."""
        saved = checkpoint.state
        self.load_tensors(checkpoint)
        set_optimizer_numbers(self.optimizer, self.parameters, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.source.restore(saved.get("source", {}))
        return TrainState(**saved["train"])

    def load_tensors(self, checkpoint: Checkpoint) -> None:
        """Loads the tensors only."""
        tensors, _ = self._tensors()
        self.strategy.load(tensors, checkpoint.load_into)

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        optimizer, numbers = optimizer_tensors(self.optimizer, self.parameters)
        weights = {f"policy.{name}": weight.detach() for name, weight in self.parameters.items()}
        of = {f"policy.{name}": name for name in self.parameters}
        of |= {name: name.split(".", 2)[2] for name in optimizer}  # optimizer.exp_avg.NAME
        return self.strategy.to_save({**weights, **self.source.tensors(), **optimizer}, of), numbers
