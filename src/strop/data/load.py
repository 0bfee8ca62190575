"""The data room's only wiring: from the configuration to groups. Floor 2.

    sources -> rows -> formats -> chat -> encode -> truncate -> groups, and a report of what became of every row

Rows are read as a stream and worked on some hundreds at a time; what stays is their tokens. The order of the groups
is the order of the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from strop.config import RunConfig
from strop.data.chat import Rendered, Renderer
from strop.data.encode import Encoded, Encoder
from strop.data.formats import Columns, to_example
from strop.data.report import DataReport, Rendering, SplitCounts
from strop.data.rows import Row, RowRefused
from strop.data.sources import Source, choose_sources
from strop.data.split import held_out
from strop.data.tokens import from_tokens, is_tokenised
from strop.data.truncate import Cut, Limits, cut, shorten_prompts
from strop.errors import DataError
from strop.types import Example, Group, RowShape

ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class LoadedData:
    """What a run trains and evaluates on.

    chat_template: the template that rows were rendered by, to be saved with the tokenizer; None where none was used.
    rejected: what rejected.jsonl holds, one object a row: file, line, reason, raw.
    """

    train: tuple[Group, ...]
    eval: tuple[Group, ...]
    report: DataReport
    chat_template: str | None
    rejected: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of one row: refused, cut to a group or dropped, or neither for a blank line.

    Holds the row itself only where it is refused: all other rows live on as tokens alone.
    """

    row: Row | None = None
    refusal: RowRefused | None = None
    cut: Cut | None = None
    prompt_key: bytes = b""
    is_raw: bool = False
    num_split: int = 0
    num_controls: int = 0
    without_end_token: int = 0


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, rows: RowShape) -> LoadedData:
    """Reads, renders, encodes and cuts the rows that the configuration names.

    Args:
        rows: what the method needs: one completion a row, or pairs.

    Raises:
        ConfigError: no source is named; messages under `dataset.render: raw`.
        DataError: a source cannot be read; a bad row under `dataset.on_error: error`; nothing is left to train on.
        ModelError: the tokenizer cannot be used.
    """
    dataset = config.dataset
    sources = choose_sources(dataset, rows)
    workshop = _Workshop(config, tokenizer, rows)
    outcomes = {"train": workshop.read(sources.train, dataset.max_samples)}
    labels = {"train": sources.train.label}
    if sources.eval is not None:
        outcomes["eval"] = workshop.read(sources.eval, None)
        labels["eval"] = sources.eval.label
    elif dataset.validation_split > 0:
        everything = list(zip(outcomes["train"], _hold_out(outcomes["train"], config, rows), strict=True))
        outcomes = {name: [o for o, held in everything if held is (name == "eval")] for name in ("train", "eval")}
        labels["eval"] = f"{sources.train.label} (held out)"
    groups = {name: _groups(part) for name, part in outcomes.items()}
    for name in ("train", "eval") if sources.eval is not None else ("train",):
        if not groups[name]:
            raise _nothing_left(outcomes[name], labels[name], workshop.limits)
    all_outcomes = [outcome for part in outcomes.values() for outcome in part]
    how = _rendering(all_outcomes, workshop.renderer)
    return LoadedData(
        train=groups["train"],
        eval=groups.get("eval", ()),
        report=DataReport.of({n: _counts(part, labels[n]) for n, part in outcomes.items()}, groups, how),
        chat_template=workshop.renderer.template if how.num_chat else None,
        rejected=tuple(_rejected(outcome) for outcome in all_outcomes if outcome.refusal is not None),
    )


class _Workshop:
    """Everything between a source and its outcomes."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, rows: RowShape) -> None:
        self._rows = rows
        self._columns = Columns.of(config.dataset)
        self._stops_at_errors = config.dataset.on_error == "error"
        self._bos: int | None = tokenizer.bos_token_id
        self._vocabulary = len(tokenizer)
        self.limits = Limits.of(config.training, config.dataset.filter_overlength_samples)
        self.renderer = Renderer(tokenizer, config.dataset.render, config.dataset.template)
        self._encoder = Encoder(tokenizer, self.renderer.template)

    def read(self, source: Source, limit: int | None) -> list[_Outcome]:
        """All rows of a source, or as many as hold `limit` good ones."""
        outcomes: list[_Outcome] = []
        stream = source.read()
        missing = limit
        while batch := list(islice(stream, ROWS_AT_ONCE if missing is None else min(ROWS_AT_ONCE, missing))):
            done = self._work(batch)
            if missing is not None:
                missing -= sum(o.cut is not None for o in done)
            outcomes += done
        if all(o.cut is None for o in outcomes):
            raise _nothing_read(outcomes, source.label)
        return outcomes

    def _work(self, rows: Sequence[Row]) -> list[_Outcome]:
        """The outcomes of some rows, in their order."""
        examples = [self._example(row) for row in rows]
        good = [example for example in examples if isinstance(example, Example)]
        encoded = iter(self._encode(good))
        results = [next(encoded) if isinstance(example, Example) else example for example in examples]
        if self._stops_at_errors:
            for row, result in zip(rows, results, strict=True):
                if isinstance(result, RowRefused):
                    raise result.at(row.origin)
        shortened = self._shortened(examples, results)
        return [
            self._outcome(row, example, result, shortened.get(i))
            for i, (row, example, result) in enumerate(zip(rows, examples, results, strict=True))
        ]

    def _example(self, row: Row) -> Example | Encoded | RowRefused | None:
        if row.data is None:
            return row.refusal
        try:
            if self._rows == "single" and is_tokenised(row.data):
                return from_tokens(row.data, self._vocabulary)
            return to_example(row.data, row.origin, self._rows, self._columns)
        except RowRefused as refusal:
            return refusal
        except RecursionError:
            return RowRefused("deep_nesting", "the row is nested too deeply to be compared")

    def _encode(self, examples: Sequence[Example]) -> list[Encoded | RowRefused]:
        results: list[Encoded | RowRefused | None] = []
        rendered: list[tuple[Rendered, ...]] = []
        for example in examples:
            try:
                rendered.append(self.renderer.render(example))
                results.append(None)
            except RowRefused as refusal:
                results.append(refusal)
            except RecursionError:
                results.append(RowRefused("deep_nesting", "the row is nested too deeply to be rendered"))
        encoded = iter(self._encoder.encode(rendered))
        return [next(encoded) if result is None else result for result in results]

    def _shortened(
        self, examples: Sequence[Example | Encoded | RowRefused | None], results: Sequence[Encoded | RowRefused | None]
    ) -> dict[int, Encoded]:
        """Row number -> the row without the messages that its prompt has too many of."""
        if self.limits.drop:
            return {}
        long = {
            i: example
            for i, (example, result) in enumerate(zip(examples, results, strict=True))
            if isinstance(example, Example) and isinstance(result, Encoded) and self.limits.prompt_is_too_long(result)
        }
        found = shorten_prompts(list(long.values()), self.limits, self._encode)
        return {i: encoded for i, encoded in zip(long, found, strict=True) if encoded is not None}

    def _outcome(
        self,
        row: Row,
        example: Example | Encoded | RowRefused | None,
        result: Encoded | RowRefused | None,
        short: Encoded | None,
    ) -> _Outcome:
        if isinstance(result, RowRefused):
            return _Outcome(row, result)
        if result is None or isinstance(example, RowRefused) or example is None:
            return _Outcome()
        encoded = short or result
        is_raw = isinstance(example, Encoded) or self.renderer.is_raw(example)
        limits = self.limits.of_whole_rows() if isinstance(example, Encoded) or not example.prompt else self.limits
        done = cut(encoded, limits, row.origin, bos=self._bos, prompt_cut=short is not None)
        completions = done.group.completions if done.group is not None else ()
        return _Outcome(
            cut=done,
            prompt_key=_prompt_key(example) if self._rows == "pair" and isinstance(example, Example) else b"",
            is_raw=is_raw,
            num_split=encoded.num_split,
            num_controls=encoded.num_controls,
            without_end_token=sum(not self._encoder.is_end_token(c.ids[-1]) for c in completions),
        )


def _prompt_key(example: Example) -> bytes:
    text = json.dumps(example.prompt, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _hold_out(outcomes: Sequence[_Outcome], config: RunConfig, rows: RowShape) -> list[bool]:
    """True for the outcomes to evaluate on; what is neither group nor dropped stays with the training rows."""
    keys = [o.prompt_key if rows == "pair" else i for i, o in enumerate(outcomes) if o.cut is not None]
    flags = iter(held_out(keys, config.dataset.validation_split, config.seed))
    return [next(flags) if o.cut is not None else False for o in outcomes]


def _groups(outcomes: Sequence[_Outcome]) -> tuple[Group, ...]:
    return tuple(o.cut.group for o in outcomes if o.cut is not None and o.cut.group is not None)


def _counts(outcomes: Sequence[_Outcome], label: str) -> SplitCounts:
    counts = SplitCounts(label)
    for o in outcomes:
        if o.refusal is not None:
            counts.refused[o.refusal.reason] += 1
        elif o.cut is None:
            counts.blank_lines += 1
            continue
        elif o.cut.dropped is not None:
            counts.dropped[o.cut.dropped] += 1
        else:
            counts.kept += 1
            counts.prompts_cut += o.cut.prompt_cut
            counts.completions_cut += o.cut.completions_cut
            counts.without_end_token += o.without_end_token
            counts.boundaries_split += o.num_split
            counts.controls_as_text += o.num_controls
        counts.rows_read += 1
    return counts


def _rendering(outcomes: Sequence[_Outcome], renderer: Renderer) -> Rendering:
    good = [o for o in outcomes if o.cut is not None]
    num_raw = sum(o.is_raw for o in good)
    if num_raw == len(good):
        return Rendering(0, num_raw, None, None)
    return Rendering(len(good) - num_raw, num_raw, renderer.chosen.name, renderer.template_sha256)


def _rejected(outcome: _Outcome) -> Mapping[str, Any]:
    row, refusal = outcome.row, outcome.refusal
    assert row is not None and refusal is not None
    return {"file": row.origin.file, "line": row.origin.line, "reason": refusal.reason, "raw": row.raw_text}


def _nothing_read(outcomes: Sequence[_Outcome], label: str) -> DataError:
    refused = [o for o in outcomes if o.refusal is not None]
    if not refused:
        return DataError(
            "there are no rows", where=label, expected="at least one row", fix="name a file that has some, or fill it"
        )
    row, refusal = refused[0].row, refused[0].refusal
    assert row is not None and refusal is not None
    reasons = Counter(o.refusal.reason for o in refused if o.refusal is not None)
    return DataError(
        f"all {len(refused)} rows are bad ({_listed(reasons)}); the first: {refusal.found}",
        where=str(row.origin),
        expected=refusal.expected,
        fix=refusal.fix or f"look at the rows of {label}; docs/data.md shows the known shapes",
    )


def _nothing_left(outcomes: Sequence[_Outcome], label: str, limits: Limits) -> DataError:
    reasons = Counter(o.cut.dropped for o in outcomes if o.cut is not None and o.cut.dropped is not None)
    return DataError(
        f"all {reasons.total()} rows are dropped ({_listed(reasons)})",
        where=label,
        expected=f"rows within training.max_seq_length {limits.sequence}, training.max_prompt_length {limits.prompt} "
        f"and training.max_completion_length {limits.completion}",
        fix=FIXES[reasons.most_common(1)[0][0]],
    )


FIXES = {
    "nothing_trained": "raise training.max_seq_length or lower training.max_prompt_length, so that a completion fits",
    "equal_after_truncation": "raise training.max_completion_length and training.max_seq_length",
    "equal_tokens": "check the rows: chosen and rejected are the same tokens",
    **dict.fromkeys(
        ("prompt_too_long", "completion_too_long", "sequence_too_long"),
        "raise the limit, or set dataset.filter_overlength_samples: false to cut the rows",
    ),
}
"""What to do where all rows were dropped, by the most frequent reason."""


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
