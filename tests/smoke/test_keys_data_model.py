"""Every key of `models`, `dataset`, `post_training` and `lora` arrives where it acts: `test_{section}__{key}`.

The keys of the other sections, and the test that none is missing, stand in test_keys_training.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, dynamic_module_utils

import strop
from strop.errors import ConfigError, DataError, ModelError

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
    with pytest.raises(ModelError, match="cannot be loaded"):
        runs({**keys, "models.0.revision": "v3"})


def test_models__adapter(runs: Any) -> None:
    first = runs({**LORA, "max_steps": 4, "method": "sft"})
    for method in ("sft", "dpo"):
        second = runs(
            {"models.0.adapter": str(first.path / "final"), "method": method, "enabled": True, "max_steps": 1}
        )
        assert second.adapter["r"] == 4
        assert second.final.keys() == first.final.keys()
        start = second.series("loss", "eval")[0]
        assert start == (first.series("loss", "eval")[-1] if method == "sft" else pytest.approx(LN2, abs=1e-5))


def test_models__attn_implementation(runs: Any, forwards: list[Any], built: list[Any]) -> None:
    plain = runs(attn_implementation="eager")
    assert {batch.layout for _, batch in forwards} == {None}
    assert built[0].base.config._attn_implementation == "eager"
    forwards.clear()
    shared = runs(fresh=True)
    assert None not in {batch.layout for with_gradients, batch in forwards if with_gradients}
    assert plain.series("loss", "eval") == pytest.approx(shared.series("loss", "eval"), rel=1e-3)


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

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"dataset.name": "org/set", "train_file": None, "dataset.split": "train[:50%]"}
    assert runs.prepare({**source, "dataset.subset": "hard"}).data.report.fingerprint
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
    run = runs(train_file=str(file), max_steps=1, on_error="skip")
    (rejected,) = map(json.loads, (run.path / "rejected.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["raw"]) == (6, '{"prompt": "cut o')
    assert sum(run.data["splits"]["train"]["refused"].values()) == 1
    assert run.data["fingerprint"] == runs().data["fingerprint"]


def test_dataset__filter_overlength_samples(runs: Any) -> None:
    keys = {"max_completion_length": 8, "validation_split": 0}  # five rejected completions have 10 tokens
    cut = runs.prepare(keys).data.report.splits["train"]
    assert (cut.kept, cut.completions_cut, cut.dropped) == (16, 5, {})
    dropped = runs.prepare(keys, filter_overlength_samples=True).data.report.splits["train"]
    assert (dropped.kept, dropped.completions_cut, dropped.dropped) == (11, 0, {"completion_too_long": 5})


# ---- post_training


def test_post_training__method(runs: Any) -> None:
    sft, dpo = runs(method="sft"), runs(method="dpo")
    assert "nll" in sft.metrics[0] and "rewards/margins" not in sft.metrics[0]
    assert "rewards/margins" in dpo.metrics[0] and "nll" not in dpo.metrics[0]
    assert not (sft.path / "logs" / "margins").exists()


def test_post_training__loss_reduction(runs: Any, logps_by_hand: ByHand) -> None:
    found = {
        name: runs(method="sft", loss_reduction=name).series("loss", "eval")[0] for name in ("tokens", "sequences")
    }
    groups = runs.prepare(method="sft").data.eval
    by_tokens, by_sequences = token_means(runs.files["model"], groups, logps_by_hand)
    assert found == {"tokens": pytest.approx(by_tokens, rel=1e-5), "sequences": pytest.approx(by_sequences, rel=1e-5)}
    assert abs(by_tokens - by_sequences) > 1e-3


def test_post_training__beta(runs: Any) -> None:
    for beta in (0.1, 0.3):
        run = runs(beta=beta)
        rewards = [record["rewards/margins"] for record in run.metrics if record["split"] == "train"]
        assert rewards == pytest.approx([beta * line["mean"] for line in run.margins], rel=1e-5)
        assert rewards[-1] != 0


def test_post_training__loss_type(runs: Any) -> None:
    # at margin 0: ln 2; relu(1); (1 / (2 beta))^2; sigmoid(0) twice
    for name, start in (("sigmoid", LN2), ("hinge", 1.0), ("ipo", 25.0), ("kto_pair", 1.0)):
        run = runs(loss_type=name)
        assert run.series("loss", "eval")[0] == pytest.approx(start, rel=1e-6)
        # the eval losses part after the first step, the formulas are those of tests/unit/objectives
        assert run.series("loss", "eval")[-1] != run.series("loss", "eval")[0]
    hinge = runs(loss_type="hinge")
    for line, loss in zip(hinge.margins, hinge.series("loss"), strict=True):
        margins = np.load(hinge.path / "logs" / "margins" / line["npy"])
        assert loss == pytest.approx(float(np.maximum(0, 1 - 0.1 * margins.astype(float)).mean()), rel=1e-5)


def test_post_training__label_smoothing(runs: Any) -> None:
    plain, smoothed = runs(), runs(label_smoothing=0.3)
    # d loss / d margin at margin 0 is -beta (1 - 2 e) / 2
    assert smoothed.series("grad_norm")[0] == pytest.approx(0.4 * plain.series("grad_norm")[0], rel=1e-5)


def test_post_training__ipo_norm(runs: Any) -> None:
    def from_margins(run: Any) -> list[float]:
        folder = run.path / "logs" / "margins"
        return [float(((np.load(folder / line["npy"]).astype(float) - 5) ** 2).mean()) for line in run.margins]

    by_sum, by_mean = (runs(loss_type="ipo", ipo_norm=norm) for norm in ("sum", "mean"))
    assert by_sum.series("loss") == pytest.approx(from_margins(by_sum), rel=1e-5)
    assert by_mean.series("loss")[-1] != pytest.approx(from_margins(by_mean)[-1], rel=1e-2)


def test_post_training__use_ref_model(runs: Any) -> None:
    with_, without = runs(), runs(use_ref_model=False)
    assert with_.untimed == without.untimed
    assert all(torch.equal(with_.final[name], without.final[name]) for name in with_.final)
    with pytest.raises(ConfigError, match="use_ref_model is false"):
        runs.config(use_ref_model=False, ref_model_id=str(runs.files["other"]))


def test_post_training__ref_model_id(runs: Any, logps_by_hand: ByHand, forwards: list[Any]) -> None:
    model, other = (str(runs.files[name]) for name in ("model", "other"))
    one = runs({"models.0.huggingface_id": model, "ref_model_id": other}, max_steps=1)
    num_forwards = len(forwards)
    two = runs({"models.0.huggingface_id": other, "ref_model_id": model}, max_steps=1)
    assert num_forwards == len(forwards) - num_forwards
    start = one.series("rewards/margins", "eval")[0]
    assert start == pytest.approx(-two.series("rewards/margins", "eval")[0], rel=1e-4)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, other))
    margins = []
    for group in runs.prepare().data.eval:
        ours, theirs = ([float(p.sum()) for p in logps_by_hand(m, group)] for m in (policy, reference))
        margins.append((ours[0] - theirs[0]) - (ours[1] - theirs[1]))
    assert start == pytest.approx(0.1 * sum(margins) / len(margins), rel=1e-4)


# ---- lora


def test_lora__enabled(runs: Any) -> None:
    on, off, unsaid = runs(LORA), runs({**LORA, "enabled": False}), runs(max_steps=1)
    assert (on.path / "final" / "adapter_model.safetensors").is_file()
    assert (off.path / "final" / "model.safetensors").is_file()
    assert all(torch.equal(off.final[name], unsaid.final[name]) for name in unsaid.final)


def test_lora__r(runs: Any) -> None:
    run = runs(LORA)
    assert run.adapter["r"] == 4
    assert {weight.shape[0] for name, weight in run.final.items() if "lora_A" in name} == {4}


def test_lora__lora_alpha(runs: Any) -> None:
    default, double = runs(LORA), runs({**LORA, "lora_alpha": 16})
    assert (default.adapter["lora_alpha"], double.adapter["lora_alpha"]) == (8, 16)
    # B is 0 at first, so the gradient is that of B alone, times lora_alpha / r
    assert double.series("grad_norm")[0] == pytest.approx(2 * default.series("grad_norm")[0], rel=1e-4)


def test_lora__lora_dropout(runs: Any) -> None:
    none, some = runs({**LORA, "max_steps": 3}), runs({**LORA, "max_steps": 3, "lora_dropout": 0.5})
    assert some.adapter["lora_dropout"] == 0.5
    assert some.series("grad_norm")[0] != none.series("grad_norm")[0]
    assert some.series("loss", "eval")[0] == none.series("loss", "eval")[0]  # evaluations are without it


def test_lora__bias(runs: Any, tmp_path: Path, make_model: Any, make_tokenizer: Any) -> None:
    make_model(attention_bias=True, mlp_bias=True).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    keys = {**LORA, "models.0.huggingface_id": str(tmp_path), "target_modules": ["q_proj"]}
    saved = {name: {k for k in runs({**keys, "bias": name}).final if k.endswith(".bias")} for name in ("none", "all")}
    only = {k for k in runs({**keys, "bias": "lora_only"}).final if k.endswith(".bias")}
    assert saved["none"] == set()
    assert only == {k for k in saved["all"] if "q_proj" in k} and len(only) == 2
    assert any("mlp" in k for k in saved["all"])
    before = load_file(tmp_path / "model.safetensors")
    after = runs({**keys, "bias": "all"}).final
    names = {k: k.removeprefix("base_model.model.").replace(".base_layer", "") for k in only}
    assert not any(torch.equal(after[k], before[name]) for k, name in names.items())


def test_lora__target_modules(runs: Any) -> None:
    def adapted(wanted: Any) -> set[str]:
        return {name.split(".")[-3] for name in runs({**LORA, "target_modules": wanted}).final}

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapted(["v_proj"]) == {"v_proj"}
    assert adapted("auto") == attention
    assert adapted("all-linear") == attention | {"gate_proj", "up_proj", "down_proj"}


def test_lora__modules_to_save(runs: Any) -> None:
    run = runs({**LORA, "modules_to_save": ["lm_head"]})
    assert run.adapter["modules_to_save"] == ["lm_head"]
    before = load_file(runs.files["model"] / "model.safetensors")["lm_head.weight"]
    assert not torch.equal(run.final["base_model.model.lm_head.weight"], before)


def test_lora__task_type(runs: Any) -> None:
    assert runs(LORA).adapter["task_type"] == "CAUSAL_LM"
    with pytest.raises(ConfigError, match=r"lora\.task_type"):
        runs.config(task_type="SEQ_CLS")


def test_lora__use_rslora(runs: Any) -> None:
    plain, stable = runs(LORA), runs({**LORA, "use_rslora": True})
    assert stable.adapter["use_rslora"] is True
    assert stable.series("grad_norm")[0] == pytest.approx(2 * plain.series("grad_norm")[0], rel=1e-4)  # r / sqrt(r)


def test_lora__use_dora(runs: Any) -> None:
    assert any("magnitude" in name for name in runs({**LORA, "use_dora": True}).final)
    assert not any("magnitude" in name for name in runs(LORA).final)
