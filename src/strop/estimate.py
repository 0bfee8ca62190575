"""What a run will need: peak memory and seconds a step, from the configuration and the lengths of its rows. Floor 5.

In: a `Prepared`, the machine, the dtypes, and how the tokens of rows are counted (`tokens`: shared prompts once, or
padded). Out: an `Estimate`. No weight is loaded and no GPU is touched: the model is built on torch's meta device, and a
GPU's size is asked of its driver's tool.

Memory is the largest micro-batch's: weights, gradients, optimizer, what every layer keeps for its backward pass
(`saved_per_token`), and the head's tile; beside them what libraries take, and on a CPU what the process has already.
Time is, on a CPU, what a layer of this architecture takes there; on a GPU products by rate, and passes over memory by
bandwidth. `make bench` measures the error of both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from strop.config import ModelSection, RunConfig
from strop.config.methods import MethodSettings
from strop.data.plan import RowTokens, lengths, packed_tokens, padded_tokens
from strop.engine.checkpoint import Checkpoint
from strop.engine.memory import ways_to_fit
from strop.errors import StropError
from strop.machine import Machine
from strop.objectives.base import Objective
from strop.plain import duration, plain
from strop.policy.attention import best_kernel
from strop.policy.dropout import bytes_of_left_out
from strop.policy.head_sizes import head_bytes, product_dtype, tile_shape
from strop.policy.matmul import LARGE, keeps_kernels, widens
from strop.policy.memory import KERNELS_KEPT
from strop.policy.outline import CannotBuildError, Shape, predicting, reason_for_plain_rows, shape_of
from strop.policy.precision import Precision, choose_precision
from strop.policy.rates import bf16_gains
from strop.policy.tiles import KEPT_BYTES
from strop.prepared import Prepared, with_budget
from strop.speed import measure
from strop.work import Work, body_flops, flops_of, recomputing

MIB = 2**20
ROOM = 0.9
"""Share of a device's memory that a run is let plan with; the rest is for what the estimate leaves out."""
SHARES = (False, 0.25, 0.5, 0.75, True)
"""What `gradient_checkpointing: auto` chooses among: the first that fits."""
PROCESS = {"cpu": 60 * MIB, "cuda": 500 * MIB}
"""What libraries take for a run, beside tensors: thread pools; a CUDA context with its workspaces."""
HOLES = 0.4
"""What a CPU's allocator leaves unused between tensors that come and go, as a share of them: in the end, after
micro-batches of many lengths; the first eight take it half the way. Fitted to the benchmarks' cases."""
KERNEL_BYTES = 0.7 * MIB
"""Of a kernel that oneDNN keeps, with its buffers, whatever its shape; measured, as is the next."""
MKL_BYTES = 40 * MIB
"""Of MKL's buffers, where it multiplies instead."""
PASSES = 6.0
"""How often what is saved for the backward pass moves through memory in a step: written, read, its gradient, copies.
Counted, not measured, like all that is said of a GPU's time."""
BESIDES = 1.03
"""What a step on a CPU takes, by the layers' and the head's own time: kernels for new shapes, collation, logging.
Fitted to 25 cases on two processors (benchmarks/RESULTS.md), of which it puts the median at +1 %."""
LEFT_OUT = (
    "the estimate leaves out: reading the data, the reference's pass before the first step, its log-probs (on the "
    "CPU, 4 bytes a scored token and 0.6 kB a completion) and the model of ref_model_id, evaluations, "
    "checkpoints, what a GPU's allocator leaves unused, modules_to_save, what layers that keep their own forward hold "
    "more than fused ones do (norms and MLPs of other kinds, eager attention), and in TFLOP/s and in the time on a GPU "
    "the products of a mixture's experts"
)


@dataclass(frozen=True)
class Estimate:
    """parts: bytes by name, whose sum is the peak. steps: seconds of every step of an epoch, or of the run where it is
    shorter, or None; source: where they are from, or why there are none. num_steps: of the run. flops: of a mean step.
    memory: bytes of the device, or None."""

    parts: dict[str, int]
    steps: Sequence[float] | None
    num_steps: int
    flops: float
    memory: int | None
    source: str
    ways: Sequence[str]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return _fits(self.parts, self.memory)

    def lines(self) -> Iterator[str]:
        """For a person."""
        has = "" if self.memory is None else f" of {self.memory / 2**30:.1f} GiB"
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.parts.items() if size >= 5 * MIB)
        yield f"predicted peak memory: {self.peak / 2**30:.2f} GiB{has} ({listed})"
        yield from self.time_lines()
        if not self.fits:
            yield "note: this will hardly fit; in the order to try: " + "; ".join(self.ways)

    def time_lines(self) -> Iterator[str]:
        """The time alone; none where a CPU was not timed."""
        if self.steps is not None:
            mean = statistics.mean(self.steps)
            yield (
                f"predicted time: {plain(mean)} s a step, {plain(max(self.steps))} s the longest, "
                f"{duration(mean * self.num_steps)} for all {self.num_steps} "
                f"({plain(self.flops / mean / 1e12)} TFLOP/s; {self.source})"
            )
        elif self.source:
            yield f"no prediction of time: {self.source}"


def _fits(parts: Mapping[str, int], memory: int | None) -> bool:
    return memory is None or sum(parts.values()) <= ROOM * memory


def estimate(
    prepared: Prepared, machine: Machine, precision: Precision, tokens: RowTokens, *, timed: bool = False
) -> Estimate:
    """Peak memory and seconds a step of the run, once its `micro_batch_tokens` is settled. timed: measure a CPU's
    speed, which takes up to half a minute; else its time is not predicted.

    Raises:
        CannotBuildError: the architecture needs more than its configuration.
        ModelError: the adapters do not fit the model.
    """
    config, shape = prepared.config, shape_of(prepared.config.lora, prepared.model)
    steps = _epoch(prepared, tokens)
    seconds: list[float] | None
    if machine.kind == "cpu" and timed:
        try:
            with predicting("they do not run alone"):
                seconds = _timed(prepared, shape, steps, precision, tokens)
            source = "layers of this architecture timed on this processor"
        except StropError as error:  # all layers stood above, so the run is fine: adapters that name single layers, say
            seconds, source = None, f"a few of its layers cannot be timed: {error.found}"
    else:
        seconds = _published(shape, steps, config, precision, machine)
        source = machine.describe(precision.compute)
    if seconds is not None:  # passes without gradients: half of one that trains adapters, a third of one of all weights
        twice = prepared.objective.whole_step and max(map(len, steps)) > 1
        again = twice + (prepared.objective.ref_sync is not None) + prepared.objective.needs_mismatched
        seconds = [s * (1 + again / (2 if shape.adapters else 3)) for s in seconds]
    flops = sum(flops_of(shape, part, config) for step in steps for part in step) / len(steps)
    ways = _ways(config, max(part.longest for step in steps for part in step))
    memory = peak_memory(prepared, shape, steps, precision, machine)
    return Estimate(memory, seconds, prepared.plan.num_steps, flops, machine.memory, source, ways)


def fitted(prepared: Prepared, machine: Machine, precision: Precision, tokens: RowTokens) -> Prepared:
    """`micro_batch_tokens` and `gradient_checkpointing` settled, where the configuration leaves them open, so that the
    estimate fits: by smaller micro-batches as far as groups allow, which costs the least, then by computing
    activations again. Where nothing fits, the least that there is."""
    start = with_budget(prepared, tokens, machine.kind)
    budget = start.config.training.micro_batch_tokens
    assert budget is not None
    auto = start.config.training.gradient_checkpointing == "auto"
    if machine.memory is None:
        return _settled(start, budget, False if auto else None, "the device's memory is not known")
    try:
        with predicting("no estimate"):
            return _fitted(start, machine, precision, tokens, halve=prepared.config.training.micro_batch_tokens is None)
    except CannotBuildError:
        why = "there is no estimate of memory for this architecture"
        return _settled(start, budget, False if auto else None, why)


def _fitted(start: Prepared, machine: Machine, precision: Precision, tokens: RowTokens, *, halve: bool) -> Prepared:
    """halve: micro-batches may be made smaller."""
    budget = start.config.training.micro_batch_tokens
    assert budget is not None
    budgets = [budget]
    shape = shape_of(start.config.lora, start.model)
    auto = start.config.training.gradient_checkpointing == "auto"
    if halve:
        longest = max(tokens([group]) for group in lengths(start.data.train))
        while budgets[-1] > longest:
            budgets.append(max(budgets[-1] // 2, longest))
    shares = (SHARES if shape.recomputes else SHARES[:1]) if auto else (None,)
    for budget, share in [*((budget, shares[0]) for budget in budgets), *((budgets[-1], s) for s in shares[1:])]:
        found = _settled(start, budget, share, "by the estimate of memory")
        if _fits(peak_memory(found, shape, _epoch(found, tokens), precision, machine), machine.memory):
            break
    return found


def _settled(prepared: Prepared, budget: int, share: bool | float | None, why: str) -> Prepared:
    """With this size of micro-batches and, where `auto` is to be decided, this share of checkpointed layers."""
    config = prepared.config
    if budget != config.training.micro_batch_tokens:
        config = config.with_values({"training.micro_batch_tokens": budget}, "halved until the estimate of memory fits")
    if share is not None:
        config = config.with_values({"training.gradient_checkpointing": share}, f"auto: {why}")
    return replace(prepared, config=config)


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


def planned_rows(model: ModelSection) -> RowTokens:
    """Tokens of this model's rows, as far as its configuration tells: the probe of the loaded model may still refuse
    to share prompts."""
    return packed_tokens if reason_for_plain_rows(model) is None else padded_tokens


def planned_precision(config: RunConfig, machine: Machine) -> Precision:
    """As `resolve_precision`, without touching a GPU: one whose driver's tool does not answer is taken to compute
    bfloat16.

    Raises:
        ConfigError: the device cannot compute in the dtype that is asked for.
    """
    if machine.kind == "cpu":
        return choose_precision(config.training, bf16_gains)
    return choose_precision(config.training, lambda: machine.has_bf16 is not False, lambda: machine.name)


def with_precision(
    prepared: Prepared,
    machine: Machine,
    found: Precision,
    tokens: RowTokens,
    resumed: Checkpoint | None = None,
) -> Prepared:
    """What `auto_precision` chooses, written down: what the resumed run had; else `found`, which is faster on this
    device; else bf16, on a CPU whose memory float32 does not fit by any way that `fitted` has."""
    training, recipe = prepared.config.training, resumed and resumed.state["recipe"]
    if not training.auto_precision or training.bf16 is not None or training.fp16 is not None:
        return prepared
    chosen, why = {"training.bf16": found.is_low, "training.fp16": False}, "auto_precision: the faster one"
    if recipe:
        chosen, why = {key: bool(recipe.get(key)) for key in chosen}, "auto_precision: as the run began"
    elif machine.kind == "cpu" and not found.is_low and not _can_fit(prepared, machine, found, tokens):
        chosen["training.bf16"], why = True, "auto_precision: float32 does not fit into memory"
    return replace(prepared, config=prepared.config.with_values(chosen, why))


def _can_fit(prepared: Prepared, machine: Machine, precision: Precision, tokens: RowTokens) -> bool:
    """Whether the estimate fits, as far as it is known."""
    found = fitted(prepared, machine, precision, tokens)
    try:
        return estimate(found, machine, precision, tokens).fits
    except CannotBuildError:
        return True


def saved_per_token(shape: Shape, config: RunConfig, precision: Precision, device: str) -> float:
    """Bytes that one fused layer keeps for its backward pass, a token; probabilities of attention are apart.

    c bytes an element in the compute dtype, s in the residual stream. Kept are the inputs of both norms, of linear
    layers that train (q, k and v share theirs), of the MLP with its gate and up, and queries, keys and values; of
    dropout a mask, or the places of what is left out.
    """
    c = precision.compute.itemsize
    s = c if shape.adapters else precision.master.itemsize
    kept: float = 2 * shape.width * s + (shape.queries + 2 * shape.keys) * c
    if shape.adapters:
        kept += shape.adapted * bytes_of_left_out(config.lora.lora_dropout, device)
    inputs: float = shape.width + shape.queries  # flash attention keeps its output, whatever trains
    if shape.adapters and device != "cuda":
        inputs = min(shape.distinct, inputs)
    return kept + (inputs + shape.width + 2 * shape.inner) * c


def _epoch(prepared: Prepared, tokens: RowTokens) -> list[list[Work]]:
    """The micro-batches of every step of an epoch, or of the run where it is shorter."""
    steps = islice(prepared.steps(tokens), min(prepared.plan.num_steps, prepared.plan.steps_per_epoch))
    prompts = prepared.objective.extras.prompts
    return [[Work.of(part, tokens, prompts=prompts) for part in parts] for parts in steps]


def _trained(shape: Shape) -> int:
    return shape.adapters or shape.matrix + shape.others


def peak_memory(
    prepared: Prepared, shape: Shape, steps: Sequence[Sequence[Work]], precision: Precision, machine: Machine
) -> dict[str, int]:
    """Bytes by name of the micro-batch that takes the most. Not always the one with the most tokens: a CPU keeps
    probabilities of attention."""
    work = {part for step in steps for part in step}
    holes = HOLES * (len(work) - 1) / (len(work) + 7) if machine.kind == "cpu" else 0.0
    objective = prepared.objective
    needs = (memory_of(shape, part, prepared.config, precision, machine.kind, objective, holes) for part in work)
    parts = max(needs, key=lambda parts: sum(parts.values()))
    return {**parts, "process": parts["process"] + machine.held}


def memory_of(
    shape: Shape,
    work: Work,
    config: RunConfig,
    precision: Precision,
    device: str,
    objective: Objective[MethodSettings],
    holes: float,
) -> dict[str, int]:
    c, wide = precision.compute.itemsize, precision.master.itemsize
    stream = c if shape.adapters else wide
    base, trained = shape.matrix + shape.others, _trained(shape)
    share = config.training.recomputed
    kept = shape.layers - max(1, round(share * shape.layers)) if share else shape.layers
    layer = saved_per_token(shape, config, precision, device) * work.tokens
    if best_kernel(torch.device(device), precision.compute) == "flash" and not shape.capped:
        layer += 2 * shape.keys * c * work.again
    probabilities = min(shape.heads * work.seen * c, KEPT_BYTES * work.tokens) if device == "cpu" else 0.0
    if shape.capped:  # whole squares: the tangent, the softmax in float32, and that in 16 bits
        probabilities = shape.heads * work.squares * 8
    layers = kept + 1 if share else kept  # one of the others at a time is computed again
    activations = layers * layer + (shape.layers - kept) * work.tokens * shape.width * stream
    product = product_dtype(precision.of_head(config.training.fp32_logits), device)
    embedding = shape.vocabulary * shape.width
    casts = 0
    if precision.is_low and not shape.adapters:
        casts = (shape.matrix + (embedding if product == precision.compute else 0)) * c
    sizes = work.scored, shape.vocabulary, shape.width, device, product
    trains, collisions = not shape.adapters, objective.extras.collisions
    head = head_bytes(*sizes, transform=shape.transform, collisions=collisions, trains=trains)
    head += work.tokens * shape.width * wide + (embedding * wide if trains else 0)
    # gradients of the widest tensors of one layer, as the backward pass goes through it
    backward = work.tokens * (4 * shape.inner * c + 4 * shape.width * stream)
    state = 2 if config.training.optim.endswith("8bit") else 2 * wide
    parts: dict[str, float] = {
        "weights": base * (c if shape.adapters else wide) + shape.adapters * wide,
        "gradients": trained * wide,
        "optimizer": trained * state,
        "activations": activations + layers * probabilities,
        "head": head + casts,
        "backward": backward,
        "allocator": holes * (activations + backward + head),
        "process": PROCESS[device],
    }
    is_narrow = precision.is_low and not (device == "cpu" and widens(precision.compute))
    if device == "cpu":
        tile = math.prod(tile_shape(work.scored, shape.vocabulary, device, product))
        largest = shape.width * max(work.tokens * shape.inner, tile)
        # in float32 oneDNN has the large products alone
        by_onednn = keeps_kernels(precision.compute) and (is_narrow or largest >= LARGE)
        parts["matmul library"] = KERNELS_KEPT * KERNEL_BYTES if by_onednn else MKL_BYTES
    # in float32: a frozen head; of one layer at a time its weight, what it reads, and results with their gradients
    copies = embedding if product != precision.compute and shape.adapters else 0
    if precision.is_low and not is_narrow:
        copies += shape.width * shape.inner + work.tokens * (2 * shape.inner + shape.width)
    if copies:
        parts["float32 copies"] = 4 * copies
    if objective.ref_sync is not None:
        parts["reference"] = base * wide + (casts if device == "cpu" else 0)
    return {name: int(size) for name, size in parts.items()}


def _timed(
    prepared: Prepared, shape: Shape, steps: Sequence[Sequence[Work]], precision: Precision, tokens: RowTokens
) -> list[float]:
    """Seconds of every step on this processor, by those of a micro-batch in layers of this architecture."""
    config, first = prepared.config, sorted(next(prepared.steps(tokens)), key=tokens)
    typical = first[len(first) // 2]
    speed, one = measure(config, prepared.model, precision, typical), Work.of(typical, tokens)
    entries = shape.vocabulary / speed.vocabulary
    layers = shape.layers * speed.layer * recomputing(shape, config) / body_flops(shape, one)
    head = speed.rest * entries / one.scored
    update = shape.layers * speed.layer_update + speed.rest_update * (1 if shape.adapters else entries)
    return [
        BESIDES * sum(layers * body_flops(shape, part) + head * part.scored for part in step) + update for step in steps
    ]


def _published(
    shape: Shape, steps: Sequence[Sequence[Work]], config: RunConfig, precision: Precision, machine: Machine
) -> list[float] | None:
    """Seconds of every step on a GPU, by its maker's figures; None where they are not known."""
    rate = machine.rate(precision.compute)
    if rate is None:
        return None
    bandwidth = machine.bandwidth or math.inf
    token = PASSES * shape.layers * saved_per_token(shape, config, precision, machine.kind) / bandwidth
    update = 4 * 7 * _trained(shape) / bandwidth
    return [sum(flops_of(shape, part, config) / rate + token * part.tokens for part in step) + update for step in steps]


def _ways(config: RunConfig, longest: int) -> list[str]:
    """What lowers the peak, the cheapest first. longest: tokens of the longest group."""
    ways = list(ways_to_fit(config))
    budget = config.training.micro_batch_tokens
    if budget is not None and longest < budget:
        first = f"lower training.micro_batch_tokens, which is {budget:,} (the longest group has {longest:,})"
        ways.insert(0, first)
    return ways
