"""What a checkpoint holds of a run in memory: weights, optimizer, scaler, source and state. Floor 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from strop.engine.checkpoint import Checkpoint
from strop.engine.optim import optimizer_tensors, set_optimizer_numbers
from strop.engine.source import StepSource
from strop.engine.state import TrainState


class Snapshot:
    """Takes and puts back the tensors and numbers of one run; they stay where they are."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        source: StepSource,
    ) -> None:
        self.parameters, self.optimizer, self.scaler, self.source = parameters, optimizer, scaler, source

    def take(self, state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named tensors, which are those of the run itself, and what JSON holds."""
        tensors, numbers = self._tensors()
        return tensors, {"train": asdict(state), "optimizer": numbers, "scaler": self.scaler.state_dict()}

    def restore(self, checkpoint: Checkpoint) -> TrainState:
        """Load everything; the state of then."""
        saved = checkpoint.state
        self.load_tensors(checkpoint)
        set_optimizer_numbers(self.optimizer, self.parameters, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        return TrainState(**saved["train"])

    def load_tensors(self, checkpoint: Checkpoint) -> None:
        """Load the tensors alone."""
        tensors, _ = self._tensors()
        checkpoint.load_into(tensors)

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        optimizer, numbers = optimizer_tensors(self.optimizer, self.parameters)
        weights = {f"policy.{name}": weight.detach() for name, weight in self.parameters.items()}
        return {**weights, **self.source.tensors(), **optimizer}, numbers
