"""What differs on a GPU, each path beside float64 or a run on the CPU: attention, head, fused layers, steps, runs."""

from __future__ import annotations

import copy
import json
import shutil
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import strop
from conftest import build_model
from strop.batch import Batch, GroupSpan, pack, pad
from strop.config.sections import ModelSection
from strop.machine import machine_of
from strop.policy.build import assemble
from strop.policy.gradient_checkpointing import checkpoint_layers
from strop.policy.kernels.attention import KERNELS, AttentionPlan, SoftmaxRules, best_kernel, dense_mask
from strop.policy.kernels.logprobs import naive_token_logps, token_logps
from strop.policy.model.load import LoadedModel
from strop.policy.model.logit_transform import LogitTransform
from strop.policy.policy import Policy
from strop.policy.precision import Precision
from strop.types import Completion, Group, Origin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning"),  # torch's own, of its own
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),  # in autograd's own thread, once
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

LOW = [torch.bfloat16, torch.float16]
LAYOUT = (GroupSpan(0, 70, (40, 33, 0, 21)), GroupSpan(164, 3, (150,)), GroupSpan(317, 130, (5, 64)))
SOME_NOISE = 2e-5
"""Of results of some units in float32, which a GPU sums in another order."""


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


def error(found: Tensor, truth: Tensor) -> float:
    """Of the whole tensor, by its norm."""
    assert torch.isfinite(found).all()
    return float((found.cpu().double() - truth).norm() / truth.norm())


# --- attention


def draw(heads: int, key_heads: int, width: int) -> list[Tensor]:
    """q, k, v and a gradient of the output in float64, as a model's projections lie in memory."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, LAYOUT[-1].stop, h, width) for h in (heads, key_heads, key_heads, heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).transpose(1, 2) for s in shapes]


def naive(q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * 0.2
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~dense_mask(LAYOUT, q.device, window), float("-inf")).softmax(-1) @ v


def with_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], like: torch.dtype, where: Any
) -> list[Tensor]:
    q, k, v, gradient = (x.to(where, like, copy=True).requires_grad_() for x in inputs)
    out = function(q, k, v)
    out.backward(gradient.detach())
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(6, 2, 64), (4, 4, 20)])
def test_attention_rounds_no_worse_than_the_naive(
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    heads: int,
    key_heads: int,
    width: int,
    device: torch.device,
) -> None:
    """Also where flash attention stands aside: capped scores, a width that is no multiple of 8."""
    on_gpu = [name for name, kernel in KERNELS.items() if "cuda" in kernel.devices]
    assert best_kernel(device, dtype) in on_gpu
    inputs = draw(heads, key_heads, width)
    truth = with_gradients(lambda q, k, v: naive(q, k, v, window, softcap), inputs, torch.float64, "cpu")
    plain = with_gradients(lambda q, k, v: naive(q, k, v, window, softcap), inputs, dtype, device)
    for kernel in on_gpu:
        plan = AttentionPlan(LAYOUT, device, kernel)
        ours = with_gradients(
            lambda *qkv, p=plan, name=kernel: KERNELS[name](*qkv, p, SoftmaxRules(0.2, window, softcap)),
            inputs,
            dtype,
            device,
        )
        for one, other, exact in zip(ours, plain, truth, strict=True):
            assert one.dtype == dtype and error(one, exact) <= 1.5 * error(other, exact) + SOME_NOISE, kernel


# --- the head


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 3.0)], ids=str)
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("tile", [None, (24, 1000), (24, 300)])
def test_the_head_rounds_no_worse_than_the_naive(
    dtype: torch.dtype, transform: LogitTransform, trains: bool, tile: tuple[int, int] | None, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((100, 48), (1000, 48)))
    coefficients = torch.rand(100, generator=generator, dtype=torch.float64)
    targets = torch.randint(1000, (100,), generator=generator)

    def run(function: Callable[..., Tensor], like: torch.dtype, where: Any) -> list[Tensor]:
        h, w = (0.3 * hidden).to(where, like).requires_grad_(), weight.to(where, like, copy=True).requires_grad_(trains)
        logps = function(h, w, None, targets.to(where), transform=transform)
        (logps * coefficients.to(where, logps.dtype)).sum().backward()
        return [logps.detach(), *(x.grad for x in (h, w) if x.grad is not None)]

    truth = run(naive_token_logps, torch.float64, "cpu")
    plain = run(naive_token_logps, dtype, device)
    ours = run(lambda *a, **k: token_logps(*a, **k, tile=tile), dtype, device)
    for one, other, exact in zip(ours, plain, truth, strict=True):
        assert error(one, exact) <= 1.5 * error(other, exact) + SOME_NOISE


# --- a policy: fused layers, 16-bit copies, checkpointing, both kinds of rows


def make_groups() -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> array[int]:
        return array("q", torch.randint(4, 400, (n,), generator=generator).tolist())

    sizes = [(20, (9, 14)), (3, (1, 30, 7)), (41, (12,))]
    return [
        Group(draw(p), tuple(Completion(draw(n), b"\1" * n) for n in lengths), Origin("rows", i))
        for i, (p, lengths) in enumerate(sizes)
    ]


def make_policy(lora: bool, checkpointing: bool, precision: Precision, where: Any) -> Policy:
    """The tiny model with weights that do not depend on the device."""
    model: Any = build_model()
    loaded = LoadedModel(model, torch.float32, copy.deepcopy(model.config))
    if lora:
        model = model.to(precision.compute)
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = 0.1 * torch.randn(weight.shape)
    checkpoint_layers(model, checkpointing, random=False, where="tiny")
    section = ModelSection(huggingface_id="tiny")
    return assemble(model.to(where), loaded, precision, section, fp32_logits=False)


def logps_and_gradients(policy: Policy, batch: Batch) -> list[Tensor]:
    policy.zero_grad()
    with policy.weights_fixed():
        logps = policy(batch.to(policy.device)).logps
        generator = torch.Generator().manual_seed(5)
        (logps * torch.randn(len(logps), generator=generator).to(logps.device)).sum().backward()
    return [logps.detach(), torch.cat([p.grad.flatten().cpu() for p in policy.trainable().values()])]  # type: ignore[union-attr]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_a_policy_is_that_of_the_cpu(lora: bool, checkpointing: bool, dtype: torch.dtype, device: torch.device) -> None:
    groups = make_groups()
    exact = logps_and_gradients(make_policy(lora, False, Precision(torch.float32), "cpu"), pad(groups))
    policy = make_policy(lora, checkpointing, Precision(dtype), device)
    assert policy.share_prefix
    shared, plain = (logps_and_gradients(policy, layout(groups)) for layout in (pack, pad))
    for one, other, truth in zip(shared, plain, exact, strict=True):
        assert error(one, truth.double()) <= 2 * error(other, truth.double()) + SOME_NOISE
        assert error(other, truth.double()) <= {torch.float32: 1e-4, torch.float16: 0.02}.get(dtype, 0.1)


# --- whole runs


ROWS = [
    {"prompt": f"question {i} " + "hello " * (i % 3), "chosen": "yes " * (1 + i % 4), "rejected": "no " * 3}
    for i in range(16)
]


@pytest.fixture
def train(tmp_path: Path, model_dir: Path, device: torch.device) -> Iterator[Callable[..., Any]]:
    """train(resume=..., **keys) -> (the records of training, the final weights, the run's folder)."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    singles = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    (tmp_path / "singles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in singles))
    made = 0

    def run(resume: str | None = None, **keys: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor], Path]:
        nonlocal made
        made += 1
        sft = keys.get("post_training.method") == "sft"
        base = {
            "models.0.name": "run",
            "models.0.huggingface_id": str(model_dir),
            "dataset.train_file": str(tmp_path / ("singles.jsonl" if sft else "pairs.jsonl")),
            "dataset.validation_split": 0.25,
            "post_training.method": "dpo",
            "training.output_dir": str(tmp_path / f"out-{made}"),
            "training.per_device_train_batch_size": 4,
            "training.gradient_accumulation_steps": 1,
            "training.max_steps": 4,
            "training.learning_rate": 1e-3,
            "training.warmup_steps": 0,
            "training.logging_steps": 1,
            "training.reference_store": False,
            "training.auto_precision": False,
        }
        (result,) = strop.train(strop.load_config(overrides={**base, **keys}), resume=resume)
        records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
        (file,) = result.final.glob("*.safetensors")
        return [r for r in records if r["split"] == "train"], load_file(file), result.run_dir

    yield run


METHODS: list[dict[str, Any]] = [
    {"post_training.method": "sft"},
    {"post_training.method": "dpo"},
    {"post_training.method": "dpo", "post_training.loss_type": "kto_pair"},
    {"post_training.method": "dpo", "post_training.wpo_weighting": True},
    {"post_training.method": "kto"},
    {"post_training.method": "orpo"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_is_that_of_the_cpu(
    method: dict[str, Any], lora: bool, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**method, "lora.enabled": lora, **({"lora.r": 4, "lora.lora_dropout": 0.0} if lora else {})}
    on_gpu, weights, folder = train(**keys)
    assert json.loads((folder / "environment.json").read_text())["devices"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        on_cpu, expected, _ = train(**keys)
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in on_gpu] == pytest.approx([r[name] for r in on_cpu], rel=2e-3, abs=1e-5)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-2, atol=3e-4)


SETTINGS: list[dict[str, Any]] = [
    {"training.bf16": True},
    {"training.fp16": True},
    {"training.auto_precision": True},
    {"training.bf16": True, "training.gradient_checkpointing": True},
    {"training.bf16": True, "training.gradient_checkpointing": 0.5, "lora.enabled": True, "lora.lora_dropout": 0.2},
    {"training.optim": "adamw_torch"},
    {"training.optim": "adamw_8bit", "training.bf16": True},
    {"training.optim": "paged_adamw_8bit", "training.bf16": True},
    {"training.reference_store": True, "training.bf16": True},
    {"training.fp32_logits": True, "training.bf16": True},
    {"training.torch_compile": True, "training.bf16": True},
]


@pytest.mark.parametrize("keys", SETTINGS, ids=lambda k: " ".join(f"{n.partition('.')[2]}={v}" for n, v in k.items()))
def test_every_setting_that_meets_the_device_trains(keys: dict[str, Any], train: Callable[..., Any]) -> None:
    if "8bit" in keys.get("training.optim", ""):
        pytest.importorskip("bitsandbytes")
    records, weights, _ = train(**{"training.max_steps": 8, **keys})
    losses = [r["loss"] for r in records if r["loss"] is not None]  # fp16 may begin with a scale that is too large
    assert losses[0] == pytest.approx(0.6931, abs=2e-3)  # the policy is its reference, as it was scored on this device
    assert losses[-1] < losses[0] and all(torch.isfinite(w).all() for w in weights.values())
    assert all(0 < r["peak_memory_gib"] < 4 for r in records)


def test_another_model_is_the_reference(train: Callable[..., Any], model_dir: Path) -> None:
    """By the same weights, so that the run starts as it does without."""
    records, _, _ = train(**{"post_training.ref_model_id": str(model_dir), "training.bf16": True})
    assert records[0]["loss"] == pytest.approx(0.6931, abs=2e-3)


def test_a_second_run_reads_what_was_scored(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    keys = {"training.reference_store": True, "training.bf16": True}
    with caplog.at_level("INFO", "strop"):
        first, _, _ = train(**keys)
        assert "are taken from the store" not in caplog.text
        again, _, _ = train(**keys)
    assert "are taken from the store" in caplog.text and "not those of the model" not in caplog.text
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in first], rel=2e-2)


def test_a_resume_goes_on(train: Callable[..., Any]) -> None:
    keys = {"lora.enabled": True, "lora.r": 4, "lora.lora_dropout": 0.3, "training.save_steps": 2}
    whole, weights, folder = train(**keys)
    resumed, again, _ = train(resume=str(folder / "checkpoint-2"), **keys)
    assert [r["step"] for r in resumed][-2:] == [3, 4]
    assert [r["loss"] for r in resumed][-2:] == pytest.approx([r["loss"] for r in whole][-2:], rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-3, atol=1e-5)


def test_a_step_that_does_not_fit_is_taken_again(
    train: Callable[..., Any], device: torch.device, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected, weights, _ = train()
    forward, failed = Policy.forward, []

    def limited(self: Policy, batch: Batch) -> Tensor:
        if batch.num_tokens > 60:
            failed.append(batch.num_tokens)
            torch.empty(2**60, dtype=torch.uint8, device=device)  # what the allocator itself then says
        return forward(self, batch)

    monkeypatch.setattr(Policy, "forward", limited)
    again, cut, _ = train()
    assert failed and "memory ran out" in " ".join(capfd.readouterr().err.split())
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in expected], rel=1e-4, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(cut[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs the driver's tool")
def test_the_device_is_known(device: torch.device) -> None:
    machine = machine_of(device)
    assert machine.kind == device.type and machine.memory is not None and machine.memory > 2**30
    assert machine.describe(torch.bfloat16)
