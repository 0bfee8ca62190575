"""The page: one file that asks for nothing, shows hostile text as text, and is the same each time."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strop.cli import main
from strop.errors import CheckpointError, ConfigError
from strop.report import write as writing
from strop.report.charts import LineChart, Series, heat_map
from strop.report.page import page
from strop.report.run_record import read_run
from strop.report.tables import tables_of
from strop.report.write import examine, write
from strop.runfiles import FINDINGS, REPORT

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Read(HTMLParser):
    """Every tag of a page with its attributes, and its text; tags must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def test_the_page_is_one_file_that_asks_for_nothing(make: Callable[..., Any]) -> None:
    made = make()
    made.margins = [np.linspace(-1, 1 + i / 50, 32) for i in range(100)]
    made.pairs = {
        "worst": [{"margin": -3.0, "prompt": "p", "chosen": "c", "rejected": "r", "source": "a:1", "step": 9}]
    }
    text = page(examine([made.write()]))
    read = Read(text)
    assert "default-src 'none'" in text
    assert not [tag for tag, _ in read.tags if tag in ("script", "img", "iframe", "object", "embed", "form", "base")]
    for tag, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        link = attributes.get("href") or attributes.get("xlink:href") or "#"
        assert link.startswith(("#", "data:")), (tag, link)
    assert "url(" not in text and "@import" not in text
    assert len(text.encode()) < 500_000
    # readable by those who do not see it
    pictures = [a for tag, a in read.tags if tag == "svg"]
    assert len(pictures) > 5
    ids = [a["id"] for _, a in read.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    for picture in pictures:
        assert picture["role"] == "img" and all(name in ids for name in (picture["aria-labelledby"] or "").split())
    for _, attributes in read.tags:
        link = attributes.get("href") or ""
        assert not link.startswith("#") or link[1:] in ids
    # what the issue of a run is, in this order
    sections = [
        "Curves",
        "Evaluation",
        "Margins",
        "Pairs",
        "Data",
        "Time and memory",
        "Environment",
        "How to read this page",
    ]
    assert [h for h in read.headings if not h.startswith("Settings")] == sections
    assert read.text.index("checks passed") < read.text.index("Curves")


HOSTILE = (
    "<script>alert(1)</script>\"'></title><img src=x onerror=alert(2)>{{ 7*7 }}\u202e\u2066\x00\x1b[31m\ud800"
    + "x" * 300_000
)


def test_hostile_text_is_text_wherever_it_stands(make: Callable[..., Any]) -> None:
    made = make(name="</title><script>alert(0)<\\script>")
    made.settings["models.huggingface_id"] = HOSTILE
    made.settings["training.output_dir"] = HOSTILE
    made.train["source"] = HOSTILE
    made.train["refused"] = {HOSTILE: 900}
    made.train["rows_read"] = 1000
    made.pairs = {
        "note": HOSTILE,
        "worst": [{"margin": "nan", "prompt": HOSTILE, "chosen": HOSTILE, "rejected": 7, "source": HOSTILE}, 5, None],
        "best": HOSTILE,
    }
    for line in made.lines:
        line[HOSTILE[:70]] = 1.0
        line[HOSTILE] = 2.0
    path = made.write()
    (path / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "command": [HOSTILE]}))
    examined = examine([path])
    text = page(examined)
    read = Read(text)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in read.tags)
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert "<script" not in text.lower().replace("&lt;", "") and "49" not in read.text.split("{{")[0][-5:]
    assert "alert(1)" in read.text and "{{ 7*7 }}" in read.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
    assert len(text.encode("utf-8", "backslashreplace")) < 500_000
    write(examined, path)
    json.loads((path / FINDINGS).read_text(encoding="utf-8"))


def test_the_same_run_gives_the_same_bytes(make: Callable[..., Any]) -> None:
    made = make()
    made.margins = [np.linspace(-1, 1, 8) for _ in range(20)]
    path = made.write()
    write(examine([path]), path)
    first = [(path / name).read_bytes() for name in (REPORT, FINDINGS)]
    write(examine([path]), path)
    assert [(path / name).read_bytes() for name in (REPORT, FINDINGS)] == first


def test_several_runs_are_laid_side_by_side(make: Callable[..., Any], tmp_path: Path) -> None:
    one, other = make(name="one"), make(name="other")
    other.settings["training.learning_rate"] = 1e-3
    other.train["rows_read"] = 77
    examined = examine([one.write(), other.write()])
    read = Read(page(examined))
    for words in ("Settings that differ", "training.learning_rate", "0.001", "Data that differs", "Results"):
        assert words in read.text
    assert "post_training.beta" not in read.text.split("Settings that differ")[1].split("Curves")[0]
    lines = [a for tag, a in read.tags if tag == "polyline"]
    assert {"line c1", "line c2"} <= {a["class"] for a in lines}
    _, listed = write(examined, tmp_path / "out")
    assert [run["run"] for run in json.loads(listed.read_text())["runs"]] == ["one", "other"]


def test_what_is_not_drawn_of_many_runs_is_told(make: Callable[..., Any]) -> None:
    folders = []
    for number in range(8):
        made = make(name=f"run{number}")
        made.margins = [np.linspace(-1, 1, 8)] * 4
        folders.append(made.write())
    text = Read(page(examine(folders))).text
    assert "The first 6 of 8 lines are drawn." in text and "The first 4 of 8 runs are drawn." in text
    assert all(text.count(f"run{number}") > 3 for number in range(8))  # in the tables all of them stand


def test_the_old_page_stays_where_the_new_one_fails(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make().write()
    write(examine([path]), path)
    before = (path / REPORT).read_bytes()

    def broken(examined: object) -> str:
        raise ValueError("no page")

    monkeypatch.setattr(writing, "page", broken)
    with pytest.raises(ValueError, match="no page"):
        write(examine([path]), path)
    assert (path / REPORT).read_bytes() == before
    monkeypatch.undo()
    (path / "file").write_text("")
    with pytest.raises(CheckpointError, match="in the way"):
        write(examine([path]), path / "file")


def test_the_command_says_what_it_found_and_gates(make: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = make().write()
    assert main(["report", str(path), "--fail-on", "fail"]) == 0
    assert "checks passed" in capsys.readouterr().out
    broken = make(lambda line: {"learning_rate": 0.0}, name="broken").write()
    assert main(["report", str(broken), "--fail-on", "fail"]) == 1
    out = capsys.readouterr().out
    assert "fail  rate-zero" in out and str(broken / REPORT) in out
    assert main(["report", str(broken)]) == 0  # without the flag, a finding is no error
    listed = json.loads((broken / FINDINGS).read_text())
    assert listed["findings"][0]["id"] == "rate-zero" and listed["findings"][0]["severity"] == "fail"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no run is given"),
        (["nowhere"], "no such folder"),
        (["."], "nothing in this folder is of a run"),
        ([".", "--threshold", "drift_warm=1"], "did you mean drift_warn"),
        ([".", "--threshold", "drift_warn"], "NAME=VALUE"),
        ([".", "--threshold", "drift_warn=nan"], "NAME=VALUE"),
        ([".", "--fail-on", "ok"], "--fail-on"),
    ],
)
def test_a_wrong_command_line_is_answered(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_a_folder_of_runs_names_them(make: Callable[..., Any]) -> None:
    path = make().write()
    with pytest.raises(ConfigError) as caught:
        examine([path.parent])
    assert str(path) in caught.value.fix


def test_the_csv_of_a_chart_is_for_programs() -> None:
    """A cell per column, thousands as numbers, and no formula."""
    steps = np.arange(50.0)
    line = LineChart("loss", "Loss", [Series("=a, b", steps, 5870 + steps)]).draw()
    heat = heat_map("margins", "Margins", "", range(50), [np.full(4, 5870.0 + step) for step in range(50)])
    assert line is not None and heat is not None
    for chart, names in ((line, ["step", "'=a, b"]), (heat, ["step", "median", "above 0"])):
        header, *rows = csv.reader(chart.csv.splitlines())
        assert header == names
        assert [(float(row[0]), float(row[1])) for row in rows] == [(step, 5870 + step) for step in range(50)]
        assert {len(row) for row in rows} == {len(names)}


def test_a_line_of_zeros_stands_on_the_axis_and_long_names_are_made_to_fit() -> None:
    chart = LineChart("clipped", "Cut", [Series("undesirable", np.arange(9.0), np.zeros(9))]).draw()
    assert chart is not None
    assert re.findall(r'text-anchor="end">([^<]+)<', chart.picture) == ["0", "0.5", "1"]
    assert 'textLength="88"' in chart.picture


@pytest.mark.parametrize("samples", [False, True])
def test_a_prediction_without_sampling_says_so(samples: bool, make: Callable[..., Any]) -> None:
    """The time of the steps, beside which it stands, has it."""
    made = make()
    made.settings["rollout.enabled"] = samples
    made.plan["prediction"] = {"seconds": 120.0, "peak_memory_bytes": 2**30}
    (cost,) = (table for table in tables_of(read_run(made.write())) if table.title == "Time and memory")
    (time,) = (row for row in cost.rows if row[0] == "time of the steps")
    assert time[2].endswith(" without sampling and rewards") == samples


def test_a_threshold_can_be_replaced(make: Callable[..., Any]) -> None:
    path = make().write()
    (before,), (after,) = examine([path]), examine([path], {"drift_warn": 0.01, "drift_note": 0.01})
    assert "drift" not in [f.id for f in before.diagnosis.findings if f.severity == "warn"]
    assert "drift" in [f.id for f in after.diagnosis.findings if f.severity == "warn"]
    assert "given for this report" in page([after])


def test_ties_before_the_first_step_are_no_accuracy_of_0(make: Callable[..., Any]) -> None:
    made = make()
    text = page(examine([made.write()]))
    assert "all ties" in text and "0.000 (0.000" not in text
    made.settings["post_training.ref_model_id"] = "org/another"  # then there are no ties
    assert "all ties" not in page(examine([made.write()]))


def test_notes_alone_are_no_reason_for_doubt(make: Callable[..., Any]) -> None:
    made = make(lambda line: {"num_groups": 50})
    verdict = made.diagnose().verdict
    assert verdict.startswith("Nothing looks wrong") and "Good to know: the evaluation has 50 rows" in verdict
