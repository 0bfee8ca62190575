"""An objective declares every column that it reads."""

from __future__ import annotations

import math
from array import array

import pytest
import torch

from scored import make_scores
from strop.columns import Columns, Structure
from strop.config.methods import DistillSettings, MethodSettings, RewardSettings
from strop.engine.step import check_columns
from strop.errors import ConfigError
from strop.objectives.base import MISMATCHED, build_objective
from strop.types import Completion, Group, Origin
from variants import GROUP_SETTINGS, SETTINGS, dpo, grpo, name

SIZES = {"single": [1, 1, 1], "labelled": [1, 1, 1], "pair": [2, 2], "group": [2, 3]}


def columns_of(structure: Structure) -> Columns:
    """Every column that is supplied to some objective."""
    m, c, g, p = structure.of_levels
    logps = ("ref_logps", "old_logps", "sampler_logps", "teacher_logps", "collisions")
    return Columns(
        per_token={
            **{name: -torch.linspace(1.0, 2.0, m) for name in logps},
            **dict.fromkeys(("divergence", "entropies"), torch.ones(m)),
        },
        per_completion={
            **dict.fromkeys(("rewards", "normalised_rewards"), torch.arange(1.0, c + 1)),
            "ended": torch.ones(c),
        },
        per_group={"labels": torch.arange(g) % 2 == 0, "margin": torch.ones(g)},
        per_prompt_token={"prompt_logps": -torch.ones(p)},
    )


@pytest.mark.parametrize(
    "settings",
    [
        *SETTINGS,
        *GROUP_SETTINGS,
        RewardSettings(center_rewards_coefficient=0.1),
        DistillSettings(teacher_model_id="t"),
        DistillSettings(teacher_model_id="t", distill_loss="policy_gradient"),
    ],
    ids=name,
)
def test_what_is_read_is_declared(settings: MethodSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = build_objective(settings)
    sizes = SIZES[settings.ROWS]
    lengths = [1 if settings.REWARD_MODEL else 3] * sum(sizes)
    structure = Structure(tuple(sizes), tuple(lengths), (2,) * len(sizes))
    logps = -torch.linspace(0.5, 2.5, structure.num_tokens)
    columns = columns_of(structure)
    read: set[str] = set()
    find = Columns.find

    def noted(self: Columns, name: str) -> torch.Tensor:
        read.add(name)
        return find(self, name)

    monkeypatch.setattr(Columns, "find", noted)
    if objective.derives:
        columns = columns.beside(objective.derive(structure, columns))
    others = make_scores(logps, lengths, sizes, columns, prompt_lengths=[2] * len(sizes))
    scores = make_scores(logps, lengths, sizes, columns, prompt_lengths=[2] * len(sizes), also={MISMATCHED: others})
    objective.terms(scores)
    objective.metrics(scores)
    objective.margins(scores)
    assert read <= objective.reads | objective.may_read | objective.derives
    assert not objective.reads & objective.may_read


def test_a_column_that_may_be_read_is_not_supplied_twice() -> None:
    objective = build_objective(RewardSettings())
    check_columns(objective, policy=(), source=(), also=())
    with pytest.raises(ConfigError, match="margin: supplied by both the policy and the step source"):
        check_columns(objective, policy={"margin"}, source={"margin"}, also=())


def group(*ids: list[int], **numbers: list[float]) -> Group:
    completions = tuple(Completion(array("i", of), b"\1" * len(of)) for of in ids)
    found = {name: array("d", values) for name, values in numbers.items()}
    return Group(array("i", [1]), completions, Origin("rows", 1), numbers=found)


@pytest.mark.parametrize(
    ("settings", "of", "has_signal"),
    [
        (dpo(), group([2, 3], [2, 3]), False),
        (dpo(), group([2, 3], [2]), True),
        (dpo(), group([2]), True),
        (grpo(), group([2], [2], rewards=[0.0, 1.0]), True),
        (grpo(), group([2], [3], rewards=[1.0, 1.0]), False),
        (grpo(advantage="gdpo"), group([2], [3], rewards=[1.0, 1.0], normalised_rewards=[-1.0, 1.0]), True),
        (grpo(), group([2], [3], rewards=[1.0, 1.0], normalised_rewards=[-1.0, 1.0]), False),
        (grpo(), group([2], [3], rewards=[math.inf, 1.0]), True),
        (grpo(advantage="reinforce++"), group([2], rewards=[1.0]), True),  # completions count by themselves
        (grpo(advantage="none"), group([2], [3], rewards=[1.0, 1.0]), True),
    ],
)
def test_the_objective_says_whether_a_group_has_a_signal(settings: MethodSettings, of: Group, has_signal: bool) -> None:
    assert build_objective(settings).has_signal(of) == has_signal
