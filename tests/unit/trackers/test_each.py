"""Each tracker holds every metric once, also after a kill and a resume, as its own reader says.

One run with each is looked at from all sides, since some of them take seconds to start.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tracked_run as course
from strop.trackers.tracker import Table
from tracked_run import Series, sorted_series, wandb_records

Reader = Callable[[Path], Series]


def read_tensorboard(run: Path) -> Series:
    events = EventAccumulator(str(run / "logs" / "tensorboard"))
    events.Reload()
    rows = [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    return {name: [(s, pytest.approx(v)) for s, v in own] for name, own in sorted_series(rows).items()}


def read_wandb(run: Path) -> Series:
    rows = [r["history"]["item"] for r in wandb_records(run / "logs") if r["type"] == "history"]
    return sorted_series([(name, row["step"], v) for row in rows for name, v in row.items() if is_metric(name)])


def read_mlflow(run: Path) -> Series:
    from mlflow import MlflowClient

    client, run_id = MlflowClient(), course.identity(run, "mlflow")["run_id"]
    names = [name for name in client.get_run(run_id).data.metrics if not name.startswith("system/")]
    rows = [(n.replace("len_2", "len#2"), m.step, m.value) for n in names for m in client.get_metric_history(run_id, n)]
    return sorted_series(rows)


def read_trackio(run: Path) -> Series:
    from trackio.sqlite_storage import SQLiteStorage

    own = course.identity(run, "trackio")
    logs = SQLiteStorage.get_logs(own["project"], own["name"])
    return sorted_series([(n, line["step"], v) for line in logs for n, v in line.items() if is_metric(n)])


def is_metric(name: str) -> bool:
    return "/" in name and not name.startswith("report/")


TABLES = (
    Table("verdict", ("verdict",), [("a | b",)]),
    Table("evaluation", ("step", "loss"), [("0", "0.7"), ("12", "0.5")]),
)

READERS: dict[str, Reader] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


SECRET = "s3cr3t" * 6


@dataclass(frozen=True)
class Tracked:
    """A run that was stopped, went on from a checkpoint and reported; what trackers said when it began, what was
    written down about it then, and the name that it was given."""

    run: Path
    said: list[str]
    before: dict[str, str] | None
    name: str


@pytest.fixture(scope="module", params=["tensorboard", "wandb", "mlflow", "trackio"])
def kind(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param, reason="install the extra of this name")
    return str(request.param)


@pytest.fixture(scope="module")
def tracked(kind: str, places: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """Where a run begins, secrets are in the environment."""
    folder = tmp_path_factory.mktemp(kind)
    run, name = folder / "run", f"run-named-{folder.name}"
    chosen = course.config(kind, **{"logging.run_name": name})
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("strop")
    level = log.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET[:40].ljust(40, "0"))
        patch.setenv("MY_TOKEN", SECRET)
        patch.setattr(sys, "argv", ["strop", "train", "--mark-of-the-command-line"])
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        first = course.process(run, chosen, last=course.KILLED)
        before = course.identity(run, kind) if kind != "tensorboard" else None
        first.close("stopped")
        trackers = course.process(run, chosen, resumed=True)
        trackers.report(course.STEPS, TABLES)
        trackers.close("finished")
    log.removeHandler(handler)
    log.setLevel(level)
    return Tracked(run, said, before, name)


def test_a_resumed_run_holds_every_metric_once(kind: str, tracked: Tracked, places: Path) -> None:
    there = tracked.run / "logs" if kind in ("tensorboard", "wandb") else places
    assert [line for line in tracked.said if line.startswith(f"{kind}: ") and str(there) in line]
    assert READERS[kind](tracked.run) == course.expected()
    assert tracked.before is None or course.identity(tracked.run, kind) == tracked.before


def test_samples_and_the_tables_of_the_report_are_there(kind: str, tracked: Tracked) -> None:
    run = tracked.run
    if kind == "wandb":
        rows = [r["history"]["item"] for r in wandb_records(run / "logs") if r["type"] == "history"]
        tables = [(row["step"], row["samples.nrows"], row["samples.ncols"]) for row in rows if "samples.path" in row]
        assert tables == [(step, 2, 2) for step in (4, 8, 12)]
        (row,) = [row for row in rows if any(name.startswith("report/") for name in row)]
        for table in TABLES:
            (file,) = (run / "logs").rglob(row[f"report/{table.name}.path"])
            held = json.loads(file.read_text())
            assert (held["columns"], held["data"]) == (list(table.columns), [list(cells) for cells in table.rows])
    elif kind == "mlflow":
        from mlflow import MlflowClient
        from mlflow.artifacts import load_dict, load_text

        found = MlflowClient().get_run(course.identity(run, "mlflow")["run_id"])
        text = load_text(f"{found.info.artifact_uri}/samples/step-00000012.jsonl")
        assert [json.loads(line) for line in text.splitlines()] == course.samples(12)
        for table in TABLES:
            held = load_dict(f"{found.info.artifact_uri}/report/{table.name}.json")
            assert held == {"columns": list(table.columns), "data": [list(cells) for cells in table.rows]}
    elif kind == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        own = course.identity(run, "trackio")
        shown = [
            (x["step"], x["samples"]) for x in SQLiteStorage.get_logs(own["project"], own["name"]) if "samples" in x
        ]
        assert [step for step, _ in shown] == [4, 8, 12]
        assert "| a &#124; &#96;b&#96; 0 | &lt;b&gt;answer&lt;/b&gt; 4<br>. |" in str(shown[0][1])
        (line,) = [x for x in SQLiteStorage.get_logs(own["project"], own["name"]) if "report/verdict" in x]
        assert line["step"] == course.STEPS and "| a &#124; b |" in str(line["report/verdict"])
        assert "| 0 | 0.7 |<br>| 12 | 0.5 |".replace("<br>", "\n") in line["report/evaluation"]["_value"]
    else:
        events = EventAccumulator(str(run / "logs" / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Tensors("samples/text_summary")] == [4, 8, 12]
        for table, words in zip(TABLES, ("a &#124; b", "| 12 | 0.5 |"), strict=True):
            (event,) = events.Tensors(f"report/{table.name}/text_summary")
            assert event.step == course.STEPS and words in event.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize(
    "killed", ["trackio", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("wandb", "mlflow", "tensorboard"))]
)
def test_a_killed_run_too(killed: str, tmp_path: Path) -> None:
    pytest.importorskip(killed, reason="install the extra of this name")
    run = tmp_path / "run"
    # a process started from one that uses W&B would share its service, which outlives the kill
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    command = [sys.executable, course.__file__, str(run), killed]
    done = subprocess.run(command, capture_output=True, timeout=240, env=alone)
    assert done.returncode == -9, done.stderr.decode()
    if killed == "tensorboard":
        time.sleep(1)  # it orders files by the second in their names, and no resume starts within one
    course.process(run, course.config(killed), resumed=True).close("finished")
    assert READERS[killed](run) == course.expected()


@pytest.mark.nightly
def test_a_process_that_ends_before_it_comes_as_far_as_the_first(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    course.process(run, course.config(kind), last=course.KILLED).close("failed")
    course.process(run, course.config(kind), resumed=True, last=6).close("failed")
    course.process(run, course.config(kind), resumed=True).close("finished")
    assert READERS[kind](run) == course.expected()


@pytest.mark.nightly
def test_a_run_without_a_checkpoint_begins_again_in_the_same_place(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    course.process(run, course.config(kind), last=course.KILLED).close("stopped")
    course.begin_again(run, course.config(kind)).close("finished")
    assert READERS[kind](run) == course.expected()


def test_no_secret_and_no_command_line_is_written(tracked: Tracked) -> None:
    for path in tracked.run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"s3cr3t" not in content and b"mark-of-the-command-line" not in content, path


def test_the_configuration_is_there_as_values(kind: str, tracked: Tracked) -> None:
    run, name = tracked.run, tracked.name
    if kind == "wandb":
        (own,) = [r["run"] for r in wandb_records(run / "logs") if r["type"] == "run"][:1]
        assert own["config"]["update"]["training"]["learning_rate"] == 0.25
        assert own["display_name"] == name and own["project"] == "strop"
    elif kind == "mlflow":
        from mlflow import MlflowClient

        found = MlflowClient().get_run(course.identity(run, "mlflow")["run_id"])
        assert found.data.params["training.learning_rate"] == "0.25" and found.info.run_name == name
        assert found.info.status == "FINISHED"
    elif kind == "trackio":
        import trackio

        (own_run,) = [r for r in trackio.Api().runs("strop") if r.name.startswith(name)]
        assert own_run.config["training"]["learning_rate"] == 0.25
    else:
        events = EventAccumulator(str(run / "logs" / "tensorboard"))
        events.Reload()
        (text,) = events.Tensors("config/text_summary")
        assert "learning_rate: 0.25" in text.tensor_proto.string_val[0].decode()
