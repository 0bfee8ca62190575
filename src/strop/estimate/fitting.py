"""What the configuration leaves open is settled so that the predicted memory suffices. Floor 5."""

from __future__ import annotations

from dataclasses import replace

from strop.allocator import give_back_freed_memory
from strop.config import ModelSection, RunConfig
from strop.engine.checkpoint import Checkpoint
from strop.estimate.devices import devices_of
from strop.estimate.memory import fits, peak_memory
from strop.machine import Machine
from strop.plan.micro_batch_size import longest_group
from strop.plan.row_tokens import RowTokens, packed_tokens, padded_tokens
from strop.policy.kernels.product_rates import bf16_gains
from strop.policy.model.from_config import CannotBuildError, predicting, reason_for_plain_rows
from strop.policy.precision import Precision, choose_precision
from strop.prepared import Prepared, with_budget

SHARES = (False, 0.25, 0.5, 0.75, True)
"""What `gradient_checkpointing: auto` chooses among: the first that fits."""


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
    shape, devices = start.shape(), devices_of(start)
    auto = start.config.training.gradient_checkpointing == "auto"
    if halve:
        longest = longest_group(start.data.train, tokens)
        while budgets[-1] > longest:
            budgets.append(max(budgets[-1] // 2, longest))
    shares = (SHARES if shape.recomputes else SHARES[:1]) if auto else (None,)
    for budget, share in [*((budget, shares[0]) for budget in budgets), *((budgets[-1], s) for s in shares[1:])]:
        found = _settled(start, budget, share, "by the estimate of memory")
        work = found.work(tokens).work
        if fits(peak_memory(work, shape, found.config, found.objective, precision, machine, devices), machine.memory):
            break
    give_back_freed_memory(len(start.data.train))
    return found


def _settled(prepared: Prepared, budget: int, share: bool | float | None, why: str) -> Prepared:
    """With this size of micro-batches and, where `auto` is to be decided, this share of checkpointed layers."""
    config = prepared.config
    if budget != config.training.micro_batch_tokens:
        config = config.with_values({"training.micro_batch_tokens": budget}, "halved until the estimate of memory fits")
    if share is not None:
        config = config.with_values({"training.gradient_checkpointing": share}, f"auto: {why}")
    return replace(prepared, config=config)


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
        with predicting("no estimate"):
            shape = found.shape()
            parts = (shape, found.config, found.objective, precision, machine, devices_of(found))
            needed = peak_memory(found.work(tokens).work, *parts)
    except CannotBuildError:
        return True
    return fits(needed, machine.memory)
