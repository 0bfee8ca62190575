"""The command line: what reaches the training, exit codes, and one clear message for every mistake."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from strop import cli
from strop.engine.progress import StopSignal
from strop.errors import ConfigError, DataError, GoneError, Interrupted, LostError, StoppedByFinding

ROOT = Path(__file__).resolve().parents[2]


class Calls(list[tuple[str, Any, dict[str, Any]]]):
    """What was called, what the next call does, and what it raises."""

    work: Callable[[], None] | None = None
    error: Exception | None = None

    def record(self, name: str) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **named: Any) -> Any:
            self.append((name, first, {"rest": rest, **named}))
            if self.work is not None:
                self.work()
            if self.error is not None:
                raise self.error
            return []

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stand-ins for training, the dry run and the demo."""
    found = Calls()
    for module, names in {"training": ["train"], "dryrun": ["dry_run"], "demo": ["run_demo"]}.items():
        stand_in = ModuleType(f"strop.{module}")
        for name in names:
            setattr(stand_in, name, found.record(name))
        monkeypatch.setitem(sys.modules, f"strop.{module}", stand_in)
    monkeypatch.setattr("strop.preflight.check", lambda *_, **__: None)  # what is named here is not there
    return found


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("c.yaml")
    path.write_text("models:\n  - huggingface_id: org/a\n  - huggingface_id: org/b\n")
    return path


def test_everything_reaches_the_training(config: Path, calls: Calls) -> None:
    line = "train --config c.yaml --preset cpu --model-index 1 --resume --allow-changes --learning-rate 1e-6 --no-bf16"
    assert cli.main(line.split()) == 0
    ((name, loaded, named),) = calls
    assert name == "train"
    assert named == {"rest": (), "model_index": 1, "resume": "auto", "overwrite": False, "allow_changes": True}
    assert loaded.training.learning_rate == 1e-6
    assert loaded.origins["training.learning_rate"] == "command line"
    assert loaded.origins["training.gradient_accumulation_steps"] == "preset cpu"


@pytest.mark.parametrize(
    ("line", "resume", "overwrite"),
    [
        ("", None, False),
        ("--resume", "auto", False),
        ("--resume auto", "auto", False),
        ("--resume=a/b", "a/b", False),
        ("--overwrite", None, True),
    ],
)
def test_resume_and_overwrite(config: Path, calls: Calls, line: str, resume: str | None, overwrite: bool) -> None:
    assert cli.main(["train", "--config", "c.yaml", *line.split(), "--seed", "3"]) == 0
    assert calls[0][2]["resume"] == resume
    assert calls[0][2]["overwrite"] is overwrite
    assert calls[0][1].seed == 3


def test_a_run_without_a_file(calls: Calls) -> None:
    assert cli.main(["train", "--model", "org/a", "--train-file", "a.jsonl"]) == 0
    assert calls[0][1].models[0].name == "a"


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ("", {"device": None, "memory": None, "timed": True}),
        ("--no-time", {"device": None, "memory": None, "timed": False}),
        ("--verbose", {"device": None, "memory": None, "timed": True, "verbose": True}),
        ("--device h100 --device-memory 24GiB", {"device": "h100", "memory": 24 * 2**30, "timed": True}),
        ("--device-memory=1.5GB", {"device": None, "memory": 1_500_000_000, "timed": True}),
    ],
)
def test_the_dry_run(flags: str, given: dict[str, Any], config: Path, calls: Calls) -> None:
    for file in (["--config", "c.yaml", "--dry-run"], ["--dry-run", "c.yaml"], ["c.yaml", "--dry-run"]):
        assert cli.main(["train", *file, "--model-index=0", *flags.split()]) == 0
    assert len(calls) == 3
    for name, _, named in calls:
        assert name == "dry_run" and named == {"rest": (), "model_index": 0, "verbose": False, "devices": None, **given}


def test_the_demo(calls: Calls) -> None:
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--seed", "3", "--output-dir", "there"]) == 0
    assert [(seed, named["rest"]) for _, seed, named in calls] == [(0, (Path("runs/demo"),)), (3, (Path("there"),))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "no command is given"),
        ("trian --config c.yaml", "did you mean strop train?"),
        ("--config c.yaml", "did you mean strop train --config c.yaml?"),
        ("train --confg c.yaml", "unknown flag --confg\n  to do:    did you mean --config?"),
        ("train --conf c.yaml", "unknown flag --conf\n"),  # no abbreviations
        ("train --config c.yaml --learnin-rate 1", "did you mean --learning-rate?"),
        ("train --config c.yaml --config c.yaml", "--config is given twice"),
        ("train --config c.yaml --dry-run --dry-run", "--dry-run is given twice"),
        ("train --config c.yaml --no-time --device h100", "--no-time and --device without --dry-run"),
        ("train --config c.yaml --dry-run --device-memory 24", "--device-memory is '24'"),
        ("train --config c.yaml --dry-run --device-memory 0GiB", "expected: a number with a unit: GiB, GB, MiB or MB"),
        ("train --config", "expected one argument"),
        ("c.yaml", "did you mean strop train c.yaml?"),
        ("train none.yaml", "none.yaml: the configuration cannot be read"),
        ("train c.toml", "'c.toml' belongs to no flag"),
        ("train --config c.yaml d.yaml", "2 configurations are given: c.yaml, d.yaml"),
        ("train c.yaml d.yml", "2 configurations are given: c.yaml, d.yml"),
        ("train c.yaml --dry-run more", "'more' belongs to no flag"),
        ("train --config c.yaml --model-index x", "invalid int value"),
        ("train --config c.yaml --resume --overwrite", "--resume and --overwrite are both given"),
        ("train --config c.yaml --resume=", "--resume is empty"),
        ("train --config c.yaml --overwrite=yes", "--overwrite"),
        ("train --config none.yaml", "none.yaml: the configuration cannot be read"),
        ("train --config c.yaml --preset none", "there is no preset 'none'"),
        ("train --config c.yaml --model x", "--model: huggingface_id could mean any of the 2 models"),
        ("train --config c.yaml --num-epochs 0", "--num-epochs: training.num_epochs is 0"),
        ("train", "no model is given"),
        ("demo --seed x", "invalid int value"),
        ("demo --seed -1", "--seed is -1"),
        ("demo --sed 1", "did you mean --seed?"),
        ("schema --format yaml", "invalid choice"),
    ],
)
def test_mistakes_exit_with_1_and_one_message(
    config: Path, calls: Calls, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    assert cli.main(line.split()) == 1
    printed = capsys.readouterr()
    assert words in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert calls == []


def test_errors_of_the_training_exit_with_1(config: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (DataError("no rows", where="a.jsonl:3", fix="add rows"), ConfigError("wrong \ud800")):
        calls.error = error
        assert cli.main(["train", "--config", "c.yaml"]) == 1
    printed = capsys.readouterr().err
    assert "a.jsonl:3: no rows\n  to do:    add rows" in printed
    assert "\\ud800" in printed


def test_anything_else_is_a_bug_and_is_not_hidden(config: Path, calls: Calls) -> None:
    calls.error = KeyError("bug")
    with pytest.raises(KeyError):
        cli.main(["train", "--config", "c.yaml"])


@pytest.mark.parametrize(
    ("line", "again"),
    [
        ("train --config c.yaml", "strop train --config c.yaml --resume"),
        ("train --overwrite --config c.yaml", "strop train --config c.yaml --resume"),
        ("train --resume --config c.yaml", "strop train --config c.yaml --resume"),
        ("train --resume a/b --config c.yaml --bf16", "strop train --config c.yaml --bf16 --resume"),
        ("train --resume=a/b --config c.yaml", "strop train --config c.yaml --resume"),
        ("train c.yaml", "strop train c.yaml --resume"),
        ("train --seed 3 c.yaml --resume a/b", "strop train --seed 3 c.yaml --resume"),
        ("train --bf16 --resume c.yaml", "strop train --bf16 c.yaml --resume"),
        ("train --overwrite c.yaml", "strop train c.yaml --resume"),
        ("train --config c.yaml --split train[:10%]", "strop train --config c.yaml --split 'train[:10%]' --resume"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(
    config: Path, calls: Calls, capsys: pytest.CaptureFixture[str], line: str, again: str
) -> None:
    calls.error = Interrupted(7, "outputs/a/checkpoint-7")
    assert cli.main(line.split()) == 75
    printed = capsys.readouterr().err
    assert "stopped after step 7" in printed
    assert "outputs/a/checkpoint-7" in printed
    assert printed.endswith(f"go on with: {again}\n")
    calls.error = None
    assert cli.main(again.replace("'", "").split()[1:]) == 0  # what it says works
    assert calls[-1][2]["resume"] == "auto"


@pytest.mark.parametrize("given", ["--finetuning.stop-on drift", "--stop-on=drift", "--finetuning.stop_on=drift"])
def test_the_way_on_after_a_finding_names_the_key_once(
    given: str, config: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.error = StoppedByFinding(7, "outputs/a/checkpoint-7", "drift", "it drifts")
    assert cli.main(["train", *given.split(), "--config", "c.yaml"]) == 3
    way_on = capsys.readouterr().err.partition("all the same: strop ")[2].strip()
    assert way_on == "train --config c.yaml --resume --finetuning.stop-on '[]'"
    calls.error = None
    assert cli.main(way_on.replace("'", "").split()) == 0


@pytest.mark.parametrize("command", ["convert --to consolidated SRC", "prepare --input SRC"])
def test_a_folder_of_the_home_directory(
    command: str, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell leaves the ~ of --output-dir=~/models as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "completion": "a"}\n' * 2)
    (tmp_path / "taken").write_text("")
    source = str(model_dir if "convert" in command else rows)
    assert cli.main([*command.replace("SRC", source).split(), "--output-dir=~/taken"]) == 1
    assert str(tmp_path / "taken") in capsys.readouterr().err


def test_the_way_on_names_the_program(
    config: Path, calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls.error = Interrupted(7, "x")
    assert cli.main(["train", "--config", "c.yaml"], prog="python scripts/train.py") == 75
    assert capsys.readouterr().err.endswith("python scripts/train.py --config c.yaml --resume\n")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert cli.main(["train", "--config", "c.yaml"], prog="python -m strop") == 75
    assert "the same torchrun command" in capsys.readouterr().err


def test_control_c_before_anything_is_saved(
    config: Path, calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["strop.training"], "train", stop)
    assert cli.main(["train", "--config", "c.yaml"]) == 130
    assert "Traceback" not in capsys.readouterr().err


# ---- the terminal


def test_the_logger_follows_log_level(config: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    def speak() -> None:
        assert logging.getLogger("transformers").level == logging.ERROR
        log = logging.getLogger("strop")
        log.info("hello")
        log.warning("careful")
        log.debug("hidden")

    calls.work = speak
    for _ in range(2):
        assert cli.main(["train", "--config", "c.yaml"]) == 0
        assert capsys.readouterr() == ("", "hello\nwarning: careful\n")
    assert cli.main(["train", "--config", "c.yaml", "--log-level", "error"]) == 0
    assert capsys.readouterr().err == ""


def test_of_several_processes_the_first_one_speaks(
    config: Path, calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("strop.cli.entry.SECONDS_TO_SPEAK", 0.0)
    calls.work = lambda: logging.getLogger("strop").warning("careful")
    assert cli.main(["train", "--config", "c.yaml"]) == 0
    assert cli.main(["train", "--config", "c.yaml", "--num-epochs", "0"]) == 1
    assert capsys.readouterr().err == "", "rank 0 speaks"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["train", "--config", "c.yaml", "--num-epochs", "0"]) == 1
    assert capsys.readouterr().err.startswith("[rank 1] --num-epochs"), "the first one of another machine"


def test_a_broken_connection_is_said_where_the_launcher_has_nothing_to_say(
    config: Path, calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("strop.cli.entry.SECONDS_TO_SPEAK", 0.0)
    calls.error = LostError("process 0 has lost the others: NCCL error")
    assert cli.main(["train", "--config", "c.yaml"]) == 1
    assert "NCCL error" in capsys.readouterr().err
    calls.error = GoneError("process 1 of 2 is gone")
    assert cli.main(["train", "--config", "c.yaml"]) == 1
    assert capsys.readouterr().err == "", "the launcher says it"


# ---- help


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    top = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  {command} " in top
        assert cli.main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: strop {command}")
    assert cli.main(["--version"]) == 0


def test_every_command_is_in_the_table() -> None:
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py") if "\ndef run(" in path.read_text("utf-8")}
    assert modules == {command.module for command in cli.COMMANDS.values()}


def test_the_help_of_train_explains_layers_and_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    from strop.config.schema import KEYS

    cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert "built-in defaults  <  preset  <  configuration file  <  command line" in text
    for flag in ("--config", "--preset", "--dry-run", "--model-index", "--resume", "--overwrite", "--allow-changes"):
        assert f"  {flag}" in text
    for key in KEYS:
        assert f"  --{key.name.replace('_', '-')}  (" in text or f"  --{key.dotted.replace('.N.', '.0.')}  (" in text


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options)


def test_the_help_answers_at_once() -> None:
    best = min(_processor_seconds("-m", "strop", "--help") for _ in range(3))
    assert best < 0.5


def _processor_seconds(*arguments: str) -> float:
    """Of a command, whatever else the machine does."""
    start = os.times()
    assert run(*arguments).returncode == 0
    end = os.times()
    return end.children_user + end.children_system - start.children_user - start.children_system


@pytest.mark.nightly
def test_three_roads_to_the_same_place(tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "train.py")
    answers = [
        run("-m", "strop", "train", "--config", "none.yaml", cwd=tmp_path),
        run(script, "--config", "none.yaml", cwd=tmp_path),
        run(
            "-c", "from strop.cli import main; raise SystemExit(main(['train', '--config', 'none.yaml']))", cwd=tmp_path
        ),
    ]
    assert {answer.returncode for answer in answers} == {1}
    assert len({answer.stderr for answer in answers}) == 1
    assert answers[0].stderr.startswith("none.yaml: ")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m strop schema | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_the_caller_gets_the_loggers_back(calls: Calls, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)

    def state() -> list[Any]:
        loggers = map(logging.getLogger, ("strop", "transformers", "peft"))
        return [os.environ.get("TRANSFORMERS_VERBOSITY"), *[(x.level, list(x.handlers)) for x in loggers]]

    before = state()
    assert cli.main(["train", "--config", str(config)]) == 0
    calls.error = DataError("no")
    assert cli.main(["train", "--config", str(config)]) == 1
    assert state() == before


class Panic(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize("error", [AttributeError("half imported"), Panic(), ConfigError("it cannot be read")])
def test_ctrl_c_that_a_library_makes_an_error_of_its_own_of_is_ctrl_c(
    error: BaseException, calls: Calls, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise error from None

    calls.work = interrupted
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["train", "--config", str(config)]) == 130
    assert capsys.readouterr().err.startswith("stopped; what is in no checkpoint is lost\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_that_python_drops_is_heard_when_training_begins(calls: Calls, config: Path) -> None:
    def dropped() -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        with StopSignal():
            raise AssertionError("it trains")

    calls.work = dropped
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["train", "--config", str(config)]) == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_without_ctrl_c_is_no_ctrl_c(calls: Calls, config: Path) -> None:
    calls.error = AttributeError("a fault")
    with pytest.raises(AttributeError, match="a fault"):
        cli.main(["train", "--config", str(config)])
