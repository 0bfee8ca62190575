"""`strop init`: a configuration for a model and a data file, after a look at both. Floor 4.

In: a model, files of rows, perhaps a method. Out: commented YAML that `strop train --dry-run` takes. The rows are
tokenised as a run would, so lengths are those of this model; numbers that nothing here decides keep their defaults and
are not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from strop.config import load_config
from strop.config.methods import METHODS
from strop.config.yamlfile import write_value
from strop.data.report import DataReport
from strop.errors import ConfigError, DataError
from strop.modelrows import ModelRows

BY_SHAPE = ("dpo", "kto", "sft")
"""The method that is proposed for each shape of rows: pairs, labelled completions, completions."""
LONGEST = 8192
"""Tokens of a row that is looked at whole."""
ROUND_TO = 64
MANY_ROWS, FEW_ROWS = 4000, 400


@dataclass(frozen=True)
class Request:
    """model: a folder or a name on the hub. data, validation: files of rows. method: None: by the shape of the rows."""

    model: str
    data: str
    validation: str | None
    method: str | None
    output_dir: str


def config_for(request: Request) -> str:
    """The text of a configuration.

    Raises:
        StropError: the model or the rows cannot be used, or the rows have the shape of no method.
    """
    rows = _rows(request, request.method) if request.method else _rows_that_fit(request)
    return _written(request, rows.config.post_training.method, rows.load().report)


def _rows(request: Request, method: str, tokenizer: PreTrainedTokenizerBase | None = None) -> ModelRows:
    overrides: dict[str, Any] = {
        "models.0.huggingface_id": request.model,
        "dataset.train_file": request.data,
        "post_training.method": method,
        "training.max_seq_length": LONGEST,
        "training.max_prompt_length": None,
        "training.max_completion_length": None,
    }
    if request.validation is not None:
        overrides["dataset.val_file"] = request.validation
    config = load_config(overrides=overrides)
    return ModelRows.of(config, config.models[0], needs_weights=False, tokenizer=tokenizer)


def _rows_that_fit(request: Request) -> ModelRows:
    """The rows as the first method reads them that can read the first one. The tokenizer is read once."""
    refused: list[str] = []
    tokenizer: PreTrainedTokenizerBase | None = None
    for method in BY_SHAPE:
        try:
            rows = _rows(request, method, tokenizer)
            tokenizer = rows.tokenizer
            if rows.first() is not None:
                return rows
        except DataError as error:
            refused.append(f"as {METHODS[method].ROWS} rows, for {method}: {error.found}")
    raise ConfigError(
        "the first rows have the shape of no method: " + "; ".join(refused),
        where=request.data,
        expected="rows with chosen and rejected, with a label, with messages, or with prompt and completion",
        fix="see docs/data.md for the shapes, and strop prepare for files with other column names",
    )


def _written(request: Request, method: str, report: DataReport) -> str:
    splits, statistics = report.splits, report.statistics
    kept = sum(split.kept for split in splits.values())
    read = sum(split.rows_read for split in splits.values())
    total = statistics["train"]["lengths"]["total"]
    longest = max(statistics[name]["lengths"]["total"].get("max", 0) for name in splits)
    limit = max(ROUND_TO, -(-longest // ROUND_TO) * ROUND_TO)
    num_cut = sum(c.changes[name] for c in splits.values() for name in ("prompts_cut", "completions_cut"))
    cut = f"{num_cut:,} prompts and completions are longer and cut" if num_cut else "nothing is cut"
    steps = 32 if kept >= MANY_ROWS else 16 if kept >= FEW_ROWS else 8
    epochs = 3 if method == "sft" and kept < MANY_ROWS else 1
    seen = f"{kept:,} of {read:,} rows are good; tokens of a row: median {total['p50']:,}, longest {total['max']:,}"
    findings = [f"# {line}" for line in report.findings["train"].sentences()]
    sections: Mapping[str, list[tuple[str, Any, str]]] = {
        "dataset": [
            ("train_file", request.data, seen),
            ("val_file", request.validation, "")
            if request.validation
            else ("validation_split", 0.1, "this share of the rows is held out"),
        ],
        "post_training": [("method", method, f"strop methods {method} explains it and lists its settings")],
        "lora": [("enabled", True, "adapters; false trains all weights, with a tenth of the learning rate")],
        "training": [
            ("output_dir", request.output_dir, "the run is in a folder of the model's name in it"),
            ("num_epochs", epochs, ""),
            ("groups_per_step", steps, "rows of an optimizer step; larger is steadier, smaller takes more steps"),
            ("max_seq_length", limit, f"the longest row, rounded up: {cut}"),
            ("max_prompt_length", None, "max_seq_length alone decides"),
            ("max_completion_length", None, "likewise"),
            ("auto_precision", True, "16 bits where the device computes them well"),
        ],
    }
    lines = [
        f"# {method}, written by strop init. The learning rate, and all else that is not here, has its default.",
        "# strop train --config THIS --dry-run shows every value, an example as it is trained, and what a run takes.",
        *findings,
        "models:",
        f"  - huggingface_id: {write_value(request.model)}",
    ]
    for section, keys in sections.items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {write_value(value)}" + (f"  # {why}" if why else "") for key, value, why in keys]
    return "\n".join(lines) + "\n"
