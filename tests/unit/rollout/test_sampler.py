"""The group sampler: what it draws, and that nothing but seed, step, prompt and index decides it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout_policies import FAMILIES, as_group, make_policy, prompts, trained_logps
from strop.errors import ConfigError, TrainingError
from strop.policy.group_logps import group_logps
from strop.policy.reference_models import FrozenReference
from strop.rollout.drawing import Drawing, uniforms
from strop.rollout.sampler import Sampled, Sampler

ENDS = (3, *range(50, 110, 3))
"""Several, so that some completions end before others."""


def ids(found: list[list[Sampled]]) -> list[list[list[int]]]:
    return [[list(c.ids) for c in own] for own in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_log_probs_are_those_of_the_training_forward(family: str, tmp_path: Path) -> None:
    policy = make_policy(tmp_path, family)
    given = prompts()
    found = Sampler(policy, 4, ENDS, seed=1).sample(1, given)
    recorded = torch.tensor([x for own in found for c in own for x in c.logps])
    torch.testing.assert_close(trained_logps(policy, given, found), recorded.float(), rtol=0, atol=1e-5)
    lengths = {len(c.ids) for own in found for c in own}
    assert len(lengths) > 4, "some end early"
    for completion in itertools.chain(*found):
        assert completion.ended == (completion.ids[-1] in ENDS)
        assert completion.ended or len(completion.ids) == 12
        assert not set(ENDS).intersection(completion.ids[:-1])


@pytest.mark.share(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_and_neighbours_change_nothing(family: str, tmp_path: Path) -> None:
    policy = make_policy(tmp_path, family)
    whole = ids(Sampler(policy, 4, ENDS, seed=1).sample(3, prompts()))
    assert ids(Sampler(policy, 4, ENDS, seed=1, batch_tokens=1).sample(3, prompts())) == whole
    assert ids(Sampler(policy, 4, ENDS, seed=1).sample(3, prompts()[::-1])) == whole[::-1]
    assert ids(Sampler(policy, 4, ENDS, seed=1).sample(3, prompts()[2:3])) == whole[2:3]
    assert [own[:2] for own in whole] == ids(Sampler(policy, 2, ENDS, seed=1).sample(3, prompts()))
    for other in ({"seed": 2}, {"step": 4}):
        assert ids(Sampler(policy, 4, ENDS, seed=other.get("seed", 1)).sample(other.get("step", 3), prompts())) != whole


def test_memory_that_does_not_suffice_is_survived_by_fewer_prompts_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy, most = make_policy(tmp_path), 100
    whole = ids(Sampler(policy, 4, ENDS, seed=1).sample(3, prompts()))
    body = type(policy.body).forward

    def short_of_memory(*arguments: Any, **given: Any) -> Any:
        if len(given["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return body(*arguments, **given)

    monkeypatch.setattr(type(policy.body), "forward", short_of_memory)
    sampler, most = Sampler(policy, 4, ENDS, seed=1), 8
    assert ids(sampler.sample(3, prompts())) == whole
    assert len(prompts()) * 4 > most and caplog.messages and "memory ran out" in caplog.messages[0]
    told = len(caplog.messages)
    assert ids(sampler.sample(3, prompts())) == whole
    assert len(caplog.messages) == told, "it begins with fewer now"
    most = 3
    with pytest.raises(TrainingError, match=r"4 completions of one prompt.*\n.*lower rollout.num_generations"):
        sampler.sample(3, prompts())


def test_the_temperature_is_that_of_the_policy(tmp_path: Path) -> None:
    """Log-probs of both are divided alike, and a cold policy repeats itself."""
    policy = make_policy(tmp_path)
    policy.transform = policy.transform.at_temperature(0.5)
    found = Sampler(policy, 4, ENDS, seed=1).sample(1, prompts())
    recorded = torch.tensor([x for own in found for c in own for x in c.logps])
    torch.testing.assert_close(trained_logps(policy, prompts(), found), recorded.float(), rtol=0, atol=1e-5)
    policy.transform = policy.transform.at_temperature(1e-4)
    cold = Sampler(policy, 8, ENDS, seed=1).sample(1, prompts())
    assert all(len({tuple(c.ids) for c in own}) == 1 for own in cold)


def test_adapters_sample_and_modes_come_back(tmp_path: Path) -> None:
    policy = make_policy(tmp_path, **{"lora.r": 4, "lora.lora_dropout": 0.5})
    modes = [m.training for m in policy.modules()]
    base = ids(Sampler(policy, 2, ENDS).sample(1, prompts()))
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    found = Sampler(policy, 2, ENDS).sample(1, prompts())
    assert ids(found) != base
    assert modes == [m.training for m in policy.modules()] and any(modes)
    recorded = torch.tensor([x for own in found for c in own for x in c.logps])
    with policy.scoring():
        torch.testing.assert_close(trained_logps(policy, prompts(), found), recorded.float(), rtol=0, atol=1e-5)


DRAWINGS = (
    *(Drawing(), Drawing(vocabulary=9), Drawing(top_k=5), Drawing(top_p=0.7), Drawing(min_p=0.1)),
    Drawing(4, 0.8, 0.05),
)


@pytest.mark.parametrize("drawing", DRAWINGS, ids=str)
def test_draws_are_those_of_the_distribution(drawing: Drawing) -> None:
    """Chi-square of 20,000 draws against the exact probabilities, and nothing outside of them."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1.5
    exact = logits.softmax(-1).numpy()
    kept = np.arange(12) < (drawing.vocabulary or 12)
    order = np.argsort(-exact * kept)
    if drawing.top_k:
        kept[order[drawing.top_k :]] = False
    if drawing.top_p < 1:
        mass = exact[order] * kept[order]
        kept[order[np.cumsum(mass) - mass >= drawing.top_p * mass.sum()]] = False
    if drawing.min_p:
        kept &= exact >= drawing.min_p * exact.max()
    expected = exact * kept / (exact * kept).sum()
    draws = 20_000
    tokens, logps, entropies = drawing.draw(logits.expand(draws, -1), torch.tensor(uniforms(1, 2, 3, 4, draws)))
    assert entropies.tolist() == pytest.approx([-(exact * np.log(exact)).sum()] * draws)
    counts = np.bincount(tokens.numpy(), minlength=12)
    assert not counts[~kept].any()
    where = expected > 0
    statistic = ((counts[where] - draws * expected[where]) ** 2 / (draws * expected[where])).sum()
    assert statistic < 11 + 4 * np.sqrt(22), "four standard deviations of a chi-square of 11 degrees"
    np.testing.assert_allclose(logps.numpy(), np.log(exact)[tokens.numpy()], rtol=1e-12)


def test_the_numbers_of_a_completion_are_its_own() -> None:
    keys = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]
    assert len({tuple(uniforms(*key, 3)) for key in keys}) == len(keys)
    assert list(uniforms(*keys[0], 3)) == list(uniforms(*keys[0], 8)[:3]), "more room changes nothing"


def test_the_ends_of_the_unit_interval_draw_what_can_be_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]], dtype=torch.float64)
    for number, token in ((0.0, 1), (1 - 2**-53, 2)):
        assert Drawing().draw(logits, torch.tensor([number], dtype=torch.float64))[0].item() == token


@pytest.mark.parametrize("vocabulary", [None, 300], ids=str)
@pytest.mark.parametrize("where", ["nowhere", "everywhere"])
def test_logits_that_are_not_finite_are_an_error(vocabulary: int | None, where: str, tmp_path: Path) -> None:
    """After a step that went too far, or at a temperature that float32 cannot divide by."""
    policy = make_policy(tmp_path)
    sampler = Sampler(policy, 2, ENDS, drawing=Drawing(vocabulary=vocabulary))
    if where == "nowhere":
        policy.transform = policy.transform.at_temperature(1e-300)
    else:
        next(iter(policy.trainable().values())).data.fill_(torch.nan)
    with pytest.raises(TrainingError, match="logits are not finite"):
        sampler.sample(1, prompts())


def test_a_model_that_never_ends_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing ends a completion"):
        Sampler(make_policy(tmp_path), 2, ())


@pytest.mark.parametrize("keys", [{}, {"lora.r": 4, "lora.lora_dropout": 0.3}], ids=str)
def test_a_frozen_reference_scores_as_the_policy_did(keys: dict[str, Any], tmp_path: Path) -> None:
    """After every weight has moved, bit for bit; and the policy goes on where it was."""
    policy = make_policy(tmp_path, **keys)
    given = prompts()
    groups = [as_group(p, own) for p, own in zip(given, Sampler(policy, 2, ENDS).sample(1, given), strict=True)]
    parts = [groups[:2], groups[2:]]
    before = group_logps(policy, parts)
    reference = FrozenReference(policy)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    moved = group_logps(policy, parts)
    places = {name: weight.data_ptr() for name, weight in policy.trainable().items()}
    found = reference.logps(parts)
    assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    assert not torch.equal(torch.cat(found), torch.cat(moved))
    assert all(torch.equal(a, b) for a, b in zip(group_logps(policy, parts), moved, strict=True))
    assert places == {name: weight.data_ptr() for name, weight in policy.trainable().items()}
    assert all(weight.requires_grad for weight in policy.trainable().values())
