"""Log-probs of groups under a policy, without gradients: of a reference, or of the policy that sampled. Floor 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strop.batch import TokenScores
from strop.policy.memory_attempts import in_halves
from strop.policy.policy import Policy
from strop.types import Group


def micro_batch_logps(policy: Policy, groups: Sequence[Group]) -> tuple[Tensor, bool]:
    """Scores groups as one micro-batch. Call it inside `Policy.scoring`.

    Returns:
        The log-probs [scored tokens of the groups] on the CPU, in float32 (float64 on a float64 model); and whether one
        pass was enough. If memory did not suffice, the groups were scored in halves, which changes the last bits.
    """
    num_passes = 0

    def score(part: Sequence[Group]) -> Tensor:
        nonlocal num_passes
        scored: TokenScores = policy(policy.collate(part))
        logps = scored.logps.cpu()
        num_passes += 1
        return logps

    logps = in_halves(score, groups) if policy.strategy.repeats else score(groups)
    return logps, num_passes == 1


def group_logps(policy: Policy, micro_batches: Sequence[Sequence[Group]]) -> list[Tensor]:
    """One tensor [scored tokens of the group] per group, on the CPU, in the order of `micro_batches`. All processes
    call it together, each with its own micro-batches, or none.

    It is float32, or float64 on a float64 model. How groups are cut into micro-batches changes rounding only; another
    pass over the same micro-batches by the same model gives the same bits.
    """
    results: list[Tensor] = []
    num_idle = policy.strategy.num_idle(len(micro_batches))
    with policy.scoring(), policy.strategy.passes():
        for batch in micro_batches:
            logps, _ = micro_batch_logps(policy, batch)
            # cloned, because a view would keep the whole micro-batch in memory
            results += [part.clone() for part in torch.split(logps, [g.num_scored for g in batch])]
        for _ in range(num_idle):
            policy.strategy.idle(False)
        policy.strategy.forget_passes()
    return results
