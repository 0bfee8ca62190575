"""Every key of `models` and `dataset` arrives where it acts: `test_{section}__{key}`.

The other sections stand in the other files test_keys_*.py; test_keys_run.py sees that no key is without a test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, dynamic_module_utils

import strop
from strop.errors import ConfigError, DataError, ModelError
from strop.policy.model.quantised_base import is_quantised

LN2 = math.log(2)
LORA = {"r": 4, "lora_dropout": 0.0, "max_steps": 1}
"""One step of a small adapter: enough for keys that are seen in what is saved or in the first gradient."""
ByHand = Callable[[nn.Module, Any], list[Tensor]]


def texts(prepared: Any) -> list[str]:
    return [prepared.tokenizer.decode(list(group.prompt_ids)) for group in prepared.data.train]


def token_means(model: Path, groups: Any, by_hand: ByHand) -> tuple[float, float]:
    """The loss of these groups under the model as transformers loads it: by tokens, and by sequences."""
    module = AutoModelForCausalLM.from_pretrained(model)
    logps = [part for group in groups for part in by_hand(module, group)]
    return -float(torch.cat(logps).mean()), -float(torch.stack([part.mean() for part in logps]).mean())


# ---- models


@pytest.mark.parametrize("which", ["model", "other"])
def test_models__huggingface_id(which: str, runs: Any, logps_by_hand: ByHand) -> None:
    keys = {"models.0.huggingface_id": str(runs.files[which]), "method": "sft"}
    by_tokens, _ = token_means(runs.files[which], runs.prepare(keys).data.eval, logps_by_hand)
    assert runs(keys).series("loss", "eval")[0] == pytest.approx(by_tokens, rel=1e-5)


def test_models__name(runs: Any) -> None:
    assert runs().path.name == "run"
    config = runs.config({"models.0.name": "a name of its own", "max_steps": 1})
    (result,) = strop.train(config)
    assert result.name == "a name of its own"
    assert result.run_dir == Path(config.training.output_dir) / "a name of its own"


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class HouseConfig(LlamaConfig):
    model_type = "smoke_house"

class HouseForCausalLM(LlamaForCausalLM):
    config_class = HouseConfig
"""


def test_models__trust_remote_code(
    runs: Any, tmp_path: Path, make_model: Any, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, built: list[Any]
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "house"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "house.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "house.HouseConfig", "AutoModelForCausalLM": "house.HouseForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "smoke_house", "auto_map": code}))
    keys = {"models.0.huggingface_id": str(folder), "max_steps": 1}
    with pytest.raises(ModelError, match="trust_remote_code"):
        runs(keys)
    assert runs(keys, trust_remote_code=True).steps() == [1]
    assert type(built[-1].base).__name__ == "HouseForCausalLM"


@pytest.mark.nightly
def test_models__revision(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub" / "models--org--tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    for branch, commit, which in (("main", "a" * 40, "model"), ("v2", "b" * 40, "other")):
        (cache / "snapshots" / commit).symlink_to(runs.files[which])
        (cache / "refs" / branch).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision, which in ((None, "model"), ("v2", "other"), ("a" * 40, "model")):
        keys = {"models.0.huggingface_id": "org/tiny", "models.0.revision": revision, "method": "sft", "max_steps": 1}
        same = {"models.0.huggingface_id": str(runs.files[which]), "method": "sft"}
        assert runs(keys).series("loss", "eval")[0] == runs(same).series("loss", "eval")[0]
    adapted = runs({**keys, "models.0.revision": "v2", "r": 2})
    assert adapted.adapter["revision"] == "v2"
    with pytest.raises(ModelError, match="org/tiny"):
        runs({**keys, "models.0.revision": "v3"})


@pytest.mark.nightly
def test_models__adapter(runs: Any) -> None:
    first = runs({**LORA, "max_steps": 4, "method": "sft"})
    for method in ("sft", "dpo"):
        second = runs(adapter=str(first.path / "final"), method=method, max_steps=1)
        assert second.adapter["r"] == 4
        assert second.final.keys() == first.final.keys()
        start = second.series("loss", "eval")[0]
        assert start == (first.series("loss", "eval")[-1] if method == "sft" else pytest.approx(LN2, abs=1e-5))


def test_models__attn_implementation(runs: Any, forwards: list[Any], built: list[Any]) -> None:
    plain = runs(attn_implementation="eager")
    assert {batch.layout for _, batch in forwards} == {None}
    assert built[0].base.config._attn_implementation == "eager"
    forwards.clear()
    shared = runs()
    assert None not in {batch.layout for with_gradients, batch in forwards if with_gradients}
    assert plain.series("loss", "eval") == pytest.approx(shared.series("loss", "eval"), rel=1e-3)


def quantised_layers(policy: Any) -> list[Any]:
    return [part for part in policy.model.modules() if is_quantised(part)]


@pytest.mark.nightly
def test_models__quant(runs: Any, built: list[Any]) -> None:
    kinds = {"none": set(), "4bit": {"Linear4bit"}, "8bit": {"Linear8bitLt"}}
    for quant in kinds:
        runs({**LORA, "quant": quant})
    for policy, kind in zip(built, kinds.values(), strict=True):
        assert {type(layer).__name__ for layer in quantised_layers(policy)} == kind


@pytest.mark.nightly
def test_models__bnb_quant_type(runs: Any, built: list[Any]) -> None:
    for kind in ("nf4", "fp4"):
        runs({**LORA, "quant": "4bit", "bnb_quant_type": kind})
        assert {layer.weight.quant_type for layer in quantised_layers(built[-1])} == {kind}


@pytest.mark.nightly
def test_models__bnb_double_quant(runs: Any, built: list[Any]) -> None:
    for double in (True, False):
        runs({**LORA, "quant": "4bit", "bnb_double_quant": double})
        assert {layer.weight.quant_state.nested for layer in quantised_layers(built[-1])} == {double}


@pytest.mark.nightly
def test_models__bnb_compute_dtype(runs: Any, built: list[Any]) -> None:
    wanted = {"auto": torch.float32, "bfloat16": torch.bfloat16}
    for name, dtype in wanted.items():
        runs({**LORA, "quant": "4bit", "bnb_compute_dtype": name})
        assert {layer.compute_dtype for layer in quantised_layers(built[-1])} == {dtype}


# ---- dataset


def test_dataset__name(runs: Any) -> None:
    wanted = runs.prepare().data.report.fingerprint
    name = {"dataset.name": str(runs.files["pairs"]), "train_file": None}
    assert runs.prepare(name).data.report.fingerprint == wanted
    with pytest.raises(ConfigError, match="no training data is named"):
        runs.prepare(train_file=None)


def test_dataset__split(runs: Any, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in runs.files["pairs"].read_text().splitlines()]
    parts = {"train": datasets.Dataset.from_list(rows[:10]), "tiny": datasets.Dataset.from_list(rows[10:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    source = {"dataset.name": str(tmp_path / "saved"), "train_file": None, "validation_split": 0}
    for split, first, num in (("train", 0, 10), ("tiny", 10, 6), ("train[2:5]", 2, 3), ("tiny[:50%]", 10, 3)):
        found = texts(runs.prepare({**source, "dataset.split": split}))
        assert len(found) == num
        assert f"question {first} " in found[0]


def test_dataset__subset(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in runs.files["pairs"].read_text().splitlines()]
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> Any:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(rows)

    def load_dataset_builder(name: str, subset: str | None) -> Any:
        return SimpleNamespace(cache_dir=f"{name}/{subset}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    source = {"dataset.name": "org/set", "train_file": None, "dataset.split": "train[:50%]"}
    wanted = runs.prepare().data.report.fingerprint
    assert runs.prepare({**source, "dataset.subset": "hard"}).data.report.fingerprint == wanted
    runs.prepare(source)
    assert asked == [("org/set", "hard", "train[:50%]"), ("org/set", None, "train[:50%]")]


def test_dataset__train_file(runs: Any) -> None:
    prepared = runs.prepare()
    assert {group.origin.file for group in prepared.data.train} == {str(runs.files["pairs"])}
    assert runs().data["splits"]["train"]["source"] == str(runs.files["pairs"])


def test_dataset__val_file(runs: Any, tmp_path: Path) -> None:
    file = tmp_path / "validation.jsonl"
    file.write_text("".join(runs.files["pairs"].read_text().splitlines(keepends=True)[:3]))
    run = runs(val_file=str(file))
    assert run.series("num_groups", "eval") == [3, 3, 3]
    assert run.data["splits"]["train"]["kept"] == 16  # validation_split takes nothing then


def test_dataset__splits_dir(runs: Any, tmp_path: Path) -> None:
    lines = runs.files["pairs"].read_text().splitlines(keepends=True)
    for name, part in (("train.dpo.jsonl", lines[:10]), ("val.dpo.jsonl", lines[10:])):
        (tmp_path / name).write_text("".join(part))
    run = runs(splits_dir=str(tmp_path), train_file=None)
    assert run.data["splits"]["train"]["kept"] == 10
    assert run.series("num_groups", "eval") == [6, 6, 6]
    assert len(runs.prepare(splits_dir=str(tmp_path)).data.train) == 16  # train_file wins
    with pytest.raises(DataError, match=r"train\.jsonl is not in the folder"):
        runs.prepare(splits_dir=str(tmp_path), train_file=None, method="sft")


def renamed(runs: Any, tmp_path: Path, key: str) -> None:
    """The same data with this column under another name."""
    file = tmp_path / "renamed.jsonl"
    column = key.removesuffix("_column")
    file.write_text(runs.files["pairs"].read_text().replace(f'"{column}":', '"other name":'))
    with pytest.raises(DataError):
        runs.prepare(train_file=str(file))
    found = runs.prepare({"train_file": str(file), key: "other name"})
    assert found.data.report.fingerprint == runs.prepare().data.report.fingerprint


def test_dataset__prompt_column(runs: Any, tmp_path: Path) -> None:
    renamed(runs, tmp_path, "prompt_column")


def test_dataset__chosen_column(runs: Any, tmp_path: Path) -> None:
    renamed(runs, tmp_path, "chosen_column")


def test_dataset__rejected_column(runs: Any, tmp_path: Path) -> None:
    renamed(runs, tmp_path, "rejected_column")


def test_dataset__max_samples(runs: Any) -> None:
    data = runs.prepare(max_samples=8).data
    assert (len(data.train), len(data.eval)) == (6, 2)
    assert {group.origin.line for group in (*data.train, *data.eval)} == set(range(1, 9))


def test_dataset__validation_split(runs: Any) -> None:
    half = runs.prepare(validation_split=0.5).data
    assert (len(half.train), len(half.eval)) == (8, 8)
    assert not {g.origin.line for g in half.train} & {g.origin.line for g in half.eval}
    assert runs(validation_split=0, max_steps=1).steps("eval") == []


def test_dataset__render(runs: Any) -> None:
    for render, marked in (("auto", True), ("chat", True), ("raw", False)):
        assert all(("<|im_start|>user" in text) is marked for text in texts(runs.prepare(render=render)))


def test_dataset__on_error(runs: Any, tmp_path: Path) -> None:
    lines = runs.files["pairs"].read_text().splitlines(keepends=True)
    file = tmp_path / "broken.jsonl"
    file.write_text("".join([*lines[:5], '{"prompt": "cut o\n', *lines[5:]]))
    with pytest.raises(DataError, match=r"broken\.jsonl:6"):
        runs(train_file=str(file), max_steps=1)
    run = runs(train_file=str(file), max_steps=1, on_error="skip", max_dropped_fraction=0.1)
    (rejected,) = map(json.loads, (run.path / "rejected.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["raw"]) == (6, '{"prompt": "cut o')
    assert sum(run.data["splits"]["train"]["refused"].values()) == 1
    assert run.data["fingerprint"] == runs().data["fingerprint"]


def test_dataset__filter_overlength_samples(runs: Any) -> None:
    keys = {"max_completion_length": 8, "validation_split": 0}  # five rejected completions have 10 tokens
    cut = runs.prepare(keys).data.report.splits["train"]
    assert (cut.kept, cut.changes["completions_cut"], cut.dropped) == (16, 5, {})
    dropped = runs.prepare(keys, filter_overlength_samples=True).data.report.splits["train"]
    assert (dropped.kept, dropped.changes["completions_cut"], dropped.dropped) == (11, 0, {"completion_too_long": 5})
