"""The rewards that are shipped. Floor 2, no torch.

A reward is called with lists of one entry per completion and gives a list of as many numbers. It takes what it names
of these: `prompts`, `completions` (texts, without special tokens), `chats` (the turns of each prompt, and the
completion as the last one), `num_tokens` (of each completion, end token included), `columns` (all columns of the rows,
by name), and single columns by their names. Parameters after `*` that have a default are settings, which columns never
fill. So a reward whose setting names a column looks it up in `columns`, where it is whatever its name.

Each is also called without completions, before a run starts: what it refuses then, it refuses for every completion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from strop.errors import ConfigError
from strop.rewards.code_tests import tests_passed

Columns = Mapping[str, Sequence[Any]]
"""Columns of the rows by name: one value per completion."""


def exact_match(
    completions: Sequence[str], columns: Columns, *, column: str = "completion", ignore_case: bool = False
) -> list[float]:
    """1 where the completion is the text of the row's `column`, white space around both aside, else 0."""
    wanted = _column(columns, column)
    pairs = zip(completions, wanted, strict=True)
    if ignore_case:
        return [float(c.strip().casefold() == str(w).strip().casefold()) for c, w in pairs]
    return [float(c.strip() == str(w).strip()) for c, w in pairs]


def regex(completions: Sequence[str], columns: Columns, *, pattern: str, column: str | None = None) -> list[float]:
    """1 where the pattern is found; with `column`, where the last match's first group (or the whole match) is the text
    of that column. 0 elsewhere."""
    compiled = _compiled(pattern)
    found = [list(compiled.finditer(c)) for c in completions]
    if column is None:
        return [float(bool(matches)) for matches in found]
    last = [(m[-1][1] if m[-1].re.groups else m[-1][0]) if m else None for m in found]
    return [
        float(x is not None and x.strip() == str(w).strip())
        for x, w in zip(last, _column(columns, column), strict=True)
    ]


def format(completions: Sequence[str], *, pattern: str = r"<think>.*?</think>\s*<answer>.*?</answer>") -> list[float]:
    """1 where the whole completion, white space around it aside, has this form, else 0."""
    compiled = _compiled(pattern)
    return [float(compiled.fullmatch(c.strip()) is not None) for c in completions]


def length(num_tokens: Sequence[int], *, max_length: int, cache: int) -> list[float]:
    """The soft overlong penalty (DAPO, arXiv 2503.14476, eq. 13): 0 up to max_length - cache tokens, then falling to -1
    at max_length, and -1 beyond."""
    if not 0 < cache <= max_length:
        raise ConfigError(f"cache is {cache} and max_length {max_length}", expected="cache from 1 to max_length")
    return [min(0.0, max(-1.0, (max_length - cache - n) / cache)) for n in num_tokens]


def math_equal(completions: Sequence[str], columns: Columns, *, column: str = "completion") -> list[float | None]:
    """1 where the last answer of the completion is mathematically that of the row's `column` (math-verify), else 0: 1/2
    is 0.5, and \\boxed{} wins. None where the column has nothing that can be read as an answer."""
    from math_verify import parse, verify

    def value(text: str, wanted: Any) -> float | None:
        gold = parse(str(wanted))
        return float(verify(gold, parse(text))) if gold else None

    return [value(c, w) for c, w in zip(completions, _column(columns, column), strict=True)]


FENCE = re.compile(r"```[^`\n]*\n(.*?)```", re.DOTALL)
"""A block of code in Markdown, whatever stands behind its opening fence: python3, c++, python title=x."""


def json_schema(
    completions: Sequence[str],
    columns: Columns,
    *,
    schema: Mapping[str, Any] | None = None,
    column: str | None = None,
) -> list[float]:
    """1 where the completion is JSON (a code fence around it aside) that the schema admits, else 0: the `schema` of the
    settings, or that of the row's `column`, an object or its text."""
    if (schema is None) == (column is None):
        raise ConfigError("neither a schema nor the column that has it is given", expected="one of the two")
    if column is None:
        admits = _admits(schema)
        return [float(admits(c)) for c in completions]
    return [float(_admits(w)(c)) for c, w in zip(completions, _column(columns, column), strict=True)]


def _admits(schema: Any) -> Callable[[str], bool]:
    """Whether a text is JSON that the schema, an object or its text, admits."""
    from jsonschema.exceptions import SchemaError, ValidationError
    from jsonschema.validators import validator_for
    from referencing import Registry

    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        kind = validator_for(schema)
        kind.check_schema(schema)
    except (ValueError, SchemaError) as error:
        raise ConfigError(f"the schema is not a JSON schema: {error}".splitlines()[0]) from error
    validator = kind(schema, registry=Registry())  # no schemas from the net

    def admits(text: str) -> bool:
        fenced = FENCE.fullmatch(text.strip())
        try:
            validator.validate(json.loads(fenced[1] if fenced else text))
        except (ValueError, ValidationError, RecursionError):
            return False
        return True

    return admits


def python_tests(
    completions: Sequence[str],
    columns: Columns,
    *,
    enabled: bool = False,
    column: str = "tests",
    seconds: float = 10.0,
    memory_mib: int = 1024,
) -> list[float]:
    """The share of the row's tests (`column`: code such as asserts, a text or a list of them) that the completion's
    code passes: its last fenced block, or all of it. Each completion runs in a process with limits; only with
    `enabled: true`, since it runs what a model wrote."""
    if not enabled:
        raise ConfigError(
            "it runs code that the model wrote, and that is off",
            fix="set settings: {enabled: true}, in a place where such code can do no harm (a container)",
        )

    if find_spec("resource") is None:
        raise ConfigError(
            "it needs limits of processes, which this system does not have",
            fix="train on Linux or macOS (WSL on Windows)",
        )

    def share(text: str, tests: Any) -> float:
        listed = [tests] if isinstance(tests, str) else [str(test) for test in tests]
        code = FENCE.findall(text)[-1:] or [text]
        return tests_passed(code[0], listed, seconds=seconds, memory_mib=memory_mib) / max(1, len(listed))

    return [share(c, t) for c, t in zip(completions, _column(columns, column), strict=True)]


def _column(columns: Columns, name: str) -> Sequence[Any]:
    if name not in columns:
        raise ConfigError(f"the rows have no column {name!r}", expected=columns_in_words(columns))
    return columns[name]


def columns_in_words(columns: Iterable[str]) -> str:
    """The columns that there are."""
    names = ", ".join(sorted(columns))
    return f"a column that every row has: {names}" if names else "rows with columns beside the prompt"


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags=re.DOTALL)
    except re.error as error:
        raise ConfigError(f"the pattern {pattern!r} is not a regular expression: {error}") from error


SHIPPED: Mapping[str, Callable[..., Sequence[Any]]] = {
    "exact_match": exact_match,
    "math_equal": math_equal,
    "regex": regex,
    "format": format,
    "length": length,
    "json_schema": json_schema,
    "python_tests": python_tests,
}

NEEDS: Mapping[str, str] = {"math_equal": "math_verify", "json_schema": "jsonschema"}
"""Packages of the extra `rewards` that shipped rewards call."""
