"""Every key of `gpu`, `finetuning`, `logging` and the top arrives where it acts: `test_{section}__{key}`.

The other sections stand in the other files test_keys_*.py; keys of one thing alone stand with it (test_vllm.py).
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import strop
from strop import cli, preflight, session
from strop.config.schema import KEYS
from strop.engine import loop
from strop.errors import CheckpointError, ConfigError, StoppedByFinding, StropError
from strop.trackers import open_trackers
from strop.trackers.tracker import RunFacts

WORSE = {"method": "sft", "greater_is_better": True, "eval_steps": 1, "max_steps": 6}
"""The loss falls and higher counts as better: the first evaluation is the best, and every later one is worse."""


# ---- the top


@pytest.mark.nightly
def test_top__seed(runs: Any) -> None:
    keys = {"r": 2, "lora_dropout": 0.3}
    one, again, other = runs(keys, seed=1), runs(keys, seed=1, fresh=True), runs(keys, seed=2)
    assert runs.same(one.final, again.final) and one.untimed == again.untimed
    assert not runs.same(one.final, other.final)
    first, second = runs.prepare(seed=1), runs.prepare(seed=2)
    assert {g.origin.line for g in first.data.eval} != {g.origin.line for g in second.data.eval}
    assert first.plan.groups(1) != second.plan.groups(1)
    starts = [runs.policy(keys, seed=seed).trainable() for seed in (1, 1, 2)]
    assert runs.same(starts[0], starts[1]) and not runs.same(starts[0], starts[2])


# ---- gpu


@pytest.fixture
def two_gpus(watched: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine that seems to have two GPUs, and stops when the policy is to be built; the devices it was asked for."""
    asked: list[torch.device] = []

    def build(config: Any, model: Any, device: torch.device, **_: Any) -> None:
        asked.append(device)
        raise StropError("enough seen")

    watched.setattr(torch.cuda, "is_available", lambda: True)
    watched.setattr(torch.cuda, "device_count", lambda: 2)
    watched.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    watched.setattr(session, "build_policy", build)
    return asked


def test_gpu__device_ids(runs: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert runs(device_ids=[0, 1], max_steps=1).steps() == [1]
    assert "gpu.device_ids [0, 1]: this machine has no GPU; training on its CPU" in caplog.text


def test_gpu__device_ids_on_gpus(runs: Any, two_gpus: list[torch.device], watched: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    watched.setattr(torch.cuda, "set_device", current.append)
    watched.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for ids in (None, [0], [1]):
        with pytest.raises(StropError, match="enough seen"):
            runs(device_ids=ids)
    assert [device.index for device in two_gpus] == [0, 0, 1] and current == two_gpus
    for ids, words in (([2], "device 2 is not there"), ([0, 1], "asks for 2 processes")):
        with pytest.raises(ConfigError, match=words):
            runs(device_ids=ids)


def test_gpu__use_ddp(runs: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert runs(use_ddp=True, max_steps=1).steps() == [1]
    assert "gpu.use_ddp true: this machine has no GPU" in caplog.text


def test_gpu__use_ddp_on_gpus(runs: Any, two_gpus: list[torch.device]) -> None:
    with pytest.raises(ConfigError, match="asks for 2 processes, and this is one"):
        runs(use_ddp=True)
    assert two_gpus == []


def test_gpu__fsdp(runs: Any, two_gpus: list[torch.device]) -> None:
    """What it does: `test_sharded_runs.py`."""
    with pytest.raises(ConfigError, match="asks for 2 processes, and this is one"):
        runs(fsdp=True)
    assert two_gpus == []


def test_gpu__shard_size(runs: Any) -> None:
    with pytest.raises(ConfigError, match="shard_size is 2, and nothing is sharded"):
        runs(shard_size=2)


def test_gpu__num_processes(runs: Any, two_gpus: list[torch.device]) -> None:
    """By the command line it starts them: `test_processes.py`."""
    for count, words in ((2, "asks for 2 processes, and this is one"), (3, "asks for 3 processes")):
        with pytest.raises(ConfigError, match=words):
            runs(num_processes=count)
    with pytest.raises(ConfigError, match="device_ids names 2 devices"):
        runs(num_processes=3, device_ids=[0, 1])
    assert two_gpus == []


# ---- finetuning


class Died(BaseException):
    """Stands for kill -9."""


def die_at(step: int, monkeypatch: pytest.MonkeyPatch, runs: Any, **keys: Any) -> None:
    unbroken = loop.Loop.step

    def die(self: loop.Loop, number: int) -> None:
        if number == step:
            raise Died
        unbroken(self, number)

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(loop.Loop, "step", die)
        runs(keys, fresh=True)


@pytest.mark.nightly
def test_finetuning__resume_from_checkpoint(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"save_steps": 1, "load_best_model_at_end": True, "output_dir": str(tmp_path)}
    unbroken = runs({**keys, "output_dir": str(runs.new_folder())})
    caplog.set_level("INFO", "strop")
    die_at(4, monkeypatch, runs, **keys)
    elsewhere = str(runs.new_folder())
    for resume, folder in (("auto", str(tmp_path)), (str(tmp_path / "run" / "checkpoint-2"), elsewhere)):
        caplog.clear()
        run = runs({**keys, "output_dir": folder, "resume_from_checkpoint": resume})
        assert runs.same(run.final, unbroken.final)
        assert run.steps() == ([1, 2, 3, 4] if resume == "auto" else [3, 4])
    with pytest.raises(CheckpointError, match="no such folder"):
        runs(resume_from_checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.nightly
def test_finetuning__load_best_model_at_end(runs: Any) -> None:
    best, last = (runs(WORSE, load_best_model_at_end=wanted) for wanted in (True, False))
    losses = best.series("loss", "eval")
    assert losses[1] == max(losses[1:])
    assert best.checkpoints == [1, 6]
    assert runs.same(best.final, best.weights(1))
    assert last.checkpoints == [6] and not runs.same(last.final, best.final)
    with pytest.raises(ConfigError, match="no validation rows"):
        runs(load_best_model_at_end=True, validation_split=0)


@pytest.mark.nightly
def test_finetuning__metric_for_best_model(runs: Any) -> None:
    keys = {"load_best_model_at_end": True, "greater_is_better": None}
    for name, best in (("eval_loss", 4), ("rewards/margins", 4), ("eval_lengths/chosen", 2), ("lengths/chosen", 2)):
        run = runs(keys, metric_for_best_model=name)  # lengths never change: the first one stays the best
        assert best in run.checkpoints
        assert runs.same(run.final, run.weights(best))


def test_finetuning__metric_for_best_model_that_is_none(runs: Any, forwards: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"no evaluation has a metric 'rewards/margin'") as refused:
        runs(load_best_model_at_end=True, metric_for_best_model="eval_rewards/margin")
    assert "rewards/margins" in refused.value.expected
    assert not any(with_gradients for with_gradients, _ in forwards)  # said before anything is trained


@pytest.mark.nightly
def test_finetuning__greater_is_better(runs: Any) -> None:
    loss, margin = "eval_loss", "rewards/margins"  # the loss falls and the margin rises
    for name, given, best in ((loss, None, 4), (loss, True, 2), (margin, None, 4), (margin, False, 2)):
        run = runs(load_best_model_at_end=True, greater_is_better=given, metric_for_best_model=name)
        assert run.config["finetuning"]["greater_is_better"] is (name == margin if given is None else given)
        assert runs.same(run.final, run.weights(best))


@pytest.mark.nightly
def test_finetuning__early_stopping_patience(runs: Any) -> None:
    for patience, last in ((1, 2), (3, 4), (None, 6)):
        run = runs(WORSE, early_stopping_patience=patience)
        assert run.steps()[-1] == run.steps("eval")[-1] == last
    with pytest.raises(ConfigError, match="no validation rows"):
        runs(early_stopping_patience=2, validation_split=0)


@pytest.mark.nightly
def test_finetuning__sample_prompts(runs: Any) -> None:
    lines = runs(sample_prompts=2, max_steps=1).path / "samples.jsonl"
    assert [json.loads(line)["step"] for line in lines.read_text().splitlines()] == [0, 0, 1, 1]


def test_finetuning__sample_max_new_tokens(runs: Any) -> None:
    lines = runs(sample_prompts=2, sample_max_new_tokens=1, max_steps=1).path / "samples.jsonl"
    assert {json.loads(line)["tokens"] for line in lines.read_text().splitlines()} == {1}


@pytest.mark.nightly
def test_finetuning__score_samples(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("def seven(completions):\n    return [7] * len(completions)\n")
    run = runs(sample_prompts=2, score_samples=f"{tmp_path}/score.py:seven", max_steps=1)
    assert run.series("samples/score", "eval") == [7, 7] and run.series("samples/win_rate", "eval") == [0.5, 0.5]


# ---- logging


def test_logging__report_to(runs: Any) -> None:
    run = runs(report_to=["tensorboard"])
    events = EventAccumulator(str(run.path / "logs" / "tensorboard"))
    events.Reload()
    for split in ("train", "eval"):
        points = [(event.step, event.value) for event in events.Scalars(f"{split}/loss")]
        assert [step for step, _ in points] == run.steps(split)
        assert [value for _, value in points] == pytest.approx(run.series("loss", split))
    assert not (runs().path / "logs" / "tensorboard").exists()
    for name in ("neptune", "all"):
        with pytest.raises(ConfigError, match="tensorboard"):
            runs.config(report_to=[name])


@pytest.fixture
def told(watched: pytest.MonkeyPatch) -> list[RunFacts]:
    """What trackers are told of a run; none of them starts."""
    found: list[RunFacts] = []

    def start(facts: RunFacts) -> Any:
        found.append(facts)
        raise OSError("enough seen")

    for kind in ("wandb", "mlflow", "trackio"):
        watched.setitem(open_trackers.KINDS, kind, start)
    watched.setattr(preflight, "find_spec", lambda name: name)
    return found


def test_logging__run_name(runs: Any, told: list[RunFacts]) -> None:
    runs(report_to=["wandb"], max_steps=1, fresh=True)
    runs(report_to=["wandb"], max_steps=1, run_name="mine")
    assert (told[0].name, told[-1].name) == ("run", "mine")
    assert told[0].config["training"]["max_steps"] == 1


def check_project(runs: Any, told: list[RunFacts], kind: str, key: str) -> None:
    runs(report_to=[kind], max_steps=1, **{key: "theirs"})
    assert {facts.project for facts in told} == {"theirs"}


def test_logging__wandb_project(runs: Any, told: list[RunFacts]) -> None:
    check_project(runs, told, "wandb", "wandb_project")


def test_logging__mlflow_experiment(runs: Any, told: list[RunFacts]) -> None:
    check_project(runs, told, "mlflow", "mlflow_experiment")


def test_logging__trackio_project(runs: Any, told: list[RunFacts]) -> None:
    check_project(runs, told, "trackio", "trackio_project")


def test_logging__report_to_without_the_package(runs: Any, watched: pytest.MonkeyPatch) -> None:
    watched.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mlflow is not installed[^$]*extra `mlflow`"):
        runs(report_to=["mlflow"])


@pytest.mark.nightly
def test_logging__logging_dir(runs: Any, tmp_path: Path) -> None:
    inside = runs(logging_dir="./elsewhere")
    assert (inside.path / "elsewhere" / "margins" / "margins_log.jsonl").is_file()
    assert not (inside.path / "logs").exists()
    runs(logging_dir=str(tmp_path))  # others may log there too
    assert (tmp_path / "run" / "margins" / "margins_log.jsonl").is_file()


@pytest.mark.nightly
def test_logging__log_level(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for level in ("debug", "info", "warning", "error"):
        (tmp_path / level).write_text(json.dumps(runs.config(log_level=level).model_dump(mode="json")))
        assert cli.main(["train", "--config", str(tmp_path / level)]) == 0
        said[level] = capsys.readouterr().err
    assert "run: the model of step 4 is in" in said["info"]
    assert "train step 4/4" in said["info"]
    assert said["warning"].splitlines() == [line for line in said["info"].splitlines() if line.startswith("warning: ")]
    assert len(said["warning"].splitlines()) == 1  # a high learning rate
    assert said["error"] == ""


def test_logging__margins(runs: Any) -> None:
    assert len(runs().margins) == 4
    off = runs(margins=False)
    assert not (off.path / "logs" / "margins").exists()
    assert runs.same(off.final, runs().final)


@pytest.mark.nightly
def test_finetuning__stop_on(runs: Any) -> None:
    """Weights that leave the reference far behind: how a run stops is in test_stop_on.py."""
    keys = {"learning_rate": 3.0, "max_steps": 40, "eval_steps": 5, "save_steps": 1000}
    with pytest.raises(StoppedByFinding) as stop:
        strop.train(runs.config({**{f"training.{name}": v for name, v in keys.items()}, "stop_on": ["drift"]}))
    assert stop.value.finding == "drift" and stop.value.step < 40


# ---- no key without a test


def test_every_key_has_a_test() -> None:
    names = {
        node.name
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    wanted = {f"test_{key.section or 'top'}__{key.name}" for key in KEYS}
    assert wanted - names == set()
    tested = {name for name in names if name.startswith("test_") and "__" in name}
    assert {name for name in tested if not any(name.startswith(key) for key in wanted)} == set()  # no key is gone


def test_the_published_guide_has_no_other_keys(shared: Path) -> None:
    text = (shared / "seeds" / "001_339f9809704d4f77.txt").read_text()
    found = set()
    for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL):
        for section, content in yaml.safe_load(block).items():
            found |= {(section, key) for key in (content[0] if section == "models" else content)}
    assert len(found) > 50
    assert found <= {(key.section, key.name) for key in KEYS}
