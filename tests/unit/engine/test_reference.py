"""The reference's log-probs of a run: the same bits whatever the store has, each completion scored once."""

from __future__ import annotations

import copy
import itertools
import logging
import resource
from array import array
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from conftest import build_model
from strop.config.run import RunConfig
from strop.config.sections import ModelSection
from strop.engine import reference_cut, reference_logps
from strop.engine.progress import Progress
from strop.engine.reference_logps import ReferenceLogps, reference_logps_of
from strop.engine.step import ALONE
from strop.errors import CheckpointError
from strop.plan.cutting import cut
from strop.plan.row_tokens import packed_tokens, padded_tokens
from strop.policy.build import assemble, build_policy
from strop.policy.model.load import LoadedModel
from strop.policy.policy import Policy
from strop.policy.precision import Precision
from strop.policy.reference_store import ReferenceStore
from strop.types import Completion, Group, Origin
from strop.world import World
from worlds import in_worlds

BUDGET = 60


def drawn_group(number: int, draw: np.random.Generator) -> Group:
    def tokens(low: int, high: int) -> array[int]:
        return array("i", draw.integers(4, 400, draw.integers(low, high)).tolist())

    def completion() -> Completion:
        ids = tokens(1, 12)
        mask = bytes(draw.integers(0, 2, len(ids) - 1).tolist()) + b"\1"
        return Completion(ids, mask)

    return Group(tokens(1, 15), tuple(completion() for _ in range(draw.integers(1, 5))), Origin("rows", number))


@pytest.fixture(scope="module")
def rows() -> list[Group]:
    """Groups of 1 to 4 completions, some at the same prompt, some with a completion that came before."""
    draw = np.random.default_rng(0)
    groups = [drawn_group(i, draw) for i in range(24)]
    groups[7] = replace(groups[7], prompt_ids=groups[2].prompt_ids, completions=groups[2].completions[::-1])
    groups[9] = replace(groups[3], completions=(*groups[9].completions, groups[3].completions[0]))
    groups[11] = replace(groups[5], completions=groups[5].completions * 2)
    groups[20] = groups[4]
    return groups


@pytest.fixture(params=["shared", "plain"])
def policy(request: pytest.FixtureRequest, model_dir: Path) -> Policy:
    section = {"huggingface_id": str(model_dir)} | ({"attn_implementation": "sdpa"} if request.param == "plain" else {})
    config = RunConfig.model_validate({"models": [section]})
    return build_policy(config, config.models[0], torch.device("cpu"))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cut, "WINDOW", 10)


def taken(
    policy: Policy,
    store: ReferenceStore | None,
    groups: Sequence[Group],
    folder: Path,
    numbers: Sequence[int] | None = None,
    budget: int = BUDGET,
    world: World = ALONE,
) -> ReferenceLogps:
    cut_into = partial(cut, budget=budget, tokens=packed_tokens if policy.share_prefix else padded_tokens)
    numbers = range(len(groups)) if numbers is None else numbers
    with Progress(quiet=True) as progress:
        return reference_logps_of(policy, store, groups, numbers, cut_into, progress, folder, world)


def test_each_group_has_its_own(policy: Policy, rows: list[Group], tmp_path: Path) -> None:
    found = taken(policy, None, rows, tmp_path)
    with policy.scoring():
        for i, group in enumerate(rows):
            torch.testing.assert_close(found.values([i]), policy(policy.collate([group])).logps, rtol=1e-5, atol=1e-5)
    some = [5, 2, 23, 2]
    assert torch.equal(found.values(some), torch.cat([found.values([i]) for i in some]))
    first, last = (rows[i].num_scored for i in (2, 7))
    assert first == last and torch.equal(found.values([2]).sort().values, found.values([7]).sort().values)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-model"]  # the file has no name


@pytest.mark.nightly
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_was_stored_before_changes_no_bit(
    data: st.DataObject, policy: Policy, rows: list[Group], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Other runs over any of the rows, in any order and cut, some of them killed."""
    check_that_the_store_changes_no_bit(data, policy, rows, tmp_path_factory)


@pytest.mark.nightly
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_was_stored_before_changes_no_bit_however_often(
    data: st.DataObject, policy: Policy, rows: list[Group], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_that_the_store_changes_no_bit(data, policy, rows, tmp_path_factory)


def check_that_the_store_changes_no_bit(
    data: st.DataObject, policy: Policy, rows: list[Group], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("store")
    cold = taken(policy, None, rows, folder).values(range(len(rows)))
    store = ReferenceStore(folder / "some.logps")
    for _ in range(data.draw(st.integers(1, 3))):
        own = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
        budget = data.draw(st.sampled_from([1, 30, BUDGET, 200]))
        taken(policy, store, [rows[i] for i in own], folder, budget=budget)
    if store.path.exists() and data.draw(st.booleans()):  # killed in the middle of a record
        with store.path.open("r+b") as file:
            file.truncate(data.draw(st.integers(0, store.path.stat().st_size)))
    for _ in range(2):  # from what is there, then from the whole
        assert torch.equal(taken(policy, store, rows, folder).values(range(len(rows))), cold)


@pytest.fixture
def scored(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Completions of each pass."""
    seen: list[int] = []
    forward = policy.forward

    def noted(batch: object) -> Tensor:
        seen.append(batch.structure.num_completions)  # type: ignore[attr-defined]
        return forward(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(policy, "forward", noted)
    return seen


def test_a_completion_is_scored_once_and_read_again(
    policy: Policy, rows: list[Group], tmp_path: Path, scored: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    store = ReferenceStore(tmp_path / "some.logps")
    different = {(g.prompt_ids.tobytes(), c.ids.tobytes(), c.loss_mask) for g in rows for c in g.completions}
    first = taken(policy, store, rows, tmp_path).values(range(len(rows)))
    assert sum(scored) == len(different)
    scored.clear()
    with caplog.at_level(logging.INFO, "strop"):
        assert torch.equal(taken(policy, store, rows, tmp_path).values(range(len(rows))), first)
    assert len(scored) == 4, "a few groups, to be sure"
    assert f"{len(different)} of {len(different)} completions are taken from the store" in caplog.text
    scored.clear()
    draw = np.random.default_rng(1)
    further = [*rows, drawn_group(24, draw), drawn_group(25, draw)]  # rows that are added at the end
    taken(policy, store, further, tmp_path)
    assert sum(scored[4:]) < len(different) / 2


def test_the_store_is_read_once(
    policy: Policy, rows: list[Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to look whether what it has is of this model."""
    taken(policy, ReferenceStore(tmp_path / "s.logps"), rows, tmp_path)
    read, num_read = ReferenceStore.read, 0

    def counted(self: ReferenceStore, wanted: Set[bytes]) -> Iterator[tuple[bytes, NDArray[Any]]]:
        nonlocal num_read
        num_read += 1
        return read(self, wanted)

    monkeypatch.setattr(ReferenceStore, "read", counted)
    taken(policy, ReferenceStore(tmp_path / "s.logps"), rows, tmp_path)
    assert num_read == 1


def test_processes_get_what_the_store_of_the_first_has(
    policy: Policy, rows: list[Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store, which has some micro-batches, is read once; all processes have the bits of one process without it."""
    cold = taken(policy, None, rows, tmp_path).values(range(len(rows)))
    path = tmp_path / "s.logps"
    taken(policy, ReferenceStore(path), rows, tmp_path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    monkeypatch.setattr(reference_logps, "STORED_AT_ONCE", 2)
    read, policies, num_read = ReferenceStore.read, [policy, copy.deepcopy(policy)], 0

    def counted(self: ReferenceStore, wanted: Set[bytes]) -> Iterator[tuple[bytes, NDArray[Any]]]:
        nonlocal num_read
        num_read += 1
        return read(self, wanted)

    monkeypatch.setattr(ReferenceStore, "read", counted)

    def work(world: World) -> Tensor:
        store = ReferenceStore(path) if world.is_main else None
        return taken(policies[world.rank], store, rows, tmp_path, world=world).values(range(len(rows)))

    assert all(torch.equal(found, cold) for found in in_worlds(2, work))
    assert num_read == 1


def test_a_killed_pass_goes_on(
    policy: Policy, rows: list[Group], tmp_path: Path, scored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = taken(policy, None, rows, tmp_path).values(range(len(rows)))
    whole = len(scored)
    store, append, count = ReferenceStore(tmp_path / "some.logps"), ReferenceStore.append, itertools.count()

    def killed(self: ReferenceStore, *args: object) -> None:
        append(self, *args)  # type: ignore[arg-type]
        if next(count) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceStore, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            taken(policy, store, rows, tmp_path)
    scored.clear()
    assert torch.equal(taken(policy, store, rows, tmp_path).values(range(len(rows))), cold)
    assert len(scored) - min(3, 4) == whole - 3


@pytest.mark.nightly
def test_what_comes_in_halves_is_not_kept(
    policy: Policy, rows: list[Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bits are not those of the micro-batch."""
    cold = taken(policy, None, rows, tmp_path).values(range(len(rows)))
    store, forward = ReferenceStore(tmp_path / "some.logps"), policy.forward

    def small(batch: object) -> Tensor:
        if batch.structure.num_groups > 2:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(policy, "forward", small)
        halved = taken(policy, store, rows, tmp_path).values(range(len(rows)))
    torch.testing.assert_close(halved, cold, rtol=1e-5, atol=1e-5)
    assert torch.equal(taken(policy, store, rows, tmp_path).values(range(len(rows))), cold)


def test_a_reference_that_is_not_this_models_is_thrown_away(
    policy: Policy, rows: list[Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, append = ReferenceStore(tmp_path / "some.logps"), ReferenceStore.append
    with monkeypatch.context() as patch:
        patch.setattr(ReferenceStore, "append", lambda self, key, values: append(self, key, values + 2e-4))
        right = taken(policy, store, rows, tmp_path).values(range(len(rows)))
    assert torch.equal(taken(policy, store, rows, tmp_path).values(range(len(rows))), right)
    assert "not those of the model" in caplog.text
    caplog.clear()
    assert torch.equal(taken(policy, store, rows, tmp_path).values(range(len(rows))), right)
    assert "not those of the model" not in caplog.text


def test_some_groups_in_any_order(policy: Policy, rows: list[Group], tmp_path: Path) -> None:
    numbers = [13, 2, 21, 7, 0]
    found = taken(policy, None, rows, tmp_path, numbers)
    alone = taken(policy, None, [rows[i] for i in numbers], tmp_path)
    assert torch.equal(found.values(numbers), alone.values(range(len(numbers))))
    assert len(found.values([21])) == rows[21].num_scored
    for absent in (1, 22, -1, 100):
        with pytest.raises(KeyError):
            found.values([absent])
        with pytest.raises(KeyError):
            alone.values([absent if absent != 1 else 5])


def test_float64_of_a_float64_model(rows: list[Group], tmp_path: Path) -> None:
    module = build_model(dtype=torch.float64)
    loaded = LoadedModel(module, torch.float64, copy.deepcopy(module.config))
    policy = assemble(module, loaded, Precision(torch.float64), ModelSection(huggingface_id="x"), fp32_logits=False)
    found = taken(policy, None, rows[:3], tmp_path).values([0, 1, 2])
    assert found.dtype == torch.float64
    with policy.scoring():
        torch.testing.assert_close(found, policy(policy.collate(rows[:3])).logps, rtol=0, atol=1e-12)


def test_a_disk_that_does_not_take_them_is_an_error(policy: Policy, rows: list[Group], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        taken(policy, None, rows, tmp_path / "nowhere")
    found = ReferenceLogps(np.arange(1), np.array([0, 3]), np.dtype("f4"), tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            found.write([(0, np.zeros(3, np.float32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
