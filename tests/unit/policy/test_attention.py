"""Masks of shared-prefix rows against their definition, and what the attention refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from strop.batch import GroupSpan
from strop.errors import ModelError
from strop.policy.attention import AttentionPlan, dense_mask, group_mask, shared_prefix_attention

CPU = torch.device("cpu")
LAYOUT = (GroupSpan(0, 3, (2, 0, 4)), GroupSpan(9, 1, (0,)), GroupSpan(10, 5, (3, 1)))


def sees(query: int, key: int, window: int | None) -> bool:
    """The definition, token by token: who am I, who is that, may I see it."""

    def place(token: int) -> tuple[int, int, int]:  # group, part (0 is the prompt), position
        for g, span in enumerate(LAYOUT):
            start = span.start
            for part, length in enumerate((span.prompt, *span.completions)):
                if start <= token < start + length:
                    return g, part, token - start + (span.prompt if part else 0)
                start += length
        raise AssertionError(token)

    (g, part, position), (other_g, other_part, other_position) = place(query), place(key)
    if g != other_g or other_part not in (0, part) or other_position > position:
        return False
    return window is None or position - other_position < window


@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
def test_masks_are_their_definition(window: int | None) -> None:
    mask = dense_mask(LAYOUT, CPU, window)
    n = LAYOUT[-1].stop
    assert mask.tolist() == [[sees(q, k, window) for k in range(n)] for q in range(n)]
    for span in LAYOUT:
        own = slice(span.start, span.stop)
        assert torch.equal(group_mask(span, CPU, window), mask[own, own])


def test_a_plan_makes_each_mask_once() -> None:
    plan = AttentionPlan(LAYOUT, CPU)
    assert plan.mask(0, None) is plan.mask(0, None)
    assert plan.mask(0, 2) is plan.mask(0, 2)
    assert plan.dense(None) is plan.dense(None)
    assert not torch.equal(plan.mask(0, None), plan.mask(0, 2))


def test_the_default_scale_is_that_of_the_width() -> None:
    plan = AttentionPlan((GroupSpan(0, 4, (2,)),), CPU)
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
    one, _ = shared_prefix_attention(nn.Module(), q, k, v, None, strop_plan=plan)
    two, _ = shared_prefix_attention(nn.Module(), q, k, v, None, scaling=8**-0.5, strop_plan=plan)
    assert torch.equal(one, two) and one.shape == (1, 6, 2, 8)


@pytest.mark.parametrize("extra", [{"s_aux": torch.zeros(2)}, {"position_bias": torch.zeros(1)}, {"is_causal": False}])
def test_what_would_change_the_result_is_refused(extra: dict[str, object]) -> None:
    plan = AttentionPlan((GroupSpan(0, 4, (2,)),), CPU)
    q = torch.randn(1, 2, 6, 8)
    with pytest.raises(ModelError, match="does not know"):
        shared_prefix_attention(nn.Module(), q, q, q, None, strop_plan=plan, **extra)  # type: ignore[arg-type]
    out, _ = shared_prefix_attention(
        nn.Module(), q, q, q, None, strop_plan=plan, position_ids=torch.zeros(1), s_aux=None, output_attentions=False
    )
    assert torch.isfinite(out).all()
