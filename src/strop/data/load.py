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

from strop.allocator import give_back_freed_memory
from strop.config import RunConfig
from strop.data.counters import COUNTERS
from strop.data.data_report import DataReport, Rendering, SplitCounts
from strop.data.problems import num_labels
from strop.data.read.sources import Source, choose_sources, warn_of_unread
from strop.data.split import held_out, sample
from strop.data.store.row_pipeline import PipelineResult, RowPipeline
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
    (True) and undesirable (False) completions each epoch has.
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
    sources = choose_sources(config.dataset, rows)
    warn_of_unread(config.dataset)
    pipeline = RowPipeline.tried(config, tokenizer, rows, stop_tokens)
    _warn_of_unread_kwargs(pipeline)
    tokeniser = _Tokeniser(pipeline, config)
    train = _train_parts(sources.train, tokeniser, config)
    splits = _splits(train, sources.eval, tokeniser, config)
    for split in splits.values():
        _refuse_losses(split, config.dataset.max_dropped_fraction, pipeline.limits)
    weighed = _weighed(splits["train"].groups, [part.source.weight for part in train], config.seed)
    if not len(weighed):
        raise _nothing_left(train, pipeline.limits)
    give_back_freed_memory(len(weighed))
    views = {name: split.groups for name, split in splits.items()}
    counts = {name: _counts(split, train) for name, split in splits.items()}
    rendering = _rendering(views, pipeline)
    return LoadedData(
        train=weighed,
        eval=views["eval"] if "eval" in views and len(views["eval"]) else (),
        report=DataReport.of(counts, views, rendering, trained=weighed, pairs=rows == "pair", sampled=rows == "prompt"),
        chat_template=pipeline.renderer.template if rendering.num_chat else None,
        rejected=sum((part.tokens.rejected for split in splits.values() for part in split.parts), Rejected([])),
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


@dataclass(frozen=True)
class _Split:
    """Training or validation rows: the groups, and the sources that they come from.

    parts: empty for validation rows that are held out of the training sources. num_not_used: of those, the rows beyond
    `dataset.max_eval_samples`.
    """

    groups: Groups
    parts: Sequence[_Part] = ()
    num_not_used: int = 0


def _warn_of_unread_kwargs(pipeline: RowPipeline) -> None:
    if unread := pipeline.renderer.unread_kwargs():
        logger.warning(
            "dataset.chat_template_kwargs: the chat template (%s) reads no %s, so nothing comes of it",
            pipeline.renderer.chosen.name,
            " and no ".join(unread),
        )


def _train_parts(sources: Sequence[Source], tokeniser: _Tokeniser, config: RunConfig) -> list[_Part]:
    """The sources one after the other, with at most `max_samples` good rows in all."""
    parts = []
    missing = config.dataset.max_samples
    for source in sources:
        limit = min((n for n in (source.limit, missing) if n is not None), default=None)
        if limit == 0:
            break
        tokens = tokeniser.tokens(source, limit)
        parts.append(_Part.of(source, tokens, source.share, config.seed))
        if missing is not None:
            missing -= _num_rows(tokens.shard) + tokens.dropped.total()
    return parts


def _splits(
    train: Sequence[_Part], validation: Source | None, tokeniser: _Tokeniser, config: RunConfig
) -> dict[str, _Split]:
    """The training split and, if there is one, `eval`: of a source of its own, or held out of the training rows."""
    most = config.dataset.max_eval_samples
    groups = train[0].whole if len(train) == 1 else Groups.joined([part.whole for part in train])
    if validation is not None:
        part = _Part.of(validation, tokeniser.tokens(validation, most), 1.0, 0)
        return {"train": _Split(groups, train), "eval": _Split(part.whole, [part])}
    if config.dataset.validation_split == 0:
        return {"train": _Split(groups, train)}
    is_held_out = held_out(_prompts(groups), config.dataset.validation_split, config.seed)[_row_numbers(groups)]
    held = groups.taken(np.flatnonzero(is_held_out))
    used = held if most is None else held.taken(np.flatnonzero(_row_numbers(held) < most))
    return {
        "train": _Split(groups.taken(np.flatnonzero(~is_held_out)), train),
        "eval": _Split(used, num_not_used=_num_rows(held) - _num_rows(used)),
    }


class _Tokeniser:
    """Tokenises a source, or takes its tokens from the cache."""

    def __init__(self, pipeline: RowPipeline, config: RunConfig) -> None:
        self._pipeline, self._num_workers = pipeline, config.dataset.num_workers
        self._identity = pipeline.identity()

    def tokens(self, source: Source, limit: int | None) -> Tokenised:
        """limit: good rows at most."""
        rows = source.identity()

        def make() -> Iterator[tuple[str, PipelineResult]]:
            read = source.read_lines or source.read
            yield from work_all(self._pipeline, read(), limit=limit, num_workers=self._num_workers)
            if source.identity() != rows:
                raise DataError(
                    "the rows were changed while they were read",
                    where=source.label,
                    fix="start again once nothing writes to them",
                )

        key = {**self._identity, "source": rows, "limit": limit}
        return fetch(key, source.label, make, strict=self._pipeline.stops_at_errors)


def _num_rows(groups: Shard | Groups) -> int:
    """How many rows the groups come from: two labelled groups can come from one pair."""
    return len(groups) - groups.sum("again")


def _prompts(groups: Groups) -> np.ndarray:
    """[rows] hashes of the rows' prompts."""
    hashes, is_first = groups.column("prompt_hash"), groups.column("again") == 0
    return hashes if is_first.all() else np.asarray(hashes[is_first])


def _row_numbers(groups: Groups) -> np.ndarray:
    """For each group the number of its row, from 0. The groups of a row are adjacent and stay together."""
    numbers: np.ndarray = np.cumsum(groups.column("again") == 0, dtype=np.int32 if len(groups) < 2**31 else np.int64)
    numbers -= 1
    return numbers


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


def _counts(split: _Split, train: Sequence[_Part]) -> SplitCounts:
    """What became of the rows of a split; what is refused or dropped of held-out rows counts as read for training."""
    label = ", ".join(part.source.label for part in split.parts or train)
    counts = SplitCounts(label if split.parts else f"{label} (held out)")
    for part in split.parts:
        counts.refused += part.tokens.refused
        counts.dropped += part.tokens.dropped
        counts.blank_lines += part.tokens.blank_lines
        counts.not_used += _num_rows(part.tokens.shard) - _num_rows(part.whole)
    counts.not_used += split.num_not_used
    counts.kept = _num_rows(split.groups)
    counts.rows_read = counts.kept + counts.not_used + counts.refused.total() + counts.dropped.total()
    counts.changes = {name: split.groups.sum(name) for name in COUNTERS}
    return counts


def _rendering(views: Mapping[str, Groups], pipeline: RowPipeline) -> Rendering:
    num_rows = sum(_num_rows(view) for view in views.values())
    num_raw = sum(view.sum("raw") for view in views.values())
    if num_raw == num_rows:
        return Rendering(0, num_raw, None, None)
    renderer = pipeline.renderer
    return Rendering(num_rows - num_raw, num_raw, renderer.chosen.name, renderer.template_sha256, renderer.date)


def _refuse_losses(split: _Split, most: float | None, limits: Limits) -> None:
    """Refuses to train if all or too many rows are lost.

    Rows that the configuration asks to drop do not count as lost. A split of held-out rows may be empty.

    Args:
        most: the share that may be lost.
    """
    parts = split.parts
    if parts and not len(split.groups):
        raise _nothing_left(parts, limits)
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
