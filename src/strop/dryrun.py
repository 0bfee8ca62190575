"""`--dry-run`: the road up to the weights, told instead of run. Floor 6.

Validates, reads and tokenises the data, shows one example as it is trained, every value with where it came from, and
what the run would be. Loads no weights and touches no GPU; writes nothing but into the cache.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.text import Text

from strop.config import RunConfig, resolve
from strop.config.yamlfile import write_value
from strop.data.show import show_group
from strop.disk import refuse_in_the_way
from strop.distributed import pick_device
from strop.errors import ConfigError
from strop.estimate import fitted, planned_precision, planned_rows, prediction, with_precision
from strop.machine import machine_of
from strop.policy.outline import reason_for_plain_rows
from strop.prepared import prepare, run_folder, select_models
from strop.terminal import escaped


def dry_run(config: RunConfig, *, model_index: int | None = None, console: Console | None = None) -> None:
    """Tell what `strop train` would do with `config`, on standard output.

    Raises:
        StropError: whatever would stop the run before its weights are loaded.
    """
    console = console or Console(soft_wrap=True)

    def say(text: str = "") -> None:
        console.print(Text(escaped(text)))

    config = resolve(config)
    models = select_models(config, model_index)
    for model in models:
        refuse_in_the_way(run_folder(config, model))
    device, notes = _device(config)
    machine = machine_of(device)
    found = planned_precision(config, machine)
    runs = []
    for model in models:
        tokens = planned_rows(model)
        prepared = with_precision(prepare(config, model), machine, found, tokens)
        runs.append((fitted(prepared, machine, planned_precision(prepared.config, machine), tokens), tokens))
    say("The configuration: key, value, where it came from\n")
    for line in _values(config, runs[0][0].config):
        say(line)
    for note in notes:
        say(f"note: {note}")
    for prepared, tokens in runs:
        say(f"\n== {prepared.model.name}")
        for line in (*prepared.data.report.lines(), *prepared.describe(tokens)):
            say(line)
        for note in prepared.advice():
            say(f"note: {note}")
        if (reason := reason_for_plain_rows(prepared.model)) is not None:
            say(f"plain padded rows, prompts are not shared: {reason}")
        precision = planned_precision(prepared.config, machine)
        for line in prediction(prepared, machine, precision, tokens, timed=True):
            say(line)
        say("\nThe first example, trained tokens marked:")
        shown = show_group(prepared.data.train[0], prepared.tokenizer, colour=console.is_terminal)
        console.print(Text.from_ansi(shown) if console.is_terminal else Text(shown))
    say("\ndry run: nothing was trained and nothing was written but into the cache")


def _values(config: RunConfig, resolved: RunConfig) -> list[str]:
    """One line a key; `resolved` has the values and origins that the data decided (and only its own model)."""
    decided = {key: value for key, value, _ in resolved.leaves()}
    rows = []
    for key, value, _ in config.leaves():
        settled = resolved if not key.startswith("models.") else config
        rows.append((key, write_value(decided[key] if settled is resolved else value), settled.origins.get(key, "")))
    widths = [max(len(row[i]) for row in rows if len(row[i]) <= 48) for i in (0, 1)]
    return [f"{key:{widths[0]}}  {value:{widths[1]}}  {origin}" for key, value, origin in rows]


def _device(config: RunConfig) -> tuple[torch.device, list[str]]:
    """What is wrong with the devices stops a run, and is only said here."""
    try:
        return pick_device(config.gpu)
    except ConfigError as error:
        return torch.device("cpu"), [f"this would stop a run here: {error}"]
