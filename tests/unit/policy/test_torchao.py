"""Bases whose files torchao quantised: recognised, trained on and merged where their weights alone are rounded."""

from __future__ import annotations

import json
import shutil
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import strop
from strop.cli import main
from strop.config.sections import LoraSection, ModelSection, TrainingSection
from strop.errors import ModelError
from strop.estimate.memory import weight_bytes
from strop.export.merge import merge
from strop.policy.build import build_policy
from strop.policy.kernels.fused import FusedLinear
from strop.policy.model import quantised_base
from strop.policy.model.configuration import quiet
from strop.policy.model.from_config import shape_of
from strop.policy.model.load import load_model
from strop.policy.model.quantisation_settings import quantisation_of
from strop.policy.model.tokenizer import load_tokenizer
from strop.policy.policy import Policy
from strop.policy.precision import resolve_precision
from strop.types import Completion, Group, Origin

CPU = torch.device("cpu")


def settings(name: str, **data: Any) -> dict[str, Any]:
    """`quantization_config` as transformers writes it for a configuration of torchao."""
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_version": 2, "_data": data}}}


def of_bits(kind: str, group: int) -> dict[str, Any]:
    weights = {"_type": "torch.dtype", "_data": kind}
    return {"weight_dtype": weights, "granularity": {"_type": "PerGroup", "_data": {"group_size": group}}}


def tell(folder: Path, found: dict[str, Any]) -> ModelSection:
    """The model of the folder, its config.json with `quantization_config`."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": found}))
    return ModelSection(huggingface_id=str(folder))


def test_what_weights_alone_are_rounded_by_is_recognised(model_dir: Path) -> None:
    for found, bits, group in (
        (settings("Int8WeightOnlyConfig", group_size=None), 8, None),
        (settings("IntxWeightOnlyConfig", **of_bits("int4", 32)), 4, 32),
        (settings("IntxWeightOnlyConfig", **of_bits("int8", 64)), 8, 64),
    ):
        read = quantisation_of(tell(model_dir, found))
        assert read is not None and (read.bits, read.group) == (bits, group)
        assert read.describe() == f"stored in {bits} bits (torchao)"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (settings("Int4WeightOnlyConfig", group_size=128), "torchao's Int4WeightOnlyConfig"),
        (settings("Int8DynamicActivationInt8WeightConfig"), "torchao's Int8DynamicActivationInt8WeightConfig"),
        (settings("IntxWeightOnlyConfig", **of_bits("int3", 32)), "torchao's IntxWeightOnlyConfig of int3"),
        (
            {**settings("Int8WeightOnlyConfig"), "include_input_output_embeddings": True},
            "torchao's Int8WeightOnlyConfig with its embeddings",
        ),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao's unnamed configuration"),
    ],
)
def test_other_configurations_are_refused(found: dict[str, Any], words: str, model_dir: Path) -> None:
    with pytest.raises(ModelError, match=f"{words} .*cannot be trained on") as caught:
        quantisation_of(tell(model_dir, found))
    assert "IntxWeightOnlyConfig of int4 or int8" in caught.value.expected


def test_an_absent_package_is_told_with_its_extra(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("strop.preflight.find_spec", lambda name: None)
    tell(model_dir, settings("Int8WeightOnlyConfig"))
    rows = model_dir / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["train", "--model", str(model_dir), "--train-file", str(rows), "--method", "sft", "--lora.enabled", "true"]
    assert main(words) == 1
    assert "pip install -e '.[torchao]'" in capsys.readouterr().err


# ---- with the package


def stored(kind: str, model_dir: Path, folder: Path) -> Path:
    """The tiny model as transformers saves it, quantised by torchao."""
    own = pytest.importorskip("torchao.quantization", reason="install the extra `torchao`")
    from transformers import TorchAoConfig

    four = own.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=own.PerGroup(16))
    how = TorchAoConfig(four if kind == "int4" else own.Int8WeightOnlyConfig())
    with quiet():
        module = AutoModelForCausalLM.from_pretrained(
            model_dir, quantization_config=how, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
        module.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model_dir / file, folder / file)
    return folder


def groups() -> list[Group]:
    random = torch.Generator().manual_seed(0)

    def ids(n: int) -> array[int]:
        return array("i", torch.randint(5, 390, (n,), generator=random).tolist())

    return [Group(ids(7), tuple(Completion(ids(n), bytes([1]) * n) for n in (5, 9)), Origin("test", i)) for i in (1, 2)]


def build(folder: Path, **keys: Any) -> Policy:
    """A policy of the folder, its adapters moved away from nothing."""
    lora = {"r": 4, "lora_dropout": 0.0, "target_modules": "all-linear"}
    overrides = {"models": [{"huggingface_id": str(folder)}], "dataset.train_file": "rows.jsonl", "lora": lora, **keys}
    config = strop.load_config(overrides=overrides)
    policy = build_policy(config, config.models[0], CPU, hashed=True)
    random = torch.Generator().manual_seed(3)
    for name, weight in policy.trainable().items():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=random) * 0.1
    return policy


def scored(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, and the gradients of their weighted sum."""
    logps = policy(policy.collate(groups())).logps
    for weight in policy.trainable().values():
        weight.grad = None
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), {n: w.grad.clone() for n, w in policy.trainable().items() if w.grad is not None}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_it_is_trained_on_and_merged(kind: str, model_dir: Path, tmp_path: Path) -> None:
    folder = stored(kind, model_dir, tmp_path / "stored")
    policy = build(folder)
    forwards = [vars(part).get("forward") for part in policy.model.modules()]
    assert sum(isinstance(f, FusedLinear) and quantised_base.is_quantised(f.base) for f in forwards) == 14
    assert policy.weights_hash == build(folder).weights_hash != build(model_dir).weights_hash
    found, slopes = scored(policy)
    with policy.scoring():
        expected = policy(policy.collate(groups())).logps
    policy.save_pretrained(tmp_path / "final", load_tokenizer(ModelSection(huggingface_id=str(folder))))
    for part in policy.model.modules():  # the same policy on a base that is dequantised by hand
        for name, layer in list(part.named_children()):
            if quantised_base.is_quantised(layer):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
                plain.weight.data = layer.weight.dequantize().float()
                setattr(part, name, plain.requires_grad_(False))
    right, right_slopes = scored(policy)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert slopes.keys() == right_slopes.keys() and len(slopes) == 28
    for name, slope in right_slopes.items():
        torch.testing.assert_close(slopes[name], slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()), msg=name)
    merged = merge(str(tmp_path / "final"), tmp_path / "merged", dtype=torch.float32)
    assert any(line.what == "greedy texts: 20 of 20 equal" for line in merged.lines) and not merged.failed
    plain_policy = build(tmp_path / "merged", lora={"enabled": False})
    with plain_policy.scoring():
        torch.testing.assert_close(plain_policy(plain_policy.collate(groups())).logps, expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(ModelError, match=r"stored in . bits \(torchao\), and all weights are to be trained"):
        build(folder, lora={"enabled": False})


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_estimate_knows_its_size(kind: str, tmp_path: Path, make_model: Any, make_tokenizer: Any) -> None:
    pytest.importorskip("torchao.quantization", reason="install the extra `torchao`")
    make_model(hidden_size=256, intermediate_size=512).save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "plain")
    section = ModelSection(huggingface_id=str(stored(kind, tmp_path / "plain", tmp_path / "stored")))
    module = load_model(section, dtype=torch.float32).module
    packed = quantised_base.packed_names(module)
    parts = [quantised_base.plain_parts(n, t) if n in packed else {n: t} for n, t in module.state_dict().items()]
    held = sum(t.nbytes for own in parts for t in own.values()) + 2 * 4 * (256 + 256) * 4
    shape = shape_of(LoraSection(r=4, target_modules=("q_proj",)), section)
    assert weight_bytes(shape, resolve_precision(TrainingSection(), CPU)) == pytest.approx(held, rel=0.03)
