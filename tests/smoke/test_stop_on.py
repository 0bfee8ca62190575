"""A finding is told while the run goes on, and `finetuning.stop_on` stops it: saved, told why, with an exit code of its
own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import strop
from strop.cli.entry import main
from strop.errors import ConfigError, StoppedByFinding
from strop.report.watch import Watch
from strop.trackers.fan_out import Trackers

TOO_HIGH: Mapping[str, Any] = {
    "training.learning_rate": 3.0,
    "training.max_steps": 40,
    "training.eval_steps": 5,
    "training.save_steps": 1000,
}


def stopped(config: Any) -> StoppedByFinding:
    with pytest.raises(StoppedByFinding) as caught:
        strop.train(config)
    return caught.value


def test_a_run_stops_where_the_finding_is_raised(runs: Any, capsys: Any) -> None:
    config = runs.config({**TOO_HIGH, "finetuning.stop_on": ["drift"]})
    stop = stopped(config)
    run = Path(stop.checkpoint).parent
    assert stop.finding == "drift" and 20 <= stop.step < 40
    assert (run / f"checkpoint-{stop.step}").is_dir() and not (run / "final").exists()
    told = capsys.readouterr().err
    assert f"step {stop.step}: The policy is far from its reference" in told
    failure = json.loads((run / "failure.json").read_text())
    assert failure["stopped_on"] == "drift" and failure["step"] == stop.step
    page = (run / "report.html").read_text()
    assert f"stopped after step {stop.step} by finetuning.stop_on: drift" in page
    ids = [f["id"] for f in json.loads((run / "findings.json").read_text())["findings"]]
    assert ids[0] == "drift"
    path = run.parent.parent / f"{run.parent.name}.yaml"  # goes on all the same, as the command line says
    path.write_text((run / "config.yaml").read_text())
    assert main(["train", "--config", str(path), "--resume"]) == 3
    assert "stopped after step" in capsys.readouterr().err
    assert main(["train", "--config", str(path), "--resume", "--finetuning.stop-on", "[]"]) == 0
    assert (run / "final").is_dir() and not (run / "failure.json").exists()


@pytest.mark.nightly
def test_without_it_the_finding_is_told_once_and_the_run_goes_on(
    runs: Any, watched: pytest.MonkeyPatch, capsys: Any
) -> None:
    sent: list[Mapping[str, Any]] = []
    watched.setattr(Trackers, "log", lambda self, record: sent.append(record))
    run = runs(TOO_HIGH, fresh=True)
    (told,) = [record for record in sent if "findings/drift" in record]
    assert told["findings/drift"] == 1 and 20 <= told["step"] < 40
    assert capsys.readouterr().err.count("The policy is far from its reference") == 1
    assert (run.path / "final").is_dir()


def test_an_unknown_finding_names_the_nearest(runs: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean drift"):
        runs.config({"finetuning.stop_on": ["drfit"]})
    with pytest.raises(ConfigError):
        runs.config({"finetuning.stop_on": ["few-steps"]})  # it says something about the end of a run


def test_a_check_that_fails_stops_no_run(runs: Any, watched: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(self: Watch, line: Mapping[str, Any]) -> Any:
        raise ValueError("a bug")

    watched.setattr(Watch, "line", broken)
    run = runs({"finetuning.stop_on": ["risen"]})
    assert (run.path / "final").is_dir()
    told = capsys.readouterr().err
    assert told.count("findings are not looked for any more: ValueError: a bug; finetuning.stop_on stops nothing") == 1
