"""The files of a full model in `final/`: those of transformers, byte for byte, written one tensor at a time, also when
several processes hold its parts; a process that fails leaves none of them."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import strop
from conftest import build_model, build_tokenizer
from processes import in_processes
from strop import RunConfig
from strop.config.sections import GpuSection
from strop.device import start_world
from strop.errors import StropError
from strop.manifest import BASE, read_manifest
from strop.policy import saving
from strop.policy.build import build_policy
from strop.policy.model.adapter_base import base_files
from strop.policy.model.configuration import quiet
from strop.policy.model.model_hashes import files_hash
from strop.policy.model.shard_writer import IN_FILES, ShardWriter, Spec
from strop.policy.policy import Policy
from strop.policy.sharding import Sharded

FSDP = {"gpu.fsdp": True}
SMALL = "30KB"
"""Of a file: the tiny model is in several."""


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def by_transformers(policy: Policy, folder: Path, dtype: torch.dtype, size: str) -> None:
    values = {name: value.to(dtype) for name, value in policy.base.state_dict().items()}
    shared = {name: values[first] for name, first in policy.base.all_tied_weights_keys.items()}
    with quiet():
        policy.base.save_pretrained(folder, state_dict=values | shared, max_shard_size=size)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    build_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    build_tokenizer().save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.parametrize("size", ["50GB", SMALL])
def test_files_are_those_of_transformers(
    runs: Any, tied: Path, tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "MAX_FILE", size)
    for number, keys in enumerate([{}, {"huggingface_id": str(tied), "save_dtype": "bfloat16"}]):
        policy = runs.policy(keys)
        ours, theirs = tmp_path / f"ours-{number}", tmp_path / f"theirs-{number}"
        policy.save_pretrained(ours, build_tokenizer())
        by_transformers(policy, theirs, policy.saved_dtype, size)
        found, expected = hashes(ours), hashes(theirs)
        weights = {name for name in expected if name.startswith("model")}
        assert len(weights) == 1 or size == SMALL
        assert {name: found[name] for name in found if name.startswith("model")} == {n: expected[n] for n in weights}
        again = type(policy.base).from_pretrained(ours)
        assert again.config.architectures == ["LlamaForCausalLM"]
        assert again.config.dtype == policy.saved_dtype


def test_tensors_lie_in_a_file_as_safetensors_has_them(tmp_path: Path) -> None:
    named: dict[str, Tensor] = {f"{dtype} {name}": torch.ones(3).to(dtype) for dtype in IN_FILES for name in "bä"}
    save_file(named, tmp_path / "theirs", {"format": "pt"})
    order = sorted(named, key=lambda name: (IN_FILES.index(named[name].dtype), name))
    with ShardWriter(tmp_path / "ours", {n: Spec((3,), named[n].dtype) for n in order}, {}) as writer:
        for name in order:
            writer.write(name, named[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def saved_by_all(configs: list[RunConfig], folders: list[Path], size: str) -> None:
    saving.MAX_FILE = size
    with start_world(GpuSection()) as world:
        for config, folder in zip(configs, folders, strict=True):
            policy = build_policy(config, config.models[0], world.device, world=world)
            if world.is_main:
                policy.save_pretrained(folder, build_tokenizer())
            else:
                policy.help_to_save()


@pytest.mark.nightly
def test_files_of_several_processes_are_those_of_one(
    runs: Any, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = {"huggingface_id": str(tied), "save_dtype": "float16"}
    kinds: list[dict[str, Any]] = [{}, half, {"lora.enabled": True, "modules_to_save": ["lm_head"]}]
    folders = [tmp_path / str(number) for number in range(len(kinds))]
    in_processes(3, saved_by_all, [runs.config({**kind, **FSDP}) for kind in kinds], folders, SMALL)
    monkeypatch.setattr(saving, "MAX_FILE", SMALL)
    for kind, folder in zip(kinds, folders, strict=True):
        alone = tmp_path / f"{folder.name}-alone"
        runs.policy(kind).save_pretrained(alone, build_tokenizer())
        assert hashes(folder) == hashes(alone)


def failing(config: RunConfig, rank: int) -> str:
    """Trains, and fails in one process in the middle of the last file."""
    count = 0
    write, whole = ShardWriter.write, Sharded.whole

    def on_a_full_disk(writer: ShardWriter, name: str, tensor: Tensor) -> None:
        nonlocal count
        count += 1
        if rank == 0 and count == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, name, tensor)

    def gone_wrong(strategy: Sharded, *args: Any) -> Any:
        for number, found in enumerate(whole(strategy, *args)):
            if rank == strategy.world.rank == 1 and number == 5:
                raise StropError("it fails")
            yield found

    ShardWriter.write, Sharded.whole = on_a_full_disk, gone_wrong  # type: ignore[method-assign]
    try:
        strop.train(config)
    except StropError as error:
        return str(error)
    return "no error"


def test_an_adapter_knows_the_files_of_its_base(runs: Any) -> None:
    final = runs(max_steps=1, r=4).path / "final"
    (files,) = runs.files["model"].glob("*.safetensors")
    assert read_manifest(final).identity[BASE] == base_files(str(final)) == files_hash([files])
    assert BASE not in read_manifest(runs(max_steps=1).path / "final").identity


@pytest.mark.nightly
@pytest.mark.parametrize(("rank", "said"), [(0, "No space left"), (1, "it fails")])
def test_a_process_that_fails_leaves_nothing(runs: Any, rank: int, said: str) -> None:
    config = runs.config({**FSDP, "training.max_steps": 1})
    assert all(said in message for message in in_processes(2, failing, config, rank))
    (folder,) = (path for path in Path(config.training.output_dir).iterdir() if path.is_dir())
    assert not list(folder.rglob("*.safetensors.index.json"))
    assert not (folder / "final").exists()
    assert {path.parent.name for path in folder.rglob("*.safetensors")} == {"checkpoint-1"}
