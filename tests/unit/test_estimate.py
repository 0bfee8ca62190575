"""The estimate: right in its parts, monotone in what it should be, and honest where it knows nothing."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.config import load_config, resolve
from strop.config.sections import ModelSection
from strop.dryrun import dry_run
from strop.errors import ConfigError, ModelError
from strop.estimate import (
    Estimate,
    estimate,
    fitted,
    planned_precision,
    planned_rows,
    prediction,
    with_precision,
)
from strop.estimate.memory import memory_of, saved_per_token
from strop.machine import Machine, machine_of
from strop.plan.row_tokens import packed_tokens, padded_tokens
from strop.plan.work import Work
from strop.policy.build import build_policy
from strop.policy.model import from_config
from strop.policy.model.from_config import CannotBuildError, shape_of
from strop.policy.precision import Precision, resolve_precision
from strop.prepared import Prepared, prepare, with_budget
from strop.readable import duration

CPU = Machine("cpu", 2**34, None)


@pytest.fixture
def prepared(tmp_path: Path, model_dir: Path) -> Callable[..., Prepared]:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"question {i}", "chosen": "yes " * (20 + i), "rejected": "no " * 25} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**keys: Any) -> Prepared:
        base = {"models.0.huggingface_id": str(model_dir), "dataset.train_file": str(path), "method": "dpo"}
        config = resolve(load_config(overrides={**base, **keys}))
        return prepare(config, config.models[0])

    return make


def guess(prepared: Prepared, machine: Machine = CPU, *, timed: bool = False) -> Estimate:
    settled = with_budget(prepared, packed_tokens, machine.kind)
    return estimate(settled, machine, planned_precision(prepared.config, machine), packed_tokens, timed=timed)


@pytest.mark.parametrize("lora", [{}, {"r": 4, "lora_dropout": 0.0}], ids=["full", "lora"])
def test_weights_are_counted_as_they_are(lora: dict[str, Any], prepared: Callable[..., Prepared]) -> None:
    found = prepared(**lora)
    policy = build_policy(found.config, found.model, torch.device("cpu"))
    shape = shape_of(found.config.lora, found.model)
    trained = sum(p.numel() for p in policy.trainable().values())
    parts = guess(found).parts
    assert parts["weights"] == sum(4 * p.numel() for p in policy.parameters())
    assert (parts["gradients"], parts["optimizer"]) == (4 * trained, 8 * trained)
    assert shape.adapters == (trained if lora else 0)


@pytest.mark.parametrize("lora", [{}, {"r": 4, "lora_dropout": 0.0}, {"r": 4}], ids=["full", "lora", "dropout"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_what_a_layer_keeps_is_what_autograd_keeps(
    lora: dict[str, Any], bf16: bool, prepared: Callable[..., Prepared]
) -> None:
    """Within a fifth: the table of bytes per token against the tensors saved by a forward pass."""
    found = prepared(bf16=bf16, **lora)
    policy = build_policy(found.config, found.model, torch.device("cpu"))
    groups = [found.data.train[i] for i in range(4)]
    batch = policy.collate(groups)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if (place not in weights and batch.input_ids.shape[1] in tensor.shape) or tensor.ndim == 4:
            saved[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        policy(batch)
    measured = sum(t.untyped_storage().nbytes() for t in saved.values())
    shape, precision = shape_of(found.config.lora, found.model), policy.precision
    predicted = shape.layers * saved_per_token(shape, found.config, precision, "cpu") * batch.num_tokens
    assert predicted == pytest.approx(measured, rel=0.2)


def test_it_grows_and_shrinks_as_it_should(prepared: Callable[..., Prepared]) -> None:
    plain = guess(prepared())
    assert guess(prepared(gradient_checkpointing=True)).peak < plain.peak
    assert guess(prepared(gradient_checkpointing=True)).flops > plain.flops
    assert guess(prepared(r=4)).flops < plain.flops
    assert guess(prepared(micro_batch_tokens=100)).parts["activations"] < plain.parts["activations"] / 2
    assert guess(prepared(optim="adamw_8bit")).parts["optimizer"] == plain.parts["optimizer"] // 4
    assert guess(prepared(ref_sync_steps=2)).parts["reference"] == plain.parts["weights"]


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_the_peak_is_found_wherever_it_is(
    chunk: int, prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = guess(prepared(micro_batch_tokens=64))
    monkeypatch.setattr("strop.estimate.memory.CHUNK", chunk)
    assert guess(prepared(micro_batch_tokens=64)).memory == whole.memory


def test_auto_takes_the_smallest_share_that_fits(prepared: Callable[..., Prepared]) -> None:
    key = "training.gradient_checkpointing"
    without, whole = (
        guess(prepared(gradient_checkpointing=share, micro_batch_tokens=1)).peak / 0.9 for share in (False, True)
    )
    for memory, share in ((without + 1, 0), (whole + 1, 2), (1, 2)):
        machine = Machine("cpu", int(memory), None)
        asked = prepared(gradient_checkpointing="auto", micro_batch_tokens=1)
        found = fitted(asked, machine, planned_precision(asked.config, machine), packed_tokens)
        chosen = found.config.training.gradient_checkpointing
        assert (max(1, round(2 * chosen)) if chosen else 0) == share  # of two layers
        assert found.config.origins[key].startswith("auto: ")
    unknown = Machine("cuda", None, None)
    found = fitted(asked, unknown, planned_precision(asked.config, unknown), packed_tokens)
    assert found.config.training.gradient_checkpointing is False
    assert "not known" in found.config.origins[key]


def test_auto_precision_takes_bfloat16_where_float32_does_not_fit(
    prepared: Callable[..., Prepared], pretend: Callable[..., None]
) -> None:
    """Though it is slower; and where it is faster, whatever the memory."""

    def chosen(memory: float, **keys: Any) -> tuple[bool | None, str]:
        machine, asked = Machine("cpu", int(memory), None), prepared(auto_precision=True, r=4, **keys)
        planned = planned_precision(asked.config, machine)
        config = with_precision(asked, machine, planned, packed_tokens).config
        return config.training.bf16, config.origins.get("training.bf16", "")

    pretend(bf16=0.3)
    smallest = prepared(r=4, gradient_checkpointing="auto")
    needed = guess(fitted(smallest, Machine("cpu", 1, None), Precision(torch.float32), packed_tokens)).peak / 0.9
    assert chosen(needed + 2) == (False, "auto_precision: the faster one")
    assert chosen(needed - 2) == (True, "auto_precision: float32 does not fit into memory")
    assert chosen(needed - 2, bf16=False)[0] is False
    pretend(bf16=2.0)
    assert chosen(needed + 2) == chosen(needed - 2) == (True, "auto_precision: the faster one")


def test_copies_in_float32_are_counted(prepared: Callable[..., Prepared], pretend: Callable[..., None]) -> None:
    """Where products of bfloat16 are made in float32: of the largest layer its weight, input and output at least."""
    found = prepared(r=4, bf16=True)
    shape, work = shape_of(found.config.lora, found.model), max(len(g.prompt_ids) for g in found.data.train)
    parts = []
    for bf16 in (2.0, 0.3):
        pretend(bf16=bf16)
        parts.append(guess(found).parts)
    assert "float32 copies" not in parts[0]
    assert parts[1]["float32 copies"] >= 4 * (shape.width * shape.inner + work * (shape.width + shape.inner))


def settle(asked: Prepared, memory: float) -> tuple[int, bool | float]:
    machine = Machine("cpu", int(memory), None)
    found = fitted(asked, machine, planned_precision(asked.config, machine), packed_tokens).config.training
    assert found.micro_batch_tokens is not None and found.gradient_checkpointing != "auto"
    return found.micro_batch_tokens, found.gradient_checkpointing


def test_micro_batches_are_halved_before_anything_is_computed_again(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prepared(per_device_train_batch_size=8)
    longest = max(group.num_tokens for group in asked.data.train)
    monkeypatch.setattr("strop.plan.micro_batch_size.CPU_TOKENS", 8 * longest)
    whole = guess(asked)
    assert settle(asked, whole.peak / 0.9 + 1) == (8 * longest, False)
    half = guess(prepared(micro_batch_tokens=4 * longest))
    assert settle(asked, half.peak / 0.9 + 1) == (4 * longest, False)
    alone = guess(prepared(micro_batch_tokens=longest))
    assert settle(asked, alone.peak / 0.9 + 1) == (longest, False)
    assert settle(asked, alone.peak / 0.9 - 2**10)[0] == longest and settle(asked, alone.peak / 0.9 - 2**10)[1]
    assert settle(asked, 1) == (longest, True)
    # what is configured stays
    assert settle(prepared(micro_batch_tokens=999), 1) == (999, True)
    assert settle(prepared(gradient_checkpointing=0.5), 1) == (longest, 0.5)


def test_layers_that_cannot_be_computed_again_are_not_asked_to(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strop.policy.model.from_config.layers_that_can", lambda module: [])
    assert settle(prepared(), 1)[1] is False


def test_what_the_process_has_already_counts_on_a_cpu(prepared: Callable[..., Prepared]) -> None:
    found = machine_of(torch.device("cpu"))
    assert 2**27 < found.held < 2**36
    alone = guess(prepared(), replace(found, held=0))
    assert guess(prepared(), found).peak == alone.peak + found.held


def test_a_gpu_without_bfloat16_is_planned_as_a_run_takes_it(prepared: Callable[..., Prepared]) -> None:
    old = Machine("cuda", 2**34, None, "Tesla T4", has_bf16=False)
    assert planned_precision(prepared(auto_precision=True).config, old).compute is torch.float32
    with pytest.raises(ConfigError, match="Tesla T4 does not compute bfloat16"):
        planned_precision(prepared(bf16=True).config, old)
    assert planned_precision(prepared(fp16=True).config, old).compute is torch.float16


def test_what_does_not_fit_is_said_with_ways(prepared: Callable[..., Prepared]) -> None:
    small = guess(prepared(), Machine("cpu", 2**20, None))
    assert not small.fits
    *_, last = small.lines()
    assert last.startswith("note: ") and last.index("micro_batch_tokens") < last.index("gradient_checkpointing")
    assert not any("leaves out" in line for line in guess(prepared()).lines())  # once, in the dry run, where asked


def test_a_gpu_is_looked_up_by_name(prepared: Callable[..., Prepared]) -> None:
    known = Machine("cuda", 80 * 2**30, 2e12, "NVIDIA H100 80GB HBM3")
    rate = known.rate(torch.bfloat16)
    assert rate == pytest.approx(0.4 * 989e12) and "assumed" in known.describe(torch.bfloat16)
    strange = Machine("cuda", 2**30, None, "Some GPU")
    assert strange.rate(torch.float32) is None
    found = guess(prepared(), strange)
    assert found.steps is None and "no prediction of time: the rate of Some GPU is not known" in found.lines()
    assert planned_precision(prepared(auto_precision=True).config, known).compute is torch.bfloat16
    on_cpu = resolve_precision(prepared(auto_precision=True).config.training, torch.device("cpu"))
    assert planned_precision(prepared(auto_precision=True).config, CPU) == on_cpu


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA A100-SXM4-40GB", "A100"), ("NVIDIA L40S", "L40S"), ("NVIDIA L40", None), ("NVIDIA GH200 480GB", None)],
)
def test_a_gpu_is_known_by_a_word_of_its_name(name: str, known: str | None) -> None:
    rate = Machine("cuda", 2**36, None, name).rate(torch.bfloat16)
    assert rate == {"A100": 0.4 * 312e12, "L40S": 0.4 * 362e12, None: None}[known]


def test_capped_scores_and_gathered_keys_are_counted(prepared: Callable[..., Prepared]) -> None:
    found = prepared(bf16=True)
    shape, precision = shape_of(found.config.lora, found.model), Precision(torch.bfloat16)
    work = Work.of(found.data.train[:4], packed_tokens)
    assert work.again == sum(g.lengths.prompt for g in found.data.train[:4])  # of pairs: once more each

    def activations(device: str, **changes: Any) -> int:
        parts = memory_of(replace(shape, **changes), work, found.config, precision, device, found.objective, 0.0)
        return int(parts["activations"][0])

    squares = sum(packed_tokens([g]) ** 2 for g in found.data.train[:4])
    for device in ("cpu", "cuda"):
        assert activations(device, capped=True) >= shape.layers * shape.heads * squares * 8
    assert activations("cuda") - activations("cuda", keys=0) == shape.layers * 4 * shape.keys * (
        work.tokens + work.again
    )


def test_this_machine_is_known() -> None:
    machine = machine_of(torch.device("cpu"))
    assert machine.memory and machine.memory > 2**27
    assert machine.rate(torch.float32) is None  # a CPU is timed instead


@pytest.mark.share(1)
@pytest.mark.parametrize("keys", [{}, {"r": 4}, {"method": "kto"}, {"micro_batch_tokens": 100}], ids=str)
def test_a_cpu_is_timed_with_layers_of_the_model(keys: dict[str, Any], prepared: Callable[..., Prepared]) -> None:
    drawn = torch.random.get_rng_state()
    found = guess(prepared(**keys), timed=True)
    assert found.steps is not None and all(0 < s < 60 for s in found.steps)
    [line] = [line for line in found.lines() if line.startswith("predicted time: ")]
    assert f" for all {found.num_steps} (" in line and "e+" not in line and "e-0" not in line
    assert torch.equal(drawn, torch.random.get_rng_state())  # or a run would not be the same with it


def test_the_time_is_that_of_all_steps(prepared: Callable[..., Prepared]) -> None:
    h100 = Machine("cuda", 2**36, 2e12, "NVIDIA H100")
    for steps in (1, 40):  # less than an epoch, and many
        found = guess(prepared(max_steps=steps), h100)
        assert found.steps is not None and found.num_steps == steps and len(found.steps) <= steps
        seconds = steps * sum(found.steps) / len(found.steps)
        assert any(f"{duration(seconds)} for all {steps} (" in line for line in found.lines())


def test_a_prediction_says_that_it_leaves_sampling_out(prepared: Callable[..., Prepared]) -> None:
    """Which takes most of the time of a run that samples."""
    h100 = Machine("cuda", 2**36, 2e12, "NVIDIA H100")
    online = {"online": True, "rollout": {"num_generations": 2}, "rewards": ["format"]}
    for keys, said in (({}, False), (online, True)):
        [line] = [line for line in guess(prepared(**keys), h100).lines() if line.startswith("predicted time: ")]
        assert line.endswith("without what sampling and rewards take)") == said


def test_longer_rows_are_predicted_to_take_longer(prepared: Callable[..., Prepared]) -> None:
    h100 = Machine("cuda", 2**36, 2e12, "NVIDIA H100")
    short = guess(prepared(max_seq_length=40), h100).steps
    long = guess(prepared(), h100).steps
    assert short is not None and long is not None and all(a < b for a, b in zip(short, long, strict=True))


def test_a_continued_adapter_is_counted_with_its_own_rank(
    prepared: Callable[..., Prepared], tmp_path: Path, model_dir: Path
) -> None:
    first = prepared(r=3, target_modules=["q_proj"])
    policy = build_policy(first.config, first.model, torch.device("cpu"))
    policy.save_pretrained(tmp_path / "adapter", first.tokenizer)
    continued = prepared(**{"models.0.adapter": str(tmp_path / "adapter")})
    assert (
        shape_of(continued.config.lora, continued.model).adapters
        == shape_of(first.config.lora, first.model).adapters
        > 0
    )
    assert guess(continued, timed=True).steps


def test_a_section_that_differs_from_a_continued_adapter_is_refused_before_rows_are_read(
    prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(r=3)
    policy = build_policy(first.config, first.model, torch.device("cpu"))
    policy.save_pretrained(tmp_path / "adapter", first.tokenizer)
    monkeypatch.setattr("strop.prepared.ModelRows", None)
    with pytest.raises(ModelError, match="r: 4 here, 3 in the adapter"):
        prepared(**{"models.0.adapter": str(tmp_path / "adapter"), "lora.r": 4})


def test_a_model_that_cannot_be_described_costs_only_the_prediction(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise CannotBuildError("its code needs a file")

    monkeypatch.setattr("strop.prepared.shape_of", fails)
    found = with_budget(prepared(), packed_tokens, "cpu")
    lines = prediction(found, CPU, planned_precision(found.config, CPU), packed_tokens)
    assert lines == ["no prediction of memory and time: its code needs a file"]
    asked = prepared(gradient_checkpointing="auto")
    auto = fitted(asked, CPU, planned_precision(found.config, CPU), packed_tokens)
    assert auto.config.training.gradient_checkpointing is False


def test_an_estimate_that_fails_costs_only_the_prediction(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the code of an architecture raises; what is wrong with the run is still an error."""
    found = with_budget(prepared(), packed_tokens, "cpu")
    precision = planned_precision(found.config, CPU)
    for module in ("fitting", "run_estimate"):
        monkeypatch.setattr(f"strop.estimate.{module}.peak_memory", lambda *_: [1] / 2)  # type: ignore[operator]
    lines = prediction(found, CPU, precision, packed_tokens)
    assert len(lines) == 1 and "TypeError" in lines[0] and lines[0].startswith("no prediction of memory and time")
    auto = fitted(prepared(gradient_checkpointing="auto"), CPU, precision, packed_tokens)
    assert auto.config.training.gradient_checkpointing is False
    monkeypatch.undo()
    monkeypatch.setattr("strop.estimate.seconds.measure", lambda *_: {}["layer_idx"])
    timed = "\n".join(prediction(found, CPU, precision, packed_tokens, timed=True))
    assert "predicted peak memory" in timed and "cannot be timed" in timed
    with pytest.raises(ModelError, match="no_such"):
        prediction(prepared(target_modules=["no_such"]), CPU, precision, packed_tokens)


def test_sizes_that_differ_from_layer_to_layer_count_with_the_largest(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Gemma 3n, whose feed-forward widths are a list."""
    found = prepared()
    one = shape_of(found.config.lora, found.model)
    build = from_config.empty_model

    def listed(model: ModelSection, **how: bool) -> Any:
        module = build(model, **how)
        vars(module.config)["intermediate_size"] = [16, one.inner, 32]
        return module

    monkeypatch.setattr(from_config, "empty_model", listed)
    assert shape_of(found.config.lora, found.model).inner == one.inner


def test_the_dry_run_shows_it(prepared: Callable[..., Prepared], capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(prepared(gradient_checkpointing="auto").config)
    said = capsys.readouterr().out
    assert "predicted peak memory: " in said and "predicted time: " in said
    assert "auto: by the estimate of memory" in said


def test_the_dry_run_knows_which_layers_there_are(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(ModelError, match="no_such_proj"):
        dry_run(prepared(target_modules=["no_such_proj"]).config)


@pytest.mark.parametrize(("visible", "asked"), [(None, "1"), ("", "1"), ("3,5", "5"), ("GPU-a,GPU-b", "GPU-b")])
def test_the_gpu_that_torch_counts_is_asked_for(
    visible: str | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="NVIDIA H100 80GB HBM3, 81559, 9.0\n")

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = machine_of(torch.device("cuda", 1))
    assert f"--id={asked}" in commands[0]
    assert found.memory == 81559 * 2**20 and found.rate(torch.bfloat16) and found.has_bf16


@pytest.mark.nightly
def test_the_dry_run_knows_which_rows_there_will_be(
    prepared: Callable[..., Prepared], capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for keys in ({}, {"models.0.attn_implementation": "eager"}):
        found = prepared(**keys)
        dry_run(found.config)
        said = capsys.readouterr().out
        assert ("plain padded rows, prompts are not shared: attn_implementation is eager" in said) == bool(keys)
        told.append(int(re.search(r"tokens: ([\d,]+) per epoch", said)[1].replace(",", "")))  # type: ignore[index]
        policy = build_policy(found.config, found.model, torch.device("cpu"))
        rows = packed_tokens if policy.share_prefix else padded_tokens
        assert planned_rows(found.model) is rows
        settled = with_budget(found, rows, "cpu")
        assert told[-1] == settled.work(rows).work.tokens.sum()
    assert told[0] < told[1]


def test_a_head_in_float32_is_counted(prepared: Callable[..., Prepared], pretend: Callable[..., None]) -> None:
    """Where a frozen head is stored in 16 bits and multiplies in float32, a copy of it is made."""
    pretend(bf16=2.0)
    low, wide = (guess(prepared(r=4, bf16=True, fp32_logits=on)).parts for on in (False, True))
    shape = shape_of(prepared().config.lora, prepared().model)
    assert "float32 copies" not in low and wide["float32 copies"] == 4 * shape.vocabulary * shape.width


def test_a_pass_over_mismatched_completions_takes_time(prepared: Callable[..., Prepared]) -> None:
    machine = Machine("cuda", 2**40, None, "NVIDIA H200")
    kto, dpo = (guess(prepared(method=method), machine) for method in ("kto", "dpo"))
    assert kto.steps is not None and dpo.steps is not None
    assert sum(kto.steps) > 1.2 * sum(dpo.steps)


def test_adapters_of_single_layers_cost_only_the_prediction_of_time(
    prepared: Callable[..., Prepared], capsys: pytest.CaptureFixture[str]
) -> None:
    """They are in the whole model, and not in the few layers that are timed."""
    dry_run(prepared(target_modules=["layers.1.mlp.up_proj"]).config)
    said = capsys.readouterr().out
    assert "predicted peak memory: " in said and "no prediction of time: a few of its layers cannot be timed" in said


def test_prompts_that_are_scored_count(prepared: Callable[..., Prepared]) -> None:
    full, own = (guess(prepared(method="orpo", orpo_nll=nll)) for nll in ("full", "completion"))
    assert full.flops > own.flops and full.parts["head"] > own.parts["head"]


def test_a_synced_reference_keeps_its_copies_in_16_bits(prepared: Callable[..., Prepared]) -> None:
    wide, low = (guess(prepared(ref_sync_steps=2, bf16=bf16)).parts["reference"] for bf16 in (False, True))
    assert wide < low < 1.6 * wide
