"""Bases in 4 and 8 bits: the numbers of the dequantised model, gradients too, whatever ran before."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Params4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import strop
from strop.cli import main
from strop.config.run import RunConfig
from strop.config.sections import LoraSection, ModelSection, TrainingSection
from strop.errors import ConfigError, ModelError
from strop.estimate.memory import weight_bytes
from strop.export.merge import merge
from strop.policy.build import build_policy
from strop.policy.kernels import quantised_weights
from strop.policy.kernels.denormals import flush_denormals
from strop.policy.kernels.fused import FusedLinear, FusedMlp, unfuse
from strop.policy.kernels.quantised_weights import QuantisedWeight
from strop.policy.model import quantised_base
from strop.policy.model.configuration import quiet
from strop.policy.model.from_config import shape_of
from strop.policy.model.load import load_model
from strop.policy.model.quantisation_settings import Quantisation
from strop.policy.model.quantised_base import check_shardable
from strop.policy.model.tokenizer import load_tokenizer
from strop.policy.policy import Policy
from strop.policy.precision import resolve_precision
from strop.types import Completion, Group, Origin

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"quant": "4bit"},
    "fp4": {"quant": "4bit", "bnb_quant_type": "fp4", "bnb_double_quant": False},
    "8bit": {"quant": "8bit"},
}
CPU = torch.device("cpu")


def group(*lengths: int, prompt: int = 7, seed: int = 0) -> Group:
    random = torch.Generator().manual_seed(seed)

    def ids(n: int) -> array[int]:
        return array("i", torch.randint(5, 390, (n,), generator=random).tolist())

    return Group(ids(prompt), tuple(Completion(ids(n), bytes([1]) * n) for n in lengths), Origin("test", 1))


GROUPS = [group(5, 9, seed=1), group(12, 3, prompt=15, seed=2)]


@pytest.fixture
def build(model_dir: Path) -> Callable[..., Policy]:
    """A policy of the tiny model in so many bits, its adapters moved away from nothing."""

    def made(quant: dict[str, Any], **keys: Any) -> Policy:
        config = strop.load_config(
            overrides={
                "models": [{"huggingface_id": str(model_dir), **quant}],
                "dataset.train_file": "rows.jsonl",
                "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": "all-linear"},
                **keys,
            }
        )
        policy = build_policy(config, config.models[0], CPU, hashed=True)
        random = torch.Generator().manual_seed(3)
        for name, weight in policy.trainable().items():
            if "lora_B" in name:
                weight.data = torch.randn(weight.shape, generator=random) * 0.1
        return policy

    return made


def scored(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs of the groups, and the gradients of their weighted sum."""
    logps = policy(policy.collate(GROUPS)).logps
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    for weight in policy.trainable().values():
        weight.grad = None
    (logps * weights).sum().backward()
    return logps.detach(), {n: w.grad.clone() for n, w in policy.trainable().items() if w.grad is not None}


def dequantised(policy: Policy, dtype: torch.dtype) -> Policy:
    """The same policy, its base dequantised by hand; as a plain model in another dtype."""
    for part in policy.model.modules():
        for name, layer in list(part.named_children()):
            if quantised_base.is_quantised(layer):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
                plain.weight.data = quantised_base.dense(layer)
                setattr(part, name, plain.requires_grad_(False))
    policy.model.to(dtype)
    return policy


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_dequantised_model(kind: str, build: Callable[..., Policy]) -> None:
    policy = build(KINDS[kind])
    layers = [part for part in policy.model.modules() if quantised_base.is_quantised(part)]
    assert len(layers) == 14 and policy.share_prefix
    found, slopes = scored(policy)
    plain = dequantised(policy, torch.float32)
    expected, right = scored(plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert slopes.keys() == right.keys() and len(slopes) == 28
    for name, slope in right.items():
        torch.testing.assert_close(slopes[name], slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()), msg=name)


def dpo_step(
    policy: Policy, logps: torch.Tensor, reference: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of DPO over two pairs, and its gradients. logps, reference: of all scored tokens."""
    counts = [len(c.ids) for g in GROUPS for c in g.completions]
    sides = torch.stack([part.sum() for part in (logps - reference).split(counts)]).reshape(2, 2)
    loss = -torch.nn.functional.logsigmoid(0.5 * (sides[:, 0] - sides[:, 1])).mean()
    for weight in policy.trainable().values():
        weight.grad = None
    loss.backward()
    return loss.detach().double(), {n: w.grad.double() for n, w in policy.trainable().items() if w.grad is not None}


def plain_logps(policy: Policy) -> torch.Tensor:
    """By the forward passes of transformers, peft and bitsandbytes themselves, a completion at a time."""
    unfuse(policy.model)
    policy.base.set_attn_implementation("eager")
    parts = []
    for g in GROUPS:
        for c in g.completions:
            ids = torch.tensor([[*g.prompt_ids, *c.ids]])
            rows = policy.model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            parts.append(rows.gather(1, ids[0, 1:, None])[len(g.prompt_ids) - 1 :, 0])
    return torch.cat(parts)


@pytest.mark.share(1)
@pytest.mark.parametrize("kind", KINDS)
def test_dpo_is_as_near_to_float64_as_the_plain_model_is(kind: str, build: Callable[..., Policy]) -> None:
    """Loss and gradients on a quantised base against the dequantised model in float64: no further away than those of
    plain transformers, peft and bitsandbytes, but for a small factor."""
    policy = build(KINDS[kind])
    with policy.scoring():
        reference = policy(policy.collate(GROUPS)).logps.double() * 1.1
    loss, slopes = dpo_step(policy, policy(policy.collate(GROUPS)).logps.double(), reference)
    naive = build(KINDS[kind])
    naive_loss, naive_slopes = dpo_step(naive, plain_logps(naive), reference)
    exact = dequantised(build(KINDS[kind]), torch.float64)
    right_loss, right = dpo_step(exact, plain_logps(exact), reference)

    def error(found: dict[str, torch.Tensor]) -> float:
        apart = sum(float((found[n] - right[n]).square().sum()) for n in right)
        return (apart / sum(float(right[n].square().sum()) for n in right)) ** 0.5

    assert slopes.keys() == right.keys() and error(naive_slopes) > 0
    assert error(slopes) <= 4 * error(naive_slopes) + 1e-7
    assert abs(float(loss - right_loss)) <= 4 * abs(float(naive_loss - right_loss)) + 1e-6
    assert error(slopes) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_before_changes_no_gradient(
    kind: str, build: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some processors, bitsandbytes packs weights anew outside of training, for good, and gradients stop there."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    policy = build(KINDS[kind])
    before = scored(policy)
    hashed = {n: t.clone() for n, t in policy.model.state_dict().items()}
    for part in policy.model.modules():
        if quantised_base.is_quantised(part):
            assert not getattr(part, "support_avx512bf16_for_cpu", False)
    with policy.scoring():
        policy(policy.collate(GROUPS))
    policy.eval()
    with torch.no_grad():
        policy(policy.collate(GROUPS))
    policy.train()
    after = scored(policy)
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(slope, after[1][name]) for name, slope in before[1].items())
    assert all(torch.equal(t, hashed[n]) for n, t in policy.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(kind: str, build: Callable[..., Policy]) -> None:
    policy = build(KINDS[kind])
    with policy.scoring():
        together = policy(policy.collate(GROUPS)).logps
        alone = torch.cat([policy(policy.collate([one])).logps for one in GROUPS])
        policy.share_prefix = False
        padded = policy(policy.collate(GROUPS)).logps
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded, together, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_the_weights_hash_knows_the_quantisation(build: Callable[..., Policy]) -> None:
    others = [{}, {"quant": "4bit", "bnb_double_quant": False}]
    hashes = {build(quant).weights_hash for quant in [*KINDS.values(), *others]}
    assert len(hashes) == 5
    assert build(KINDS["nf4"]).weights_hash in hashes


def test_it_is_small_and_counted_as_what_it_is(build: Callable[..., Policy]) -> None:
    policy, plain = build(KINDS["nf4"]), build({})
    counted = [one.describe()[0].partition(" weights")[0] for one in (policy, plain)]
    assert counted[0] == counted[1]
    layers = [part for part in policy.model.modules() if quantised_base.is_quantised(part)]
    stored = sum(layer.weight.nbytes for layer in layers)
    assert stored * 2 == sum(quantised_base.num_weights(layer) for layer in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_knows_its_size(kind: str, tmp_path: Path, make_model: Any, make_tokenizer: Any) -> None:
    make_model(hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    section = ModelSection(huggingface_id=str(tmp_path), **KINDS[kind])
    lora = LoraSection(r=4, target_modules=("q_proj",))
    module = load_model(section, dtype=torch.float32).module
    adapters = 2 * 4 * (256 + 256) * 4
    tables = (".quant_map", ".nested_quant_map")  # of the numbers that 4 bits stand for: the same in every layer
    stored = sum(t.nbytes for name, t in module.state_dict().items() if not name.endswith(tables))
    shape, precision = shape_of(lora, section), resolve_precision(TrainingSection(), CPU)
    assert weight_bytes(shape, precision) == pytest.approx(stored + adapters, rel=0.03)
    assert weight_bytes(shape, precision) < 0.6 * weight_bytes(replace(shape, matrix_bytes=None), precision)


def test_int8_in_another_dtype_and_with_a_bias() -> None:
    flush_denormals()
    layer = torch.nn.Linear(16, 8)
    q = type("Linear8bitLt", (torch.nn.Module,), {})()
    scales = layer.weight.detach().abs().amax(1)
    q.weight = torch.nn.Parameter((layer.weight.detach() / scales[:, None] * 127).round().to(torch.int8), False)
    q.weight.SCB, q.bias = scales, layer.bias
    x = torch.randn(3, 5, 16, requires_grad=True)
    y = quantised_weights.DequantisingForward(q)(x)
    w = quantised_weights.int8_dense(q.weight.data, scales, torch.float32)
    torch.testing.assert_close(w, layer.weight.detach(), atol=float(scales.max()) / 250, rtol=0)
    torch.testing.assert_close(y, x @ w.T + layer.bias)
    (slope,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(slope, (2 * y) @ w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantised_weights.DequantisingForward(q)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_dequantised_weight_lives_for_one_product(
    kind: str, build: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward: no two at a time, and none is kept for the backward pass, which makes all of them again."""
    policy = build(KINDS[kind])
    fused = [vars(part).get("forward") for part in policy.model.modules()]
    linears = [one for one in fused if isinstance(one, FusedLinear) and quantised_base.is_quantised(one.base)]
    assert len(linears) == 14 and sum(isinstance(one, FusedMlp) for one in fused) == 2
    made: list[weakref.ref[torch.Tensor]] = []
    name = "int8_dense" if kind == "8bit" else "int4_dense"
    own = getattr(quantised_weights, name)

    def watched(*args: Any) -> torch.Tensor:
        assert not any(one() is not None for one in made)
        dense: torch.Tensor = own(*args)
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(quantised_weights, name, watched)
    logps = policy(policy.collate(GROUPS)).logps
    assert len(made) == 14 and not any(one() is not None for one in made)
    logps.sum().backward()
    # of the first layer, q, k and v read what needs no gradient
    assert len(made) == 2 * 14 - 3 and not any(one() is not None for one in made)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_large_weight_is_made_in_memory_that_is_used_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as at once, whatever its rows are cut into; in the dtype that products are made in."""
    monkeypatch.setattr(quantised_weights, "PART", 1000)
    for rows, inside, double in ((37, 64, True), (19, 192, False)):
        given = torch.randn(rows, inside, generator=torch.Generator().manual_seed(rows))
        weight = Params4bit(given, requires_grad=False, quant_type=kind, compress_statistics=double).to("cpu")
        packed = QuantisedWeight(weight.data, weight.quant_state, torch.bfloat16)
        for widened in (True, False):
            monkeypatch.setattr(quantised_weights, "widens", lambda dtype, own=widened: own)
            dense, exact = packed.wide(), replace(packed, dtype=torch.float32).whole()
            assert dense.dtype == (torch.float32 if widened else torch.bfloat16)
            torch.testing.assert_close(dense, exact if widened else packed.whole(), rtol=0, atol=0)
    assert packed.wide().data_ptr() == packed.wide().data_ptr()


def test_a_layer_that_is_set_to_another_dtype_keeps_its_own_forward(build: Callable[..., Policy]) -> None:
    asked = {"training.bf16": True}
    policy = build({"quant": "4bit", "bnb_compute_dtype": "float32"}, **asked)
    usual = build(KINDS["nf4"], **asked)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    fits = []
    for one in (policy, usual):
        forwards = [vars(part).get("forward") for part in one.model.modules()]
        with one.precision.autocast(CPU):
            fits.append(
                {f.fits(x) for f in forwards if isinstance(f, FusedLinear) and quantised_base.is_quantised(f.base)}
            )
    assert fits == [{False}, {True}]
    assert all(bool(slope.isfinite().all()) for slope in scored(policy)[1].values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_file_stays_in_memory_once_its_weights_are_quantised(model_dir: Path) -> None:
    for quant, stays in (("none", True), ("4bit", False), ("8bit", False)):
        loaded = load_model(ModelSection(huggingface_id=str(model_dir), quant=quant), dtype=torch.float32)
        assert (str(model_dir) in Path("/proc/self/maps").read_text()) is stays
        assert loaded.module.name_or_path == str(model_dir) and loaded.module.generation_config is not None
        del loaded


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_16_bits(dtype: str, build: Callable[..., Policy]) -> None:
    policy = build(KINDS["nf4"], **{f"training.{dtype}": True})
    exact, _ = scored(build(KINDS["nf4"]))
    found, slopes = scored(policy)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.15)
    assert len(slopes) == 28
    for slope in slopes.values():
        assert slope.dtype == torch.float32 and bool(slope.isfinite().all()) and bool(slope.any())


# ---- what is refused


def test_full_training_of_a_quantised_base_is_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="all weights are to be trained"):
        RunConfig(models=[{"huggingface_id": str(model_dir), "quant": "4bit"}], dataset={"train_file": "rows.jsonl"})


def test_settings_that_nothing_reads_are_refused() -> None:
    for quant, key, value in (("none", "bnb_quant_type", "fp4"), ("8bit", "bnb_double_quant", False)):
        with pytest.raises(ConfigError, match="which is read with quant: 4bit alone"):
            RunConfig(
                models=[{"huggingface_id": "m", "quant": quant, key: value}], lora={}, dataset={"train_file": "r"}
            )


def test_modules_that_are_quantised_cannot_be_trained_in_full(build: Callable[..., Policy]) -> None:
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}
    with pytest.raises(ModelError, match="down_proj is quantised"):
        build(KINDS["nf4"], lora=lora)


def test_a_model_that_is_not_reached_is_refused(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    """bitsandbytes does not see fused experts."""
    size = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8}
    MixtralForCausalLM(MixtralConfig(**size, **heads)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not reach fused experts"):
        load_model(ModelSection(huggingface_id=str(tmp_path), quant="4bit"), dtype=torch.float32)


def test_an_absent_package_is_told_before_anything_is_loaded(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("strop.preflight.find_spec", lambda name: None)
    (model_dir / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config = model_dir / "c.yaml"
    parts = {"dataset": {"train_file": str(model_dir / "rows.jsonl")}, "lora": {"r": 4}}
    config.write_text(json.dumps({"models": [{"huggingface_id": str(model_dir)}], **parts}))
    assert main(["train", "--config", str(config), "--quant", "4bit"]) == 1
    assert "the extra `bnb`" in capsys.readouterr().err


def test_the_dequantised_module_is_a_plain_one(model_dir: Path) -> None:
    section = ModelSection(huggingface_id=str(model_dir), quant="4bit")
    module = load_model(section, dtype=torch.float32).module
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        before = module(ids).logits
        assert len(quantised_base.dequantise(module, torch.float32)) == 14
        after = module(ids).logits
    assert isinstance(module, LlamaForCausalLM) and not any(map(quantised_base.is_quantised, module.modules()))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


# ---- bases whose files are quantised


@pytest.fixture
def stored_dir(model_dir: Path, tmp_path: Path) -> Callable[[str], Path]:
    """The tiny model as transformers saves it in so many bits."""

    def made(kind: str) -> Path:
        keys = KINDS[kind]
        how = (
            {"load_in_8bit": True}
            if kind == "8bit"
            else {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": kind,
                "bnb_4bit_use_double_quant": keys.get("bnb_double_quant", True),
                "bnb_4bit_compute_dtype": torch.float16,
            }
        )
        with quiet():
            module = AutoModelForCausalLM.from_pretrained(
                model_dir, quantization_config=BitsAndBytesConfig(**how), device_map={"": "cpu"}, dtype=torch.float32
            )
            module.save_pretrained(tmp_path / "stored")
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(model_dir / file, tmp_path / "stored" / file)
        return tmp_path / "stored"

    return made


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_quantised_are_trained_on_as_they_are(
    kind: str, stored_dir: Callable[[str], Path], build: Callable[..., Policy], tmp_path: Path
) -> None:
    """The same numbers as a base that is quantised as it is loaded, whatever dtype it was saved to multiply in."""
    asked = build(KINDS[kind])
    folder = stored_dir(kind)
    policy = build({"huggingface_id": str(folder)})
    for one, two in zip(scored(asked), scored(policy), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert policy.weights_hash == asked.weights_hash
    section = ModelSection(huggingface_id=str(folder))
    sizes = [
        shape_of(LoraSection(r=4), s).matrix_bytes
        for s in (section, ModelSection(**KINDS[kind], huggingface_id=str(tmp_path / "tiny-model")))
    ]
    assert sizes[0] == sizes[1]
    policy.save_pretrained(tmp_path / "final", load_tokenizer(section))
    with policy.scoring():
        expected = policy(policy.collate(GROUPS)).logps
    merged = merge(str(tmp_path / "final"), tmp_path / "merged")
    assert not merged.failed
    assert any(line.what == "greedy texts: 20 of 20 equal" for line in merged.lines)
    plain = build({"huggingface_id": str(tmp_path / "merged")}, lora={"enabled": False})
    assert not any(map(quantised_base.is_quantised, plain.modules()))
    with plain.scoring():
        torch.testing.assert_close(plain(plain.collate(GROUPS)).logps, expected, rtol=1e-4, atol=1e-3)


def test_what_is_refused_of_quantised_files(
    stored_dir: Callable[[str], Path], build: Callable[..., Policy], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = stored_dir("nf4")
    with pytest.raises(ModelError, match=r"stored in 4 bits \(nf4, double\).*cannot move by a step"):
        build({"huggingface_id": str(folder)}, lora={"enabled": False})
    with pytest.raises(ModelError, match=r"stored in 4 bits .* already, and quant is 8bit"):
        build({"huggingface_id": str(folder), "quant": "8bit"})
    with pytest.raises(ModelError, match="quantised ones cannot be changed"):
        build({"huggingface_id": str(folder)}, lora={"init_lora_weights": "olora"})
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["train", "--model", str(folder), "--train-file", str(tmp_path / "rows.jsonl"), "--method", "sft"]
    assert main(words) == 1
    assert "all weights are to be trained" in capsys.readouterr().err
    file = folder / "config.json"
    whole = file.read_text()
    for other in ("gptq", "awq"):
        file.write_text(whole.replace('"bitsandbytes"', f'"{other}"'))
        with pytest.raises(ModelError, match=f"quantised by {other} .*cannot be trained on"):
            build({"huggingface_id": str(folder)})


@pytest.mark.parametrize("found", [Quantisation(8), Quantisation(4, stored=True)])
def test_only_4_bits_made_at_loading_are_sharded(found: Quantisation) -> None:
    check_shardable(Quantisation(4), "here")
    with pytest.raises(ModelError, match="shards a base that is quantised to 4 bits"):
        check_shardable(found, "here")
