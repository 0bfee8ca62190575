"""The estimate for several devices: what each holds, what they send, how long they take."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from strop.cli.train import run as run_train
from strop.config import RunConfig, load_config, resolve
from strop.dryrun import dry_run
from strop.errors import ConfigError
from strop.estimate import estimate, fitted, longest_line, planned_precision
from strop.estimate.devices import ALONE, Devices, base_bytes, scales_bytes, sent_bytes
from strop.estimate.longest import longest_that_fits, stretched
from strop.estimate.memory import memory_of, peak_memory
from strop.machine import Machine
from strop.plan.row_tokens import packed_tokens
from strop.plan.work import Work
from strop.policy.model.from_config import shape_of
from strop.policy.precision import Precision
from strop.prepared import Prepared, prepare, with_budget
from strop.run_description import describe
from strop.types import GroupLengths

ROOT = Path(__file__).resolve().parents[2]
H100 = Machine("cuda", 2**36, 2e12, "NVIDIA H100")
BF16 = Precision(torch.bfloat16)


@pytest.fixture
def prepared(tmp_path: Path, model_dir: Path) -> Callable[..., Prepared]:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"question {i}", "chosen": "yes " * (20 + i), "rejected": "no " * 25} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(num_processes: int = 1, **keys: Any) -> Prepared:
        base = {"models.0.huggingface_id": str(model_dir), "dataset.train_file": str(path), "method": "dpo"}
        base |= {"training.bf16": True, "training.groups_per_step": 24}
        config = resolve(load_config(overrides={**base, **keys}))
        found = prepare(config, config.models[0], num_processes=num_processes)
        return with_budget(found, packed_tokens, "cuda")

    return make


def peak(found: Prepared, devices: Devices = ALONE) -> dict[str, int]:
    shape = shape_of(found.config.lora, found.model)
    return peak_memory(found.work(packed_tokens).work, shape, found.config, found.objective, BF16, H100, devices)


@pytest.mark.parametrize("lora", [{}, {"r": 4}], ids=["full", "lora"])
def test_a_shard_is_a_part_of_what_training_holds(lora: dict[str, Any], prepared: Callable[..., Prepared]) -> None:
    found = prepared(**lora)
    whole, parts = peak(found), peak(found, Devices(8, 4))
    for name in ("weights", "gradients", "optimizer"):
        assert parts[name] == pytest.approx(whole[name] / 4, abs=1)
    for name in ("activations", "backward"):
        assert parts[name] == whole[name]
    shape = shape_of(found.config.lora, found.model)
    layer, rest = shape.matrix / shape.layers, shape.others
    gradients, kept = (0, 2) if lora else (4 * (layer + rest), 4)
    assert parts["gathered weights"] == pytest.approx(2 * 2 * layer + kept * rest + gradients, abs=1)


def test_a_copy_on_each_device_costs_what_one_does_but_for_a_bucket(prepared: Callable[..., Prepared]) -> None:
    found = prepared()
    whole, parts = peak(found), peak(found, Devices(8))
    assert {name: size for name, size in parts.items() if name != "sum of gradients"} == whole
    assert parts["sum of gradients"] == whole["gradients"] < 2**26


def test_all_weights_are_gathered_to_sample_with(prepared: Callable[..., Prepared]) -> None:
    """They count as far as they are more than what a step needs at the same time beside its shard."""
    found = prepared(r=4)
    sampling = found.config.with_values({"finetuning.sample_prompts": 2}, "test")
    shape = shape_of(found.config.lora, found.model)
    deep = replace(shape, layers=80, matrix=40 * shape.matrix)
    work = Work.of([GroupLengths(2, (3,))], packed_tokens)

    def parts(config: RunConfig, devices: Devices) -> dict[str, int]:
        sizes = memory_of(deep, work, config, BF16, "cuda", found.objective, 0.0, devices)
        return {name: int(size[0]) for name, size in sizes.items()}

    before, after = parts(found.config, Devices(8, 8)), parts(sampling, Devices(8, 8))
    own = after.pop("weights to sample with")
    assert after == before
    in_steps = sum(before[name] for name in ("activations", "head", "backward", "gathered weights"))
    assert own == pytest.approx(2 * (deep.matrix + deep.others + deep.adapters) - in_steps, abs=5) and own > 0
    assert parts(sampling, ALONE) == parts(found.config, ALONE), "all weights are there"


@pytest.mark.parametrize("lora", [{}, {"r": 4}], ids=["full", "lora"])
def test_the_copy_of_an_asynchronous_save_lies_in_host_memory(
    lora: dict[str, Any], prepared: Callable[..., Prepared]
) -> None:
    """As large as what trains with the optimizer's state; on a CPU it counts against the device's memory."""
    plain, found = prepared(**lora), prepared(**lora, **{"training.async_save": True})
    parts = peak(found)
    assert parts == peak(plain), "beside a GPU"
    shape = shape_of(found.config.lora, found.model)
    copied = 3 * 4 * (shape.adapters or shape.matrix + shape.others)  # weights and two moments of AdamW, in float32
    line = f"training.async_save: {copied / 2**30:.2f} GiB of host memory in the first process for the copy"
    assert line in list(estimate(found, H100, BF16, packed_tokens).lines())
    cpu = Machine("cpu", 2**36, 1e11)
    on_cpu = [estimate(each, cpu, BF16, packed_tokens).parts for each in (plain, found)]
    assert on_cpu[1] == {**on_cpu[0], "copy of a checkpoint": copied}
    tight = estimate(found, replace(cpu, memory=sum(on_cpu[0].values())), BF16, packed_tokens)
    assert not tight.fits and tight.ways[0] == "set training.async_save: false"


def test_what_a_device_sends_is_the_least_of_a_ring(prepared: Callable[..., Prepared]) -> None:
    """Written out for each of the strategies; no more than all of it, whatever the number of devices."""
    shape = shape_of(prepared().config.lora, prepared().model)
    weights = shape.matrix + shape.others
    steps = np.array([1.0, 3.0])
    assert sent_bytes(shape, BF16, ALONE, steps).tolist() == [0, 0]
    assert sent_bytes(shape, BF16, Devices(4), steps).tolist() == [2 * 4 * weights * 3 / 4] * 2
    gathered = 2 * (2 * shape.matrix + 4 * shape.others)
    sharded = (gathered + 4 * weights) * 3 / 4
    assert sent_bytes(shape, BF16, Devices(4, 4), steps) == pytest.approx(sharded * steps)
    hybrid = sharded + 2 * (4 * weights / 4) * 1 / 2
    assert sent_bytes(shape, BF16, Devices(8, 4), steps) == pytest.approx(hybrid * steps)


def test_what_is_sent_is_what_was_counted() -> None:
    """A run of `benchmarks.processes` (float32, 12 million weights) counts every call of torch.distributed."""
    found = json.loads((ROOT / "benchmarks" / "results" / "processes.json").read_text())
    model = found["model"]
    how = {
        "a copy in each of 2": Devices(2),
        "a copy in each of 4": Devices(4),
        "sharded over 2 (fsdp)": Devices(2, 2),
        "sharded over 2 of 4 (fsdp)": Devices(4, 2),
    }
    assert len(found["bytes"]) == 2 * len(how)
    for row in found["bytes"]:
        adapters = 0 if row["trains"] == "full" else model["adapters"]
        shape = SimpleNamespace(**{**model, "adapters": adapters, "matrix_bytes": None})
        sent = sent_bytes(shape, Precision(torch.float32), how[row["strategy"]], np.ones(1))  # type: ignore[arg-type]
        assert sent[0] == pytest.approx(row["sent"], rel=0.02), row


def test_adapters_are_summed_alone(prepared: Callable[..., Prepared]) -> None:
    found = prepared(r=4)
    shape = shape_of(found.config.lora, found.model)
    assert sent_bytes(shape, BF16, Devices(2), np.ones(1)).tolist() == [4 * shape.adapters]
    quantised = replace(shape, matrix_bytes=0.5)
    assert base_bytes(quantised, BF16) == shape.matrix / 2 + 2 * shape.others
    assert sent_bytes(quantised, BF16, Devices(2, 2), np.ones(1)) < sent_bytes(shape, BF16, Devices(2, 2), np.ones(1))


def steps_of(found: Prepared, machine: Machine = H100) -> np.ndarray:
    seconds = estimate(found, machine, BF16, packed_tokens).steps
    assert seconds is not None
    return seconds


def test_more_devices_take_less_time_but_for_what_they_exchange(prepared: Callable[..., Prepared]) -> None:
    alone, four = (steps_of(prepared(size)) for size in (1, 4))
    assert (four < alone).all() and (four > alone / 4).all()
    no_link = Machine("cuda", 2**36, 2e12, "NVIDIA H100")
    exchange = sent_bytes(shape_of(prepared().config.lora, prepared().model), BF16, Devices(4), np.ones(1))
    link = no_link.link(4)
    assert link == pytest.approx(0.7 * 450e9) and four - alone / 4 == pytest.approx(exchange / link)


def test_a_step_takes_as_long_as_its_longest_group(prepared: Callable[..., Prepared]) -> None:
    """However many devices there are beyond the groups of a step."""
    work = prepared().work(packed_tokens).work
    alone, many = steps_of(prepared()), steps_of(prepared(1024))
    assert (many >= alone * int(work.longest.max()) / int(work.tokens.sum())).all()


def test_machines_are_joined_by_a_slower_network() -> None:
    assert H100.link(8) == pytest.approx(0.7 * 450e9) and H100.link(16) == pytest.approx(0.7 * 50e9)
    card = Machine("cuda", 2**36, 2e12, "NVIDIA L4")
    assert card.link(16) == pytest.approx(0.7 * 32e9), "the network is no faster than what leads to it"
    assert Machine("cuda", None, None, "Some GPU").link(2) is None


def test_processes_share_the_memory_of_a_cpu() -> None:
    assert Machine("cpu", 2**34, None).shared_by(4).memory == 2**32
    assert H100.shared_by(4) is H100 and Machine("cpu", None, None).shared_by(4).memory is None


def test_the_longest_group_is_the_longest_that_fits(prepared: Callable[..., Prepared]) -> None:
    found = prepared(gradient_checkpointing=True)
    small = replace(H100, memory=2**32)
    longest, here = longest_that_fits(found, small, BF16, packed_tokens)
    one = Work.of([max(found.data.train, key=lambda group: group.num_tokens)], packed_tokens)
    assert here == one.tokens[0] < longest

    def needed(size: float) -> int:
        shape = shape_of(found.config.lora, found.model)
        parts = (shape, found.config, found.objective, BF16, small)
        return sum(peak_memory(stretched(one, size / here), *parts).values())

    assert needed(longest) <= 0.9 * 2**32 < needed(1.02 * longest)
    [line] = longest_line(found, small, BF16, packed_tokens)
    assert line.startswith("longest group that would fit: about ")
    [line] = longest_line(found, replace(H100, memory=2**20), BF16, packed_tokens)
    assert line.startswith("longest group that fits: about 0 tokens")
    assert longest_line(found, replace(H100, memory=None), BF16, packed_tokens) == []


def test_stretched_counts_are_those_of_longer_groups(prepared: Callable[..., Prepared]) -> None:
    found = prepared()
    work = found.work(packed_tokens).work
    longer = stretched(work, 2.0)
    for name, by in {"tokens": 2, "scored": 2, "longest": 2, "again": 2, "seen": 4, "squares": 4}.items():
        np.testing.assert_allclose(getattr(longer, name), by * getattr(work, name))


def test_the_dry_run_judges_several_devices(prepared: Callable[..., Prepared], capsys: Any) -> None:
    config = prepared(r=4).config
    dry_run(config, device="h100", devices=4, timed=False)
    said = capsys.readouterr().out
    assert "predicted peak memory on each of 4 devices: " in said and " of 79.6 GiB " in said
    assert "judged for 4 devices" in said and "4 devices, each sends 315 GB/s" in said
    assert "longest group that would fit: about " in said


def test_processes_of_a_cpu_are_judged_by_their_share(prepared: Callable[..., Prepared], capsys: Any) -> None:
    config = prepared(r=4).config.with_values({"gpu.num_processes": 2}, "test")
    dry_run(config, timed=False)
    said = capsys.readouterr().out
    assert "predicted peak memory on each of 2 devices: " in said


@pytest.mark.parametrize("given", ["0", "-1", "many", "4.5", "1025", ""])
def test_what_is_no_number_of_devices(given: str) -> None:
    with pytest.raises(ConfigError, match="--devices is "):
        run_train(["--config", "none.yaml", "--dry-run", f"--devices={given}"])


def test_devices_are_judged_in_a_dry_run_alone() -> None:
    with pytest.raises(ConfigError, match="--devices without --dry-run"):
        run_train(["--config", "none.yaml", "--devices", "4"])


def test_fewer_bytes_are_planned_with_where_processes_share(prepared: Callable[..., Prepared]) -> None:
    """`gradient_checkpointing: auto` is settled by what one process has."""
    asked = prepared(2, gradient_checkpointing="auto", micro_batch_tokens=1)
    machine = Machine("cpu", 2**31, None)
    precision = planned_precision(asked.config, machine)
    alone = fitted(asked, machine, precision, packed_tokens).config.training
    shared = fitted(asked, machine.shared_by(2**11), precision, packed_tokens).config.training
    assert (alone.gradient_checkpointing, shared.gradient_checkpointing) == (False, True)


def test_sharding_is_named_where_it_fits(prepared: Callable[..., Prepared]) -> None:
    """With the fewest devices, and only where it is allowed."""
    found, memory = prepared(), 2**20

    def needed(count: int) -> int:
        return sum(peak(found, Devices(count, count)).values())

    def ways(of: Prepared, room: float) -> str:
        told = estimate(of, replace(H100, memory=int(room / 0.9)), BF16, packed_tokens)
        return "; ".join(told.ways)

    assert needed(2) > needed(4) > needed(8)
    assert "gpu.fsdp: true on 8 devices, where it fits with " in ways(found, needed(8) + memory // 2**10)
    assert "gpu.fsdp: true on 4 devices, where it fits with " in ways(found, needed(4) + memory // 2**10)
    assert "gpu.fsdp" not in ways(found, needed(64) / 2), "not even on 64"
    assert "gpu.fsdp" not in ways(prepared(optim="adamw_8bit"), needed(8)), "it would be refused"
    assert ways(found, 2**40) == "", "it fits"


def test_a_sharded_run_is_predicted_sharded(prepared: Callable[..., Prepared]) -> None:
    found = prepared(4, **{"gpu.fsdp": True, "gpu.shard_size": 2})
    assert estimate(found, H100, BF16, packed_tokens).parts == peak(found, Devices(4, 2))
    described = "\n".join(describe(found, packed_tokens))
    assert "processes: 4, each with a part of the model, which lies on 2 of them," in described
    with pytest.raises(ConfigError, match="3 does not divide the number of processes, 4"):
        dry_run(found.config.with_values({"gpu.shard_size": 3}, "test"), device="h100", devices=4)


def test_devices_say_how_the_model_lies() -> None:
    names = {ALONE: "1 device", Devices(4): "a copy on each of 4 devices", Devices(4, 4): "fsdp on 4 devices"}
    assert all(str(devices) == name for devices, name in names.items())
    assert str(Devices(16, 8)) == "fsdp over 8 of 16 devices" and Devices(16, 8).replicas == 2


@pytest.mark.parametrize("name", ["0.5B", "8B"])
def test_the_page_has_what_the_estimate_says(name: str) -> None:
    page = runpy.run_path(str(ROOT / "docs" / "scaling.py"))
    there = page["PAGE"].read_text(encoding="utf-8").splitlines()
    for both in page["lines"](name):
        for line in both:
            assert line in there, f"{line}\nwrite it by python docs/scaling.py"


def test_sharded_bases_in_4_bits_keep_their_scales_on_each_device(prepared: Callable[..., Prepared]) -> None:
    found = prepared(r=4)
    quantised = replace(shape_of(found.config.lora, found.model), matrix_bytes=0.5625)
    assert scales_bytes(quantised) == quantised.matrix / 16
    for other in (1.0, None):  # in 8 bits, and not quantised
        assert scales_bytes(replace(quantised, matrix_bytes=other)) == 0
