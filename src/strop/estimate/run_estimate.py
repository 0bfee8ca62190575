"""The estimate of a run, and how people are told. Floor 5.

In: a `Prepared`, the machine, the dtypes, and how the tokens of rows are counted (`tokens`: shared prompts once, or
padded). Out: an `Estimate`, and its lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from strop.config import RunConfig
from strop.config.methods import MethodSettings
from strop.engine.out_of_memory import ways_to_fit
from strop.errors import StropError
from strop.estimate.devices import ALONE, Devices, devices_of
from strop.estimate.flops import flops_of
from strop.estimate.longest import longest_that_fits
from strop.estimate.memory import COPY, MIB, checkpoint_bytes, fits, peak_memory
from strop.estimate.seconds import Seconds, published_seconds, timed_seconds, together
from strop.machine import Machine
from strop.objectives.base import Objective
from strop.plan.row_tokens import RowTokens
from strop.plan.work import Work
from strop.policy.model.from_config import CannotBuildError, Shape, predicting
from strop.policy.precision import Precision
from strop.prepared import Prepared
from strop.readable import duration, plain

LEFT_OUT = (
    "the estimate leaves out: reading the data, what sampling and rewards take, the reference's pass before the first "
    "step, its log-probs (on the CPU, 4 bytes per scored token and 0.6 kB per completion) and the model of "
    "ref_model_id, evaluations, checkpoints, what a GPU's allocator leaves unused and what NCCL keeps between several "
    "GPUs, modules_to_save, what layers that keep their own forward hold more than fused ones do (norms and MLPs of "
    "other kinds, eager attention), and in TFLOP/s and in the time on a GPU the products of a mixture's experts"
)


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a run will need.

    parts: bytes by name on each device, whose sum is the peak. steps: [steps] seconds of every step of an epoch, or of
    the run where it is shorter, or None; source: where they are from, or why there are none. num_steps: of the run.
    flops: of a mean step, on all devices together. memory: bytes of the device, or None. copied: bytes of host memory
    beside a GPU, into which `training.async_save` copies a checkpoint.
    """

    parts: dict[str, int]
    steps: Seconds | None
    num_steps: int
    flops: float
    memory: int | None
    source: str
    ways: Sequence[str]
    devices: Devices = ALONE
    copied: int = 0

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return fits(self.parts, self.memory)

    def lines(self) -> Iterator[str]:
        """For a person."""
        has = "" if self.memory is None else f" of {self.memory / 2**30:.1f} GiB"
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.parts.items() if size >= 5 * MIB)
        each = "" if self.devices.count == 1 else f" on each of {self.devices.count} devices"
        yield f"predicted peak memory{each}: {self.peak / 2**30:.2f} GiB{has} ({listed})"
        if self.copied:
            whose = "the first process" if self.devices.shard == 1 else "each process"
            yield f"training.async_save: {self.copied / 2**30:.2f} GiB of host memory in {whose} for the copy"
        yield from self.time_lines()
        if not self.fits:
            yield "note: this will hardly fit; in the order to try: " + "; ".join(self.ways)

    def time_lines(self) -> Iterator[str]:
        """The time alone; none where a CPU was not timed."""
        if self.steps is not None:
            mean = float(self.steps.mean())
            yield (
                f"predicted time: {_step(mean)} per step, {_step(float(self.steps.max()))} the longest, "
                f"{duration(mean * self.num_steps)} for all {self.num_steps} "
                f"({plain(self.flops / mean / 1e12)} TFLOP/s; {self.source})"
            )
        elif self.source:
            yield f"no prediction of time: {self.source}"


def _step(seconds: float) -> str:
    return f"{plain(seconds)} s" if seconds >= 1e-3 else "under 0.001 s"


def estimate(
    prepared: Prepared, machine: Machine, precision: Precision, tokens: RowTokens, *, timed: bool = False
) -> Estimate:
    """Peak memory and seconds per step of the run, once its `micro_batch_tokens` is settled. timed: measure a CPU's
    speed, which takes up to half a minute; else its time is not predicted.

    Raises:
        CannotBuildError: the architecture needs more than its configuration.
        ModelError: the adapters do not fit the model.
    """
    config, shape, objective = prepared.config, prepared.shape(), prepared.objective
    epoch = prepared.work(tokens)
    seconds: Seconds | None
    if machine.kind == "cpu" and timed:
        try:
            with predicting("they do not run alone"):
                seconds = timed_seconds(prepared, shape, epoch, precision, tokens)
            source = "layers of this architecture timed on this processor"
        except StropError as error:  # all layers stood above, so the run is fine: adapters that name single layers, say
            seconds, source = None, f"a few of its layers cannot be timed: {error.found}"
    else:
        seconds = published_seconds(shape, epoch, config, precision, machine)
        source = machine.describe(precision.compute)
    devices = devices_of(prepared)
    if seconds is not None:  # passes without gradients: half of one that trains adapters, a third of one of all weights
        twice = objective.whole_step and int(np.diff(epoch.starts).max()) > 1
        in_steps = objective.ref_sync is not None or (config.rollout.enabled and objective.needs_reference)
        again = twice + in_steps + len(objective.also)
        seconds = seconds * (1 + again / (2 if shape.adapters else 3))
        seconds = together(seconds, shape, epoch, precision, machine, devices)
        source = f"{source}{_exchanged(machine, devices)}"
        source += "; without what sampling and rewards take" if config.rollout.enabled else ""
    flops = float(flops_of(shape, epoch.work, config).sum()) / epoch.num_steps
    memory = peak_memory(epoch.work, shape, config, objective, precision, machine, devices)
    ways: list[str] = []
    if not fits(memory, machine.memory):
        ways = [*_ways(config, int(epoch.work.longest.max()))]
        if COPY in memory:
            ways.insert(0, "set training.async_save: false")
        parts = (epoch.work, shape, config, objective, precision, machine)
        ways[len(ways) - 1 : len(ways) - 1] = _sharding(*parts, devices)  # before shorter rows or another model
    copied = 0
    if machine.kind != "cpu" and config.training.async_save:
        copied = checkpoint_bytes(shape, config, precision, objective) // devices.shard
    return Estimate(memory, seconds, prepared.plan.num_steps, flops, machine.memory, source, ways, devices, copied)


COUNTS = (2, 4, 8, 16, 32, 64)
"""Devices over which it is seen whether the model fits."""


def _sharding(
    work: Work,
    shape: Shape,
    config: RunConfig,
    objective: Objective[MethodSettings],
    precision: Precision,
    machine: Machine,
    devices: Devices,
) -> Iterator[str]:
    """The fewest devices, beginning with those that there are, over which the model fits if it is sharded."""
    sharded = config.with_values({"gpu.fsdp": True, "gpu.use_ddp": False, "gpu.shard_size": None}, "tried")
    is_stored_so = shape.matrix_bytes is not None and all(model.quant == "none" for model in config.models)
    if machine.kind == "cpu" or is_stored_so or any(sharded.problems()):
        return
    for count in sorted({devices.count, *COUNTS}):
        if count < max(2, devices.count) or count == devices.shard:
            continue
        parts = peak_memory(work, shape, sharded, objective, precision, machine, Devices(count, count))
        if fits(parts, machine.memory):
            yield f"gpu.fsdp: true on {count} devices, where it fits with {sum(parts.values()) / 2**30:.1f} GiB on each"
            return


def _exchanged(machine: Machine, devices: Devices) -> str:
    """What the time of several devices assumes besides."""
    if devices.count == 1:
        return ""
    if machine.kind == "cpu":
        return f"; {devices.count} processes share its cores"
    link = machine.link(devices.count)
    assert link is not None, "a GPU whose rate is known has a link"
    return f"; {devices.count} devices, each sends {link / 1e9:.0f} GB/s"


def prediction(
    prepared: Prepared, machine: Machine, precision: Precision, tokens: RowTokens, *, timed: bool = False
) -> list[str]:
    """The lines of the estimate, or why there is none.

    Raises:
        StropError: the configuration does not fit the model, so that a run would fail.
    """
    try:
        with predicting("this architecture is of a kind that the estimate does not know"):
            return list(estimate(prepared, machine, precision, tokens, timed=timed).lines())
    except CannotBuildError as error:
        return [f"no prediction of memory and time: {error.found}"]


def predicted_time(prepared: Prepared, machine: Machine, precision: Precision, tokens: RowTokens) -> list[str]:
    """The line about the time of a run on a CPU, which is measured for it: up to half a minute."""
    try:
        with predicting("this architecture is of a kind that the estimate does not know"):
            return list(estimate(prepared, machine, precision, tokens, timed=True).time_lines())
    except CannotBuildError as error:
        return [f"no prediction of time: {error.found}"]


def longest_line(prepared: Prepared, machine: Machine, precision: Precision, tokens: RowTokens) -> list[str]:
    """How long a group may be on a device of known memory; no line where there is no estimate."""
    if machine.memory is None:
        return []
    try:
        with predicting("this architecture is of a kind that the estimate does not know"):
            longest, here = longest_that_fits(prepared, machine, precision, tokens)
    except CannotBuildError:
        return []  # `prediction` says why
    if longest < here:
        return [f"longest group that fits: about {plain(longest)} tokens; the longest here has {here:,}"]
    return [f"longest group that would fit: about {plain(longest)} tokens; the longest here has {here:,}"]


def _ways(config: RunConfig, longest: int) -> list[str]:
    """What lowers the peak, the cheapest first. longest: tokens of the longest group."""
    ways = list(ways_to_fit(config))
    budget = config.training.micro_batch_tokens
    if budget is not None and longest < budget:
        first = f"lower training.micro_batch_tokens, which is {budget:,} (the longest group has {longest:,})"
        ways.insert(0, first)
    return ways
