"""`strop train`: trains, or with --dry-run says what would be trained. Floor 10."""

from __future__ import annotations

import argparse
import shutil

from strop.cli.run_config import load, parse, parser_of_run, run_in_processes
from strop.config.manual import LAYERS, key_help
from strop.errors import ConfigError
from strop.machine import bytes_of

MOST_DEVICES = 1024

HELP = """\
usage: strop train [--config] FILE [--preset NAME] [--dry-run] [--resume [auto|PATH]] [any key of the configuration]

  --config FILE          the configuration; a FILE.yaml that stands alone is it, too
  --preset NAME          cpu, gpu-bf16, gpu-fp16, memory-efficient, or a path
  --dry-run              validate, read the data, show one example and the plan, stop; needs config.json, no weights
    --no-time            do not time the processor
    --verbose            say what the estimate leaves out, too
    --device NAME        judge another machine: cpu, or a GPU's name, such as h100
    --device-memory SIZE judge this much memory per device, such as 24GiB
    --devices N          judge N devices that train together
  --model-index N        train only the N-th model of the file, from 0
  --resume [auto|PATH]   go on from the newest complete checkpoint, or from this one; start where there is none
  --overwrite            start anew in a folder that holds another run
  --allow-changes        resume although data or settings that change the result have changed; it is recorded
"""


def usage() -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    return f"{HELP}\n{LAYERS}\n{key_help(width)}"


def run(arguments: list[str]) -> int:
    parser = parser_of_run("train")
    parser.once("--resume", nargs="?", const="auto")
    for flag in ("--device", "--device-memory", "--devices"):
        parser.once(flag)
    for switch in ("--dry-run", "--no-time", "--verbose", "--overwrite", "--allow-changes"):
        parser.switch(switch)
    options, overrides = parse(parser, arguments)
    _check_flags(options)
    devices = None if options.devices is None else _number_of_devices(options.devices)
    memory = None if options.device_memory is None else bytes_of(options.device_memory)
    config = load(options, overrides, resume=options.resume, needs_weights=not options.dry_run)
    if options.dry_run:
        from strop.dryrun import dry_run

        dry_run(
            config,
            model_index=options.model_index,
            device=options.device,
            memory=memory,
            devices=devices,
            timed=not options.no_time,
            verbose=options.verbose,
        )
        return 0

    if (code := run_in_processes(config, "train", arguments)) is not None:
        return code

    from strop.engine.progress import StopSignal
    from strop.training import train

    StopSignal.ends_process = True
    try:
        train(
            config,
            model_index=options.model_index,
            resume=options.resume,
            overwrite=options.overwrite,
            allow_changes=options.allow_changes,
        )
    finally:
        StopSignal.ends_process = False
    return 0


def _check_flags(options: argparse.Namespace) -> None:
    """Refuses flags that exclude each other or need another."""
    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite are both given", fix="choose one")
    if options.resume == "":
        raise ConfigError("--resume is empty", expected="auto, the path of a checkpoint, or nothing after it")
    of_the_dry_run = {
        "--no-time": options.no_time,
        "--verbose": options.verbose,
        "--device": options.device,
        "--device-memory": options.device_memory,
        "--devices": options.devices,
    }
    given = [flag for flag, value in of_the_dry_run.items() if value]
    if given and not options.dry_run:
        raise ConfigError(
            f"{' and '.join(given)} without --dry-run",
            expected="a dry run: a run takes the machine it is on",
            fix="add --dry-run",
        )


def _number_of_devices(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) <= MOST_DEVICES):
        raise ConfigError(f"--devices is {text[:40]!r}", expected=f"a number from 1 to {MOST_DEVICES}", fix="write 8")
    return int(text)
