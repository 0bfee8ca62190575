"""What is wrong with the data as a whole is found, although each row is fine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from strop.data.load import LoadedData, load_data
from strop.data.problems import imbalance
from strop.errors import DataError

Make = Callable[..., Any]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(i: int, chosen: str = "good", rejected: str = "bad") -> dict[str, Any]:
    return {"prompt": f"question {i}", "chosen": chosen, "rejected": rejected}


@pytest.fixture
def load(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> Callable[..., LoadedData]:
    def run(
        train: list[dict[str, Any]], held: list[dict[str, Any]] | None = None, template: str | None = None, **how: Any
    ) -> LoadedData:
        files = {"train_file": write(tmp_path / "train.jsonl", train)}
        if held is not None:
            files["val_file"] = write(tmp_path / "val.jsonl", held)
        config = make_config(how.pop("training", None), **files, validation_split=0.0, **how)
        shape = "pair" if "chosen" in train[0] else "single"
        return load_data(config, make_tokenizer(template=template), shape)

    return run


def test_a6_duplicates_contradictions_and_leaks(load: Make) -> None:
    train = [pair(0), pair(1), pair(0), pair(1, "bad", "good"), pair(2), pair(3)]
    held = [pair(2), pair(3, "other"), pair(4)]
    data = load(train, held)
    found = data.report.findings
    assert (found["train"].duplicates, found["train"].contradictions) == (1, 2)
    assert (found["eval"].leaked_prompts, found["eval"].leaked_rows) == (2, 1)
    assert (found["train"].leaked_prompts, found["eval"].duplicates) == (0, 0)
    text = "\n".join(data.report.lines())
    for words in (
        "1 rows stand there more than once",
        "2 rows are contradicted",
        "2 rows have a prompt that",
    ):
        assert words in text
    assert json.loads(json.dumps(data.report.as_dict()))["splits"]["eval"]["findings"]["leaked_rows"] == 1


def test_a6_labels_that_contradict(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    rows = [{"prompt": "q", "completion": "x", "label": label} for label in (True, False, True)]
    rows.append({"prompt": "r", "completion": "x", "label": True})
    config = make_config(train_file=write(tmp_path / "rows.jsonl", rows), validation_split=0.0)
    found = load_data(config, make_tokenizer(), "labelled").report.findings["train"]
    assert (found.duplicates, found.contradictions, found.length) == (1, 3, {})


def test_a6_length_bias(load: Make) -> None:
    data = load([pair(i, "good " * 20 if i else "x", "bad") for i in range(4)])
    length = data.report.findings["train"].length
    assert length["chosen_is_longer"] == 0.75 and length["mean_chosen"] > 2 * length["mean_rejected"]
    assert "may drift to that length" in "\n".join(data.report.lines())
    even = load([pair(i) for i in range(4)])
    assert "may drift" not in "\n".join(even.report.lines())
    single = load([{"prompt": "q", "completion": "x"}, {"prompt": "r", "completion": "x"}])
    assert single.report.findings["train"].length == {}


def test_a6_double_bos_and_missing_eos(load: Make) -> None:
    twice = "{{ bos_token + bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    data = load([{"prompt": f"q {i}", "completion": "dog " * 50} for i in range(3)], template=twice,
                training={"max_completion_length": 10})  # fmt: skip
    assert (data.report.findings["train"].double_bos, data.report.findings["train"].missing_eos) == (3, 3)
    assert "3 prompts begin with two BOS tokens" in "\n".join(data.report.lines())


def test_a6_the_report_tells_lengths_and_what_sharing_saves(load: Make) -> None:
    text = "\n".join(load([pair(i) for i in range(9)]).report.lines())
    assert "tokens (median / 90 % / 99 % / most): prompt" in text and "shared prompts save" in text


def test_b7_losing_more_than_allowed_stops(load: Make, tmp_path: Path) -> None:
    rows = [pair(i) for i in range(18)] + [{"prompt": "q", "chosen": "", "rejected": "y"}] * 2
    with pytest.raises(DataError, match=r"2 of 20 rows are lost: 2 empty_field") as error:
        load(rows, on_error="skip")
    assert "train.jsonl:19 (empty_field)" in error.value.fix and "5 %" in error.value.expected
    assert len(load(rows, on_error="skip", max_dropped_fraction=0.1).train) == 18
    # rows with nothing left count, rows that were to be dropped do not
    long = [{"prompt": "q", "completion": "x"}, *({"prompt": "dog " * 400, "completion": "x"} for _ in range(3))]
    tight = {"max_seq_length": 40, "max_prompt_length": None}
    with pytest.raises(DataError, match=r"3 of 4 rows are lost: 3 nothing_trained"):
        load(long, training=tight, max_dropped_fraction=0.5)
    assert len(load(long, training=tight, max_dropped_fraction=0.5, filter_overlength_samples=True).train) == 1
    assert len(load(long, training=tight).train) == 1


@pytest.mark.parametrize(("num", "other"), [(1, 1), (3, 4), (90, 10), (10, 90), (4, 3), (5, 3), (1000, 1)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5), (0.3, 1.0)])
def test_labels_out_of_balance_are_told_with_weights_that_balance_them(
    num: int, other: int, weights: tuple[float, float]
) -> None:
    desirable, undesirable = weights
    labels = {True: num, False: other}
    note = imbalance(labels, desirable, undesirable)
    ratio = desirable * num / (undesirable * other)
    assert (note is None) == (1 <= ratio <= 4 / 3)
    if note is not None:
        assert f"{num} desirable and {other} undesirable" in note
        better = [float(value) for value in re.findall(r"_weight: ([0-9.e+-]+\d)", note)]
        assert imbalance(labels, better[0], undesirable) is None
        assert imbalance(labels, desirable, better[1]) is None


def test_labels_of_one_kind_are_told() -> None:
    only_good, only_bad = (imbalance(labels, 1.0, 1.0) for labels in ({True: 7, False: 0}, {True: 0, False: 7}))
    assert only_good is not None and "all 7 completions are desirable" in only_good and "sft" in only_good
    assert only_bad is not None and "all 7 completions are undesirable" in only_bad and "sft" not in only_bad


def test_the_report_counts_labels(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    rows = [{"prompt": f"q{i}", "completion": "x", "label": i % 4 == 0} for i in range(12)]
    path = write(tmp_path / "rows.jsonl", rows)
    config = make_config(sources=[{"name": path, "weight": 2.0}], validation_split=0.0)
    data = load_data(config, make_tokenizer(), "labelled")
    assert any("3 desirable and 9 undesirable completions" in line for line in data.report.lines())
    assert data.num_labels == {True: 6, False: 18}
    pairs = [pair(i) for i in range(4)]
    data = load_data(
        make_config(train_file=write(tmp_path / "pairs.jsonl", pairs), validation_split=0.0), make_tokenizer(), "pair"
    )
    assert not any("desirable" in line for line in data.report.lines())
