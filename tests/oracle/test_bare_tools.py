"""Tools and calls without a {"type": "function", "function": ...} around them, as rows of ShareGPT's shape have them:
every family that trains the wrapped row trains the bare one, with the same tokens: those that inference servers see."""

from __future__ import annotations

from typing import Any

import pytest

from oracle.cells import trained_by_strop
from oracle.conversations import CONVERSATIONS
from oracle.families import family, names

FAMILIES = names()
ROWS = ("tools_not_called", "tool_call", "tool_call_and_result", "parallel_tool_calls")

pytestmark = pytest.mark.skipif(not FAMILIES, reason="the package trl, whose templates are the measure, is not there")


def _bare_call(call: dict[str, Any]) -> dict[str, Any]:
    return {"id": call["id"], **call["function"]}


def _bare(row: dict[str, Any], *, tools: bool, calls: bool) -> dict[str, Any]:
    found = dict(row)
    if tools:
        found["tools"] = [tool["function"] for tool in row["tools"]]
    if calls:
        found["messages"] = [
            {**m, "tool_calls": [_bare_call(call) for call in m["tool_calls"]]} if "tool_calls" in m else m
            for m in row["messages"]
        ]
    return found


@pytest.mark.share(12)
@pytest.mark.parametrize("name", FAMILIES)
def test_bare_tools_and_calls_are_trained_as_wrapped_ones(name: str) -> None:
    one = family(name)
    for kind in ROWS:
        wrapped = trained_by_strop(one, one.template, CONVERSATIONS[kind])
        if isinstance(wrapped, str):
            continue
        for tools, calls in ((True, True), (True, False), (False, True)):
            bare = trained_by_strop(one, one.template, _bare(CONVERSATIONS[kind], tools=tools, calls=calls))
            assert not isinstance(bare, str), (kind, tools, calls, bare)
            assert bare.runs == wrapped.runs, (kind, tools, calls)
            assert bare.prompt == wrapped.prompt, (kind, tools, calls)
