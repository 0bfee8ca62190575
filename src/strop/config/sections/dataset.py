"""The `dataset` section of the configuration: rows, and how they become tokens. Floor 1, no torch."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from strop.config.base_section import JsonMapping, MappingOf, NamedOf, Problem, Section


class SourceSection(Section):
    """One of several sources of rows; a text is the source of that name."""

    name: str
    """`jsonl:PATH`, `text:PATH` (one row per line), `local:PATH` (a `save_to_disk` folder), or as `dataset.name`."""
    subset: str | None = None
    """Hub configuration of the data set."""
    split: str = "train"
    """Split, for hub data sets and folders; slices such as `train[:10%]` work."""
    num_samples: int | None = Field(default=None, gt=0)
    """Use only the first rows; null: all."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Use only this share of the rows, chosen at random."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often each row is met in an epoch: 2 twice, 0.5 every second one, 1.5 once or twice."""
    streaming: bool = False
    """Read a hub data set as a stream, once, into the token cache."""


def _as_day(value: Any) -> Any:
    """YAML reads a day that stands without quotes as a date."""
    return value.isoformat() if isinstance(value, datetime.date) else value


RESERVED = frozenset(
    {
        *("messages", "tools", "documents", "conversation", "conversations", "chat_template", "tokenize", "padding"),
        *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("add_generation_prompt", "continue_final_message", "tokenizer_kwargs", "processor_kwargs"),
        *("strftime_now", "raise_exception"),
    }
)
"""Names that a chat template, or `apply_chat_template`, has for what the row and strop itself hand over."""

VARIABLES = "names of the template's own variables, such as enable_thinking, and JSON values"


def bad_variable(name: Any, value: Any) -> str | None:
    """What is wrong with a variable for the chat template; None where nothing is."""
    if not isinstance(name, str) or not name.isidentifier():
        return f"{str(name)[:40]!r} is no name of a variable"
    if name in RESERVED or name.endswith("_token"):
        return f"{name} is set by strop: it comes from the row, the tokenizer or the run"
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return f"{name} is no JSON value"
    return None


class DatasetSection(Section):
    """Where the rows come from and how they become tokens."""

    name: str | None = None
    """Hub data set, `save_to_disk` folder, or a .jsonl, .json, .csv or .parquet file; `jsonl:PATH`, `text:PATH` (a
    row per line) and `local:PATH` say which it is."""
    subset: str | None = None
    """Hub configuration of the data set. (A slice belongs in `split`.)"""
    split: str = "train"
    """Split to train on, for hub data sets and folders; slices such as `train[:10%]` work."""
    streaming: bool = False
    """Read a hub data set as a stream, once, into the token cache, instead of downloading it whole."""
    sources: NamedOf[SourceSection] = Field(
        default=(), json_schema_extra={"x-type": "a list of names, or of mappings with name, split, weight, ..."}
    )
    """Several sources, one behind the other; wins over `name`. Each is a name or a mapping: `name` (`jsonl:PATH`,
    `text:PATH`, `local:PATH`, or as `dataset.name`), `subset`, `split`, `num_samples` (the first rows), `fraction`
    (of the rows, at random), `weight` (how often each row is met in an epoch), `streaming`."""
    train_file: str | None = None
    """Training rows; wins over `splits_dir` and `name`."""
    val_file: str | None = None
    """Validation rows; wins over `splits_dir` and `validation_split`."""
    splits_dir: str | None = None
    """Folder with `train.jsonl` and `val.jsonl` (sft), `train.dpo.jsonl` and `val.dpo.jsonl` (pairs),
    `train.kto.jsonl` and `val.kto.jsonl` (kto), or `train.groups.jsonl` and `val.groups.jsonl` (grpo)."""
    prompt_column: str = "prompt"
    """Column with the prompt (text or a list of messages)."""
    chosen_column: str = "chosen"
    """Column with the preferred completion."""
    rejected_column: str = "rejected"
    """Column with the other completion."""
    completion_column: str = "completion"
    """Column with the completion of sft and kto rows."""
    label_column: str = "label"
    """Column that says whether a completion is desirable (kto): true or false."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use only the first rows of the training data, validation split included; null: all."""
    max_eval_samples: int | None = Field(default=None, gt=0)
    """Use only the first of the validation rows, held out or of a file, and none of the others; null: all."""
    validation_split: float = Field(default=0.1, ge=0, lt=1)
    """Share of the training rows held out for evaluation where no validation source is given; 0: none."""
    render: Literal["auto", "chat", "raw"] = "auto"
    """Text rows: `chat` wraps them by the chat template, `raw` does not, `auto`: chat where the tokenizer has one."""
    template: str | None = None
    """Chat template: a shipped one (`llama3_instruct`, `qwen2.5_instruct`, `chatml`, `olmo2_instruct`, `mistral`,
    `gemma`, `zephyr`, `plain`), or the path of a YAML template or a Jinja file. Null: the tokenizer's, or else
    `plain`."""
    chat_template_kwargs: MappingOf[Any] = Field(
        default_factory=JsonMapping,
        json_schema_extra={
            "x-default": "{}",
            "x-type": "a mapping of names to values, such as {enable_thinking: false}",
        },
    )
    """Variables for the chat template, by the name that transformers and servers have for them. Every rendering gets
    them; the column `chat_template_kwargs` of a row goes before them."""
    train_on: Literal["all", "last", "last_and_tools"] = "all"
    """Assistant turns of a completion that are trained: all that the template renders as inference would see them, the
    last one, or the last one and the calls of tools behind the last user turn."""
    on_dropped_reasoning: Literal["refuse", "drop"] = "refuse"
    """A row with reasoning that the chat template has no place for: refuse it, or train it without its reasoning."""
    date: Annotated[str | None, BeforeValidator(_as_day)] = Field(
        default=None, json_schema_extra={"x-default": "the day of the first launch, where the template prints it"}
    )
    """What chat templates that print the day take for today, as YYYY-MM-DD; a resumed run keeps it."""
    on_error: Literal["error", "skip"] = "error"
    """A row that cannot be read: stop with its file and line, or skip it, count it and write it to rejected.jsonl."""
    on_trailing_user: Literal["refuse", "drop"] = "refuse"
    """A conversation with turns behind its last assistant turn, such as a question that nobody answers: refuse the row,
    or drop these turns and train up to that assistant turn, counted."""
    max_dropped_fraction: float | None = Field(
        default_factory=lambda data: 0.05 if data.get("on_error") == "skip" else None,
        ge=0,
        le=1,
        json_schema_extra={"x-default": "0.05 under on_error: skip, else null"},
    )
    """Stop where more than this share of a source's rows is refused or left with nothing to train; null: never."""
    num_workers: int | None = Field(default=None, gt=0, le=256)
    """Processes that tokenise; null: by the number of processors, for files of some thousand rows and more."""
    filter_overlength_samples: bool = False
    """Drop rows that are longer than the limits instead of truncating them."""

    def problems(self) -> Iterator[Problem]:
        try:
            datetime.date.fromisoformat(self.date or "2026-01-01")
        except ValueError:
            yield Problem(("date",), f"date is {self.date!r}, which is no day", fix="write it as YYYY-MM-DD")
        if self.subset is not None and "[" in self.subset:
            yield Problem(
                ("subset",),
                f"subset is {self.subset!r}, a slice; subset names a configuration of a hub data set",
                fix=f"write it behind the split, as in split: {self.split}[:10%]",
            )
        for key in ("template", "chat_template_kwargs"):
            if self.render == "raw" and getattr(self, key):
                yield Problem(
                    (key,),
                    f"{key} is given, and render is raw: rows are trained as they are, by no template",
                    fix=f"remove {key}, or set render: auto",
                )
        for name, value in self.chat_template_kwargs.items():
            if (found := bad_variable(name, value)) is not None:
                yield Problem(("chat_template_kwargs",), f"chat_template_kwargs: {found}", VARIABLES)
