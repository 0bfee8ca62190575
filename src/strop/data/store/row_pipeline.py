"""Rows to records of the table: everything between a source and the disk. Floor 2.

    rows -> examples -> render -> encode -> truncate -> records, and what became of every other row

Rows are worked on some hundreds at a time, here or in other processes (`worker_pool`); a pipeline has no state, so what
becomes of a row does not depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from strop import garbage_collection, time_limit
from strop.config import RunConfig
from strop.data.counters import LEFT_OUT
from strop.data.read.files import parse_line
from strop.data.read.row import Row, RowRefused
from strop.data.shapes.examples import RowColumns, to_example
from strop.data.shapes.messages import as_turns
from strop.data.store.group_numbers import checked_numbers, unpaired, with_numbers
from strop.data.store.table import KeptRow, Record, to_table
from strop.data.text.date import day_of
from strop.data.text.encode import Encoded, Encoder
from strop.data.text.message_forms import reasons
from strop.data.text.render import Rendered, Renderer, TextRules
from strop.data.text.sandbox import bounded_memory, time_is_watched
from strop.data.text.token_rows import from_tokens, group_from_tokens, is_tokenised, is_tokenised_group
from strop.data.text.truncate import Limits, shorten_prompts, truncate
from strop.errors import DataError, ModelError, foreign_errors
from strop.types import OF_TOKENS, Example, Group, RowShape, judged


@dataclass
class PipelineResult:
    """What became of some rows.

    table: the records, or None where there are none. num_good: rows that were neither refused nor blank.
    error: of the first refused row, under `dataset.on_error: error`. first: the group of the first record. left_out:
    what of that record's row is not in its tokens, in words.
    """

    num_good: int = 0
    blank_lines: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: list[Mapping[str, Any]] = field(default_factory=list)
    first_refusal: Mapping[str, str] | None = None
    error: DataError | None = None
    table: Any = None
    first: Group | None = None
    left_out: tuple[str, ...] = ()


class RowPipeline:
    """Works on rows as the configuration says."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        rows: RowShape,
        stop_tokens: Sequence[int] = (),
        tokenizer_json: str | None = None,
    ) -> None:
        """tokenizer_json: what `json_of` writes of the tokenizer, where the caller has it."""
        dataset = config.dataset
        self._rows = rows
        self._keeps_rows = config.rollout.enabled  # for the rewards
        numbers = () if rows == "prompt" else config.post_training.NUMBERS  # those of a sampled group are made
        self._columns = replace(RowColumns.of(dataset), numbers=numbers)
        self.stops_at_errors = dataset.on_error == "error"
        self._bos: int | None = tokenizer.bos_token_id
        self._vocabulary = len(tokenizer)
        self.limits = Limits.of(config.training, dataset.filter_overlength_samples)
        rules = TextRules(
            dataset.render,
            dataset.template,
            dataset.train_on,
            dataset.on_dropped_reasoning,
            day_of(dataset),
            dataset.chat_template_kwargs,
        )
        self.renderer = Renderer(tokenizer, rules, stop_tokens)
        self._judged = config.post_training.REWARD_MODEL
        self._encoder = Encoder(tokenizer, self.renderer.template, whole=self._judged)
        self._tokenizer = tokenizer
        self._made_of = (config, tokenizer, rows, stop_tokens)
        whole = tokenizer_json or json_of(tokenizer)
        self.may_run_away = may_run_away(whole)
        """Whether rows may take the tokenizer for ever, where no signal ends it."""
        parts = (whole, str(tokenizer.special_tokens_map), str(tokenizer.chat_template))
        self._tokenizer_hashes = [hashlib.sha256(part.encode(errors="surrogatepass")).hexdigest() for part in parts]

    def __reduce__(self) -> tuple[object, ...]:
        # another process makes its own: compiled templates cannot be sent
        return RowPipeline, self._made_of

    @classmethod
    def tried(
        cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, rows: RowShape, stop_tokens: Sequence[int] = ()
    ) -> RowPipeline:
        """A pipeline, made in another process first where the tokenizer may never come to an end.

        Raises:
            ModelError: it takes too much time or memory to be made.
        """
        tokenizer_json = json_of(tokenizer)
        if may_run_away(tokenizer_json):
            try:
                time_limit.tried(cls, config, tokenizer, rows, stop_tokens)
            except time_limit.TooMuch as limit:
                raise ModelError(
                    f"its tokenizer takes more than {limit} for a few words",
                    where=tokenizer.name_or_path,
                    expected="some milliseconds and little memory",
                    fix="look at the normalizer and pre_tokenizer in tokenizer.json before you trust it",
                ) from limit
        with foreign_errors(partial(_unusable, tokenizer)):
            return cls(config, tokenizer, rows, stop_tokens, tokenizer_json)

    def identity(self) -> dict[str, Any]:
        """Everything but the rows themselves that decides what becomes of them."""
        return {
            "rows": self._rows,
            "kept": self._keeps_rows,
            "judged": self._judged,
            "columns": repr(self._columns),
            "limits": repr(self.limits),
            "text": self.renderer.identity(),
            "tokenizer": self._tokenizer_hashes,
            "code": _code(),
            "versions": [tokenizers.__version__, transformers.__version__],
        }

    def work(self, rows: Sequence[Row], file: int = 0) -> PipelineResult:
        """The records of some rows, in their order.

        Args:
            file: number of the file that the rows are from.
        """
        with garbage_collection.paused():  # what a batch makes stays until its end
            return self._work(rows, file)

    def _work(self, rows: Sequence[Row], file: int) -> PipelineResult:
        done = PipelineResult()
        rows = [_parsed(row) for row in rows]
        examples = [self._example(row) for row in rows]
        good = [example for example in examples if isinstance(example, Example)]
        encoded = iter(self._encode(good))
        found = [next(encoded) if isinstance(example, Example) else example for example in examples]
        results = [checked_numbers(whole) if isinstance(whole, Encoded) else whole for whole in found]
        shortened = self._shortened(examples, results)
        records: list[Record] = []
        for i, (row, example, result) in enumerate(zip(rows, examples, results, strict=True)):
            if isinstance(result, RowRefused):
                _refuse(done, row, result)
                if self.stops_at_errors:
                    done.error = result.at(row.origin)
                    break
            elif result is None or example is None or isinstance(example, RowRefused):
                done.blank_lines += 1
            else:
                done.num_good += 1
                record = self._record(row, example, shortened.get(i), result, file)
                if isinstance(record, str):
                    done.dropped[record] += 1
                elif self._rows == "labelled" and record.group.label is None:
                    first, second = unpaired(record.group)
                    records += [replace(record, group=first), Record(second, file, record.prompt_words, again=1)]
                else:
                    records.append(record)
                if records and not done.left_out:
                    done.left_out = _left_out(example, result) if records[0].group.origin == row.origin else ()
        done.table, done.first = (to_table(records), records[0].group) if records else (None, None)
        return done

    def _example(self, row: Row) -> Example | Encoded | RowRefused | None:
        if row.data is None:
            return row.refusal
        try:
            if self._rows in ("single", "prompt") and is_tokenised(row.data):
                return from_tokens(row.data, self._vocabulary, self._columns.numbers)
            if self._rows == "group" and is_tokenised_group(row.data):
                return group_from_tokens(row.data, self._vocabulary, self._columns.numbers)
            return to_example(row.data, row.origin, self._rows, self._columns)
        except RowRefused as refusal:
            return refusal
        except RecursionError:
            return RowRefused("deep_nesting", "the row is nested too deeply to be compared")

    def _encode(self, examples: Sequence[Example]) -> list[Encoded | RowRefused]:
        results: list[Encoded | RowRefused | None] = []
        rendered: list[tuple[Rendered, ...]] = []
        with bounded_memory(), time_is_watched():
            for example in examples:
                try:
                    rendered.append(self.renderer.render(example))
                    results.append(None)
                except RowRefused as refusal:
                    results.append(refusal)
                except RecursionError:
                    results.append(RowRefused("deep_nesting", "the row is nested too deeply to be rendered"))
        with foreign_errors(partial(self._tokenizer_fails, examples)):
            encoded = iter(self._encoder.encode(rendered))
        return [
            _with_numbers_of(example, next(encoded)) if result is None else result
            for example, result in zip(examples, results, strict=True)
        ]

    def _tokenizer_fails(self, examples: Sequence[Example], why: str) -> ModelError:
        first, last = examples[0].origin, examples[-1].origin
        return ModelError(
            f"the model's tokenizer fails on these rows: {why}",
            where=f"{first} to {last.line}" if len(examples) > 1 else str(first),
            expected="a tokenizer that takes any text",
            fix="look at these rows, and at the normalizer and pre_tokenizer in its tokenizer.json",
        )

    def _shortened(
        self, examples: Sequence[Example | Encoded | RowRefused | None], results: Sequence[Encoded | RowRefused | None]
    ) -> dict[int, Encoded]:
        """Row number -> the row without the messages that its prompt has too many of."""
        if self.limits.drop:
            return {}
        long = {
            i: example.split_before(result.num_prompt_turns)
            for i, (example, result) in enumerate(zip(examples, results, strict=True))
            if isinstance(example, Example) and isinstance(result, Encoded) and self.limits.prompt_is_too_long(result)
        }
        found = shorten_prompts(list(long.values()), self.limits, self._encode)
        return {i: encoded for i, encoded in zip(long, found, strict=True) if encoded is not None}

    def _record(
        self, row: Row, example: Example | Encoded, short: Encoded | None, whole: Encoded, file: int
    ) -> Record | str:
        """The record, or the reason why the row is dropped."""
        encoded = short or whole
        has_no_border = isinstance(example, Encoded) or not example.prompt
        limits = self.limits.of_whole_rows() if has_no_border else self.limits
        label, notes = (example.label, example.notes) if isinstance(example, Example) else (None, ())
        differ = self._rows != "group"
        prompt_cut = short is not None
        done = truncate(encoded, limits, row.origin, bos=self._bos, prompt_cut=prompt_cut, label=label, differ=differ)
        if done.group is None:
            assert done.dropped is not None
            return done.dropped
        if done.prompt_cut and any(name in whole.numbers for name in OF_TOKENS):
            return "prompt_too_long"  # its log-probs are those after the whole prompt
        group = with_numbers(judged(done.group) if self._judged else done.group, whole.numbers)
        return Record(
            group,
            file,
            prompt_words=_prompt_words(example, encoded),
            counts={
                **(Counter(notes) if notes else {}),
                **(_kinds(example) if isinstance(example, Example) else {}),
                **encoded.counts,
                "prompts_cut": done.prompt_cut,
                "completions_cut": done.completions_cut,
                "without_end_token": 0
                if self._judged
                else sum(not self._encoder.is_end_token(c.ids[-1]) for c in group.completions),
                "double_bos": self._bos is not None and list(_start(encoded)) == [self._bos] * 2,
            },
            raw=isinstance(example, Encoded) or self.renderer.is_raw(example),
            kept=_kept(row, example).to_json() if self._keeps_rows else None,
        )


def _kept(row: Row, example: Example | Encoded) -> KeptRow:
    assert row.data is not None
    if isinstance(example, Encoded):
        return KeptRow(row.data, None)
    prompt, tools = example.prompt, example.tools
    return KeptRow(
        row.data, prompt if isinstance(prompt, str) else list(prompt), None if tools is None else list(tools)
    )


def _with_numbers_of(example: Example, encoded: Encoded | RowRefused) -> Encoded | RowRefused:
    return replace(encoded, numbers=example.numbers) if example.numbers and isinstance(encoded, Encoded) else encoded


def _unusable(tokenizer: PreTrainedTokenizerBase, why: str) -> ModelError:
    return ModelError(
        f"its tokenizer cannot be used: {why}",
        where=tokenizer.name_or_path,
        expected="a tokenizer and a chat template that take any text",
        fix="look at tokenizer.json, tokenizer_config.json and the chat template; download or copy them again",
    )


RUNS_AWAY = re.compile('"type":"(?:Replace|Precompiled|Prepend)"|"Regex":')
"""What a tokenizer.json can make endless: its own regular expressions, and texts that grow."""


def may_run_away(tokenizer_json: str) -> bool:
    """Whether a tokenizer has parts that a text can keep busy for ever, or that make texts longer."""
    return RUNS_AWAY.search(tokenizer_json) is not None


def json_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of its tokenizer.json, which takes a twentieth of a second and more to be written."""
    text: str = tokenizer.backend_tokenizer.to_str()
    return text


def _kinds(example: Example) -> dict[str, bool]:
    """What the row has, by the names of `COUNTERS`."""
    turns = [turn for part in (example.prompt, *example.completions) if not isinstance(part, str) for turn in part]
    return {
        "with_tools": bool(example.tools) or any("tool_calls" in turn for turn in turns),
        "with_reasoning": any(map(reasons, turns)),
    }


def _left_out(example: Example | Encoded, encoded: Encoded) -> tuple[str, ...]:
    """What of the row is not in its tokens, in words: by strop's own rules, and by the template."""
    notes = example.notes if isinstance(example, Example) else ()
    own = [words for name, words in LEFT_OUT.items() if name in notes]
    return (*own, *encoded.left_out)


def _start(encoded: Encoded) -> list[int]:
    return [*encoded.prompt_ids[:2], *encoded.sides[0].ids[:1]][:2]


def _parsed(row: Row) -> Row:
    """A line that nobody has looked at yet, read."""
    if row.raw is None or row.data is not None or row.refusal is not None:
        return row
    try:
        return Row(row.origin, parse_line(row.raw), raw=row.raw)
    except RowRefused as refusal:
        return Row(row.origin, refusal=refusal, raw=row.raw)


def _refuse(done: PipelineResult, row: Row, refusal: RowRefused) -> None:
    done.refused[refusal.reason] += 1
    done.rejected.append(row.rejected(refusal.reason))
    if done.first_refusal is None:
        done.first_refusal = {
            "where": str(row.origin.line), "found": refusal.found, "expected": refusal.expected, "fix": refusal.fix,
        }  # fmt: skip


def _prompt_words(example: Example | Encoded, encoded: Encoded) -> bytes:
    """What rows with one prompt share: its words, whatever is cut of it."""
    if isinstance(example, Encoded) or not example.prompt:
        ids = [*encoded.prompt_ids, *encoded.sides[0].ids] if not isinstance(example, Encoded) else encoded.prompt_ids
        return json.dumps(ids).encode()
    return json.dumps(as_turns(example.prompt), sort_keys=True, default=str).encode()


def _code() -> str:
    """What this room's own code is: another version of it may make other tokens of the same rows."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
