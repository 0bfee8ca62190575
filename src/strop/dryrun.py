"""`--dry-run`: the road up to the weights, told instead of run. Floor 4.

Validates, reads and tokenises the data, shows one example as it is trained, every value with where it came from, and
what the run would be. Loads no weights, touches no GPU and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from strop.config import RunConfig, advice, resolve
from strop.data.plan import cut, default_budget, packed_tokens
from strop.data.show import show_group
from strop.distributed import pick_device
from strop.engine.optim import warmup_steps
from strop.errors import ConfigError
from strop.train import Prepared, prepare, select_models


def dry_run(config: RunConfig, *, model_index: int | None = None, console: Console | None = None) -> None:
    """Tell what `strop train` would do with `config`, on standard output.

    Raises:
        StropError: whatever would stop the run before its weights are loaded.
    """
    console = console or Console(soft_wrap=True)
    config = resolve(config)
    console.print(_values(config))
    for note in (*_device_notes(config), *advice(config)):
        console.print(Text(f"note: {note}"))
    for model in select_models(config, model_index):
        prepared = prepare(config, model)
        console.rule(Text(model.name))
        for line in (*prepared.data.report.lines(), *_recipe(prepared)):
            console.print(Text(line))
        console.print(Text("\nThe first example, trained tokens marked:"))
        console.print(show_group(prepared.data.train[0], prepared.tokenizer, colour=console.is_terminal))
    console.print(Text("\ndry run: nothing was trained and nothing was written"))


def _values(config: RunConfig) -> Table:
    table = Table(title="Configuration", title_justify="left", box=None, pad_edge=False)
    for heading in ("key", "value", "from"):
        table.add_column(heading, overflow="fold")
    for key, value, _ in config.leaves():
        table.add_row(Text(key), Text(_shown(value)), Text(config.origins.get(key, "")))
    return table


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _device_notes(config: RunConfig) -> list[str]:
    """What is wrong with the devices stops a run, and is only said here."""
    try:
        return pick_device(config.gpu)[1]
    except ConfigError as error:
        return [f"this would stop a run here: {error}"]


def _recipe(prepared: Prepared) -> Iterator[str]:
    config, plan, data = prepared.config, prepared.plan, prepared.data
    training = config.training
    assert training.groups_per_step is not None
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if training.groups_per_step == batch * accumulation:
        made = f" = {batch} per device x {accumulation} accumulation steps x 1 device"
    else:
        made = ""
    yield f"effective batch: {training.groups_per_step} groups a step{made}"
    steps = plan.num_steps
    epochs = steps / plan.steps_per_epoch
    warmup = warmup_steps(steps, training)
    yield f"steps: {steps} ({plan.steps_per_epoch} an epoch, {epochs:.3g} epochs), {warmup} of them warm-up"
    if warmup >= steps:
        yield (
            f"note: the warm-up never ends: {warmup} steps of {steps}; the learning rate reaches "
            f"{training.learning_rate:g} at the last step at best. Lower training.warmup_steps or use warmup_ratio"
        )
    tokens = sum(packed_tokens([data.train[i] for i in plan.groups(s)]) for s in range(1, plan.steps_per_epoch + 1))
    budget = training.micro_batch_tokens or default_budget(data.train, batch, packed_tokens)
    parts = [p for s in range(1, plan.steps_per_epoch + 1) for p in cut(map(data.train.__getitem__, plan.groups(s)), budget, packed_tokens)]
    yield (
        f"tokens: {tokens:,} an epoch with prompts shared, in {len(parts)} micro-batches of at most {budget:,}, "
        f"{100 * tokens / (len(parts) * budget):.0f} % full"
    )
