"""What commands that work on a run share: a configuration, a preset, a model, any key as a flag. Floor 10, no torch.

options, overrides = parse(parser_of_run("train"), arguments)
config = load(options, overrides)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from strop.cli.parser import Parser
from strop.config import CommandLine, RunConfig, load_config
from strop.config.flags import split_flags
from strop.terminal import log_to_terminal


def parser_of_run(command: str) -> Parser:
    """A parser that takes --config, --preset and --model-index."""
    parser = Parser(command)
    parser.once("--config")
    parser.once("--preset")
    parser.once("--model-index", type=int)
    return parser


def parse(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, CommandLine]:
    """The command's own flags, and the keys of the configuration that are given as flags.

    Raises:
        ConfigError: a flag that is neither, or has no good value.
    """
    overrides, rest = split_flags(arguments, parser.flags)
    return parser.parse_args(rest), overrides


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
