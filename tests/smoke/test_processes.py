"""Whole runs in several processes: the losses, margins and weights of one process, and one run folder."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import strop
from commands import Command
from processes import in_processes, start_processes
from same_runs import CUT, FULL, KINDS, LORA, RELATIVE, assert_close, assert_same_run, in_many, train
from strop import RunConfig, heartbeat
from strop.config import to_yaml
from strop.engine import agreement
from strop.engine.loop import Loop
from strop.errors import CheckpointError, ConfigError, LostError, PeerError, TrainingError
from strop.launch import launch
from strop.policy.policy import Policy
from strop.rundir import RunDir


def assert_says_each_device(lines: list[dict[str, Any]], processes: list[dict[str, Any]]) -> None:
    """Name and memory of every device in the first line, peaks in every one."""
    first, *others = [line for line in lines if line["split"] == "train"]
    for rank, process in enumerate(processes):
        assert {name: first[f"{name}/rank_{rank}"] for name in process} == process
        assert process["device"] and process["memory_gib"] > 0
    for line in (first, *others):
        peaks = [line[f"peak_memory_gib/rank_{rank}"] for rank in range(len(processes))]
        assert line["peak_memory_gib"] == max(peaks) and all(peak > 0 for peak in peaks)
    assert not any(name.startswith("device/") for line in others for name in line)


OFTEN = {"sft full 2", "dpo lora 3", "kto_pair full 2", "kto lora 2"}
"""What the suite runs: losses that need nothing of other rows, and all that do; `make nightly` runs all. The step of
the others is compared in tests/invariance/test_step.py."""


def _cases() -> Iterator[Any]:
    for kind, (what, keys), size in product(KINDS, (("full", FULL), ("lora", LORA)), (2, 3)):
        name = f"{kind} {what} {size}"
        yield pytest.param(kind, keys, size, id=name, marks=() if name in OFTEN else pytest.mark.nightly)


@pytest.mark.share(1)
@pytest.mark.parametrize(("kind", "keys", "size"), list(_cases()))
def test_the_run_of_several_processes_is_that_of_one(kind: str, keys: dict[str, Any], size: int, runs: Any) -> None:
    settings = {**KINDS[kind], **keys, **CUT}
    alone = runs(settings)
    many = runs.at(in_many(size, runs.config(settings)))
    assert_same_run(alone, many)
    environment = json.loads((many.path / "environment.json").read_text())
    assert environment["world_size"] == size == len(environment["processes"])
    assert_says_each_device(many.metrics, environment["processes"])


def test_a_run_goes_on_in_another_number_of_processes(runs: Any, tmp_path: Path) -> None:
    """2 -> 1 -> 3: the steps that follow are those of one unbroken run in one process."""
    settings = {**LORA, **CUT, "training.max_steps": 6, "training.save_steps": 2, "training.save_total_limit": None}
    settings |= {"finetuning.load_best_model_at_end": True, "finetuning.metric_for_best_model": "eval_loss"}
    alone = runs({**settings, "training.groups_per_step": 4})
    two = {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 2}
    begun = in_many(2, runs.config({**settings, **two}))
    assert runs.at(begun).config["training"]["groups_per_step"] == 4, "1 per device x 2 x 2 processes"
    then = Path(train(runs.config({**settings, **two}), resume=str(begun / "checkpoint-2"))[0])
    last = in_many(3, runs.config({**settings, **two}), str(then / "checkpoint-4"))
    assert_same_run(alone, runs.at(begun))
    for run, first in ((runs.at(then), 3), (runs.at(last), 5)):
        assert run.steps() == list(range(first, 7))
        assert run.series("loss") == pytest.approx(alone.series("loss")[first - 1 :], rel=RELATIVE)
        assert_close(alone.final, run.final)


@pytest.mark.nightly
def test_a_run_in_several_processes_is_resumed_and_finished_once(runs: Any) -> None:
    """Every step stands once in its files, and what is finished says so in all processes."""
    keys = {**CUT, "training.save_steps": 2}
    config = runs.config(keys)
    run = runs.at(in_many(2, config))
    before = run.final
    (run.path / "final").rename(run.path / "elsewhere")
    assert in_many(2, config, "auto") == run.path
    assert run.steps() == [1, 2, 3, 4] and [line["global_step"] for line in run.margins] == [1, 2, 3, 4]
    assert runs.same(before, run.final)
    assert in_many(2, config, "auto") == run.path, "finished: nothing is trained"
    with pytest.raises(CheckpointError, match="holds another run"):
        in_many(2, config)


def _train_in(folders: list[Path], config: RunConfig, settings: Mapping[str, Any]) -> str:
    """Each process in its own folder, the second with its own settings, too: what each says in the end."""
    rank = int(os.environ["RANK"])
    os.chdir(folders[rank])
    try:
        strop.train(config.with_values(settings, "test") if rank else config)
    except (ConfigError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("differs", "settings", "main_says", "other_says"),
    [
        ("settings", {"training.learning_rate": 0.5}, "ConfigError: process 1 on", "the configuration of the run"),
        ("rows", {}, "ConfigError: process 1 on", "the rows (training or validation groups)"),
        ("weights", {}, "ConfigError: process 1 on", "the weights that the run begins with"),
        ("no file", {}, "PeerError: process 1 of 2 failed", "rows.jsonl"),
    ],
)
def test_processes_that_do_not_train_the_same_are_refused(
    differs: str, settings: dict[str, Any], main_says: str, other_says: str, runs: Any, tmp_path: Path
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for at, folder in enumerate(folders):
        folder.mkdir()
        rows = runs.files["pairs"].read_text()
        other = at == 1 and differs
        (folder / "model").symlink_to(runs.files["other" if other == "weights" else "model"])
        if other != "no file":
            (folder / "rows.jsonl").write_text(rows.replace("maybe", "perhaps") if other == "rows" else rows)
    keys = {"models.0.huggingface_id": "model", "dataset.train_file": "rows.jsonl"}
    main, other = in_processes(2, _train_in, folders, runs.config({**CUT, **keys}), settings)
    assert main.startswith(main_says) and other_says in main
    assert other.startswith(("PeerError", "ConfigError"))


@pytest.mark.nightly
def test_only_rank_0_needs_the_run_folder(runs: Any, tmp_path: Path) -> None:
    """As on two machines without a shared disk: begun, resumed, and with the weights of the best evaluation."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    keys = {**CUT, "training.output_dir": "out", "training.save_steps": 2, "finetuning.load_best_model_at_end": True}
    config = runs.config({**keys, "finetuning.resume_from_checkpoint": "auto"})
    assert in_processes(2, _train_in, folders, config, {}) == ["trained", "trained"]
    run = runs.at(folders[0] / "out" / "run")
    before = run.final
    (run.path / "final").rename(run.path / "elsewhere")
    assert in_processes(2, _train_in, folders, config, {}) == ["trained", "trained"]
    assert runs.same(before, run.final) and run.steps() == [1, 2, 3, 4]
    assert not list(folders[1].iterdir())


def launched(folder: Path, config: RunConfig, *flags: str) -> subprocess.Popen[str]:
    """`strop train` of this configuration, which starts processes by itself."""
    line, environment = _line(folder, config, flags)
    command = [sys.executable, "-m", "strop", *line]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def forked(folder: Path, config: RunConfig, *flags: str) -> Command:
    """The same in processes that need not import everything first."""
    line, environment = _line(folder, config, flags)
    return Command(line, folder / f"said{len(flags)}", environment)


def _line(folder: Path, config: RunConfig, flags: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text(to_yaml(config))
    return ["train", str(folder / "c.yaml"), *flags], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.nightly
def test_processes_are_started_by_a_python_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    """Which the other tests that launch in the suite do without, for it takes seconds to import what a run needs."""
    log = logging.getLogger("torch.distributed")
    level = log.level
    try:
        assert launch(["--version"], 2) == 0
        assert capfd.readouterr().out.split().count(version("strop")) == 2
        assert launch(["train", "no-such.yaml"], 2) == 1
        assert "no-such.yaml" in capfd.readouterr().err
    finally:
        log.setLevel(level)


@pytest.mark.parametrize("start", [forked, pytest.param(launched, marks=pytest.mark.nightly)], ids=lambda f: f.__name__)
def test_sigterm_to_the_launcher_saves_once_and_says_how_to_go_on(
    start: Callable[..., Any], runs: Any, tmp_path: Path
) -> None:
    endless = {"training.max_steps": 100_000, "training.save_steps": 2, "training.eval_at_start": False}
    config = runs.config({**CUT, **endless, "gpu.num_processes": 2})
    process = start(tmp_path, config)
    run = Path(config.training.output_dir) / "run"
    deadline = time.monotonic() + 120
    while not any(run.glob("checkpoint-*/MANIFEST.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 75, said
    assert said.count("stopped after step") == 1 and "--resume" in said and "Traceback" not in said
    assert said.count("SIGTERM: ") == 1, "told once"
    steps = runs.at(run).steps()
    assert steps == list(range(1, len(steps) + 1)) and runs.at(run).checkpoints[-1] == len(steps)


@pytest.mark.parametrize("start", [forked, pytest.param(launched, marks=pytest.mark.nightly)], ids=lambda f: f.__name__)
def test_a_mistake_is_said_once(start: Callable[..., Any], runs: Any, tmp_path: Path) -> None:
    """By the process that speaks, though all of them meet it."""
    keys = {**CUT, "gpu.num_processes": 2, "training.on_nonfinite": "stop", "training.learning_rate": 1e30}
    process = start(tmp_path, runs.config(keys))
    _, said = process.communicate(timeout=100)
    assert process.returncode == 1, said
    assert said.count("finite") >= 1 and said.count("to do:") == 1 and "Traceback" not in said


LONG = {**CUT, "training.max_steps": 40, "training.save_steps": 2, "training.eval_steps": 1000}


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process, of those that a launcher has started."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        told = dict(x.split("=", 1) for x in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in x)
        if "RANK" in told:
            found[int(told["RANK"])] = int(pid)
    return found


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(done: Callable[[], bool], what: str, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="it looks for processes in /proc")
@pytest.mark.parametrize(
    ("victims", "start"),
    [
        ("rank 1", forked),
        *(pytest.param(v, launched, marks=pytest.mark.nightly) for v in ("rank 0", "rank 1", "launcher", "all")),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_whatever_is_killed_the_same_command_goes_on(
    victims: str, start: Callable[..., Any], runs: Any, tmp_path: Path
) -> None:
    """All processes end, with one message that names the one that was killed, and the result is the unbroken run's."""
    whole = runs.config({**LONG, "training.save_steps": 1000, "gpu.num_processes": 2})
    started = start(tmp_path / "unbroken", whole)  # as the other is: its processes have as many threads
    _, said = started.communicate(timeout=200)
    assert started.returncode == 0, said
    unbroken = runs.at(Path(whole.training.output_dir) / "run")
    config = runs.config({**LONG, "gpu.num_processes": 2})
    process = start(tmp_path, config)
    run = Path(config.training.output_dir) / "run"
    wait_until(lambda: any(run.glob("checkpoint-*/MANIFEST.json")), "a checkpoint")
    ranks = process.ranks() if isinstance(process, Command) else ranks_of(process.pid)
    assert sorted(ranks) == [0, 1]
    targets = {"launcher": [process.pid], "all": [process.pid, *ranks.values()]}
    for pid in targets.get(victims) or [ranks[int(victims[-1])]]:
        os.kill(pid, signal.SIGKILL)
    _, said = process.communicate(timeout=100)
    wait_until(lambda: not any(map(is_alive, ranks.values())), "all have ended", 60)
    assert process.returncode != 0
    if victims.startswith("rank"):
        assert process.returncode == 128 + signal.SIGKILL
        assert said.count("to do:") == 1 and "Traceback" not in said, said
        assert f"process {victims[-1]} of 2 was killed by SIGKILL" in said and "last did: " in said
    resumed = start(tmp_path, config, "--resume")
    _, said = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, said
    assert runs.at(run).series("step") == list(range(1, 41))
    assert runs.same(unbroken.final, runs.at(run).final), "bit for bit"


def _hang_in_rank_1(config: RunConfig, limit_seconds: float, said: Path) -> None:
    """It stops in the third step, and does not even beat any more."""
    heartbeat.LIMIT_SECONDS = limit_seconds
    os.dup2(os.open(f"{said}-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT), 2)
    step = Loop.step

    def stops(loop: Loop, number: int) -> None:
        if loop.world.rank == 1 and number == 3:
            loop.world.doing("step 3")
            time.sleep(2 * heartbeat.BEAT_SECONDS)
            os.kill(os.getpid(), signal.SIGSTOP)
        step(loop, number)

    Loop.step = stops  # type: ignore[method-assign]
    strop.train(config)


@pytest.mark.nightly
def test_a_process_that_hangs_ends_all(runs: Any, tmp_path: Path) -> None:
    started = start_processes(2, _hang_in_rank_1, runs.config(CUT), 4.0, tmp_path / "said")
    main, other = (process for process, _ in started)
    main.join(100)
    other.kill()
    assert main.exitcode == 1
    said = (tmp_path / "said-0").read_text()
    assert "process 1 of 2 hangs. It (pid" in said and "last did: step 3" in said and said.count("to do:") == 1


def _die_at_once(config: RunConfig, doomed: int, said: Path) -> None:
    heartbeat.BEAT_SECONDS, heartbeat.BEGIN_SECONDS = 0.1, 1.0
    if os.environ["RANK"] == str(doomed):
        os.kill(os.getpid(), signal.SIGKILL)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    strop.train(config)


@pytest.mark.parametrize("doomed", [0, 1])
def test_a_process_that_dies_before_it_says_anything_ends_all(doomed: int, runs: Any, tmp_path: Path) -> None:
    """Here no launcher ends the others, which wait for it as they connect."""
    other, _ = start_processes(2, _die_at_once, runs.config(CUT), doomed, tmp_path / "said")[1 - doomed]
    other.join(100)
    assert other.exitcode == 1
    said = (tmp_path / "said").read_text()
    assert f"process {doomed} of 2 has not begun within 1 seconds" in said and said.count("to do:") == 1


def _die_in_rank_1(config: RunConfig, keys: dict[str, Any]) -> None:
    """It is killed in the third step; the other one notices soon."""
    heartbeat.BEAT_SECONDS, heartbeat.GONE_SECONDS = 0.1, 0.4
    step = Loop.step

    def dies(loop: Loop, number: int) -> None:
        if loop.world.rank == 1 and number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        step(loop, number)

    Loop.step = dies  # type: ignore[method-assign]
    strop.train(config, **keys)


def _restarted(config: RunConfig, keys: dict[str, Any]) -> list[Path]:
    if os.environ["RANK"] == "1":  # the agent of the machine whose process failed counts
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return [result.run_dir for result in strop.train(config, **keys)]


@pytest.mark.nightly
@pytest.mark.parametrize("keys", [pytest.param({}, marks=pytest.mark.nightly), {"overwrite": True}], ids=str)
def test_an_attempt_that_torchrun_restarts_goes_on_by_itself(keys: dict[str, Any], runs: Any) -> None:
    """From the newest whole checkpoint, and it overwrites nothing of the attempt before."""
    unbroken = runs(CUT)
    config = runs.config({**CUT, "training.save_steps": 1})
    main, other = start_processes(2, _die_in_rank_1, config, keys)
    assert main[1].poll(60) and isinstance(main[1].recv(), LostError)
    for process, _ in (main, other):
        process.join(60)
    assert other[0].exitcode == -signal.SIGKILL
    run = runs.at(Path(config.training.output_dir) / "run")
    assert run.steps() == [1, 2]
    failure = run.path / "failure.json"
    assert "process 1 of 2 is gone" in json.loads(failure.read_text())["error"] and (run.path / "report.html").exists()
    in_processes(2, _restarted, config, keys)
    assert not failure.exists()
    assert run.series("loss") == pytest.approx(unbroken.series("loss"), rel=RELATIVE) and run.steps() == [1, 2, 3, 4]
    assert_close(unbroken.final, run.final)
    assert json.loads((run.path / "environment.json").read_text())["resumes"][0]["after_step"] == 2


@pytest.mark.nightly
def test_torchrun_restarts_a_killed_process(runs: Any, tmp_path: Path) -> None:
    """Its own agent, which starts all processes again."""
    unbroken = runs.at(in_many(2, runs.config(LONG)))
    config = runs.config(LONG)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    agent = subprocess.Popen([*command, "-m", "strop", "train", str(tmp_path / "c.yaml")], stderr=subprocess.PIPE)
    run = Path(config.training.output_dir) / "run"
    wait_until(lambda: any(run.glob("checkpoint-*/MANIFEST.json")), "a checkpoint")
    os.kill(ranks_of(agent.pid)[1], signal.SIGKILL)
    said = agent.communicate(timeout=300)[1].decode()
    assert agent.returncode == 0 and "restarted by torchrun" in said, said
    assert runs.at(run).steps() == list(range(1, 41)) and runs.same(unbroken.final, runs.at(run).final)


def _poisoned_in_rank_1(config: RunConfig, what: str) -> tuple[str, str]:
    """The loss or a gradient of its first micro-batch of step 2 is not finite. What became of it, and the weights."""
    forward = Policy.forward
    digests, num_passes = [], 0
    step = Loop.step

    def stepping(loop: Loop, number: int) -> None:
        digests.append(loop.digest.of(loop.digest.sample()))
        nonlocal num_passes
        num_passes = 0
        step(loop, number)

    def poisoned(policy: Policy, batch: Any) -> Any:
        nonlocal num_passes
        scored = forward(policy, batch)
        if not torch.is_grad_enabled():
            return scored
        num_passes += 1
        if os.environ["RANK"] == "1" and len(digests) == 2 and num_passes == 1:
            if what == "loss":
                return scored._replace(logps=scored.logps * torch.nan)
            scored.logps.register_hook(lambda gradient: gradient * torch.inf)
        return scored

    Loop.step, Policy.forward = stepping, poisoned  # type: ignore[assignment, method-assign]
    ended = "trained"
    try:
        strop.train(config)
    except (TrainingError, PeerError) as error:
        ended = f"{type(error).__name__}: {error}"
    return ended, digests[-1]


@pytest.mark.parametrize("what", ["loss", pytest.param("gradient", marks=pytest.mark.nightly)])
def test_what_is_not_finite_in_one_process_stops_all(what: str, runs: Any) -> None:
    """Before the update, with the step and the rows; no checkpoint of it is left."""
    config = runs.config({**CUT, "training.save_steps": 1})
    found = in_processes(2, _poisoned_in_rank_1, config, what)
    run = runs.at(Path(config.training.output_dir) / "run")
    (main, weights), (other, there) = found
    assert main.startswith("TrainingError: step 2: ") and "the weights were not updated. Rows: " in main
    assert other.startswith("PeerError: process 0 says what is wrong: step 2: ") and weights == there
    assert run.checkpoints == [1] and run.steps() == [1]


def _refusal(config: RunConfig) -> str:
    try:
        strop.train(config)
    except (CheckpointError, ConfigError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_a_second_launch_in_one_folder_is_refused_in_every_process(runs: Any) -> None:
    config = runs.config(CUT)
    with RunDir.open(Path(config.training.output_dir) / "run", resume=False, overwrite=False):
        refused = in_processes(2, _refusal, config)
    for rank, said in enumerate(refused):
        assert said.startswith("PeerError: process 0" if rank else "CheckpointError: ")
        assert f"another run is using the folder: process {os.getpid()} on host " in said


def _with_other_version(config: RunConfig, package: str) -> str:
    real = agreement.installed_version
    if os.environ["RANK"] == "1":
        agreement.installed_version = lambda name: "0.0.1" if name == package else real(name)  # type: ignore[assignment]
    return _refusal(config)


@pytest.mark.share(1)
@pytest.mark.parametrize("package", ["strop", "torch"])
def test_other_versions_on_another_machine_are_refused(package: str, runs: Any) -> None:
    refused = in_processes(2, _with_other_version, runs.config(CUT), package)
    assert all(text.startswith(("ConfigError: process 1 on", "PeerError")) for text in refused)
    assert f"{package}: {version(package)} in process 0, 0.0.1 there" in refused[0]


@pytest.mark.nightly
def test_torchrun_on_two_machines(runs: Any, tmp_path: Path) -> None:
    """Two of its agents, which find each other by an address."""
    config = runs.config({**CUT, "gpu.num_processes": 1})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "-m", "strop", "train"]
    agents = [
        subprocess.Popen([*command, str(tmp_path / "c.yaml")], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [agent.communicate(timeout=200)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("the model of step 4 is in" in text for text in said) == 1, "rank 0 speaks"
    assert_same_run(runs(CUT), runs.at(Path(config.training.output_dir) / "run"))
