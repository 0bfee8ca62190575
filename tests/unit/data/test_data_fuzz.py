"""Two thousand broken rows: whatever stands in a file, a row is trained on or refused, and nothing else happens."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strop.data.load import load_data
from strop.errors import DataError

NUM_ROWS = 2000
SEEDS: list[dict[str, Any]] = [
    {"prompt": "what is it?", "chosen": "a dog", "rejected": "the fox"},
    {
        "prompt": [{"role": "system", "content": "b"}, {"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "x"}],
        "rejected": [{"role": "assistant", "content": "y"}],
    },
    {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}],
    },
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "x"}]},
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "x"},
        ],
        "tools": [{"function": {"name": "f"}}],
    },
    {"prompt": "q", "completion": "x"},
    {"text": "a text"},
    {"input_ids": [20, 21, 22, 23], "labels": [-100, 21, 22, 23], "attention_mask": [1, 1, 1, 1]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}], "tools": "[]", "system": "b"},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "x"},
        "rejected": {"from": "gpt", "value": "y"},
    },
    {"inputs": {"question": "q", "context": "c"}, "outputs": {"answer": "x"}, "schema_version": "1", "id": "1"},
    {"system": "b", "question": "q", "response": "x", "response_j": "x", "response_k": "y"},
    {"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"},
]
STRINGS = [
    "", " ", "x", "\0", "\ud800", "</s>", "<|start|>", "[INST]", "<think>", "\U000f0000\U000f0001", "\U00100000",
    "e\u0301\u200d\u202e\x1b[2J", "x" * 3000, "{{ 7 * 7 }}{% raw %}", "system", "assistant", "\u2028\x85",
]  # fmt: skip
ANSWER = {"role": "assistant", "content": "x"}
OTHERS = [None, True, 0, -1.5, float("nan"), 10**30, [], [[]], {}, {"role": "user"}, ANSWER, [ANSWER], [None]]
VALUES: list[Any] = [*STRINGS, *OTHERS, {"type": "text", "text": "x"}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in below for place in places(item, (*path, key))]


def mutated(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not (found := places(row)):
            break
        *way, last = rng.choice(found)
        parent = row
        for key in way:
            parent = parent[key]
        match rng.randrange(4):
            case 0:
                del parent[last]
            case 1:
                parent[last] = copy.deepcopy(rng.choice(VALUES))
            case 2 if isinstance(parent, list):
                parent.insert(last, copy.deepcopy(rng.choice(VALUES)))
            case 2:
                parent[rng.choice(("role", "content", "prompt", "tool_calls", "x"))] = parent.pop(last)
            case _ if isinstance(parent[last], str):
                text = parent[last]
                at = rng.randrange(len(text) + 1)
                parent[last] = text[:at] + rng.choice(STRINGS) + text[at:]
    return row


def line(rng: random.Random) -> bytes:
    text = json.dumps(mutated(rng.choice(SEEDS), rng), ensure_ascii=rng.random() < 0.5)
    data = bytearray(text.encode("utf-8", "surrogatepass").replace(b"\n", b" "))
    if rng.random() < 0.2 and data:
        at = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                del data[at:]
            case 1:
                data[at] = rng.choice([b for b in range(256) if b != 10])
            case _:
                data[at:at] = bytes(rng.choice([b for b in range(256) if b != 10]) for _ in range(3))
    return bytes(data)


@pytest.mark.share(2)
@pytest.mark.parametrize("num_rows", [NUM_ROWS // 4, pytest.param(25_000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("rows", ["single", "pair"])
@pytest.mark.parametrize(("kind", "template"), [("byte_level", "chatml"), ("sentence_piece", None)])
def test_no_row_raises_anything_but_data_errors(
    num_rows: int, rows: Any, kind: str, template: str | None, tmp_path: Path, make_config: Callable[..., Any],
    make_tokenizer: Callable[..., Any], templates: dict[str, str],
) -> None:  # fmt: skip
    seed = f"{rows} {kind}"
    rng = random.Random(seed)
    content = [line(rng) for _ in range(num_rows)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(content))
    tokenizer = make_tokenizer(kind, templates[template] if template else None)
    training = {"max_seq_length": 48, "max_prompt_length": 24, "max_completion_length": 24}
    data = load_data(
        make_config(training, train_file=str(path), on_error="skip", max_dropped_fraction=1.0), tokenizer, rows
    )

    # every line is somewhere, once
    refused = {r["line"] for r in data.rejected}
    groups = {group.origin.line for group in (*data.train, *data.eval)}
    counts = data.report.splits.values()
    assert not refused & groups
    assert sum(c.rows_read + c.blank_lines for c in counts) == len(content)
    assert len(refused) == sum(c.refused.total() for c in counts) and len(groups) == sum(c.kept for c in counts)
    assert groups and len({r["reason"] for r in data.rejected}) > 8, seed
    json.dumps(list(data.rejected)).encode()
    # no control token comes from a row: as many as the template writes
    controls = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for group in (*data.train, *data.eval):
        for completion in group.completions:
            own = [i for i, trained in zip(completion.ids, completion.loss_mask, strict=True) if trained]
            assert sum(i in controls for i in own) <= 2

    # the first bad row stops a strict run, with its line
    with pytest.raises(DataError) as error:
        load_data(make_config(training, train_file=str(path)), tokenizer, rows)
    assert error.value.where == f"{path}:{min(refused)}"
