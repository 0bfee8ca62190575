"""`strop init`: a configuration for a model, a data file and a machine, after a look at all three. Floor 7.

In: a model, files of rows, perhaps a method. Out: commented YAML that `strop train --dry-run` takes. The rows are
tokenised as a run would, so lengths are those of this model. Memory is predicted as a dry run does: adapters are put on
the base in 16 or 32 bits if that fits, else on a base in 4 bits. Numbers that nothing here decides keep their defaults
and are not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from strop.config import load_config, resolve
from strop.config.methods import METHODS
from strop.config.yamlfile import write_value
from strop.data.data_report import DataReport
from strop.data.load import LoadedData
from strop.device import pick_device
from strop.errors import ConfigError, DataError, StropError
from strop.estimate import Estimate, estimate
from strop.machine import Machine, machine_named, machine_of
from strop.modelrows import ModelRows
from strop.policy.model.from_config import CannotBuildError, predicting
from strop.session import Session

BY_SHAPE = ("dpo", "kto", "sft")
"""The method that is proposed for each shape of rows: pairs, labelled completions, completions."""
LONGEST = 8192
"""Tokens of a row that is looked at whole."""
ROUND_TO = 64
MANY_ROWS, FEW_ROWS = 4000, 400


Section = list[tuple[str, Any, str]]
"""Keys of a section with their values and comments."""


@dataclass(frozen=True)
class Request:
    """model: a folder or a name on the hub. data, validation: files of rows. method: None: by the shape of the rows.
    device: the name of the machine that the run must fit, as of `--dry-run --device`; None: this one."""

    model: str
    data: str
    validation: str | None
    method: str | None
    output_dir: str
    device: str | None = None


@dataclass(frozen=True)
class Way:
    """A way to train, and its predicted memory; None where there is no prediction."""

    keys: Mapping[str, Any]
    estimate: Estimate | None

    @property
    def fits(self) -> bool:
        return self.estimate is None or self.estimate.fits

    def __str__(self) -> str:
        if self.estimate is None:
            return "there is no prediction of memory for this model"
        return f"{self.estimate.peak / 2**30:.2g} GiB of memory are predicted" + ("" if self.fits else ": too much")


ADAPTERS: Mapping[str, Any] = {"lora.enabled": True}
ON_4_BITS: Mapping[str, Any] = {**ADAPTERS, "models.0.quant": "4bit"}
ALL_WEIGHTS: Mapping[str, Any] = {"lora.enabled": False}


def config_for(request: Request) -> str:
    """The text of a configuration.

    Raises:
        StropError: the model or the rows cannot be used, or the rows have the shape of no method.
    """
    rows = _rows(request, request.method) if request.method else _rows_that_fit(request)
    data = rows.load()
    machine = _machine(request)
    sections = _sections(request, rows.config.post_training.method, data.report)
    trains = {f"{name}.{key}": value for name, keys in sections.items() for key, value, _ in keys}

    def way(keys: Mapping[str, Any]) -> Way:
        return Way(keys, _predicted({"models.0.huggingface_id": request.model, **trains, **keys}, machine, rows, data))

    chosen = way(ADAPTERS)
    if not chosen.fits and (smaller := way(ON_4_BITS)).estimate is not None:
        chosen = smaller
    return _written(request, sections, data.report, machine, chosen, way(ALL_WEIGHTS))


def _machine(request: Request) -> Machine:
    if request.device is not None:
        return machine_named(request.device)
    device, _ = pick_device(load_config(overrides={"models.0.huggingface_id": request.model}).gpu)
    return machine_of(device)


def _predicted(keys: Mapping[str, Any], machine: Machine, rows: ModelRows, data: LoadedData) -> Estimate | None:
    """None: no prediction for this model, or it cannot be trained so."""
    config = resolve(load_config(overrides=keys))
    model = config.models[0]
    try:
        read = ModelRows.of(config, model, needs_weights=False, tokenizer=rows.tokenizer), data
        with (
            Session(config, model, None, machine=machine, read=read) as session,
            predicting("this architecture is of a kind that the estimate does not know"),
        ):
            settled = session.settled
            return estimate(settled.prepared, machine, settled.precision, settled.tokens)
    except (CannotBuildError, StropError):
        return None  # the dry run says why


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


def _sections(request: Request, method: str, report: DataReport) -> dict[str, Section]:
    """What the rows decide."""
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
    return {
        "dataset": [
            ("train_file", request.data, seen),
            ("val_file", request.validation, "")
            if request.validation
            else ("validation_split", 0.1, "this share of the rows is held out"),
        ],
        "post_training": [("method", method, f"strop methods {method} explains it and lists its settings")],
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


def _written(
    request: Request, sections: dict[str, Section], report: DataReport, machine: Machine, chosen: Way, whole: Way
) -> str:
    """chosen: with adapters. whole: training all weights instead."""
    size = "memory that is not known" if machine.memory is None else f"{machine.memory / 2**30:.1f} GiB of memory"
    device = machine.name or ("the CPU" if machine.kind == "cpu" else "a GPU")
    ((_, method, _),) = sections["post_training"]
    lines = [
        f"# {method}, written by strop init for {device} with {size}.",
        "# The learning rate, and all else that is not here, has its default. Micro-batches are chosen to fit.",
        "# strop train --config THIS --dry-run shows every value, an example as it is trained, and what a run takes.",
        *(f"# {line}" for line in report.findings["train"].sentences()),
        "models:",
        f"  - huggingface_id: {write_value(request.model)}",
    ]
    if "models.0.quant" in chosen.keys:
        lines.append("    quant: 4bit  # in 16 bits, the base does not fit; needs the extra bnb")
    adapters: Section = [("enabled", True, "adapters; false trains all weights, with a tenth of the learning rate")]
    dataset, method_section, training = sections.items()
    for section, keys in (dataset, method_section, ("lora", adapters), training):
        lines.append(f"{section}:")
        if keys is adapters:
            lines += [f"  # with adapters: {chosen}", f"  # with all weights: {whole}"]
        lines += [f"  {key}: {write_value(value)}" + (f"  # {why}" if why else "") for key, value, why in keys]
    return "\n".join(lines) + "\n"
