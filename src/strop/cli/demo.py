"""`strop demo`: a real training run that needs no model and no data. Floor 10."""

from __future__ import annotations

from pathlib import Path

from strop.cli.parser import Parser, check_seed
from strop.terminal import log_to_terminal


def usage() -> str:
    return "usage: strop demo [--seed N] [--output-dir DIR]\n"


def run(arguments: list[str]) -> int:
    parser = Parser("demo")
    parser.once("--seed", type=int, default=0)
    parser.once("--output-dir", default="runs/demo")
    options = parser.parse_args(arguments)
    check_seed(options.seed)
    log_to_terminal("info")

    from strop.demo import run_demo

    run_demo(options.seed, Path(options.output_dir))
    return 0
