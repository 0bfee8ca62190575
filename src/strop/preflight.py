"""What a configuration names, looked at before anything slow is imported: models, adapters, files, columns. Floor 3.

In: a configuration. Out: nothing, or one error that lists what cannot be used. It takes milliseconds and no torch: what
needs a tokenizer, weights or a network is looked at later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from os import path
from pathlib import Path

from strop.config import DatasetSection, RunConfig
from strop.config.sections import ModelSection
from strop.data.read.files import file_kind
from strop.data.read.row import Row, RowRefused
from strop.data.read.sources import Source, choose_sources
from strop.data.shapes.examples import RowColumns, to_example
from strop.errors import CheckpointError, ConfigError, StropError
from strop.policy.model.adapter_base import saved_model
from strop.policy.model.consolidated_files import consolidated_folder
from strop.policy.model.folder import check_adapter, check_files, source_of
from strop.policy.model.quantisation_settings import BITSANDBYTES, EXTRAS, check_adapts, quantisation_of
from strop.rewards.lookup import MODEL_PREFIX
from strop.types import RowShape
from strop.uploads import bad_names, no_hub

ROWS = 8
"""Rows of each file that are looked at."""
LARGE = 2**24
"""Bytes of a file that is read as a whole, from which its rows are not looked at here."""


def check(
    config: RunConfig, *, model_index: int | None = None, resume: str | None = None, needs_weights: bool = True
) -> None:
    """Refuse models, adapters, checkpoints, files and columns that are not there, all of them at once.

    Args:
        model_index: look only at this model, from 0.
        resume: a checkpoint's path, or `auto`, which is looked for later.
        needs_weights: refuse model folders without weights.

    Raises:
        StropError: what cannot be used; a ConfigError that lists them where there are several.
    """
    models = select_models(config, model_index)
    problems = list(_problems(config, models, resume, needs_weights))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "\n".join("- " + str(problem).replace("\n", "\n  ") for problem in problems)
        raise ConfigError(f"{len(problems)} things that the configuration names cannot be used\n{listed}")


def select_models(config: RunConfig, model_index: int | None) -> Sequence[ModelSection]:
    """All models, or the one at `model_index`."""
    if model_index is None:
        return config.models
    if not 0 <= model_index < len(config.models):
        raise ConfigError(
            f"there is no model {model_index}",
            where="--model-index",
            expected=f"0 to {len(config.models) - 1}: "
            + ", ".join(f"{i} = {m.name}" for i, m in enumerate(config.models)),
            fix="name one of these",
        )
    return [config.models[model_index]]


def run_folder(config: RunConfig, model: ModelSection) -> Path:
    """Where everything about the run of one model is left."""
    return Path(config.training.output_dir).expanduser() / model.name


def _problems(
    config: RunConfig, models: Sequence[ModelSection], resume: str | None, needs_weights: bool
) -> Iterator[StropError]:
    resume = resume or config.finetuning.resume_from_checkpoint
    if resume not in (None, "auto") and not path.isdir(path.expanduser(resume)):
        expected = "auto, or a checkpoint-{step} folder of a run"
        yield CheckpointError("there is no such folder", where=f"--resume {resume}", expected=expected)
    for model in models:
        try:
            check_files(model, needs_weights=needs_weights)
            _check_quantised(model, config.adapts(model))
            if model.adapter is not None:
                check_adapter(model)
        except StropError as error:
            yield error
    for key, role in (("ref_model_id", "reference"), ("teacher_model_id", "teacher")):
        other = getattr(config.post_training, key, None)
        if other is not None:
            try:
                check_files(ModelSection(huggingface_id=other))
            except StropError as error:
                where = f"{role} {error.where}"
                yield type(error)(error.found, where=where, expected=error.expected, fix=error.fix)
    for reward in config.rewards:
        if reward.name.startswith(MODEL_PREFIX):
            try:
                section = saved_model(reward.name.removeprefix(MODEL_PREFIX))
                check_files(section)
                if section.adapter is not None:
                    check_adapter(section)
            except StropError as error:
                yield type(error)(error.found, where=f"rewards: {reward.name}", expected=error.expected, fix=error.fix)
    yield from _missing_trackers(config)
    yield from _not_uploaded(config, models)
    try:
        check_rows(config.dataset, config.rows)
    except StropError as error:
        yield error


def _check_quantised(model: ModelSection, adapts: bool) -> None:
    """Refuse a quantised base where nothing is installed that quantises, or where all weights are to be trained. One on
    the hub is looked at when it is loaded."""
    local = path.isdir(source_of(model.huggingface_id)) and consolidated_folder(model.huggingface_id) is None
    found = quantisation_of(model) if local else None
    package = BITSANDBYTES if found is None else found.package
    if (found is not None or model.quant != "none") and find_spec(package) is None:
        raise ConfigError(
            f"the package {package} is not installed",
            where=f"model {model.name}, {found.describe() if found else f'quant: {model.quant}'}",
            expected=f"{package}, which is the extra `{EXTRAS[package]}`",
            fix=f"pip install -e '.[{EXTRAS[package]}]' in strop's folder, or use a model that is not quantised",
        )
    if local:
        check_adapts(model, adapts)


def _not_uploaded(config: RunConfig, models: Sequence[ModelSection]) -> Iterator[StropError]:
    """Why a final model could not be uploaded, as far as that is known before the run."""
    training = config.training
    if not training.push_to_hub:
        return
    where = "training.push_to_hub: true"
    later = "or remove push_to_hub and upload it later: strop push RUN --repo OWNER/NAME"
    if training.hub_model_id is not None and len(models) > 1:
        yield ConfigError(
            f"{len(models)} models cannot be uploaded to one repository",
            where=f"training.hub_model_id: {training.hub_model_id}",
            fix="remove hub_model_id: each goes to the repository of its name",
        )
    for model in models:
        yield from bad_names(training.hub_model_id or model.name, where, "set training.hub_model_id")
        if config.adapts(model) and path.isdir(source_of(model.huggingface_id)):
            yield ConfigError(
                f"an adapter names its base, and {model.huggingface_id} is a folder of this computer, where nobody "
                "else finds it",
                where=where,
                expected="the id of a base at the hub",
                fix="name the base by its id in models[].huggingface_id; " + later + " --base OWNER/NAME",
            )
    yield from no_hub(where, f"; {later}")


def _missing_trackers(config: RunConfig) -> Iterator[StropError]:
    """Trackers whose package is not installed."""
    for name in config.logging.report_to:
        if find_spec(name) is None:
            yield ConfigError(
                f"the package {name} is not installed",
                where=f"logging.report_to: {name}",
                expected=f"{name}, which is the extra `{name}`",
                fix=f"pip install -e '.[{name}]' in strop's folder, or leave {name} out of logging.report_to",
            )


def check_rows(dataset: DatasetSection, rows: RowShape) -> None:
    """Refuse files that are not there, and, where a bad row stops a run, files whose first rows are bad.

    Raises:
        StropError: the file, or the row.
    """
    sources = choose_sources(dataset, rows)
    if dataset.on_error != "error":
        return
    columns = RowColumns.of(dataset)
    for source in (*sources.train, *([sources.eval] if sources.eval is not None else [])):
        if _is_quickly_read(source):
            for row in islice(source.read(), ROWS):
                _check_row(row, rows, columns)


def _is_quickly_read(source: Source) -> bool:
    name = source.label
    return path.isfile(name) and (file_kind(name) in (".jsonl", ".csv", ".txt") or path.getsize(name) < LARGE)


def _check_row(row: Row, rows: RowShape, columns: RowColumns) -> None:
    if row.refusal is not None:
        raise row.refusal.at(row.origin)
    if row.data is None or {"input_ids", "completion_ids"} & row.data.keys():
        return  # a blank line; tokens, which are looked at with the tokenizer
    try:
        to_example(row.data, row.origin, rows, columns)
    except RowRefused as refusal:
        raise refusal.at(row.origin) from None
    except RecursionError:
        return  # told with the others of its kind, when all rows are read
