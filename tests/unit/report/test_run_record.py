"""Run folders as they are found: half-written, of older versions, of foreign hand, of one step, of very many."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strop.errors import StropError
from strop.report import json_lines as module
from strop.report.findings import Severity
from strop.report.json_lines import read_lines
from strop.report.page import page
from strop.report.run_record import read_run
from strop.report.write import examine, write

NAMES = ("config.yaml", "environment.json", "data.json", "metrics.jsonl", "result.json", "plan.json", "pairs.json")


def told(path: Path) -> str:
    """The page of the folder, which must come to be."""
    return page(examine([path]))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_one_of_its_files_has_a_page(name: str, make: Callable[..., Any]) -> None:
    path = make().write()
    (path / name).unlink()
    text = told(path)
    if name not in ("plan.json", "pairs.json"):  # which older versions did not write
        assert f"{name} " in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"splits": 7}', b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 50_000, b"&a [*a]"],
)
def test_a_damaged_file_is_told_and_the_page_comes_all_the_same(
    name: str, content: bytes, make: Callable[..., Any]
) -> None:
    path = make().write()
    (path / name).write_bytes(content)
    assert told(path).startswith("<!doctype html>")


def test_a_half_written_line_is_left_out_and_counted(make: Callable[..., Any]) -> None:
    made = make()
    path = made.write()
    whole = read_run(path)
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 101, "split": "tra')
    cut = read_run(path)
    assert any("1 damaged lines" in gap for gap in cut.gaps)
    assert np.array_equal(cut.train.step, whole.train.step)
    for name, values in whole.train.columns.items():
        assert np.array_equal(cut.train.columns[name], values, equal_nan=True)


@pytest.mark.parametrize("value", ["null", "NaN", "Infinity", "1e400", '"0.5"', "true", "[1]", "{}", "1" * 400])
def test_a_number_that_is_none_is_no_number(value: str, make: Callable[..., Any]) -> None:
    """In the loss of the last line: the page comes, and says that the loss is not finite."""
    made = make()
    path = made.write()
    text = (path / "metrics.jsonl").read_text().splitlines()
    last = json.loads(text[-1])
    text[-1] = json.dumps({**last, "loss": "HERE"}).replace('"HERE"', value)
    (path / "metrics.jsonl").write_text("\n".join(text) + "\n")
    (examined,) = examine([path])
    assert [f.severity for f in examined.diagnosis.findings if f.id == "not-finite"] == [Severity.FAIL]
    page([examined])


def test_all_losses_null_are_not_finite(make: Callable[..., Any]) -> None:
    assert make(lambda line: {"loss": None, "grad_norm": None}).finding("not-finite").severity is Severity.FAIL


def test_both_ways_of_reading_give_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pyarrow's parser, and line by line."""
    path = tmp_path / "lines.jsonl"
    names = ("step", "loss", "rare", "big")
    rows = [{"step": i, "split": "train" if i % 3 else "eval", "loss": math.sin(i), "big": 2**70} for i in range(500)]
    rows[7] |= {"rare": 1, "loss": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(module, "BLOCK", 1000)  # many blocks
    fast = read_lines(path, names, text="split")
    monkeypatch.setattr(module, "is_flat", lambda block: False)
    slow = read_lines(path, names, text="split")
    assert fast.columns.keys() == slow.columns.keys() == set(names)
    for name in names:
        assert np.array_equal(fast.columns[name], slow.columns[name], equal_nan=True)
    for word in ("train", "eval"):
        assert fast.where(word).sum() == slow.where(word).sum() > 0
        assert np.array_equal(fast.where(word), slow.where(word))


def test_a_run_of_one_step_and_one_without_any_have_a_page(make: Callable[..., Any]) -> None:
    made = make()
    made.lines = made.lines[1:2]
    assert "<svg" in told(made.write())
    made.lines = []
    (examined,) = examine([made.write()])
    assert {f.severity for f in examined.diagnosis.findings if f.id in ("rate-zero", "not-finite")} == {
        Severity.UNCHECKED
    }
    page([examined])


def test_without_an_evaluation_what_needs_one_is_not_checked(make: Callable[..., Any]) -> None:
    made = make()
    made.lines = [line for line in made.lines if line["split"] == "train"]
    found = {f.id: f.severity for f in made.diagnose().findings}
    assert found["worse-than-start"] == found["risen"] == found["eval-size"] == Severity.UNCHECKED
    assert "there is no evaluation" in told(made.path)


def test_a_folder_of_before_there_were_reports_has_its_findings(make: Callable[..., Any]) -> None:
    """plan.json and pairs.json are not there, and nothing is missed."""
    path = make().write()
    for name in ("plan.json", "pairs.json"):
        (path / name).unlink()
    run = read_run(path)
    assert run.gaps == ()
    assert "fail" not in [f.severity for e in examine([path]) for f in e.diagnosis.findings]


def test_names_in_the_margins_log_lead_nowhere_else(make: Callable[..., Any], tmp_path: Path) -> None:
    """Arrays are found by epoch and step; a path that the log names is not followed, nor a link."""
    made = make()
    made.margins = [np.zeros(4), np.ones(4)]
    path = made.write()
    secret = tmp_path / "secret.npy"
    np.save(secret, np.full(4, 77, np.float32))
    log = path / "logs" / "margins" / "margins_log.jsonl"
    log.write_text(log.read_text() + json.dumps({"epoch": 0, "step": 2, "global_step": 3, "npy": str(secret)}) + "\n")
    (path / "logs/margins/epoch_000/step_00001.npy").unlink()
    (path / "logs/margins/epoch_000/step_00001.npy").symlink_to(secret)
    found = read_run(path)
    assert found.margins.steps == (1,)
    assert any("2 steps cannot be read" in gap for gap in found.gaps)


def test_arrays_that_hold_objects_are_not_loaded(make: Callable[..., Any]) -> None:
    made = make()
    made.margins = [np.zeros(4)] * 3
    path = made.write()
    folder = path / "logs/margins/epoch_000"
    np.save(folder / "step_00000.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    np.save(folder / "step_00001.npy", np.array([np.nan, np.inf, 1.0], np.float32))
    assert [v.tolist() for v in read_run(path).margins.values] == [[1.0], [0.0] * 4]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_in_any_place_gives_a_page(data: st.DataObject, make: Callable[..., Any]) -> None:
    """A value of any kind in the place of any value of data.json, result.json, plan.json, pairs.json, config.yaml."""
    made = make(name="fuzzed")
    made.pairs = {"note": "n", "worst": [{"margin": 1.0, "prompt": "p", "chosen": "c", "rejected": "r", "source": "s"}]}
    made.plan["prediction"] = {"peak_memory_bytes": 1, "seconds": 2}

    def places(found: Any) -> list[tuple[Any, Any]]:
        keys = found.keys() if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
        return [(found, key) for key in keys] + [place for key in keys for place in places(found[key])]

    every = [place for part in (made.train, made.plan, made.pairs, made.settings) for place in places(part)]
    for _ in range(data.draw(st.integers(1, 4))):
        holder, key = data.draw(st.sampled_from(every))
        value = data.draw(values)
        if key in holder if isinstance(holder, dict) else key < len(holder):
            holder[key] = value
    try:
        path = made.write()
    except (ValueError, TypeError):  # what JSON itself cannot hold
        return
    examined = examine([path])
    page(examined)
    write(examined, path / "out")


@pytest.mark.nightly
def test_a_million_steps(make: Callable[..., Any], tmp_path: Path) -> None:
    """Every step logged: less than ten seconds of one processor, 500 MiB, and a page as small as any."""
    made = make()
    path = made.write()
    line = json.dumps(next(x for x in made.lines if x["split"] == "train")) + "\n"
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, 1_000_001):
            file.write(line.replace('"step": 2,', f'"step": {step},'))
    before = time.process_time()
    examined = examine([path])
    text = page(examined)
    assert time.process_time() - before < 15  # of all threads; a busy machine takes half as long again
    assert examined[0].run.last_step == 1_000_000
    assert len(text.encode()) < 500_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1200 * 1024  # with torch, which tests load


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StropError, match="it is a file"):
        examine([tmp_path / "file"])


def test_numbers_are_read_as_the_configuration_means_them(make: Callable[..., Any]) -> None:
    """5e-07 is a number in YAML 1.2, which configurations are; it is text in YAML 1.1."""
    path = make().write()
    text = (path / "config.yaml").read_text(encoding="utf-8")
    assert "learning_rate: 5e-07" in text
    assert read_run(path).number("training.learning_rate") == 5e-7


def test_a_setting_is_given_whatever_its_file_is_called(make: Callable[..., Any]) -> None:
    path = make().write()
    origins = {"auto.yaml:1": True, "defaults.yaml:2": True, "default: by method": False, "auto_precision: fast": False}
    lines = "".join(f"k{i}: 1  # {origin}\n" for i, origin in enumerate(origins))
    (path / "config.yaml").write_text(lines + "last: 1\n")
    given = {s.origin: s.is_given for s in read_run(path).settings.values()}
    assert given == {**origins, "": False}
