"""What a run will need: peak memory and seconds a step, from the configuration and the lengths of its rows. Floor 5.

In: a `Prepared` and a device. Out: an `Estimate`. No weight is loaded and no GPU is touched: the model is built on
torch's meta device, and a GPU's size is asked of its driver's tool.

Memory is the largest micro-batch's: weights, gradients, optimizer, what every layer keeps for its backward pass
(`saved_per_token`, the one table to calibrate), and the head's chunk. Time is, on a CPU, what a layer of this
architecture takes there; on a GPU products by rate, and passes over memory by bandwidth. `make bench` measures the
error of both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from strop.config import RunConfig
from strop.data.plan import RowTokens, Sized, cut, lengths, packed_tokens
from strop.engine.memory import ways_to_fit
from strop.machine import Machine
from strop.policy.adapters import adapters_of, linear_layers, resolve_targets
from strop.policy.folder import first_line, place_of
from strop.policy.load import LOAD_ERRORS, CannotBuildError, empty_model, model_config
from strop.policy.logprobs import SLAB_ELEMENTS, chunk_rows
from strop.policy.memory import KERNELS
from strop.policy.precision import Precision
from strop.policy.tiles import KEPT_BYTES
from strop.prepared import Prepared, with_budget
from strop.speed import Speed, measure

MIB = 2**20
ROOM = 0.9
"""Share of a device's memory that a run is let plan with; the rest is for what the estimate leaves out."""
SHARES = (False, 0.25, 0.5, 0.75, True)
"""What `gradient_checkpointing: auto` chooses among: the first that fits."""
PROCESS = {"cpu": 60 * MIB, "cuda": 500 * MIB}
"""What libraries take beside tensors: thread pools; a CUDA context with its workspaces."""
HOLES = {"cpu": 0.35, "cuda": 0.0}
"""What the allocator leaves unused between tensors that come and go in a step, as a share of them."""
PASSES = 6.0
"""How often what is saved for the backward pass moves through memory in a step: written, read, its gradient, copies."""
BESIDES = 1.15
"""What a step on a CPU takes, by the layers' and the head's own time: kernels for new shapes, collation, logging."""
OUTPUTS = frozenset({"o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "wo", "w2"})
"""Linear layers at the end of an attention or feed-forward block; the others of a block share its input."""
LEFT_OUT = (
    "reading the data, the reference's pass before the first step, evaluations, checkpoints, what a GPU's allocator "
    "leaves unused, modules_to_save; of mixtures of experts all experts are counted"
)


@dataclass(frozen=True)
class Shape:
    """A model in numbers: width D, feed-forward width I, attention widths (queries A, keys and values K), heads of
    queries, layers, vocabulary; matrix: weights of all linear layers but the head; others: all further weights, tied
    ones once."""

    width: int
    inner: int
    queries: int
    keys: int
    heads: int
    layers: int
    vocabulary: int
    matrix: int
    others: int
    adapters: int = 0
    adapted: float = 0.0
    distinct: float = 0.0
    """adapters: their weights. adapted: inputs of adapted layers, in elements a token a layer; distinct: those that
    several of them share (q, k, v; gate, up) counted once."""


@dataclass(frozen=True)
class Estimate:
    """parts: bytes by name, whose sum is the peak. steps: seconds of every step of an epoch; None: the device's rate is
    not known. flops: of a mean step. memory: bytes of the device, or None."""

    parts: dict[str, int]
    steps: Sequence[float] | None
    flops: float
    memory: int | None
    source: str
    ways: Sequence[str]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.memory is None or self.peak <= ROOM * self.memory

    def lines(self) -> Iterator[str]:
        """For a person."""
        has = "" if self.memory is None else f" of {self.memory / 2**30:.1f} GiB"
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.parts.items() if size >= 5 * MIB)
        yield f"predicted peak memory: {self.peak / 2**30:.2f} GiB{has} ({listed})"
        if self.steps is not None:
            mean = statistics.mean(self.steps)
            yield (
                f"predicted time: {mean:.3g} s a step, {max(self.steps):.3g} s the longest, "
                f"{sum(self.steps) / 60:.3g} minutes an epoch ({self.flops / mean / 1e12:.3g} TFLOP/s; {self.source})"
            )
        yield f"left out: {LEFT_OUT}"
        if not self.fits:
            yield "note: this will hardly fit; in the order to try: " + "; ".join(self.ways)


def estimate(
    prepared: Prepared, machine: Machine, precision: Precision, tokens: RowTokens, *, timed: bool = False
) -> Estimate:
    """Peak memory and seconds a step of the run, once its `micro_batch_tokens` is settled. timed: measure a CPU's
    speed, which takes a few seconds; else its time is not predicted.

    Raises:
        CannotBuildError: the architecture needs more than its configuration.
        ModelError: the adapters do not fit the model.
    """
    config, training = prepared.config, prepared.config.training
    shape = shape_of(prepared)
    budget = training.micro_batch_tokens
    assert budget is not None
    sized, plan = lengths(prepared.data.train), prepared.plan
    num_steps = min(plan.steps_per_epoch, plan.num_steps)
    cuts = [cut(sized, plan.groups(step), budget, tokens) for step in range(1, num_steps + 1)]
    steps = [[_Work.of([sized[i] for i in part], tokens) for part in parts] for parts in cuts]
    work = {part for step in steps for part in step}
    synced = prepared.objective.ref_sync is not None
    needs = [_memory(shape, part, config, precision, machine.kind, synced) for part in work]
    memory = max(needs, key=lambda parts: sum(parts.values()))
    flops = [sum(_flops(shape, part, config) for part in step) for step in steps]
    seconds, source = None, "not known"
    if machine.kind == "cpu" and timed:
        parts = sorted((part for parts in cuts for part in parts), key=lambda part: tokens([sized[i] for i in part]))
        typical = [sized[i] for i in parts[len(parts) // 2]]
        speed = measure(config, prepared.model, precision, typical)
        one = _Work.of(typical, tokens)
        seconds = [BESIDES * _seconds(shape, speed, one, step, config) + _update(shape, speed) for step in steps]
        source = "layers of this architecture timed on this processor"
    elif (rate := machine.rate(precision.compute)) is not None:
        token = PASSES * shape.layers * saved_per_token(shape, config, precision, machine.kind)
        moved = [token * sum(part.tokens for part in step) + 4 * 7 * _trained(shape) for step in steps]
        bandwidth, source = machine.bandwidth or math.inf, machine.describe()
        seconds = [f / rate + m / bandwidth for f, m in zip(flops, moved, strict=True)]
    if seconds is not None:  # passes without gradients, a third or a quarter of a training pass
        again = (prepared.objective.whole_step and max(map(len, steps)) > 1) + synced
        seconds = [s * (1 + again / (3 if shape.adapters else 4)) for s in seconds]
    ways = _ways(config, max(part.longest for part in work))
    return Estimate(memory, seconds, sum(flops) / num_steps, machine.memory, source, ways)


def with_checkpointing(
    prepared: Prepared, machine: Machine, precision: Precision, tokens: RowTokens = packed_tokens
) -> Prepared:
    """`gradient_checkpointing: auto` decided: the smallest share of layers with which the estimate fits."""
    if prepared.config.training.gradient_checkpointing != "auto":
        return prepared
    key = "training.gradient_checkpointing"

    def chosen(share: bool | float, why: str) -> Prepared:
        return replace(prepared, config=prepared.config.with_values({key: share}, f"auto: {why}"))

    if machine.memory is None:
        return chosen(True, "the device's memory is not known")
    for share in SHARES:
        found = chosen(share, "by the estimate of memory")
        try:
            if estimate(with_budget(found, tokens, machine.kind), machine, precision, tokens).fits:
                break
        except CannotBuildError:
            return chosen(True, "there is no estimate of memory for this architecture")
    return found


def prediction(
    prepared: Prepared, machine: Machine, precision: Precision, tokens: RowTokens, *, timed: bool = False
) -> list[str]:
    """The lines of the estimate, or why there is none.

    Raises:
        ModelError: the configuration does not fit the model, so that a run would fail.
    """
    try:
        return list(estimate(prepared, machine, precision, tokens, timed=timed).lines())
    except CannotBuildError as error:
        return [f"no prediction of memory and time: {error.found}"]


def planned_precision(config: RunConfig, machine: Machine) -> Precision:
    """As `resolve_precision`, without asking a GPU: `auto_precision` takes it to compute bfloat16 if it is known to."""
    training = config.training
    auto = training.auto_precision and training.bf16 is None and training.fp16 is None
    if training.bf16 or (auto and machine.kind == "cuda" and not any(old in machine.name for old in ("V100", "T4"))):
        return Precision(torch.bfloat16)
    return Precision(torch.float16, scaler=True) if training.fp16 else Precision(torch.float32)


def saved_per_token(shape: Shape, config: RunConfig, precision: Precision, device: str) -> float:
    """Bytes that one fused layer keeps for its backward pass, a token; probabilities of attention are apart.

    c bytes an element in the compute dtype, s in the residual stream. Kept are the inputs of both norms, of linear
    layers that train (q, k and v share theirs), of the MLP with its gate and up, and queries, keys and values. Dropout
    gives every adapter an input and a mask of its own, and an MLP of such adapters keeps all that it computes.
    """
    c = precision.compute.itemsize
    s = c if shape.adapters else precision.master.itemsize
    kept: float = 2 * shape.width * s + (shape.queries + 2 * shape.keys) * c
    if shape.adapters and config.lora.lora_dropout:
        kept += shape.adapted * (c + (1 if device == "cuda" else s))
        return kept + (3 if shape.distinct > 2 * shape.width + shape.queries else 2) * shape.inner * c
    inputs = min(shape.distinct, shape.width + shape.queries) if shape.adapters else shape.width + shape.queries
    return kept + (inputs + shape.width + 2 * shape.inner) * c


def shape_of(prepared: Prepared) -> Shape:
    """The model in numbers, built without weights.

    Raises:
        CannotBuildError: the architecture needs more than its configuration.
        ModelError: the adapters do not fit the model.
    """
    model = prepared.model
    module = empty_model(model)
    try:
        shape = _without_adapters(module, model_config(model).get_text_config())
    except LOAD_ERRORS as error:  # an architecture whose configuration has other names, or one a layer
        found = f"its config.json does not say how large it is: {first_line(error)}"
        raise CannotBuildError(found, where=place_of(model)) from error
    lora = adapters_of(prepared.config.lora, model)
    if lora is None:
        return shape
    targets = resolve_targets(module, lora.target_modules, place_of(model))
    linears = linear_layers(module)
    sides = {n: _sides(m) for n, m in linears.items() if any(n == t or n.endswith(f".{t}") for t in targets)}
    adapters = lora.r * sum(i + o for i, o in sides.values())
    adapted = sum(i for i, _ in sides.values()) / shape.layers
    shared = {(n.rpartition(".")[0], n.rpartition(".")[2] in OUTPUTS): i for n, (i, _) in sides.items()}
    return replace(shape, adapters=adapters, adapted=adapted, distinct=sum(shared.values()) / shape.layers)


def _without_adapters(module: PreTrainedModel, text: PreTrainedConfig) -> Shape:
    heads = getattr(text, "num_attention_heads", 1)
    width = text.hidden_size
    head_dim = getattr(text, "head_dim", None) or width // heads
    matrix = sum(layer.weight.numel() for layer in linear_layers(module).values())  # type: ignore[operator, misc]
    return Shape(
        width=width,
        inner=getattr(text, "intermediate_size", None) or 4 * width,
        queries=heads * head_dim,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        heads=heads,
        layers=text.num_hidden_layers,
        vocabulary=module.get_output_embeddings().weight.shape[0],
        matrix=matrix,
        others=sum(p.numel() for p in module.parameters()) - matrix,
    )


def _sides(layer: nn.Module) -> tuple[int, int]:
    out, inside = layer.weight.shape  # type: ignore[misc]
    return int(inside), int(out)


@dataclass(frozen=True)
class _Work:
    """A micro-batch in numbers: tokens of its rows; keys that its queries see, all together; scored tokens at most;
    tokens of its longest group."""

    tokens: int
    seen: float
    scored: int
    longest: int

    @classmethod
    def of(cls, groups: Sequence[Sized], tokens: RowTokens) -> _Work:
        own = [g.lengths for g in groups]
        spans = [tokens([g]) for g in own]
        seen = sum(g.prompt**2 / 2 + sum(g.prompt * n + n**2 / 2 for n in g.completions) for g in own)
        return cls(tokens(groups), seen, sum(sum(g.completions) for g in own), max(spans))


def _share(config: RunConfig) -> float:
    """Of layers that are checkpointed, once that is decided."""
    share = config.training.gradient_checkpointing
    assert share != "auto"
    return float(share)


def _trained(shape: Shape) -> int:
    return shape.adapters or shape.matrix + shape.others


def _memory(
    shape: Shape, work: _Work, config: RunConfig, precision: Precision, device: str, synced: bool
) -> dict[str, int]:
    c, wide = precision.compute.itemsize, precision.master.itemsize
    stream = c if shape.adapters else wide
    base, trained = shape.matrix + shape.others, _trained(shape)
    share = _share(config)
    kept = shape.layers - max(1, round(share * shape.layers)) if share else shape.layers
    layer = saved_per_token(shape, config, precision, device) * work.tokens
    probabilities = shape.heads * work.seen * c
    if device == "cpu" and probabilities <= KEPT_BYTES:
        layer += probabilities
    activations = kept * layer
    if share:
        activations += (shape.layers - kept) * work.tokens * shape.width * stream + layer
    casts = (shape.matrix + shape.vocabulary * shape.width) * c if precision.is_low and not shape.adapters else 0
    rows = min(work.scored, chunk_rows(shape.vocabulary, not shape.adapters, device))
    slab = min(rows * shape.vocabulary, SLAB_ELEMENTS) if device == "cpu" else rows * shape.vocabulary
    head = rows * shape.vocabulary * c + slab * wide * (2 if precision.is_low else 1)
    head += (work.tokens + 3 * work.scored) * shape.width * wide
    if not shape.adapters:
        head += shape.vocabulary * shape.width * wide  # its gradient, summed over chunks
    # gradients of the widest tensors of one layer, as the backward pass goes through it
    passing = work.tokens * (4 * shape.inner * c + 4 * shape.width * stream)
    state = 2 if config.training.optim.endswith("8bit") else 2 * wide
    parts: dict[str, float] = {
        "weights": base * (c if shape.adapters else wide) + shape.adapters * wide,
        "gradients": trained * wide,
        "optimizer": trained * state,
        "activations": activations,
        "head": head + casts,
        "passing": passing,
        "allocator": HOLES.get(device, 0.0) * (activations + passing),
        "process": PROCESS.get(device, PROCESS["cuda"]),
    }
    if device == "cpu" and precision.is_low:
        parts["kernels"] = KERNELS * 1.6 * MIB  # of oneDNN, with their buffers
    if synced:
        parts["reference"] = base * wide
    return {name: int(size) for name, size in parts.items()}


def _flops(shape: Shape, work: _Work, config: RunConfig) -> float:
    """Of the forward and backward pass of one micro-batch."""
    head = 2.0 * shape.vocabulary * shape.width * work.scored
    return _body_flops(shape, work) * _recomputed(shape, config) + head * (2 if shape.adapters else 4)


def _body_flops(shape: Shape, work: _Work) -> float:
    """Of all layers; attention computes its scores again on the way back."""
    products = 2.0 * shape.matrix * work.tokens * (2 if shape.adapters else 3)
    attention = 4.0 * shape.queries * shape.layers * work.seen * 3.5
    return products + attention + 6.0 * shape.adapters * work.tokens


def _recomputed(shape: Shape, config: RunConfig) -> float:
    """What checkpointing makes of the layers' work."""
    return 1 + _share(config) / (2 if shape.adapters else 3)


def _seconds(shape: Shape, speed: Speed, typical: _Work, work: Sequence[_Work], config: RunConfig) -> float:
    """Of the forward and backward passes of all this work, by those of a typical micro-batch."""
    body = sum(_body_flops(shape, part) for part in work) / _body_flops(shape, typical)
    head = sum(part.scored for part in work) / typical.scored * shape.vocabulary / speed.vocabulary
    return body * _recomputed(shape, config) * shape.layers * speed.layer + head * speed.rest


def _update(shape: Shape, speed: Speed) -> float:
    """Seconds of clipping and of the optimizer."""
    rest = speed.rest_update * (1 if shape.adapters else shape.vocabulary / speed.vocabulary)
    return shape.layers * speed.layer_update + rest


def _ways(config: RunConfig, longest: int) -> list[str]:
    """What lowers the peak, the cheapest first. longest: tokens of the longest group."""
    ways = list(ways_to_fit(config))
    budget = config.training.micro_batch_tokens
    if budget is not None and longest < budget:
        first = f"lower training.micro_batch_tokens, which is {budget:,} (the longest group has {longest:,})"
        ways.insert(0, first)
    return ways
