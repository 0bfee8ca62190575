"""A model's numbers, row by row, by the objective of a method. Floor 8.

The rows are tokenised once, by the tokenizer and the chat template of the first model, and every model scores these
tokens. Where the method compares with a reference, one model is the reference of all: the one that is named, else what
the first model was trained from.
"""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from strop.batch import Batch, Scores
from strop.columns import Unit
from strop.config import RunConfig, resolve
from strop.config.methods import MethodSettings
from strop.config.sections import ModelSection
from strop.data.load import LoadedData
from strop.device import start_world
from strop.engine.progress import Progress
from strop.engine.step import join_all, summarise
from strop.engine.step_source import GroupSet
from strop.errors import ConfigError, ModelError
from strop.evaluate.intervals import Metric, Ratio
from strop.generate.loading import Source
from strop.modelrows import ModelRows
from strop.objectives.base import Objective, build_objective
from strop.policy.model.tokenizer import read_tokenizer
from strop.policy.policy import Policy
from strop.session import Session
from strop.world import World

log = logging.getLogger("strop")


@dataclass(frozen=True)
class Evaluated:
    """numbers: over all rows, by name. by_row: the same row by row; empty if the loss contains a statistic of all
    rows."""

    name: str
    numbers: Mapping[str, float]
    by_row: Mapping[str, Metric]


@dataclass(frozen=True)
class Evaluation:
    """models: in the order in which they were given. num_rows: how many rows each of them scored. reference: what the
    method compared with; None where it needs none."""

    models: Sequence[Evaluated]
    num_rows: int
    reference: str | None


def evaluate(config: RunConfig, sources: Sequence[str], reference: str | None = None) -> Evaluation:
    """Evaluate models on the rows of `config.dataset`, all of them.

    Args:
        config: its models are not looked at.
        sources: the models: runs, adapters, model folders or hub ids.
        reference: what a method with a reference compares with, given in the same way; None: what the first of
            `sources` was trained from.

    Raises:
        StropError: a model or the rows cannot be read, or the tokens mean something else to one of the models.
    """
    config = resolve(config)
    objective = build_objective(config.post_training)
    if not objective.needs_reference and reference is not None:
        raise ConfigError(
            f"--reference {reference}: the method {config.post_training.method} compares with no reference",
            fix="leave --reference out",
        )
    with start_world(config.gpu) as world, tempfile.TemporaryDirectory() as folder, Progress() as progress:
        if world.size > 1:
            raise ConfigError(f"started as {world.size} processes", expected="one", fix="start strop eval by itself")
        named = [Source.of(given) for given in sources]  # a wrong name is told before anything is scored
        first, groups = named[0], None
        rows = ModelRows.of(_of_all_rows(config, first.model), first.model)
        data = rows.load()
        if objective.needs_reference:
            other = reference or getattr(config.post_training, "ref_model_id", None)
            base = first.base() if other is None else Source.of(other)
            groups = _against(base.model, rows, data, world, progress, Path(folder))
            reference = base.model.adapter or base.model.huggingface_id
        found = []
        for given, source in zip(sources, named, strict=True):
            gc.collect()  # of the model before this one
            log.info("scoring %s", given)
            with _session(rows, data, source.model, world) as session:
                found.append(_scored(given, session, objective, groups))
            del session  # which holds the model
    return Evaluation(found, len(data.train), reference if objective.needs_reference else None)


def _against(
    model: ModelSection, rows: ModelRows, data: LoadedData, world: World, progress: Progress, folder: Path
) -> GroupSet:
    """All rows with their log-probs under the reference, which is gone from memory afterwards."""
    with _session(rows, data, model, world) as session:
        groups, _ = session.score(session.policy, progress, folder)
    return groups


def _scored(given: str, session: Session, objective: Objective[MethodSettings], groups: GroupSet | None) -> Evaluated:
    """The numbers of one model. groups: with log-probs of the reference, if there is one.

    Raises:
        ModelError: it has no weights for what the method asks of it.
    """
    if session.policy.has_new_head:
        raise ModelError(
            "it has no head of a reward model, and a new one would give random numbers",
            where=given,
            expected="a model that was trained with method reward",
            fix="train one, or choose another method",
        )
    scored = session.groups()[0] if groups is None else groups
    return _evaluated(given, session.policy, objective, scored.derived(objective), session.world)


def _of_all_rows(config: RunConfig, model: ModelSection) -> RunConfig:
    """The configuration for one model, with no row held out."""
    values = {
        "models": (model,),
        "lora.enabled": False,
        "dataset.validation_split": 0.0,
        "dataset.val_file": None,
        "training.reference_store": False,
        "training.micro_batch_tokens": None,
    }
    return config.with_values(values, "strop eval")


def _session(rows: ModelRows, data: LoadedData, model: ModelSection, world: World) -> Session:
    """A model on rows that the first model's tokenizer has made tokens of.

    Raises:
        ModelError: the tokens mean something else to this model.
    """
    if model != rows.model:
        _check_tokens(rows, data, model)
    read = (replace(rows, config=_of_all_rows(rows.config, model), model=model), data)
    return Session(read[0].config, model, world, read=read, backward=False)


def _check_tokens(rows: ModelRows, data: LoadedData, model: ModelSection) -> None:
    """Refuse a model to which a token of the rows is another text; say it where its own template differs.

    Raises:
        ModelError: names the first token that differs.
    """
    own = read_tokenizer(model)
    ours, theirs = ({i: token for token, i in tok.get_vocab().items()} for tok in (rows.tokenizer, own))
    differing = {i for i, token in ours.items() if theirs.get(i) != token}
    if differing and (used := differing & set(_tokens(data))):
        number = min(used)
        raise ModelError(
            f"token {number} of the rows is {theirs.get(number)!r} to it",
            where=model.adapter or model.huggingface_id,
            expected=f"{ours[number]!r}, as it is to {rows.model.adapter or rows.model.huggingface_id}, which is the "
            "first model that is named",
            fix="compare models of one family, so that their numbers are of the same tokens",
        )
    if own.chat_template != rows.tokenizer.chat_template and rows.config.dataset.template is None:
        log.info(
            "%s has another chat template: it scores the rows as that of %s writes them",
            model.adapter or model.huggingface_id,
            rows.model.adapter or rows.model.huggingface_id,
        )


def _tokens(data: LoadedData) -> Iterator[int]:
    """Every token of all rows."""
    for group in data.train:
        yield from group.prompt_ids
        for completion in group.completions:
            yield from completion.ids


def _evaluated(
    name: str, policy: Policy, objective: Objective[MethodSettings], groups: GroupSet, world: World
) -> Evaluated:
    with policy.scoring():
        others = {
            key: join_all([Scores.of(b, policy(b)) for b in _batches(policy, some)], world)
            for key, some in sorted(groups.also.items())
        }
        parts = [Scores.of(batch, policy(batch), others) for batch in _batches(policy, groups)]
    whole = summarise(objective, join_all(parts, world, others)).fetch()
    numbers = {"loss": whole.loss, **{key: total / count for key, (total, count) in whole.metrics.items() if count}}
    by_row = {} if objective.whole_step else _by_row(objective, parts)
    return Evaluated(name, numbers, {key: metric for key, metric in by_row.items() if key in numbers})


def _batches(policy: Policy, groups: GroupSet) -> Iterator[Batch]:
    """Each group alone, so that its numbers can be told from those of the others."""
    return (groups.batch(policy, [i]) for i in range(len(groups.groups)))


def _by_row(objective: Objective[MethodSettings], parts: Sequence[Scores]) -> dict[str, Metric]:
    terms, metrics = [], []
    with torch.no_grad():
        for part in parts:
            terms.append({key: float(total) for key, total in objective.terms(part).items()})
            metrics.append({key: (float(a), float(n)) for key, (a, n) in objective.metrics(part).items()})
    units: Mapping[str, Unit] = objective.units
    counts = {key: np.array([float(unit(part.structure)) for part in parts]) for key, unit in units.items()}
    found: dict[str, Metric] = {
        "loss": [Ratio(np.array([row[key] for row in terms]), count) for key, count in counts.items()]
    }
    for key in sorted({key for row in metrics for key in row}):
        each = [row.get(key, (0.0, 0.0)) for row in metrics]
        found[key] = [Ratio(np.array([a for a, _ in each]), np.array([n for _, n in each]))]
    return found
