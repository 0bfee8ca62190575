"""Loads the data of a run: from the configuration to groups and a report. Floor 2.

    sources -> RowPipeline (in several processes) -> token cache -> training and validation groups, and a report

Groups are in the order of the rows. The tokens stay on disk, so memory does not grow with them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from strop.config import RunConfig
from strop.data.counters import COUNTERS
from strop.data.doctor import num_labels
from strop.data.read.sources import Source, choose_sources, warn_of_unread
from strop.data.report import DataReport, Rendering, SplitCounts
from strop.data.split import held_out, sample
from strop.data.store.records import PipelineResult, RowPipeline
from strop.data.store.table import Groups, Shard
from strop.data.store.token_cache import Rejected, Tokenised, fetch
from strop.data.store.worker_pool import work_all
from strop.data.text.truncate import Limits
from strop.errors import DataError
from strop.types import Group, RowShape

logger = logging.getLogger("strop")


@dataclass(frozen=True)
class LoadedData:
    """The rows that a run trains and evaluates on.

    chat_template: the template that rendered the rows, to be saved with the tokenizer; None if no row was rendered.
    rejected: the content of rejected.jsonl, one object per row: file, line, reason, raw. num_labels: how many desirable
    (True) and undesirable (False) completions an epoch has.
    """

    train: Groups
    eval: Sequence[Group]
    report: DataReport
    chat_template: str | None
    rejected: Sequence[Mapping[str, Any]]
    num_labels: Mapping[bool, int]


def load_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, rows: RowShape, stop_tokens: Sequence[int] = ()
) -> LoadedData:
    """Reads, renders, encodes and truncates the rows that the configuration names, or takes them from the cache.

    Args:
        rows: what the method needs: one completion per row, pairs, or labelled completions (made of pairs, too).
        stop_tokens: ids of tokens that generation with the model stops at, besides the tokenizer's EOS token.

    Raises:
        ConfigError: no source is named; messages under `dataset.render: raw`.
        DataError: a source cannot be read; a bad row under `dataset.on_error: error`; too much or all is lost.
        ModelError: the tokenizer cannot be used.
    """
    dataset = config.dataset
    sources = choose_sources(dataset, rows)
    warn_of_unread(dataset)
    pipeline = RowPipeline.tried(config, tokenizer, rows, stop_tokens)
    _warn_of_unread_kwargs(pipeline)
    identity = pipeline.identity()
    train = _train_parts(sources.train, pipeline, identity, config)
    groups = _joined([part.whole for part in train])
    parts = {"train": train}
    views: dict[str, Groups] = {}
    not_used = 0
    if sources.eval is not None:
        tokens = _tokenise(sources.eval, dataset.max_eval_samples, pipeline, identity, config)
        parts["eval"] = [_Part.of(sources.eval, tokens, 1.0, 0)]
        views["eval"] = parts["eval"][0].whole
    elif dataset.validation_split > 0:
        row_of = _row_numbers(groups)
        firsts = groups.column("prompt_hash")[groups.column("again") == 0]
        flags = held_out(firsts, dataset.validation_split, config.seed)[row_of]
        held = groups.taken(np.flatnonzero(flags))
        views["eval"] = _first_rows(held, dataset.max_eval_samples)
        not_used = _num_rows(held) - _num_rows(views["eval"])
        groups = groups.taken(np.flatnonzero(~flags))
    views["train"] = groups
    for name in parts:
        if not len(views[name]):
            raise _nothing_left(parts[name], pipeline.limits)
        _refuse_losses(parts[name], dataset.max_dropped_fraction)
    names: list[str] = [name for name in ("train", "eval") if name in views]
    counts = {name: _counts(parts.get(name, []), views[name], train) for name in names}
    if "eval" in counts:
        counts["eval"].leave_out(not_used)
    how = _rendering(views, pipeline)
    weighed = _weighed(views["train"], [part.source.weight for part in train], config.seed)
    if not len(weighed):
        raise _nothing_left(train, pipeline.limits)
    return LoadedData(
        train=weighed,
        eval=views["eval"] if "eval" in views and len(views["eval"]) else (),
        report=DataReport.of(counts, views, how, trained=weighed, pairs=rows == "pair"),
        chat_template=pipeline.renderer.template if how.num_chat else None,
        rejected=sum((part.tokens.rejected for some in parts.values() for part in some), Rejected([])),
        num_labels=num_labels(weighed),
    )


@dataclass(frozen=True)
class _Part:
    """A source, its tokens, and those of its groups that are used."""

    source: Source
    tokens: Tokenised
    whole: Groups

    @classmethod
    def of(cls, source: Source, tokens: Tokenised, share: float, seed: int) -> _Part:
        whole = Groups.of(tokens.shard)
        if share < 1.0:
            chosen = sample(_num_rows(tokens.shard), share, seed)
            whole = whole.taken(np.flatnonzero(np.isin(_row_numbers(whole), chosen)))
        return cls(source, tokens, whole)


def _warn_of_unread_kwargs(pipeline: RowPipeline) -> None:
    if unread := pipeline.renderer.unread_kwargs():
        logger.warning(
            "dataset.chat_template_kwargs: the chat template (%s) reads no %s, so nothing comes of it",
            pipeline.renderer.chosen.name,
            " and no ".join(unread),
        )


def _train_parts(
    sources: Sequence[Source], pipeline: RowPipeline, identity: Mapping[str, Any], config: RunConfig
) -> list[_Part]:
    """The sources one after the other, with at most `max_samples` good rows in all."""
    parts = []
    missing = config.dataset.max_samples
    for source in sources:
        limit = min((n for n in (source.limit, missing) if n is not None), default=None)
        if limit == 0:
            break
        tokens = _tokenise(source, limit, pipeline, identity, config)
        parts.append(_Part.of(source, tokens, source.share, config.seed))
        if missing is not None:
            missing -= _num_rows(tokens.shard) + tokens.dropped.total()
    return parts


def _tokenise(
    source: Source, limit: int | None, pipeline: RowPipeline, identity: Mapping[str, Any], config: RunConfig
) -> Tokenised:
    rows = source.identity()

    def make() -> Iterator[tuple[str, PipelineResult]]:
        read = source.read_lines or source.read
        yield from work_all(pipeline, read(), limit=limit, num_workers=config.dataset.num_workers)
        if source.identity() != rows:
            raise DataError(
                "the rows were changed while they were read",
                where=source.label,
                fix="start again once nothing writes to them",
            )

    whole = {**identity, "source": rows, "limit": limit}
    return fetch(whole, source.label, make, strict=pipeline.stops_at_errors)


def _num_rows(groups: Shard | Groups) -> int:
    """How many rows the groups come from: two labelled groups can come from one pair."""
    return len(groups) - int(groups.column("again").sum())


def _row_numbers(groups: Groups) -> np.ndarray:
    """For each group the number of its row, from 0. The groups of a row are adjacent and stay together."""
    return np.asarray(np.cumsum(groups.column("again") == 0) - 1)


def _first_rows(groups: Groups, most: int | None) -> Groups:
    return groups if most is None else groups.taken(np.flatnonzero(_row_numbers(groups) < most))


def _joined(parts: Sequence[Groups]) -> Groups:
    return parts[0] if len(parts) == 1 else Groups.joined(parts)


def _weighed(groups: Groups, weights: Sequence[float], seed: int) -> Groups:
    """The groups with each as often as its source's weight says; the fraction of a weight goes to some at random."""
    if all(weight == 1.0 for weight in weights):
        return groups
    row_of = _row_numbers(groups)
    source_of = groups.shard_of[groups.column("again") == 0]
    times = np.zeros(len(source_of), np.int64)
    for n, weight in enumerate(weights):
        rows = np.flatnonzero(source_of == n)
        times[rows] = int(weight)
        times[rows[sample(len(rows), weight % 1, seed + n)]] += 1
    return groups.taken(np.repeat(np.arange(len(groups)), times[row_of]))


def _counts(parts: Sequence[_Part], kept: Groups, train: Sequence[_Part]) -> SplitCounts:
    """What became of the rows of a split; what is refused or dropped of held-out rows counts as read for training."""
    label = ", ".join(part.source.label for part in parts or train)
    counts = SplitCounts(label if parts else f"{label} (held out)")
    for part in parts:
        counts.refused += part.tokens.refused
        counts.dropped += part.tokens.dropped
        counts.blank_lines += part.tokens.blank_lines
        counts.not_used += _num_rows(part.tokens.shard) - _num_rows(part.whole)
    counts.kept = _num_rows(kept)
    counts.rows_read = counts.kept + counts.not_used + counts.refused.total() + counts.dropped.total()
    counts.changes = {name: int(kept.column(name).sum()) for name in COUNTERS}
    return counts


def _rendering(views: Mapping[str, Groups], pipeline: RowPipeline) -> Rendering:
    num_rows = sum(_num_rows(view) for view in views.values())
    num_raw = sum(int(view.column("raw").sum()) for view in views.values())
    if num_raw == num_rows:
        return Rendering(0, num_raw, None, None)
    renderer = pipeline.renderer
    return Rendering(num_rows - num_raw, num_raw, renderer.chosen.name, renderer.template_sha256, renderer.date)


def _refuse_losses(parts: Sequence[_Part], most: float | None) -> None:
    """Refuses to train if too many rows are lost. Rows that the configuration asks to drop do not count as lost."""
    lost = sum((part.tokens.refused + part.tokens.dropped for part in parts), Counter[str]())
    lost -= Counter({reason: n for reason, n in lost.items() if reason in ASKED_FOR})
    num_rows = sum(_num_rows(part.tokens.shard) for part in parts) + lost.total()
    if most is None or lost.total() <= most * num_rows:
        return
    rejected = islice((row for part in parts for row in part.tokens.rejected), 5)
    examples = ", ".join(f"{row['file']}:{row['line']} ({row['reason']})" for row in rejected)
    raise DataError(
        f"{lost.total()} of {num_rows} rows are lost: " + ", ".join(f"{n} {why}" for why, n in lost.most_common()),
        where=", ".join(part.source.label for part in parts),
        expected=f"at most {100 * most:g} % (dataset.max_dropped_fraction)",
        fix=(f"look at {examples}; " if examples else "")
        + f"{FIXES.get(lost.most_common(1)[0][0], 'fix the rows')}; or raise dataset.max_dropped_fraction",
    )


def _nothing_left(parts: Sequence[_Part], limits: Limits) -> DataError:
    reasons = sum((part.tokens.dropped for part in parts), Counter[str]())
    where = ", ".join(part.source.label for part in parts)
    if num_good := sum(_num_rows(part.tokens.shard) for part in parts):
        return DataError(
            f"of {num_good} good rows none is left",
            where=where,
            expected="at least one",
            fix="raise the fraction or the weight of the sources, or lower dataset.validation_split",
        )
    listed = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    return DataError(
        f"all {reasons.total()} rows are dropped ({listed})",
        where=where,
        expected=f"rows within training.max_seq_length {limits.sequence}, training.max_prompt_length {limits.prompt} "
        f"and training.max_completion_length {limits.completion}",
        fix=FIXES[reasons.most_common(1)[0][0]],
    )


ASKED_FOR = frozenset({"prompt_too_long", "completion_too_long", "sequence_too_long"})
"""Reasons that `dataset.filter_overlength_samples` gives."""

FIXES = {
    "dropped_by_template": "set dataset.template to one that writes all turns (qwen2.5_instruct: tools and system)",
    "nothing_trained": "raise training.max_seq_length or lower training.max_prompt_length, so that a completion fits",
    "equal_after_truncation": "raise training.max_completion_length and training.max_seq_length",
    "equal_tokens": "check the rows: chosen and rejected are the same tokens",
    **dict.fromkeys(
        sorted(ASKED_FOR),
        "raise the limit, or set dataset.filter_overlength_samples: false to cut the rows",
    ),
}
"""What to do where most or all rows are lost, by the most frequent reason."""
