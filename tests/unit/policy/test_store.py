"""Reference log-probs on disk: found by model and tokens, whole or not at all, shared by writers."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from peft.tuners.lora import LoraLayer

from conftest import build_model
from strop.errors import ConfigError
from strop.policy import store as store_module
from strop.policy.policy import Policy
from strop.policy.reference import not_known, only, reference_logps, stored_logps
from strop.policy.store import ReferenceStore, completion_key, completion_keys, model_identity, weights_hash
from strop.types import Completion, Group


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(tmp_path / "some.logps")


def drawn(groups: list[Group]) -> list[torch.Tensor]:
    return [torch.randn(g.num_scored, generator=torch.Generator().manual_seed(i)) for i, g in enumerate(groups)]


def read(store: ReferenceStore, groups: dict[int, Group]) -> dict[int, torch.Tensor]:
    """By number, the groups that the store has whole."""
    keys = {i: completion_keys(group) for i, group in groups.items()}
    found = store.read({key for own in keys.values() for key in own})
    return {i: torch.cat([found[k] for k in own]) for i, own in keys.items() if all(k in found for k in own)}


def same(found: dict[int, torch.Tensor], groups: list[Group]) -> bool:
    values = drawn(groups)
    return sorted(found) == list(range(len(groups))) and all(torch.equal(found[i], values[i]) for i in found)


def test_what_is_added_is_found_bit_for_bit(store: ReferenceStore, groups: list[Group]) -> None:
    assert read(store, dict(enumerate(groups))) == {}
    store.append(groups[:1], drawn(groups)[:1])
    assert sorted(read(store, dict(enumerate(groups)))) == [0]
    store.append(groups[1:], drawn(groups)[1:])
    assert same(read(store, dict(enumerate(groups))), groups)
    assert same(read(ReferenceStore(store.path), dict(enumerate(groups))), groups)


def test_a_folder_that_is_deleted_is_made_again(
    tmp_path: Path, groups: list[Group], caplog: pytest.LogCaptureFixture
) -> None:
    store, values = ReferenceStore(tmp_path / "deep" / "some.logps"), drawn(groups)
    for number in range(3):
        store.append(groups[:1], values[:1])
        shutil.rmtree(tmp_path / "deep")
        assert read(store, {0: groups[0]}) == {}
        store.append(groups, values)
        assert same(read(store, dict(enumerate(groups))), groups), number
    assert "cannot be written" not in caplog.text


def test_completions_are_found_in_other_groups(store: ReferenceStore, groups: list[Group]) -> None:
    store.append(groups, drawn(groups))
    group = groups[0]
    turned = replace(group, completions=group.completions[::-1])
    first, second = drawn(groups)[0].split([c.num_scored for c in group.completions])
    assert torch.equal(read(store, {7: turned})[7], torch.cat([second, first]))
    assert torch.equal(read(store, {7: replace(group, completions=group.completions[1:])})[7], second)


def test_what_is_not_known_is_scored_once(groups: list[Group]) -> None:
    group, other = groups[0], groups[1]
    first, second = group.completions
    alone, turned = replace(group, completions=(first, first)), replace(group, completions=(second, first))
    asked = [other, alone, turned, replace(other, prompt_ids=group.prompt_ids)]
    keys = {i: completion_keys(g) for i, g in enumerate(asked)}
    missing = not_known(keys, set(keys[0][:1]))
    found = [only(asked[i], new).completions for i, new in missing.items()]
    assert found == [other.completions[1:], (first,), (second,), other.completions]
    assert not_known(keys, {key for own in keys.values() for key in own}) == {}


def test_the_key_is_of_tokens_prompt_and_mask(groups: list[Group]) -> None:
    group, one = groups[0], groups[0].completions[0]
    others = [
        completion_key(group, one),
        completion_key(group, Completion(one.ids, b"\1" * (len(one.ids) - 1) + b"\0")),
        completion_key(group, group.completions[1]),
        completion_key(replace(group, prompt_ids=group.prompt_ids[1:]), one),
        # the same tokens in all, parted elsewhere
        completion_key(
            replace(group, prompt_ids=group.prompt_ids[:-1]),
            Completion(group.prompt_ids[-1:] + one.ids, b"\0" + one.loss_mask),
        ),
    ]
    assert len(set(others)) == len(others)


def test_every_cut_of_the_file_is_read_up_to_there_and_written_on(
    store: ReferenceStore, groups: list[Group], caplog: pytest.LogCaptureFixture
) -> None:
    store.append(groups, drawn(groups))
    whole = store.path.read_bytes()
    for length in range(len(whole)):
        store.path.write_bytes(whole[:length])
        mended = ReferenceStore(store.path)
        found = read(mended, dict(enumerate(groups)))
        assert all(torch.equal(found[i], drawn(groups)[i]) for i in found) and len(found) < len(groups)
        missing = [i for i in range(len(groups)) if i not in found]
        mended.append([groups[i] for i in missing], [drawn(groups)[i] for i in missing])
        assert same(read(ReferenceStore(store.path), dict(enumerate(groups))), groups)
    assert "not whole" in caplog.text


def test_no_flipped_bit_is_believed(store: ReferenceStore, groups: list[Group]) -> None:
    store.append(groups, drawn(groups))
    whole = store.path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        store.path.write_bytes(damaged)
        found = read(ReferenceStore(store.path), dict(enumerate(groups)))
        assert all(torch.equal(found[i], drawn(groups)[i]) for i in found) and len(found) < len(groups)


def _write(path: Path, group: Group, times: int) -> None:
    store = ReferenceStore(path)
    for i in range(times):
        own = replace(group, prompt_ids=group.prompt_ids[:1] + type(group.prompt_ids)("q", [i]))
        store.append([own], [torch.full((group.num_scored,), float(i))])


def test_two_writers_at_once(store: ReferenceStore, groups: list[Group]) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(store.path, group, 50)) for group in groups[:2]]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    for group in groups[:2]:
        asked = {
            i: replace(group, prompt_ids=group.prompt_ids[:1] + type(group.prompt_ids)("q", [i])) for i in range(50)
        }
        found = read(store, asked)
        assert all(float(found[i][0]) == i for i in range(50))


def test_what_cannot_be_written_is_said_once(
    store: ReferenceStore, groups: list[Group], caplog: pytest.LogCaptureFixture
) -> None:
    store.path.mkdir()
    store.append(groups, drawn(groups))
    store.append(groups, drawn(groups))
    assert caplog.text.count("kept for this run only") == 1


def test_what_must_be_kept_and_cannot_be_is_an_error(tmp_path: Path, groups: list[Group]) -> None:
    store = ReferenceStore(tmp_path / "some.logps", must_keep=True)
    store.append(groups[:1], drawn(groups)[:1])
    store.path.unlink()
    store.path.mkdir()
    with pytest.raises(ConfigError, match=r"some.logps: it cannot be written \(Is a directory\)"):
        store.append(groups, drawn(groups))


def test_a_writer_that_does_not_end_is_said(
    store: ReferenceStore, groups: list[Group], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PATIENCE", 0.05)
    other = FileLock(store._lock.lock_file)
    other.acquire()
    writer = threading.Thread(target=store.append, args=(groups, drawn(groups)))
    writer.start()
    writer.join(0.5)
    assert writer.is_alive() and "another process is writing" in caplog.text
    other.release()
    writer.join(10)
    assert len(read(store, dict(enumerate(groups)))) == len(groups)


def test_what_cannot_be_removed_or_read_is_said(
    store: ReferenceStore, groups: list[Group], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    store.append(groups, drawn(groups))
    monkeypatch.setattr(Path, "unlink", refuse)
    store.clear()
    store.append(groups, drawn(groups))  # not after what could not be removed
    assert caplog.text.count("kept for this run only") == 1
    monkeypatch.setattr(Path, "open", refuse)
    assert read(store, dict(enumerate(groups))) == {}
    assert "cannot be read" in caplog.text


def test_a_file_that_became_another_is_not_cut(
    store: ReferenceStore, groups: list[Group], caplog: pytest.LogCaptureFixture
) -> None:
    """Another run removed it and wrote its own, whose records end elsewhere."""
    store.append(groups[:1], drawn(groups)[:1])
    store.path.unlink()
    ReferenceStore(store.path).append(groups[2:], drawn(groups)[2:])
    store.append(groups[1:2], drawn(groups)[1:2])
    assert sorted(read(ReferenceStore(store.path), dict(enumerate(groups)))) == [1, 2]
    assert "not whole" not in caplog.text


def test_float64_stays_float64(tmp_path: Path, groups: list[Group]) -> None:
    store = ReferenceStore(tmp_path / "wide.logps", torch.float64)
    values = [v.double() / 3 for v in drawn(groups)]
    store.append(groups, values)
    assert all(torch.equal(read(store, {0: g})[0], v) for g, v in zip(groups, values, strict=True))


def identity_of(policy: Policy) -> dict[str, object]:
    return model_identity(policy, weights_hash(policy.model))


def test_the_identity_is_of_what_decides_the_numbers(build: Callable[..., Policy]) -> None:
    plain = identity_of(build())
    assert identity_of(build(lora={"r": 4})) == plain  # adapters that add nothing yet
    assert identity_of(build(training={"learning_rate": 1.0})) == plain
    others: list[dict[str, Any]] = [
        {"training": {"bf16": True}},
        {"training": {"bf16": True, "fp32_logits": True}},
        {"attn_implementation": "sdpa"},
        {"lora": {"r": 4}, "training": {"bf16": True}},  # the base is stored in bfloat16
    ]
    seen = [plain, *(identity_of(build(**keys)) for keys in others)]
    policy = build(lora={"r": 4})
    next(p for n, p in policy.named_parameters() if "lora_B" in n).data[0, 0] = 1e-3
    seen.append(identity_of(policy))
    policy = build()
    next(policy.parameters()).data[0, 0] += 1e-6
    seen.append(identity_of(policy))
    policy = build(lora={"r": 4})
    next(p for n, p in policy.named_parameters() if "lora_B" in n).data[0, 0] = 1e-3
    next(m for m in policy.modules() if isinstance(m, LoraLayer)).scaling["default"] *= 2
    seen.append(identity_of(policy))
    for key, value in (("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("num_attention_heads", 2), ("rope_theta", 5.0)):
        policy = build()
        setattr(policy.loaded_config, key, value)
        seen.append(identity_of(policy))
    assert all(one not in seen[:i] for i, one in enumerate(seen))


def test_the_hash_of_weights_is_of_names_shapes_and_bytes() -> None:
    model = build_model()
    before = weights_hash(model)
    assert weights_hash(build_model()) == before != weights_hash(build_model(1))
    assert weights_hash(build_model(dtype=torch.bfloat16)) != before
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    assert weights_hash(model) != before


def test_a_reference_that_is_not_this_models_is_thrown_away(
    build: Callable[..., Policy], groups: list[Group], caplog: pytest.LogCaptureFixture
) -> None:
    policy, keys = build(), {i: completion_keys(group) for i, group in enumerate(groups)}
    store = ReferenceStore.of(policy, weights_hash(policy.model))
    values = reference_logps(policy, [groups], keep=store.append)
    with caplog.at_level(logging.INFO, "strop"):
        found = stored_logps(policy, store, groups, keys)
    assert all(torch.equal(torch.cat([found[k] for k in keys[i]]), value) for i, value in enumerate(values))
    assert f"{len(found)} of {len(found)} completions were scored before" in caplog.text
    store.clear()
    store.append(groups, [v + 2e-4 for v in values])
    assert stored_logps(policy, store, groups, keys) == {}
    assert "not those of the model" in caplog.text and not store.path.exists()
