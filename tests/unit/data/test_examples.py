"""Formats: every known shape is read, everything else is refused with a reason and a sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rows import HERE, a, s, u
from strop.data.read.files import read_jsonl
from strop.data.read.row import RowRefused
from strop.data.shapes.examples import RowColumns, to_example
from strop.types import Example, RowShape

PARTS = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def read(row: Mapping[str, Any], rows: RowShape = "pair", columns: RowColumns | None = None) -> Example:
    return to_example(row, HERE, rows, columns or RowColumns())


def reason(row: Mapping[str, Any], rows: RowShape = "pair", columns: RowColumns | None = None) -> str:
    with pytest.raises(RowRefused) as refusal:
        read(row, rows, columns)
    assert refusal.value.found
    return refusal.value.reason


SINGLE = [
    ({"messages": [u("q"), a("x")]}, (u("q"),), (a("x"),)),
    ({"messages": [s(""), u("q"), a("x"), u("r"), a("y")]}, (s(""), u("q")), (a("x"), u("r"), a("y"))),
    ({"messages": [a("x")], "prompt": 3, "extra": float("nan")}, (), (a("x"),)),
    ({"messages": [u(PARTS), a("x")]}, (u("hello"),), (a("x"),)),
    ({"prompt": "q", "completion": " x"}, "q", " x"),
    ({"prompt": "q", "completion": [a("x")]}, (u("q"),), (a("x"),)),
    ({"prompt": [u("q")], "completion": "x"}, (u("q"),), (a("x"),)),
    ({"prompt": [u("q")], "completion": [a("x"), u("r"), a("y")]}, (u("q"),), (a("x"), u("r"), a("y"))),
    ({"prompt": [u("q")], "completion": [u("q"), a("x")]}, (u("q"),), (a("x"),)),
]


@pytest.mark.parametrize(("row", "prompt", "completion"), SINGLE)
def test_single_shapes(row: dict[str, Any], prompt: Any, completion: Any) -> None:
    assert read(row, "single") == Example(prompt, (completion,), HERE)


PROMPTS = [
    ({"prompt": "q", "answer": "2"}, "q"),
    ({"prompt": [u("q")], "answer": "2", "label": True}, (u("q"),)),
    ({"messages": [s("b"), u("q"), a("x"), u("r")]}, (s("b"), u("q"), a("x"), u("r"))),
    ({"conversations": [{"from": "human", "value": "q"}], "answer": "2"}, (u("q"),)),
    ({"question": "q", "input": "more", "solution": "2"}, "q\n\nmore"),
    ({"prompt": "q", "completion": None}, "q"),
]


@pytest.mark.parametrize(("row", "prompt"), PROMPTS)
def test_prompts_alone(row: dict[str, Any], prompt: Any) -> None:
    assert read(row, "prompt").prompt == prompt
    assert len(read(row, "prompt").completions) == 1  # so that its prompt is rendered as all others are


@pytest.mark.parametrize(("row", "prompt", "completion"), SINGLE)
def test_prompts_with_an_answer(row: dict[str, Any], prompt: Any, completion: Any) -> None:
    assert read({**row, "label": True}, "prompt") == Example(prompt, (completion,), HERE)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "x"}, "missing_field"),
        ({"answer": "x"}, "missing_field"),
        ({"prompt": None, "answer": "x"}, "null_field"),
        ({"prompt": " "}, "empty_field"),
        ({"prompt": 3}, "wrong_type"),
    ],
)
def test_rows_without_a_prompt(row: dict[str, Any], why: str) -> None:
    assert reason(row, "prompt") == why


PAIRS = [
    ({"prompt": "q", "chosen": "x", "rejected": "y", "id": 3}, "q", "x", "y"),
    ({"prompt": [u("q")], "chosen": [a("x")], "rejected": [a("y")]}, (u("q"),), (a("x"),), (a("y"),)),
    ({"prompt": [u("q")], "chosen": "x", "rejected": "y"}, (u("q"),), (a("x"),), (a("y"),)),
    ({"prompt": "q", "chosen": [a("x")], "rejected": [a("y")]}, (u("q"),), (a("x"),), (a("y"),)),
    ({"chosen": [u("q"), a("x")], "rejected": [u("q"), a("y")]}, (u("q"),), (a("x"),), (a("y"),)),
    (
        {"chosen": [u("q"), a("z"), u("r"), a("x")], "rejected": [u("q"), a("z"), u("r"), a("y")]},
        (u("q"), a("z"), u("r")),
        (a("x"),),
        (a("y"),),
    ),
    (
        {"prompt": "q", "chosen": [s("b"), u(" q"), a("x")], "rejected": [s("b"), u(" q"), a("y")]},
        (s("b"), u(" q")),
        (a("x"),),
        (a("y"),),
    ),
    ({"prompt": [u("q")], "chosen": [u("q"), a("x")], "rejected": [a("y")]}, (u("q"),), (a("x"),), (a("y"),)),
]


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), PAIRS)
def test_pair_shapes(row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any) -> None:
    assert read(row) == Example(prompt, (chosen, rejected), HERE)


def test_columns_can_have_other_names() -> None:
    columns = RowColumns("question", "good", "bad")
    assert read({"question": "q", "good": "x", "bad": "y"}, columns=columns) == Example("q", ("x", "y"), HERE)
    assert read({"question": "q", "completion": "x"}, "single", columns) == Example("q", ("x",), HERE)
    # a configured prompt column that is not there is an error, not a row without a prompt
    row = {"good": [u("q"), a("x")], "bad": [u("q"), a("y")]}
    assert reason(row, columns=columns) == "missing_field"


REFUSED = {
    "missing_field": [
        {"prompt": "q", "chosen": "x"},
        {"chosen": "x", "rejected": "y"},
        {"chosen": [a("x")], "rejected": [a("y")]},
        {"prompt": [{"content": "q"}], "chosen": "x", "rejected": "y"},
        {"prompt": [{"role": "user"}], "chosen": "x", "rejected": "y"},
    ],
    "null_field": [
        {"prompt": None, "chosen": "x", "rejected": "y"},
        {"prompt": "q", "chosen": None, "rejected": "y"},
        {"prompt": [u(None)], "chosen": "x", "rejected": "y"},
        {"prompt": "q", "chosen": [a(None)], "rejected": [a("y")]},
        {"prompt": "q", "chosen": [a(None, tool_calls=[])], "rejected": [a("y")]},
    ],
    "wrong_type": [
        {"prompt": 3.5, "chosen": "x", "rejected": "y"},
        {"prompt": float("nan"), "chosen": "x", "rejected": "y"},
        {"prompt": "q", "chosen": a("x"), "rejected": [a("y")]},
        {"prompt": "q", "chosen": True, "rejected": "y"},
        {"prompt": ["q"], "chosen": "x", "rejected": "y"},
        {"prompt": [u(3)], "chosen": "x", "rejected": "y"},
        {"prompt": [{"role": 1, "content": "q"}], "chosen": "x", "rejected": "y"},
        {"prompt": "q", "chosen": [a(None, tool_calls="f()")], "rejected": [a("y")]},
        {"prompt": "q", "chosen": "x", "rejected": "y", "tools": "f"},
    ],
    "mixed_types": [{"prompt": "q", "chosen": "x", "rejected": [a("y")]}],
    "empty_field": [
        {"prompt": "", "chosen": "x", "rejected": "y"},
        {"prompt": [], "chosen": "x", "rejected": "y"},
        {"prompt": "q", "chosen": " \n\t", "rejected": "y"},
        {"prompt": "q", "chosen": [a("")], "rejected": [a("y")]},
        {"prompt": [u([])], "chosen": "x", "rejected": "y"},
    ],
    "role_order": [
        {"prompt": [u("q"), a("z")], "chosen": [a("x")], "rejected": [a("y")]},
        {"prompt": [u("q")], "chosen": [u("x")], "rejected": [a("y")]},
        {"chosen": [u("q"), a("z"), a("x")], "rejected": [u("q"), a("z"), a("y")]},
    ],
    "unknown_role": [{"prompt": [{"role": "human", "content": "q"}], "chosen": "x", "rejected": "y"}],
    "sharegpt_keys": [{"prompt": [{"from": "human", "value": "q"}], "chosen": "x", "rejected": "y"}],
    "system_not_first": [{"prompt": [u("q"), s("b")], "chosen": "x", "rejected": "y"}],
    "unsupported_modality": [{"prompt": [u([{"type": "image"}])], "chosen": "x", "rejected": "y"}],
    "chosen_equals_rejected": [
        {"prompt": "q", "chosen": "x", "rejected": "x"},
        {"prompt": [u("q")], "chosen": [u("q"), a("x")], "rejected": [a("x")]},
        {"chosen": [u("q"), a("x")], "rejected": [u("q"), a("x")]},
    ],
    "prompt_mismatch": [
        {"chosen": [u("q"), a("x")], "rejected": [u("r"), a("y")]},
        {"chosen": [u("q"), a("x")], "rejected": [u("q"), a("x"), u("r"), a("y")]},
        {"prompt": [u("q")], "chosen": [u("r"), a("x")], "rejected": [a("y")]},
        {"prompt": "q", "chosen": [u("r"), a("x")], "rejected": [u("r"), a("y")]},
    ],
    "nul_character": [{"prompt": "q\0", "chosen": "x", "rejected": "y"}],
    "lone_surrogate": [{"prompt": "q", "chosen": "x\ud83d", "rejected": "y"}],
    "wrong_shape": [{"messages": [u("q"), a("x")]}, {"prompt": "q", "completion": "x"}],
}


@pytest.mark.parametrize(("expected", "row"), [(name, row) for name, rows in REFUSED.items() for row in rows])
def test_refusals_of_pairs(expected: str, row: dict[str, Any]) -> None:
    assert reason(row) == expected


@pytest.mark.parametrize(
    ("expected", "row"),
    [
        ("wrong_shape", {"prompt": "q", "chosen": "x", "rejected": "y"}),
        ("wrong_shape", {"prompt": "q", "completion": "x", "label": False}),
        ("role_order", {"messages": [u("q")]}),
        ("null_field", {"messages": None}),
        ("wrong_type", {"messages": "q"}),
        ("missing_field", {"prompt": "q", "answer": "x"}),
        ("missing_field", {}),
    ],
)
def test_refusals_of_single_rows(expected: str, row: dict[str, Any]) -> None:
    assert reason(row, "single") == expected


def test_a_row_of_the_other_kind_says_what_to_set() -> None:
    with pytest.raises(RowRefused) as pair:
        read({"prompt": "q", "chosen": "x", "rejected": "y"}, "single")
    with pytest.raises(RowRefused) as single:
        read({"messages": [u("q"), a("x")]}, "pair")
    assert "method: dpo" in str(pair.value.at(HERE)) and "method: sft" in str(single.value.at(HERE))


def test_a_tool_call_may_have_no_content_and_keeps_its_keys() -> None:
    turns = [u("q"), a(None, tool_calls=CALL), {"role": "tool", "content": "", "tool_call_id": "1"}, a("x", name=None)]
    example = read({"messages": turns, "tools": [{"name": "f"}]}, "single")
    completion = example.completions[0]
    assert isinstance(completion, tuple)
    # arguments are an object, as templates want them, whether or not the row wrote them as a text
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert completion[0] == {"role": "assistant", "tool_calls": call}
    assert completion[1] == turns[2] and completion[2] == a("x")
    assert example.tools == ({"name": "f"},)
    assert read({"messages": [u("q"), a("", tool_calls=CALL)]}, "single").completions == ((a("", tool_calls=call),),)


def test_messy_rows_line_by_line(shared: Path) -> None:
    expected = json.loads((shared / "data" / "messy.expected.json").read_text())["lines"]
    verdicts: dict[str, tuple[bool | None, str]] = {}
    for row in read_jsonl(str(shared / "data" / "messy.jsonl")):
        verdict: tuple[bool | None, str] = (None, "blank_line")
        if row.refusal is not None:
            verdict = (False, row.refusal.reason)
        elif row.data is not None:
            try:
                to_example(row.data, row.origin, "pair", RowColumns())
                verdict = (True, "")
            except RowRefused as refusal:
                verdict = (False, refusal.reason)
        verdicts[str(row.origin.line)] = verdict
    assert verdicts.keys() == expected.keys()
    wrong = {
        line: (verdict, expected[line])
        for line, verdict in verdicts.items()
        if verdict[0] != expected[line]["valid"] and not expected[line].get("policy")
    }
    assert wrong == {}
    torn = {"195", "274"}  # first halves of rows that a raw newline has torn: they do break off
    reasons = {
        line: (verdict[1], expected[line]["reason"])
        for line, verdict in verdicts.items()
        if verdict[0] is False and not expected[line]["valid"] and line not in torn
    }
    assert all(found == named for found, named in reasons.values()), reasons


# ---- labelled rows


@pytest.mark.parametrize("label", [True, False, "true", "False"])
@pytest.mark.parametrize("prompt", ["q", [u("q")]])
@pytest.mark.parametrize("completion", ["x", [a("x")]])
def test_labelled_shapes(prompt: Any, completion: Any, label: Any) -> None:
    example = read({"prompt": prompt, "completion": completion, "label": label}, "labelled")
    assert example.label is (str(label).lower() == "true")
    assert len(example.completions) == 1


def test_pairs_stay_together_until_they_are_tokens() -> None:
    pair = {"prompt": "q", "chosen": "x", "rejected": "y"}
    assert read(pair, "labelled") == read(pair, "pair")
    assert read(pair, "labelled").label is None


@pytest.mark.parametrize(
    ("why", "row"),
    [
        ("missing_field", {"prompt": "q", "completion": "x"}),
        ("missing_field", {"completion": "x", "label": True}),
        ("null_field", {"prompt": "q", "completion": "x", "label": None}),
        ("wrong_type", {"prompt": "q", "completion": "x", "label": 2}),
        ("wrong_type", {"prompt": "q", "completion": "x", "label": "good"}),
        ("wrong_shape", {"messages": [u("q"), a("x")]}),
        ("empty_field", {"prompt": "q", "completion": " ", "label": True}),
    ],
)
def test_labelled_rows_that_are_refused(why: str, row: dict[str, Any]) -> None:
    assert reason(row, "labelled") == why
