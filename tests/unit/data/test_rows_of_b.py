"""What people have as data: every shape that is known goes in, right, or is refused in words that help."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from strop.data.load import LoadedData, load_data
from strop.errors import DataError

Make = Callable[..., Any]


@lru_cache
def real_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(data: LoadedData, tokenizer: Any) -> list[tuple[str, ...]]:
    """Prompt and trained words of each group."""
    out = []
    for group in data.train:
        trained = (
            tokenizer.decode([t for t, m in zip(c.ids, c.loss_mask, strict=True) if m]) for c in group.completions
        )
        out.append((tokenizer.decode(group.prompt_ids), *trained))
    return out


@pytest.fixture
def load(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> Callable[..., list[tuple[str, ...]]]:
    def run(
        rows: Iterable[Mapping[str, Any]], shape: str, template: str | None = None, **dataset: Any
    ) -> list[tuple[str, ...]]:
        tokenizer = make_tokenizer(template=template)
        path = write(tmp_path / "rows.jsonl", rows)
        config = make_config(train_file=path, validation_split=0.0, **dataset)
        return texts(load_data(config, tokenizer, shape), tokenizer)

    return run


def test_b3_data_records(load: Make) -> None:
    rows = [
        {"id": "1", "schema_version": "1", "inputs": {"question": "q", "context": "c"}, "outputs": {"answer": "x"}},
        {"inputs": {"question": "q", "context": None}, "outputs": {"answer": "x"}, "meta": {"tags": []}},
    ]
    assert load(rows, "single") == [("q\n\nc", "x</s>"), ("q", "x</s>")]
    for inputs in ({}, {"question": 3}, {"question": " "}, {"question": "q", "context": 3}):
        with pytest.raises(DataError, match=r"inputs\."):
            load([{"inputs": inputs, "outputs": {"answer": "x"}}], "single")


def test_b3_tokens_go_in_as_they_are(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    rows = [
        {"input_ids": [9, 10, 11, 12, 13], "labels": [-100, -100, 11, -100, 13]},
        {"input_ids": [9, 10, 11, 0, 0], "labels": [9, 10, 11, 0, 0], "attention_mask": [1, 1, 1, 0, 0]},
        {"input_ids": [9, 10, 11], "labels": [-100, 10, -100]},
    ]
    config = make_config(train_file=write(tmp_path / "rows.jsonl", rows), validation_split=0.0)
    data = load_data(config, make_tokenizer(), "single")
    found = [(list(g.prompt_ids), list(g.completions[0].ids), list(g.completions[0].loss_mask)) for g in data.train]
    assert found == [([9, 10], [11, 12, 13], [1, 0, 1]), ([9], [10, 11], [1, 1]), ([9], [10], [1])]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [1, 2]}, "missing_field"),
        ({"input_ids": [1, 2], "labels": [1]}, "token_mismatch"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "token_mismatch"),
        ({"input_ids": [1, 10**6], "labels": [1, 10**6]}, "unknown_token"),
        ({"input_ids": [1, -1], "labels": [1, -1]}, "unknown_token"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "nothing_labelled"),
        ({"input_ids": [1], "labels": [1]}, "nothing_labelled"),
        ({"input_ids": [], "labels": []}, "empty_field"),
        ({"input_ids": [1, True], "labels": [1, 1]}, "wrong_type"),
        ({"input_ids": "1 2", "labels": [1, 2]}, "wrong_type"),
    ],
)
def test_b3_tokens_that_cannot_be_meant_are_refused(
    row: dict[str, Any], reason: str, tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    with pytest.raises(DataError, match=reason):
        load_data(make_config(train_file=write(tmp_path / "r.jsonl", [row])), make_tokenizer(), "single")


def test_b12_all_of_a_text_is_trained(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "hello world </s>"}, {"text": "dog " * 200}])
    config = make_config({"max_seq_length": 64}, train_file=path, validation_split=0.0, render="chat")
    for adds_bos in (False, True):
        tokenizer = make_tokenizer(adds_bos=adds_bos)
        first, second = load_data(config, tokenizer, "single").train
        assert tokenizer.decode([*first.prompt_ids, *first.completions[0].ids]).removeprefix("<s>").strip() == (
            "hello world </s></s>"  # the first one is the row's text, the second one closes it
        )
        assert len(first.prompt_ids) == 1 and 0 not in first.completions[0].loss_mask
        # the sequence is the only limit: there is no border for the other two
        assert len(second.prompt_ids) + len(second.completions[0].ids) == 64
        assert (first.prompt_ids[0] == tokenizer.bos_token_id) is adds_bos


def test_b4_questions_with_and_without_system(load: Make) -> None:
    orca = [
        {"system": "b", "question": "q", "chosen": "x", "rejected": "y"},
        {"system": "", "question": "q", "chosen": "x", "rejected": "y"},
    ]
    found = load(orca, "pair")
    assert found == [("b\n\nUser: q\n\nAssistant:", " x</s>", " y</s>"), ("User: q\n\nAssistant:", " x</s>", " y</s>")]
    exchange = {"qid": 1, "question": "q", "response_j": "x", "response_k": "y"}
    assert load([exchange], "pair") == [("q", "x</s>", "y</s>")]
    single = {"system_prompt": "b", "question": "q", "response": "x"}
    assert load([single], "single") == [("b\n\nUser: q\n\nAssistant:", " x</s>")]
    # a system text beside a prompt is not lost either
    assert load([{"system": "b", "prompt": "q", "completion": "x"}], "single") == load([single], "single")


HH = {
    "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: x",
    "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: y",
}


def test_b4_transcripts(load: Make) -> None:
    assert load([HH], "pair") == [("User: a\n\nAssistant: b</s>\n\nUser: c\n\nAssistant:", " x</s>", " y</s>")]
    raw = load([HH], "pair", render="raw")
    assert raw == [("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " x</s>", " y</s>")]
    for broken, reason in (
        ("\n\nHuman: a\n\nAssistant: ", "empty_field"),
        ("\n\nHuman: a\n\nHuman: c\n\nAssistant: x", "role_order"),
        ("\n\nHuman: other\n\nAssistant: x", "prompt_mismatch"),
    ):
        with pytest.raises(DataError, match=reason):
            load([{**HH, "chosen": broken}], "pair")


def test_b4_columns_of_any_name(load: Make) -> None:
    row = {"instruction": "q", "good": "x", "bad": "y", "out": "z"}
    names = {"prompt_column": "instruction", "chosen_column": "good", "rejected_column": "bad"}
    assert load([row], "pair", **names) == [("q", "x</s>", "y</s>")]
    assert load([row], "single", prompt_column="instruction", completion_column="out") == [("q", "z</s>")]


def test_b3_sharegpt(load: Make) -> None:
    turns = [{"from": "system", "value": "b"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]
    assert load([{"conversations": turns}], "single") == [("b\n\nUser: q\n\nAssistant:", " x</s>")]
    answers = {"chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "y"}}
    pair = {"conversations": turns[:2], **answers}
    read = [("b\n\nUser: q\n\nAssistant:", " x</s>", " y</s>")]
    assert load([pair], "pair") == read
    for name in ("conversations", "question"):  # a name for the prompt that other files have changes nothing
        assert load([pair], "pair", prompt_column=name) == read
    for broken in ({"from": "nobody", "value": "q"}, {"value": "q"}, {"from": "function_call", "value": "{"}):
        with pytest.raises(DataError):
            load([{"conversations": [broken]}], "single")


CALLING = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] + (c['function']['arguments'] | tojson) }}"
    "{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


@pytest.mark.nightly
def test_b3_tools_and_tool_calls(shared: Path, make_config: Make, make_tokenizer: Make) -> None:
    path = str(shared / "data" / "sft_toolcalls.train.jsonl")
    config = make_config(
        {"max_seq_length": 8192}, train_file=path, on_error="skip", max_dropped_fraction=1.0, validation_split=0.0
    )
    tokenizer = make_tokenizer(template=CALLING)
    data = load_data(config, tokenizer, "single")
    assert len(data.train) == 300
    trained = "".join(words for _, words in texts(data, tokenizer))
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    calls = [call["function"] for row in rows for m in row["messages"] for call in m.get("tool_calls", ())]
    assert len(calls) > 100 and all(call["name"] in trained for call in calls)
    assert '\\"' not in json.dumps(calls[0]["arguments"]) or calls[0]["name"] + calls[0]["arguments"][:2] in trained


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("name", "shape", "dataset", "kept", "refused"),
    [
        ("hh_raw.train", "pair", {}, 974, {"role_order": 15, "chosen_equals_rejected": 6, "empty_field": 5}),
        ("pref_mix.val", "pair", {}, 300, {}),
        ("kto_unpaired.train", "labelled", {"max_samples": 1000}, 1000, {}),
        ("gsm8k.test", "single", {"completion_column": "answer"}, 1019, {}),
        ("instruct_sft.val", "single", {}, 252, {}),
        # without a template that knows tools: the rows without any survive
        ("sft_toolcalls.train", "single", {}, 109, {"dropped_by_template": 191}),
    ],
)
def test_b_real_files_are_counted_right(
    name: str, shape: Any, dataset: dict[str, Any], kept: int, refused: dict[str, int],
    shared: Path, make_config: Make, make_tokenizer: Make,
) -> None:  # fmt: skip
    config = make_config(
        {"max_seq_length": 65536, "max_prompt_length": None, "max_completion_length": None},
        train_file=str(shared / "data" / f"{name}.jsonl"), on_error="skip", max_dropped_fraction=1.0,
        validation_split=0.0, **dataset,
    )  # fmt: skip
    counts = load_data(config, make_tokenizer(), shape).report.splits["train"]
    assert (counts.kept, dict(counts.refused), counts.dropped.total()) == (kept, refused, 0)


def test_b2_splits_dir_and_files_that_win_over_it(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    splits = tmp_path / "splits"
    splits.mkdir()
    write(splits / "train.jsonl", [{"prompt": "q", "completion": "x"}] * 2)
    with pytest.raises(DataError, match=r"val\.jsonl"):
        load_data(make_config(splits_dir=str(splits)), make_tokenizer(), "single")
    write(splits / "val.jsonl", [{"prompt": "r", "completion": "x"}])
    data = load_data(make_config(splits_dir=str(splits), validation_split=0.5), make_tokenizer(), "single")
    assert (len(data.train), len(data.eval)) == (2, 1)
    own = write(tmp_path / "own.jsonl", [{"prompt": "s", "completion": "x"}] * 3)
    data = load_data(make_config(splits_dir=str(splits), train_file=own), make_tokenizer(), "single")
    assert (len(data.train), len(data.eval)) == (3, 1)


def test_b5_preferences_for_other_tools(tmp_path: Path) -> None:
    import strop

    path = write(tmp_path / "rows.jsonl", [{"system": "b", "question": "q", "chosen": "x", "rejected": "y"}, HH])
    table = strop.load_preference_jsonl(path)
    assert table.column_names == ["prompt", "chosen", "rejected"] and len(table) == 2
    assert [turn["role"] for turn in table[0]["prompt"]] == ["system", "user"]
    assert table[1]["chosen"] == [{"role": "assistant", "content": "x"}]


def test_b7_every_messy_line_is_where_it_belongs(shared: Path, make_config: Make, make_tokenizer: Make) -> None:
    expected = json.loads((shared / "data" / "messy.expected.json").read_text())["lines"]
    config = make_config(
        {"max_seq_length": 2048}, train_file=str(shared / "data" / "messy.jsonl"), on_error="skip",
        max_dropped_fraction=1.0, validation_split=0.0,
    )  # fmt: skip
    data = load_data(config, make_tokenizer(), "pair")
    kept = {group.origin.line for group in data.train}
    refused = {row["line"]: row["reason"] for row in data.rejected}
    assert not kept & refused.keys() and all(set(row) == {"file", "line", "reason", "raw"} for row in data.rejected)
    raw = (shared / "data" / "messy.jsonl").read_bytes().split(b"\n")
    for row in data.rejected:
        assert row["raw"] == raw[row["line"] - 1].rstrip(b"\r").removeprefix(b"\xef\xbb\xbf").decode(
            errors="backslashreplace"
        )
    num_dropped = data.report.splits["train"].dropped.total()
    lost = []
    for number, what in expected.items():
        line = int(number)
        if what["valid"] is None:
            assert line not in kept and line not in refused
        elif not what.get("policy"):
            assert what["valid"] is (line not in refused), (line, what, refused.get(line))
            lost += [line] if what["valid"] and line not in kept else []
    assert len(lost) <= num_dropped


SPECIAL_WORDS = "a</s>b <s> [INST]c[/INST] <|im_start|>system <|endoftext|><pad> {{ eos_token }}"


LARGEST = "mistral-tekken-131k"
"""Reading it takes seconds: the suite does so with its family's template alone."""


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("template", "name"),
    [
        pytest.param(t, n, marks=pytest.mark.nightly if n == LARGEST and t != "mistral" else ())
        for t in (None, "qwen2.5_instruct", "mistral")
        for n in ("gpt2", LARGEST, "mistral-v3-32k")
    ],
)
def test_b9_control_tokens_are_written_by_the_template_alone(
    name: str, template: str | None, shared: Path, tmp_path: Path, make_config: Make
) -> None:
    tokenizer = real_tokenizer(shared / "tokenizers" / name)
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    def counts(words: str) -> list[int]:
        rows = [
            {"messages": [{"role": r, "content": f"x {words} y"} for r in ("user", "assistant", "user", "assistant")]}
        ]
        config = make_config(
            {"max_prompt_length": None, "max_completion_length": None},
            train_file=write(tmp_path / f"{len(words)}.jsonl", rows), template=template, validation_split=0.0,
        )  # fmt: skip
        (group,) = load_data(config, tokenizer, "single").train
        completion = group.completions[0]
        assert completion.ids[-1] in special and completion.loss_mask[-1]  # closed once, and it is trained
        if words:
            assert words in tokenizer.decode(completion.ids)
        return [i for i in (*group.prompt_ids, *completion.ids) if i in special]

    assert counts(SPECIAL_WORDS) == counts("")


def test_b10_prompt_and_completion_come_from_one_pass(shared: Path, tmp_path: Path, make_config: Make) -> None:
    tokenizer = real_tokenizer(shared / "tokenizers" / "mistral-v3-32k")
    row = {"prompt": [{"role": "user", "content": "What is it?"}], "chosen": "It is a dog.", "rejected": "Itself."}
    config = make_config(train_file=write(tmp_path / "rows.jsonl", [row]), validation_split=0.0)
    (group,) = load_data(config, tokenizer, "pair").train
    assert list(group.prompt_ids).count(tokenizer.bos_token_id) == 1
    for completion, words in zip(group.completions, ("It is a dog.", "Itself."), strict=True):
        ids = tokenizer.apply_chat_template(
            [*row["prompt"], {"role": "assistant", "content": words}], return_dict=False
        )
        assert [*group.prompt_ids, *completion.ids] == ids
        assert completion.ids[-1] == tokenizer.eos_token_id and list(completion.ids).count(tokenizer.eos_token_id) == 1


def test_b11_both_sides_of_a_pair_are_cut_by_the_same_bound(
    tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    row = {"prompt": "what is it? " * 20, "chosen": "dog " * 60, "rejected": "fox " * 60 + "end"}
    limits = {"max_seq_length": 60, "max_prompt_length": 40, "max_completion_length": 30}
    config = make_config(limits, train_file=write(tmp_path / "rows.jsonl", [row]), validation_split=0.0)
    data = load_data(config, make_tokenizer(), "pair")
    (group,) = data.train
    assert len(group.prompt_ids) == 40 and [len(c.ids) for c in group.completions] == [20, 20]
    counts = data.report.splits["train"]
    assert (counts.changes["prompts_cut"], counts.changes["completions_cut"], counts.changes["without_end_token"]) == (
        1,
        2,
        2,
    )


NAMING = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + (' ' + m['name'] if m['name'] else '') + '\n' }}"
    "{{ m['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SILENT = NAMING.replace(" + (' ' + m['name'] if m['name'] else '')", "")


@pytest.mark.parametrize("shape", ["single", "pair"])
def test_names_are_written_or_refused(load: Make, shape: str) -> None:
    turn = {"role": "user", "content": "q", "name": "Zoe"}
    answer = {"single": {"completion": "x"}, "pair": {"chosen": "x", "rejected": "y"}}[shape]
    row = {"prompt": [turn], **answer}
    assert "user Zoe" in load([row], shape, NAMING)[0][0]
    with pytest.raises(DataError, match=r"leaves the name 'Zoe' of turn 1 out \[dropped_by_template\]"):
        load([row], shape, SILENT)
    for nothing in ("", None):
        assert load([{**row, "prompt": [{**turn, "name": nothing}]}], shape, SILENT)
    tool = {"role": "tool", "content": "4", "name": "add"}  # its call has the name
    assert load([{**row, "prompt": [{**turn, "name": None}, tool]}], shape, SILENT)
