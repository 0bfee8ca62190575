"""What commands that work on a run share: a configuration, a preset, a model, any key as a flag. Floor 10, no torch.

options, overrides = parse(parser_of_run("train"), arguments)
config = load(options, overrides)
if (code := run_in_processes(config, "train", arguments)) is not None:
    return code
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from strop.cli.parser import Parser
from strop.config import CommandLine, RunConfig, load_config
from strop.config.flags import is_file, split_flags
from strop.errors import ConfigError
from strop.terminal import log_to_terminal


def parser_of_run(command: str) -> Parser:
    """A parser that takes --config, --preset and --model-index."""
    parser = Parser(command)
    parser.once("--config")
    parser.once("--preset")
    parser.once("--model-index", type=int)
    return parser


def parse(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, CommandLine]:
    """The command's own flags, and the keys of the configuration that are given as flags. A YAML file that stands alone
    is that of `--config`.

    Raises:
        ConfigError: a flag that is neither, or has no good value; several configurations.
    """
    overrides, own = split_flags(arguments, parser.flags)
    options, rest = parser.parse_known_args(own)
    if is_file(getattr(options, "resume", None) or ""):  # a word behind --resume is its value, which is a folder
        rest, options.resume = [options.resume, *rest], "auto"
    files = [word for word in rest if is_file(word)]
    if others := [word for word in rest if word not in files]:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    given = [*([options.config] if options.config is not None else []), *files]
    if len(given) > 1:
        raise ConfigError(
            f"{len(given)} configurations are given: {', '.join(given)}",
            expected="one",
            fix="name one; what is to differ follows it as flags: --learning-rate 1e-6",
        )
    options.config = given[0] if given else None
    return options, overrides


def load(
    options: argparse.Namespace, overrides: CommandLine, *, resume: str | None = None, needs_weights: bool = True
) -> RunConfig:
    """Reads the configuration, opens the log, and refuses files and models that are not there.

    All of this comes before torch is imported, which takes seconds.

    Raises:
        StropError: what is wrong with the configuration, or with what it names.
    """
    config = load_config(options.config, preset=options.preset, overrides=overrides)
    log_to_terminal(config.logging.log_level)

    from strop.preflight import check

    check(config, model_index=options.model_index, resume=resume, needs_weights=needs_weights)
    return config


def run_in_processes(config: RunConfig, command: str, arguments: Sequence[str]) -> int | None:
    """Runs the command again in as many processes as the configuration asks for; their exit code.

    None where this process is to do the work: it is the only one, or was started as one of several.

    Raises:
        ConfigError: it was started as one of several by a launcher that strop does not join.
    """
    if config.gpu.asked_processes == 1 and not (config.gpu.use_ddp or config.gpu.fsdp):
        return None
    from strop.device import num_processes
    from strop.distributed import find_place

    if find_place() is not None or (count := num_processes(config.gpu)) == 1:
        return None
    from strop.launch import launch

    return launch([command, *arguments], count)
