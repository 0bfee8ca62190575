"""ledger.jsonl, read: the line of a step, and the fields in which two lines differ. Floor 2, no torch.

In: a run folder. Out: lines as mappings, in order. What a line holds: `strop.engine.ledger`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from strop.durable import json_object
from strop.errors import ConfigError
from strop.runfiles import LEDGER, METRICS

Line = Mapping[str, Any]

INPUTS = ("rows", "seed", "cut", "weights")
"""What a step was made from, in the order in which a difference is named."""
RESULTS = ("loss", "terms", "grad_norm", "skipped", "clipped", "learning_rate", "scored_tokens")
"""What a step gave."""
WORDS: Mapping[str, str] = {
    "rows": "rows of the step",
    "seed": "seed of the step",
    "cut": "micro-batches",
    "weights": "weights before the step",
    "loss": "loss",
    "terms": "terms of the loss",
    "grad_norm": "norm of the gradient",
    "skipped": "whether the step was skipped",
    "clipped": "whether the gradient was clipped",
    "learning_rate": "learning rate",
    "scored_tokens": "scored tokens",
}


def ledger_path(folder: Path) -> Path:
    """The ledger of a run.

    Raises:
        ConfigError: there is no such run, or it has no ledger.
    """
    path = folder / LEDGER
    if path.is_file():
        return path
    if not folder.is_dir():
        raise ConfigError(
            "there is no such folder", where=str(folder), expected="the folder of a run: training.output_dir/NAME"
        )
    if (folder / METRICS).is_file():
        raise ConfigError(
            f"this run has no {LEDGER}",
            where=str(folder),
            expected="a run that was trained by this version or a later one, and has done a step",
            fix="train it again to have one",
        )
    raise ConfigError(
        "nothing in this folder is of a run",
        where=str(folder),
        expected=f"a run folder with {LEDGER}: training.output_dir/NAME",
    )


def read_ledger(folder: Path) -> Iterator[Line]:
    """The lines in order. A line that is damaged, such as a half-written last one, is left out.

    Raises:
        ConfigError: see `ledger_path`.
    """
    with ledger_path(folder).open("rb") as file:
        for raw in file:
            if (line := line_of(raw)) is not None:
                yield line


def line_of(raw: bytes) -> Line | None:
    """A line as a mapping; None where it is damaged."""
    line = json_object(raw)
    return line if line is not None and isinstance(line.get("step"), int) else None


def differing(one: Line, other: Line) -> list[str]:
    """The fields in which two lines of the same step differ, those that come first in a step first."""
    return [name for name in (*INPUTS, *RESULTS) if one.get(name) != other.get(name)]
