"""Samples before and after: the first and the last answer to each prompt, whatever else stands in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from strop.report import samples
from strop.report.page import page
from strop.report.samples import read_samples
from strop.report.write import examine


def line(step: int, number: int, text: str, **more: Any) -> str:
    about = {"prompt_number": number, "where": f"rows.jsonl:{number + 1}", "prompt": f"question {number}"}
    return json.dumps({"step": step, **about, "completion": text, "tokens": 3, "ended": True, **more}) + "\n"


def test_the_first_and_the_last_answer_are_shown(make: Callable[..., Any]) -> None:
    path = make().write()
    assert read_samples(path) == () and "Samples before" not in page(examine([path]))
    lines = [line(step, number, f"answer {number} at {step}") for step in (0, 20, 40) for number in (0, 1)]
    lines += ["null\n", '{"step": 1}\n', line(40, 2, "<b>alone</b>", ended=False, score=0.25), '{"step": 60, "prom']
    (path / "samples.jsonl").write_text("".join(lines))
    found = read_samples(path)
    assert [(s.first.step, s.first.text, s.last.step, s.last.text) for s in found[:2]] == [
        (0, "answer 0 at 0", 40, "answer 0 at 40"),
        (0, "answer 1 at 0", 40, "answer 1 at 40"),
    ]
    text = page(examine([path]))
    assert "before training" in text and "answer 1 at 40" in text and "answer 1 at 20" not in text
    assert "&lt;b&gt;alone&lt;/b&gt;" in text and "[cut at the limit]" in text and "[score 0.25]" in text


def test_of_a_long_file_the_beginning_and_the_end_are_read(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make().write()
    lines = [line(step, number, "x" * 50) for step in range(50) for number in range(30)]
    (path / "samples.jsonl").write_text("".join(lines))
    monkeypatch.setattr(samples, "MOST_BYTES", 20 * len(lines[0]))
    found = read_samples(path)
    assert len(found) == samples.MOST_PROMPTS
    assert {s.first.step for s in found} == {0}
    assert max(s.last.step for s in found) == 49


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", None),
        ("one two three four five six seven", None),  # too short to repeat itself
        ("one two three four five six seven eight nine", 0.0),
        ("yes yes yes yes yes yes yes yes yes", 5 / 6),
        ("one two three four one two three four one two three four", 5 / 9),
        ("好的" * 12, 15 / 17),  # without spaces: by characters
        ("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往", 0.0),
    ],
)
def test_how_much_of_an_answer_is_repeated(text: str, share: float | None) -> None:
    assert samples.Answer(0, text, True, None).repeated == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("before", "now", "severity"),
    [
        ("none of these words is there more than once", "yes " * 20, "fail"),
        ("yes " * 20, "yes " * 20, "ok"),  # as before training
        ("none of these words is there more than once", "none of these words is there more than once at all", "ok"),
        ("yes", "no", "ok"),
        ("yes " * 20, None, "unchecked"),
    ],
)
def test_answers_that_repeat_themselves(before: str, now: str | None, severity: str, make: Callable[..., Any]) -> None:
    made = make()
    lines = [line(step, 0, text) for step, text in ((0, before), (100, now)) if text is not None]
    made.write()
    (made.path / "samples.jsonl").write_text("".join(lines))
    found = made.finding("repetition")
    assert found.severity == severity, found.claim
