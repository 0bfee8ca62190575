"""`strop prepare`: turns files of rows into split files for training and validation. Floor 10."""

from __future__ import annotations

import argparse
from pathlib import Path

from strop.cli.parser import Parser, check_seed
from strop.config.methods import METHODS
from strop.errors import ConfigError
from strop.terminal import log_to_terminal, show

HELP = """\
usage: strop prepare --input FILE ... --output-dir DIR [--method NAME] [options]
       strop prepare --example NAME --output-dir DIR

  --input FILE ...       JSON Lines, a JSON array, CSV or Parquet (jsonl:PATH, text:PATH, local:FOLDER)
  --output-dir DIR       gets train.jsonl and val.jsonl (sft), train.kto.jsonl and val.kto.jsonl (kto),
                         train.groups.jsonl and val.groups.jsonl (grpo), or train.dpo.jsonl and val.dpo.jsonl (all that
                         train on pairs), and statistics.json; refused rows go to rejected.jsonl. It is what
                         dataset.splits_dir names
  --method NAME          the method that the rows are for (default: sft): see strop methods
  --val-input FILE ...   validation rows, instead of a share of the others
  --val-fraction SHARE   share of the rows to hold out (default: 0.1)
  --seed N               what decides which (default: 42)
  --keep-duplicates      keep rows that are there before
  --on-trailing-user refuse|drop
                         conversations with turns behind their last assistant turn: refuse them (default), or keep them
                         for a run that drops these turns
  --prompt-column, --completion-column, --chosen-column, --rejected-column, --label-column NAME
"""
COLUMNS = ("prompt", "completion", "chosen", "rejected", "label")
"""Columns whose names can be given."""


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    parser = Parser("prepare")
    for files in ("--input", "--val-input"):
        parser.add_argument(files, nargs="+", action="extend", default=[])
    parser.once("--output-dir")
    parser.once("--method", choices=tuple(METHODS), default="sft")
    parser.once("--example", choices=tuple(METHODS))
    parser.once("--val-fraction", type=float, default=0.1)
    parser.once("--seed", type=int, default=42)
    parser.switch("--keep-duplicates")
    parser.once("--on-trailing-user", choices=("refuse", "drop"), default="refuse")
    for name in COLUMNS:
        parser.once(f"--{name}-column", default=name)
    options = parser.parse_args(arguments)
    _check(options)
    log_to_terminal("info")
    show("\n".join(_prepare(options)) + "\n")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuses flags that are missing, exclude each other or are out of range."""
    check_seed(options.seed)
    if not options.output_dir:
        raise ConfigError("--output-dir is missing", fix="see strop prepare --help")
    if bool(options.input) == bool(options.example):
        found = "--input and --example are both given" if options.input else "neither --input nor --example is given"
        raise ConfigError(found, expected="one of the two", fix="see strop prepare --help")
    if not 0 <= options.val_fraction < 1:
        raise ConfigError(f"--val-fraction is {options.val_fraction}", expected="a share of at least 0 and below 1")


def _prepare(options: argparse.Namespace) -> list[str]:
    """Writes the files. Returns what became of the rows, in words."""
    from strop.data.shapes.examples import RowColumns
    from strop.data.split_files import write_example_files, write_split_files

    method, folder = options.example or options.method, Path(options.output_dir).expanduser()
    share = {"val_fraction": options.val_fraction, "seed": options.seed, "keep_duplicates": options.keep_duplicates}
    if options.example:
        result = write_example_files(method, folder, **share)
    else:
        named = {name: getattr(options, f"{name}_column") for name in COLUMNS}
        columns = RowColumns(**named, drops_trailing=options.on_trailing_user == "drop")
        rows = METHODS[method].ROWS
        result = write_split_files(options.input, folder, rows, val_inputs=options.val_input, columns=columns, **share)
    return [*result.lines(), f"train on it with: dataset.splits_dir: {folder} and post_training.method: {method}"]
