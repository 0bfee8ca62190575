"""Every run leaves a page and findings; they never decide how a run ends."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from strop import report_files
from strop.errors import TrainingError
from strop.report_files import MOST_LOGGED
from strop.runfiles import FINDINGS, PAIRS, PLAN, REPORT


def read(path: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.share(2)
@pytest.mark.parametrize("method", ["sft", "dpo", "ipo", "kto", "orpo", "simpo", "cpo"])
def test_a_run_leaves_its_report(runs: Any, method: str) -> None:
    run = runs({"post_training.method": method}, max_steps=3, logging_steps=1)
    text = (run.path / REPORT).read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and f"({method})" in text
    found = read(run.path / FINDINGS)["findings"]
    assert {"fail", "warn"}.isdisjoint(f["severity"] for f in found if f["evidence"] == "exact"), found
    ids = [f["id"] for f in found]
    assert len(ids) == len(set(ids))
    exact = {f["id"]: f["severity"] for f in found}
    assert exact["rate-zero"] == exact["gradient-zero"] == exact["not-finite"] == "ok"
    if method in ("dpo", "ipo", "kto"):
        assert exact["reference-mismatch"] == exact["first-loss"] == "ok"
    plan = read(run.path / PLAN)
    assert plan["num_steps"] == 3 and plan["prediction"]["peak_memory_bytes"] > 0
    assert (run.path / PAIRS).exists() == (method not in ("sft", "kto"))


def test_the_pairs_of_the_page_are_those_of_the_rows(runs: Any) -> None:
    """Their text is that of the file and line which they name, and their margin the one that was logged."""
    run = runs(max_steps=3, logging_steps=1)
    pairs = read(run.path / PAIRS)
    rows = runs.files["pairs"].read_text().splitlines()
    assert len(pairs["worst"]) == len(pairs["best"]) > 0
    logged = {value for line in run.margins for value in line["sample"]}
    for pair in pairs["worst"] + pairs["best"]:
        file, _, line = pair["source"].rpartition(":")
        row = json.loads(rows[int(line) - 1])
        assert file == str(runs.files["pairs"])
        for name in ("prompt", "chosen", "rejected"):
            assert row[name].strip() in pair[name]
        assert pair["margin"] in logged
    margins = [pair["margin"] for pair in pairs["worst"] + pairs["best"][::-1]]
    assert margins == sorted(margins)


@pytest.mark.nightly
def test_a_resumed_run_has_the_pairs_of_an_unbroken_one(runs: Any) -> None:
    whole = runs(max_steps=4, logging_steps=1, save_steps=2)
    import strop

    config = runs.config(max_steps=4, logging_steps=1, save_steps=2)
    (again,) = strop.train(config, resume=str(whole.path / "checkpoint-2"))
    assert read(again.run_dir / PAIRS)["note"].startswith("Of ")


def test_a_report_that_fails_is_told_and_fails_nothing(
    runs: Any, watched: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(folders: object) -> None:
        raise RecursionError("the page is too deep")

    watched.setattr(report_files, "examine", broken)
    run = runs(max_steps=2)
    assert (run.path / "final").is_dir() and not (run.path / REPORT).exists()
    assert "the report could not be written: RecursionError: the page is too deep" in caplog.text


def test_a_disk_that_is_full_for_the_report_is_told_with_a_setting_of_the_run(
    runs: Any, watched: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    watched.setattr("strop.report.write.write_file", full)
    run = runs(max_steps=2)
    assert (run.path / "final").is_dir()
    (told,) = [text for record in caplog.records if "report could not" in (text := record.getMessage())]
    assert "No space left on device" in told and "choose another training.output_dir" in told
    assert "--output" not in told and "CheckpointError" not in told


def test_what_is_found_is_told_with_what_to_try(
    runs: Any, watched: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "strop")
    run = runs(max_steps=40, learning_rate=1e-9)
    found = [f for f in read(run.path / FINDINGS)["findings"] if f["severity"] in ("warn", "fail") and f["remedies"]]
    told = [record.getMessage() for record in caplog.records]
    for finding in found[:MOST_LOGGED]:
        (line,) = [text for text in told if f"{finding['severity']}: {finding['claim']}" in text]
        assert line.endswith(f". To try: {finding['remedies'][0]['words']}")
    assert found


def test_a_run_that_ends_with_an_error_leaves_one_too(runs: Any, watched: pytest.MonkeyPatch) -> None:
    config = runs.config(max_steps=3, logging_steps=1, learning_rate=1e30)
    import strop

    with pytest.raises(TrainingError):
        strop.train(config)
    (page,) = runs.folder.glob(f"{runs._num_folders}/*/{REPORT}")
    found = read(page.parent / FINDINGS)
    assert found["findings"][0]["id"] == "ended-by-error" and "the loss is" in found["verdict"]
