"""References whose weights lie in memory beside the policy's. Floor 2.

Where groups are sampled, the reference is needed in every step: what trains is copied (`FrozenReference`). A reference
that follows the policy (`SyncedReference`) is a second model in memory. All other references are scored before the
first step (`other_models.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from strop.policy.group_logps import group_logps
from strop.policy.policy import Policy
from strop.types import Group


class FrozenReference:
    """The policy as it is now, while it goes on training. Only the weights that train are copied, each process what it
    holds of them: for the passes of the reference they take the place of the policy's own.

    Args:
        policy: as it is now. A reference that stays is made before a checkpoint is loaded into the policy.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._weights = {name: weight.detach().clone() for name, weight in policy.strategy.trained.items()}

    def logps(self, micro_batches: Sequence[Sequence[Group]]) -> list[Tensor]:
        """As `group_logps`, under the weights of that time."""
        self._swap()
        try:
            return group_logps(self._policy, micro_batches)
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self._policy.strategy.trained.items():
            now = weight.detach().clone()
            weight.detach().copy_(self._weights[name])  # in place: a sharded layer is gathered from this memory
            self._weights[name] = now


class SyncedReference:
    """A reference that follows the policy (TR-DPO, arXiv 2404.09656): a second model, which scores every batch.

    Args:
        policy: before its first step, trained in full.
        every_steps, share: every this many steps, the weights become share x the policy's + (1 - share) x their own.
    """

    def __init__(self, policy: Policy, every_steps: int, share: float) -> None:
        self._leader, self._every, self._share = policy.trainable(), every_steps, share
        self._copy = copy.deepcopy(policy)
        self.weights = {name: weight.detach() for name, weight in self._copy.trainable().items()}
        """The weights that follow the policy, by the names of `Policy.trainable`."""
        self._copy.requires_grad_(False)

    def logps(self, groups: Sequence[Group]) -> list[Tensor]:
        """One tensor [scored tokens] per group; they are scored as one micro-batch."""
        return group_logps(self._copy, [groups])

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Moves the weights towards the policy's, if this step is one of those."""
        if step % self._every == 0:
            for name, weight in self.weights.items():
                weight.lerp_(self._leader[name], self._share)
