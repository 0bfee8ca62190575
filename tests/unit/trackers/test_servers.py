"""Servers that are not there, go away and come back."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import tracked_run as course
from strop.trackers import fan_out
from strop.trackers import wandb as wandb_tracker


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.nightly
def test_wandb_without_a_login_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb", reason="install the extra `wandb`")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    with caplog.at_level(logging.INFO, "strop"):
        course.process(tmp_path / "run", course.config("wandb"), last=2).close("finished")
    assert "there is no login" in caplog.text and "wandb sync uploads it" in caplog.text
    assert [r["type"] for r in course.wandb_records(tmp_path / "run" / "logs")].count("history") == 2


@pytest.mark.nightly
def test_wandb_without_its_server_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb", reason="install the extra `wandb`")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    start = wandb.init

    def init(**settings: object) -> object:
        if settings["mode"] == "online":
            raise wandb.errors.CommError("the server does not answer")
        return start(**settings)

    monkeypatch.setattr(wandb, "init", init)
    course.process(tmp_path / "run", course.config("wandb"), last=2).close("finished")
    assert "the server does not answer; the run is kept offline" in caplog.text
    assert [r["type"] for r in course.wandb_records(tmp_path / "run" / "logs")].count("history") == 2


@pytest.mark.nightly
def test_wandb_with_a_server_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb", reason="install the extra `wandb`")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setattr(wandb_tracker, "START_SECONDS", 3.0)
    course.process(tmp_path / "run", course.config("wandb"), last=2).close("finished")
    assert "the run is kept offline" in caplog.text


class Server:
    """An MLflow server with a database of its own, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = f"sqlite:///{self.folder}/mlflow.db"
        # in one process: `mlflow server` starts several and leaves them when it is killed
        script = (
            "import sys; from werkzeug.serving import run_simple; from mlflow.server import app, handlers\n"
            "handlers.initialize_backend_stores(sys.argv[1], None, sys.argv[2])\n"
            "run_simple('127.0.0.1', int(sys.argv[3]), app)\n"
        )
        command = [sys.executable, "-c", script, store, str(self.folder / "artifacts"), str(self.port)]
        env = {**os.environ, "_MLFLOW_SERVER_FILE_STORE": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command, env=env, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=1)
            except OSError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.2)
            else:
                return
        raise AssertionError("the server does not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("flask", reason="the server of MLflow needs flask")
    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.mark.nightly
def test_an_mlflow_server_that_goes_away_and_comes_back(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow", reason="install the extra `mlflow`")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.start()
    trackers = course.process(tmp_path / "run", course.config("mlflow"), last=4)
    server.stop()
    now = time.monotonic()
    monkeypatch.setattr(fan_out.time, "monotonic", lambda: now)
    for line in course.lines(5, 8):
        now += 60
        trackers.log(line)
    server.start()
    for line in course.lines(9, course.STEPS):
        now += 3600
        trackers.log(line)
    trackers.close("finished")
    run_id = course.identity(tmp_path / "run", "mlflow")["run_id"]
    history = MlflowClient().get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == course.expected()["train/loss"]
    assert caplog.text.count("The run goes on") == 1 and "has all records in the end" in caplog.text
