"""Every key of `post_training` and `lora` arrives where it acts: `test_{section}__{key}`.

The other sections stand in the other files test_keys_*.py; test_keys_run.py sees that no key is without a test.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import strop
from strop.errors import ConfigError
from strop.export.merge import merge

LN2 = math.log(2)
LORA = {"r": 4, "lora_dropout": 0.0, "max_steps": 1}
"""One step of a small adapter: enough for keys that are seen in what is saved or in the first gradient."""
ByHand = Callable[[nn.Module, Any], list[Tensor]]


def token_means(model: Path, groups: Any, by_hand: ByHand) -> tuple[float, float]:
    """The loss of these groups under the model as transformers loads it: by tokens, and by sequences."""
    module = AutoModelForCausalLM.from_pretrained(model)
    logps = [part for group in groups for part in by_hand(module, group)]
    return -float(torch.cat(logps).mean()), -float(torch.stack([part.mean() for part in logps]).mean())


# ---- post_training


def test_post_training__method(runs: Any) -> None:
    sft, dpo = runs(method="sft"), runs(method="dpo")
    assert "nll" in sft.metrics[0] and "rewards/margins" not in sft.metrics[0]
    assert "rewards/margins" in dpo.metrics[0] and "nll" not in dpo.metrics[0]
    assert not (sft.path / "logs" / "margins").exists()


@pytest.mark.nightly
def test_post_training__loss_reduction(runs: Any, logps_by_hand: ByHand) -> None:
    names = ("tokens", "sequences")
    found = {name: runs(method="sft", loss_reduction=name).series("loss", "eval")[0] for name in names}
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


@pytest.mark.nightly
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


@pytest.mark.nightly
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
    on, off, unsaid = runs(LORA), runs({**LORA, "lora.enabled": False}), runs(max_steps=1)
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


@pytest.mark.nightly
def test_lora__lora_dropout(runs: Any) -> None:
    none, some = runs({**LORA, "max_steps": 3}), runs({**LORA, "max_steps": 3, "lora_dropout": 0.5})
    assert some.adapter["lora_dropout"] == 0.5
    assert some.series("grad_norm")[0] != none.series("grad_norm")[0]
    assert some.series("loss", "eval")[0] == none.series("loss", "eval")[0]  # evaluations are without it


@pytest.mark.nightly
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


def test_lora__target_parameters(runs: Any, tmp_path: Path, make_tokenizer: Any) -> None:
    sizes = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    keys = {**LORA, "models.0.huggingface_id": str(tmp_path)}
    assert not any(".experts." in name for name in runs(keys).final)
    run = runs({**keys, "target_parameters": ["experts.down_proj"]})
    assert "down_proj" in str(run.adapter["target_parameters"])
    assert any(".experts." in name for name in run.final)


@pytest.mark.nightly
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


def test_lora__loraplus_lr_ratio(runs: Any) -> None:
    """With plain steps, what B has moved by is its rate times its gradient."""
    plain, faster = (runs({**LORA, "optim": "sgd", "loraplus_lr_ratio": ratio}) for ratio in (None, 16.0))
    for name, weight in plain.final.items():
        factor = 16.0 if "lora_B" in name else 1.0
        torch.testing.assert_close(faster.final[name], factor * weight, rtol=1e-4, atol=1e-9)


@pytest.mark.nightly
def test_lora__init_lora_weights(runs: Any, tmp_path: Path) -> None:
    """The reference is the model before the initialisation moved it; the result loads on the base as it is, with twice
    the rank, and is merged into it; a resumed run is an unbroken one."""
    keys = {**LORA, "max_steps": 4, "init_lora_weights": "pissa", "training.save_steps": 2}
    run = runs(keys)
    assert run.series("loss", "eval")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert run.adapter["r"] == 2 * LORA["r"] and run.adapter["init_lora_weights"] is True
    assert not merge(str(run.path), tmp_path / "merged").failed
    shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    strop.train(runs.config(keys).with_values({"training.output_dir": str(tmp_path)}, "the test"), resume="auto")
    assert runs.same_run(run, runs.at(tmp_path / "run"))


def test_lora__use_rslora(runs: Any) -> None:
    plain, stable = runs(LORA), runs({**LORA, "use_rslora": True})
    assert stable.adapter["use_rslora"] is True
    assert stable.series("grad_norm")[0] == pytest.approx(2 * plain.series("grad_norm")[0], rel=1e-4)  # r / sqrt(r)


def test_lora__use_dora(runs: Any) -> None:
    assert any("magnitude" in name for name in runs({**LORA, "use_dora": True}).final)
    assert not any("magnitude" in name for name in runs(LORA).final)
