"""`--dry-run`: builds a run up to the weights, and describes it instead of running it. Floor 8.

Validates, reads and tokenises the data, shows one example as it is trained, every value with where it came from, and
what the run would be. Loads no weights and touches no GPU; writes nothing but into the cache. What takes long to import
comes after the first example, and the processor is timed last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from strop.config import ModelSection, RunConfig, resolve
from strop.config.unread_keys import unread
from strop.config.yamlfile import write_value
from strop.data.load import LoadedData
from strop.data.text.show import SeenRow, odd_groups, show_group
from strop.device import num_processes, pick_device
from strop.errors import ConfigError, SaveError
from strop.export.converted_bases import with_converted
from strop.machine import Machine, machine_named, machine_of
from strop.modelrows import ModelRows
from strop.policy.model.folder import has_weights, source_of
from strop.preflight import run_folder, select_models
from strop.rundir import RunDir
from strop.terminal import escaped

if TYPE_CHECKING:
    from strop.session import Settled


def dry_run(
    config: RunConfig,
    *,
    model_index: int | None = None,
    device: str | None = None,
    memory: int | None = None,
    devices: int | None = None,
    timed: bool = True,
    verbose: bool = False,
    console: Console | None = None,
) -> None:
    """Tell what `strop train` would do with `config`, on standard output.

    Args:
        device: the machine that is judged: `cpu` or a GPU's name; None: this one.
        memory: bytes that each device has; None: its own.
        devices: how many of them train together; None: as many as the configuration says.
        timed: measure the speed of this processor, which takes up to half a minute.
        verbose: say what the estimate leaves out, too.

    Raises:
        StropError: whatever would stop the run before its weights are loaded.
    """
    console = console or Console(soft_wrap=True)

    def say(text: str = "") -> None:
        console.print(Text(escaped(text)))

    config = resolve(config)
    select_models(config, model_index)
    config = with_converted(config, model_index)
    models = select_models(config, model_index)
    for model in models:
        folder = RunDir(run_folder(config, model), logging_dir=config.logging.logging_dir)
        if present := folder.check(config.training.mount_dir):
            there = f"{folder.path} holds another run ({', '.join(present)})"
            say(f"note: without --resume or --overwrite this would stop a run here: {there}")
    processes = devices or (num_processes(config.gpu) if device is None else config.gpu.asked_processes)
    machine, notes = _machine(config, device, memory, processes)
    if devices is not None:
        notes.append(f"judged for {devices} devices")
    runs = []
    for model in models:
        read = _read(config, model, console)
        runs.append(_settle(config, model, machine, processes, read, say))
    say("The configuration: key, value, where it came from\n")
    _show_values(_values(config, runs[0].prepared.config), console)
    for note in notes:
        say(f"note: {note}")
    if timed and machine.kind == "cpu":
        say("\ntiming layers of the model on this processor, up to half a minute; --no-time leaves it out")
        for run in runs:
            for line in run.time():
                say(f"{run.prepared.model.name}: {line}" if len(runs) > 1 else line)
    if verbose:
        from strop.estimate import LEFT_OUT

        say(f"\n{LEFT_OUT}")
    say("\ndry run: nothing was trained and nothing was written but into the cache")


def _read(config: RunConfig, model: ModelSection, console: Console) -> tuple[ModelRows, LoadedData]:
    """Shows the first row as it is trained, reads all of them, and says what became of them."""
    rows = ModelRows.of(config, model, needs_weights=False)
    data, first = None, rows.first()
    if first is None:
        data = rows.load()
        group = data.train[0]
        first = SeenRow(group, rows.left_out([group.origin]).get(group.origin, ()))

    def show(title: str, row: SeenRow, *, whole: bool) -> None:
        shown = show_group(row.group, rows.tokenizer, rows=rows.config.rows, colour=console.is_terminal, whole=whole)
        marked = "" if config.rows == "prompt" else ", trained tokens marked"
        console.print(Text(escaped(f"\n{title}{marked}:")))
        console.print(Text.from_ansi(shown) if console.is_terminal else Text(shown))
        if row.left_out:
            console.print(Text(escaped("left out: " + "; ".join(row.left_out))))

    console.print(Text(escaped(f"== {model.name}")))
    show("The first example", first, whole=True)
    data = data or rows.load()
    odd = [(words, data.train[number]) for words, number in odd_groups(data.train)]
    gone = rows.left_out({group.origin for _, group in odd})
    for words, group in odd:
        if group != first.group:
            show(f"{group.origin}, {words}", SeenRow(group, gone.get(group.origin, ())), whole=False)
    console.print(Text(escaped("\n" + "\n".join(data.report.lines()))))
    return rows, data


def _settle(
    config: RunConfig,
    model: ModelSection,
    machine: Machine,
    processes: int,
    read: tuple[ModelRows, LoadedData],
    say: Callable[[str], None],
) -> Settled:
    """Settles the run, and says what it will be and need."""
    from strop.generate.while_training import prompts_of
    from strop.policy.model.from_config import reason_for_plain_rows
    from strop.policy.model.shape_check import check_shapes
    from strop.session import Session

    folder = source_of(model.huggingface_id)
    is_without = os.path.isdir(folder) and not has_weights(folder)
    if os.path.isdir(folder) and not is_without:
        check_shapes(model)
    with Session(config, model, None, machine=machine, num_processes=processes, read=read) as session:
        settled = session.settled
        for line in settled.describe():
            say(line)
        for note in settled.prepared.advice():
            say(f"note: {note}")
        prompts_of(session)  # refuses what a run would refuse
    if (reason := reason_for_plain_rows(model)) is not None:
        say(f"plain padded rows, prompts are not shared: {reason}")
    for line in (*settled.prediction(), *settled.longest()):
        say(line)
    for note in _space(settled, run_folder(config, model)):
        say(f"note: {note}")
    if is_without:
        say(f"note: there are no weights in {folder}: this dry run needs none, a run does")
    say("")
    return settled


def _space(settled: Settled, folder: Path) -> list[str]:
    """What is to be said of the disks. One that is too full stops a run, and is only said here."""
    from strop.disk_estimate import check_space

    try:
        return list(check_space(settled.prepared, settled.precision, folder))
    except SaveError as error:
        return [f"this would stop a run here: {error}"]


def _values(config: RunConfig, resolved: RunConfig) -> list[tuple[str, str, str]]:
    """Key, value and origin of each key that the run reads; `resolved` has the values and origins that the data
    decided (and only its own model)."""
    decided = {key: value for key, value, _ in resolved.leaves()}
    rows, hidden = [], unread(config)
    for key, value, _ in config.leaves():
        if key in hidden:
            continue
        settled = resolved if not key.startswith("models.") else config
        rows.append((key, write_value(decided[key] if settled is resolved else value), settled.origins.get(key, "")))
    return rows


def _show_values(rows: Sequence[tuple[str, str, str]], console: Console) -> None:
    """In three columns. On a terminal, what is too long for its column goes on below, in the column."""
    if console.is_terminal:
        table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), Column(overflow="fold"), padding=(0, 2))
        for row in rows:
            table.add_row(*(Text(escaped(cell)) for cell in row))
        console.print(table, soft_wrap=False)
        return
    widths = [max(len(row[i]) for row in rows if len(row[i]) <= 48) for i in (0, 1)]
    for key, value, origin in rows:
        console.print(Text(escaped(f"{key:{widths[0]}}  {value:{widths[1]}}  {origin}")))


def _machine(config: RunConfig, device: str | None, memory: int | None, processes: int) -> tuple[Machine, list[str]]:
    """What each process has of the machine that is judged, and what is to be said of it."""
    if device is None:
        here, notes = _device(config)
        machine = machine_of(here)
    else:
        machine, notes = machine_named(device), [f"judged for another machine: {device}"]
    return machine.shared_by(processes) if memory is None else replace(machine, memory=memory), notes


def _device(config: RunConfig) -> tuple[torch.device, list[str]]:
    """What is wrong with the devices stops a run, and is only said here."""
    try:
        return pick_device(config.gpu)
    except ConfigError as error:
        return torch.device("cpu"), [f"this would stop a run here: {error}"]
