"""Between a run in memory and a checkpoint: weights, optimizer, scaler, source and state. Floor 3."""

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
from strop.world import World


class Snapshot:
    """Collects what a checkpoint of the run holds, and loads a checkpoint into the run. Tensors are not copied. Rank 0
    reads files, and gives the others what it has read."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        source: StepSource,
        world: World,
    ) -> None:
        self.parameters, self.optimizer, self.scaler, self.source = parameters, optimizer, scaler, source
        self.world = world

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
        if self.world.is_main:
            checkpoint.load_into(tensors)
        self.world.share_tensors(tensors.values())

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        optimizer, numbers = optimizer_tensors(self.optimizer, self.parameters)
        weights = {f"policy.{name}": weight.detach() for name, weight in self.parameters.items()}
        return {**weights, **self.source.tensors(), **optimizer}, numbers
