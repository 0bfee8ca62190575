"""Reference log-probs on disk: found by model and tokens, whole or not at all, shared by writers."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer

from conftest import build_model
from strop.errors import ConfigError
from strop.policy import reference_store as store_module
from strop.policy.model.model_hashes import weights_hash
from strop.policy.policy import Policy
from strop.policy.reference_store import ReferenceStore, model_identity

Values = dict[bytes, NDArray[Any]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(tmp_path / "some.logps")


def drawn(n: int) -> Values:
    """Records of n micro-batches: key -> log-probs."""
    return {bytes([i] * 16): np.random.default_rng(i).normal(size=3 + i).astype(np.float32) for i in range(n)}


def add(store: ReferenceStore, values: Values) -> None:
    for key, logps in values.items():
        store.append(key, logps)


def read(store: ReferenceStore, values: Values) -> Values:
    return dict(store.read(values.keys()))


def same(found: Values, values: Values) -> bool:
    return found.keys() == values.keys() and all(np.array_equal(found[key], values[key]) for key in values)


def test_what_is_added_is_found_bit_for_bit(store: ReferenceStore) -> None:
    values = drawn(3)
    first = dict(list(values.items())[:1])
    assert read(store, values) == {}
    add(store, first)
    assert same(read(store, values), first)
    add(store, values)  # what stands there already is not read from here
    assert same(read(store, values), values)
    assert same(read(ReferenceStore(store.path), values), values)
    assert read(store, {b"another key of 16": np.zeros(1)}) == {}


def test_what_was_written_first_is_read(store: ReferenceStore) -> None:
    values = drawn(2)
    add(store, values)
    add(store, {key: logps + 1 for key, logps in values.items()})
    assert same(read(store, values), values)


def test_a_folder_that_is_deleted_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, values = ReferenceStore(tmp_path / "deep" / "some.logps"), drawn(3)
    for number in range(3):
        add(store, values)
        shutil.rmtree(tmp_path / "deep")
        assert read(store, values) == {}
        add(store, values)
        assert same(read(store, values), values), number
    assert "cannot be written" not in caplog.text


def test_every_cut_of_the_file_is_read_up_to_there_and_written_on(
    store: ReferenceStore, caplog: pytest.LogCaptureFixture
) -> None:
    values = drawn(3)
    add(store, values)
    whole = store.path.read_bytes()
    for length in range(len(whole)):
        store.path.write_bytes(whole[:length])
        fixed = ReferenceStore(store.path)
        found = read(fixed, values)
        assert len(found) < len(values) and same(found, {key: values[key] for key in found})
        add(fixed, {key: logps for key, logps in values.items() if key not in found})
        assert same(read(ReferenceStore(store.path), values), values)
    assert "an incomplete record" in caplog.text


def test_no_flipped_bit_is_believed(store: ReferenceStore) -> None:
    values = drawn(3)
    add(store, values)
    whole = store.path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        store.path.write_bytes(damaged)
        found = read(ReferenceStore(store.path), values)
        assert len(found) < len(values) and same(found, {key: values[key] for key in found})


def numbered(who: int) -> Values:
    return {bytes([who, i] * 8): np.full(4, 100 * who + i, np.float32) for i in range(50)}


def _write(path: Path, who: int) -> None:
    add(ReferenceStore(path), numbered(who))


def test_two_writers_at_once(store: ReferenceStore) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(store.path, who)) for who in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert same(read(store, numbered(1) | numbered(2)), numbered(1) | numbered(2))


def test_what_cannot_be_written_is_said_once(store: ReferenceStore, caplog: pytest.LogCaptureFixture) -> None:
    store.path.mkdir()
    add(store, drawn(3))
    assert caplog.text.count("later runs will score the reference again") == 1


def test_what_must_be_kept_and_cannot_be_is_an_error(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "some.logps", must_keep=True)
    add(store, drawn(1))
    store.path.unlink()
    store.path.mkdir()
    with pytest.raises(ConfigError, match=r"some.logps: it cannot be written \(Is a directory\)"):
        add(store, drawn(1))


def test_a_writer_that_does_not_end_is_said(
    store: ReferenceStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PATIENCE", 0.05)
    other = FileLock(f"{store.path}.lock")
    other.acquire()
    writer = threading.Thread(target=add, args=(store, drawn(3)))
    writer.start()
    writer.join(0.5)
    assert writer.is_alive() and "another process that is writing" in caplog.text
    other.release()
    writer.join(10)
    assert same(read(store, drawn(3)), drawn(3))


def test_what_cannot_be_removed_or_read_is_said(
    store: ReferenceStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    add(store, drawn(3))
    monkeypatch.setattr(Path, "unlink", refuse)
    store.clear()
    add(store, drawn(3))  # not after what could not be removed
    assert caplog.text.count("later runs will score the reference again") == 1
    monkeypatch.setattr(Path, "open", refuse)
    assert read(store, drawn(3)) == {}
    assert "cannot be read" in caplog.text


def test_a_file_that_became_another_is_not_cut(store: ReferenceStore, caplog: pytest.LogCaptureFixture) -> None:
    """Another run removed it and wrote its own, whose records end elsewhere."""
    one, two, three = ({key: logps} for key, logps in drawn(3).items())
    add(store, one)
    store.path.unlink()
    add(ReferenceStore(store.path), three)
    add(store, two)
    assert same(read(ReferenceStore(store.path), drawn(3)), two | three)
    assert "an incomplete record" not in caplog.text


def test_float64_stays_float64(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "wide.logps", torch.float64)
    values = {key: logps.astype(np.float64) / 3 for key, logps in drawn(3).items()}
    add(store, values)
    assert same(read(store, values), values)


def identity_of(policy: Policy) -> dict[str, object]:
    return model_identity(policy, weights_hash(policy.model))


@pytest.mark.nightly
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
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    seen.append(identity_of(build()))
    torch.set_num_threads(threads)
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
