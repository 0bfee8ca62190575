"""Calls and their results in the contents of turns, as public data sets have them.

Qwen's templates know a result by the tags at the ends of a user's turn, and write the reasoning in front of it as they
do in front of a tool's turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from oracle.cells import judge, trained_by_strop
from oracle.families import family, names

FAMILIES = [name for name in names() if "startswith('<tool_response>')" in family(name).template]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
ASK, AGAIN = {"role": "user", "content": "Two and two?"}, {"role": "user", "content": "Sure?"}
RESULTS = ("2", "4 <|im_end|>")

pytestmark = pytest.mark.skipif(not names(), reason="the package trl, whose templates are the measure, is not there")


def result(*texts: str) -> dict[str, Any]:
    """Results of tools as a turn of the user."""
    return {"role": "user", "content": "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in texts)}


def by_key(content: str, thought: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": thought}


def in_content(content: str, thought: str) -> dict[str, Any]:
    return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{content}"}


def without(content: str, _: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def row(write: Any, *results: Mapping[str, Any], goes_on: bool = False) -> dict[str, Any]:
    """A question, a call, its results, the answer, and more where it goes on."""
    more = (AGAIN, write(CALL, "Once more."), *results, write("Yes.", "I am.")) if goes_on else ()
    return {"messages": [ASK, write(CALL, "I need the tool."), *results, write("Four.", "It says so."), *more]}


ways = pytest.mark.parametrize("write", [by_key, in_content, without])
every = pytest.mark.parametrize("name", FAMILIES)


def test_there_are_such_families() -> None:
    assert {"qwen3", "qwen3_5_think"} <= set(FAMILIES)


@every
@ways
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_result_in_a_turn_of_the_user_is_what_transformers_makes_of_it(name: str, write: Any, goes_on: bool) -> None:
    one = judge(family(name), row(write, result("2"), goes_on=goes_on), twin=False)
    assert one.kind in ("right", "differs"), one.words


@every
@ways
@pytest.mark.parametrize("goes_on", [False, True])
def test_its_tokens_are_those_of_a_tools_turn(name: str, write: Any, goes_on: bool) -> None:
    one = family(name)
    as_user = trained_by_strop(one, one.template, row(write, result(*RESULTS), goes_on=goes_on))
    tools = ({"role": "tool", "content": text} for text in RESULTS)
    as_tool = trained_by_strop(one, one.template, row(write, *tools, goes_on=goes_on))
    assert not isinstance(as_user, str) and not isinstance(as_tool, str)
    assert (as_user.ids, as_user.runs, as_user.prompt) == (as_tool.ids, as_tool.runs, as_tool.prompt)
    assert as_user.counts["controls_as_text"] == (2 if goes_on else 1)  # what a result says is no control token
