"""Loading: every row is accounted for, the order is kept, and what is wrong is one clear error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from strop.config import RunConfig
from strop.data.load import LoadedData, load_data
from strop.data.store import worker_pool
from strop.data.store.group_numbers import unpaired
from strop.errors import ConfigError, DataError

Make = Callable[..., Any]


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def pair(i: int, prompt: str | None = None, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt or f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}", **more}


def lines(groups: Iterable[Any]) -> list[int]:
    return [group.origin.line for group in groups]


def check_counts(data: LoadedData) -> None:
    for name, counts in data.report.splits.items():
        assert counts.rows_read == counts.kept + counts.refused.total() + counts.dropped.total()
        assert counts.kept == len(getattr(data, name))
    assert len(data.rejected) == sum(counts.refused.total() for counts in data.report.splits.values())


def test_groups_keep_the_order_of_the_rows(
    tmp_path: Path, make_config: Callable[..., RunConfig], make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", ["", *(pair(i) for i in range(30))])
    config = make_config(train_file=path, validation_split=0.2)
    data = load_data(config, make_tokenizer(), "pair")
    check_counts(data)
    assert len(data.train) == 24 and len(data.eval) == 6
    assert sorted(lines(data.train) + lines(data.eval)) == list(range(2, 32))
    assert lines(data.train) == sorted(lines(data.train)) and lines(data.eval) == sorted(lines(data.eval))
    assert data.report.splits["train"].blank_lines == 1
    # how many rows are worked on at once changes nothing
    monkeypatch.setattr(worker_pool, "ROWS_AT_ONCE", 7)
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    again = load_data(config, make_tokenizer(), "pair")
    assert (again.train, again.eval, again.report) == (data.train, data.eval, data.report)


def test_the_same_rows_have_the_same_fingerprint_wherever_they_stand(
    tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    rows = [pair(i) for i in range(6)]
    (tmp_path / "other").mkdir()
    paths = [write(tmp_path / "rows.jsonl", rows), write(tmp_path / "other" / "x.jsonl", ["", *rows])]
    os.utime(paths[1], (0, 0))
    prints = {load_data(make_config(train_file=p), make_tokenizer(), "pair").report.fingerprint for p in paths}
    assert len(prints) == 1
    changed = write(tmp_path / "changed.jsonl", [*rows[:-1], pair(7)])
    prints.add(load_data(make_config(train_file=changed), make_tokenizer(), "pair").report.fingerprint)
    prints.add(load_data(make_config(train_file=paths[0], seed=1), make_tokenizer(), "pair").report.fingerprint)
    assert len(prints) == 3


def test_an_explicit_validation_source_wins_over_the_split(
    tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    train, val = write(tmp_path / "a.jsonl", map(pair, range(5))), write(tmp_path / "b.jsonl", map(pair, range(3)))
    data = load_data(make_config(train_file=train, val_file=val), make_tokenizer(), "pair")
    assert (len(data.train), len(data.eval)) == (5, 3) and data.eval[0].origin.file == val
    none = load_data(make_config(train_file=train, validation_split=0.0), make_tokenizer(), "pair")
    assert (len(none.train), none.eval) == (5, ()) and list(none.report.splits) == ["train"]


def test_prompts_of_pairs_are_not_on_both_sides(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(i, prompt=f"question {i % 7}") for i in range(28)])
    data = load_data(make_config(train_file=path, validation_split=0.3), make_tokenizer(), "pair")
    trained, held = ({bytes(g.prompt_ids.tobytes()) for g in groups} for groups in (data.train, data.eval))
    assert held and not held & trained


def test_max_samples_are_the_first_good_rows(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(0), "{", pair(2), pair(3), "["])
    config = make_config(
        train_file=path, max_samples=2, on_error="skip", max_dropped_fraction=1.0, validation_split=0.0
    )
    data = load_data(config, make_tokenizer(), "pair")
    assert lines(data.train) == [1, 3] and data.report.splits["train"].rows_read == 3
    # a row behind them is not even looked at
    assert len(load_data(make_config(train_file=path, max_samples=1), make_tokenizer(), "pair").train) == 1


BAD = [pair(0), "{", {**pair(2), "chosen": ""}, pair(3), {**pair(4), "rejected": "good 4"}, pair(5)]


def test_the_first_bad_row_stops(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    path = write(tmp_path / "rows.jsonl", BAD)
    with pytest.raises(DataError) as error:
        load_data(make_config(train_file=path), make_tokenizer(), "pair")
    assert error.value.where == f"{path}:2" and "truncated_json" in str(error.value)
    assert "on_error: skip" in error.value.fix


def test_bad_rows_are_left_out_counted_and_kept_aside(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    path = write(tmp_path / "rows.jsonl", BAD)
    data = load_data(
        make_config(train_file=path, on_error="skip", max_dropped_fraction=1.0, validation_split=0.0),
        make_tokenizer(),
        "pair",
    )
    check_counts(data)
    assert lines(data.train) == [1, 4, 6]
    reasons = {"truncated_json": 1, "empty_field": 1, "chosen_equals_rejected": 1}
    assert dict(data.report.splits["train"].refused) == reasons
    assert [r["line"] for r in data.rejected] == [2, 3, 5]
    assert [r["raw"] for r in data.rejected] == ["{", json.dumps(BAD[2]), json.dumps(BAD[4])]
    assert json.loads(json.dumps(data.rejected[0])) == {
        "file": path, "line": 2, "reason": "truncated_json", "raw": "{",
    }  # fmt: skip


def test_rows_that_the_template_refuses_are_skipped_too(
    tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    template = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    rows = [{"messages": turns}, {"messages": [{"role": "system", "content": "b"}, *turns]}]
    path = write(tmp_path / "rows.jsonl", rows)
    data = load_data(
        make_config(train_file=path, on_error="skip", max_dropped_fraction=1.0),
        make_tokenizer(template=template),
        "single",
    )
    assert lines(data.train) == [1] and data.rejected[0]["reason"] == "dropped_by_template"
    with pytest.raises(DataError, match="dropped_by_template"):
        load_data(make_config(train_file=path), make_tokenizer(template=template), "single")


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, make_config: Make, make_tokenizer: Make, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    for config in (
        make_config(train_file=str(path), on_error="skip", max_dropped_fraction=1.0),
        make_config(train_file=str(path)),
    ):
        with pytest.raises(DataError, match="no rows"):
            load_data(config, make_tokenizer(), "pair")


def test_nothing_but_bad_rows_is_an_error(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    path = write(tmp_path / "rows.jsonl", ["{", {"messages": []}, {"messages": []}])
    with pytest.raises(DataError, match="all 3 rows are bad") as error:
        load_data(make_config(train_file=path, on_error="skip", max_dropped_fraction=1.0), make_tokenizer(), "pair")
    assert "2 wrong_shape" in error.value.found and error.value.where == f"{path}:1"


def test_nothing_within_the_limits_says_which_and_what_to_set(
    tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    path = write(tmp_path / "rows.jsonl", map(pair, range(4)))
    tight = {"max_seq_length": 12, "max_prompt_length": 10, "max_completion_length": 2}
    with pytest.raises(DataError, match="4 prompt_too_long") as error:
        load_data(
            make_config(tight, train_file=path, validation_split=0.0, filter_overlength_samples=True),
            make_tokenizer(),
            "pair",
        )
    assert "training.max_prompt_length 10" in error.value.expected and "filter_overlength" in error.value.fix
    same = write(tmp_path / "same.jsonl", [{**pair(i), "rejected": f"good {i}!"} for i in range(4)])
    with pytest.raises(DataError, match="4 equal_after_truncation"):
        load_data(make_config(tight, train_file=same, validation_split=0.0), make_tokenizer(), "pair")


def test_long_conversations_lose_their_first_turns_and_are_counted(
    tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    def row(num_turns: int) -> dict[str, Any]:
        roles = ["system", *(["user", "assistant"] * num_turns), "user"]
        turns = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
        return {"prompt": turns, "chosen": "yes", "rejected": "no"}

    tokenizer = make_tokenizer()
    path = write(tmp_path / "rows.jsonl", [row(0), row(1), row(8)])
    config = make_config({"max_prompt_length": 64}, train_file=path, validation_split=0.0)
    data = load_data(config, tokenizer, "pair")
    texts = [tokenizer.decode(group.prompt_ids) for group in data.train]
    assert data.report.splits["train"].changes["prompts_cut"] == 1
    assert all(len(group.prompt_ids) <= 64 for group in data.train)
    # whole messages went: the template is as whole as before
    assert texts[2].startswith("<|start|>system\nsystem 0<|end|>\n<|start|>user\n")
    assert texts[2].endswith("<|end|>\n<|start|>user\nuser 17<|end|>\n<|start|>assistant\n")
    # and one more would not have fitted
    longer = load_data(make_config({"max_prompt_length": 64 + 30}, train_file=path), tokenizer, "pair")
    assert len(longer.train[-1].prompt_ids) > 64


def test_completions_that_lose_their_end_token_are_counted(
    tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    rows = [{"prompt": "q", "completion": "dog " * n} for n in (1, 2, 50, 60)]
    config = make_config(
        {"max_completion_length": 20}, train_file=write(tmp_path / "r.jsonl", rows), validation_split=0.0
    )
    counts = load_data(config, make_tokenizer(), "single").report.splits["train"]
    assert (counts.kept, counts.changes["completions_cut"], counts.changes["without_end_token"]) == (4, 2, 2)


def test_what_the_encoder_had_to_change_is_counted(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    rows = [pair(0), pair(1, prompt="a</s>b</s>"), {**pair(2), "chosen": "\n\nx", "rejected": "\n\ny"}]
    config = make_config(train_file=write(tmp_path / "rows.jsonl", rows), validation_split=0.0)
    counts = load_data(config, make_tokenizer(), "pair").report.splits["train"]
    # both sides hold the prompt, whose control tokens count once
    assert (counts.changes["controls_as_text"], counts.changes["boundaries_split"]) == (2, 2)


def test_the_report_says_how_rows_became_text(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    texts = write(tmp_path / "texts.jsonl", map(pair, range(3)))
    turns = write(
        tmp_path / "turns.jsonl",
        [{**pair(i), "prompt": [{"role": "user", "content": "q"}]} for i in range(3)],
    )
    own, bare = make_tokenizer(), make_tokenizer(template=None)

    def how(path: str, tokenizer: PreTrainedTokenizerFast, render: str = "auto") -> tuple[Any, ...]:
        data = load_data(make_config(train_file=path, render=render), tokenizer, "pair")
        r = data.report.rendering
        return r.num_chat, r.num_raw, r.template, data.chat_template == tokenizer.chat_template, data.chat_template

    assert how(texts, own)[:4] == (3, 0, "tokenizer", True)
    assert how(texts, own, "raw") == (0, 3, None, False, None)
    assert how(texts, bare) == (0, 3, None, True, None)
    assert how(texts, bare, "chat")[:3] == (3, 0, "plain")
    assert how(turns, bare)[:4] == (3, 0, "plain", False)
    with pytest.raises(ConfigError, match="raw"):
        how(turns, own, "raw")


def test_labelled_rows_and_pairs_become_labelled_groups(
    tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    rows = [{"prompt": f"question {i}", "completion": "good", "label": i % 3 == 0} for i in range(6)]
    path = write(tmp_path / "rows.jsonl", [*rows, pair(7), pair(8)])
    data = load_data(make_config(train_file=path, validation_split=0.0), make_tokenizer(), "labelled")
    assert lines(data.train) == [1, 2, 3, 4, 5, 6, 7, 7, 8, 8]
    assert [g.label for g in data.train] == [True, False, False, True, False, False, True, False, True, False]
    assert all(len(g.completions) == 1 for g in data.train)
    assert data.report.splits["train"].kept == 8
    pairs_alone = write(tmp_path / "pairs.jsonl", [pair(7)])
    (whole,) = load_data(make_config(train_file=pairs_alone, validation_split=0.0), make_tokenizer(), "pair").train
    assert data.train[6:8] == tuple(replace(g, origin=data.train[6].origin) for g in unpaired(whole))


def test_both_halves_of_a_pair_go_the_same_way(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(i) for i in range(12)])
    sources = [{"name": path, "fraction": 0.75, "weight": 1.5}]
    data = load_data(make_config(sources=sources, validation_split=0.1), make_tokenizer(), "labelled")
    assert len(data.eval) == 2 and data.report.splits["eval"].kept == 1
    assert not set(lines(data.eval)) & set(lines(data.train))
    for groups in (data.train, data.eval):
        both = [(g.origin.line, g.label) for g in groups]
        assert {both.count((line, True)) - both.count((line, False)) for line, _ in both} == {0}


def test_the_label_is_part_of_the_fingerprint(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    found = set()
    for label in (True, False):
        path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "x", "label": label}])
        data = load_data(make_config(train_file=path, validation_split=0.0), make_tokenizer(), "labelled")
        found.add(data.report.fingerprint)
    assert len(found) == 2


def test_labelled_rows_with_one_prompt_stay_together(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    rows = [{"prompt": f"question {i // 3}", "completion": f"x {i}", "label": i % 2 == 0} for i in range(30)]
    config = make_config(train_file=write(tmp_path / "rows.jsonl", rows), validation_split=0.3)
    data = load_data(config, make_tokenizer(), "labelled")
    assert data.eval and not {g.prompt_ids.tobytes() for g in data.eval} & {g.prompt_ids.tobytes() for g in data.train}
