"""What a run does from its first evaluation to the folder it leaves: the road as users meet it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import strop
from strop import cli, session
from strop.engine import loop
from strop.engine.outputs import RunOutputs
from strop.engine.recipe import recipe_of
from strop.engine.validation import Validation
from strop.errors import CheckpointError, ConfigError, DataError, Interrupted, ModelError, StropError, TrainingError
from strop.policy.policy import Policy
from strop.rundir import RunDir
from strop.runfiles import FAILURE

LORA = {"r": 4, "lora_dropout": 0.5}


# ---- evaluations and records


@pytest.mark.share(2)
@pytest.mark.parametrize("keys", [{}, LORA, {"bf16": True}, {"attn_implementation": "sdpa"}], ids=str)
def test_dpo_starts_at_ln_2(keys: dict[str, Any], runs: Any) -> None:
    start = runs(keys).metrics[0]
    assert (start["split"], start["step"], start["epoch"]) == ("eval", 0, 0)
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert {start[f"rewards/{name}"] for name in ("margins", "chosen", "rejected", "accuracies")} == {0}


def test_evaluations_frame_the_training(runs: Any) -> None:
    assert runs(eval_steps=100).steps("eval") == [0, 4]
    assert [(r["split"], r["step"]) for r in runs(max_steps=2, eval_steps=1).metrics] == [
        ("eval", 0), ("train", 1), ("eval", 1), ("train", 2), ("eval", 2),
    ]  # fmt: skip


ALWAYS = {"step", "epoch", "split", "loss", "num_groups", "num_scored_tokens", "seconds"}
TRAIN = {
    "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_memory_gib", "clipped", "update_ratio",
    "changed_fraction", "num_zero_signal_groups", "weights_digest",
}  # fmt: skip
TEXTS = {"split", "weights_digest"}
METHODS = {
    "sft": {"nll", "lengths/completion"},
    "dpo": {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    | {f"{name}/{side}" for name in ("logps", "logps_per_token", "lengths") for side in ("chosen", "rejected")},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_fields_of_a_record(method: str, runs: Any) -> None:
    run, data = runs(method=method), runs.prepare(method=method).data
    for record in run.metrics:
        assert record.keys() == ALWAYS | METHODS[method] | (TRAIN if record["split"] == "train" else set())
        assert all(isinstance(value, int | float) for name, value in record.items() if name not in TEXTS)
    train = [record for record in run.metrics if record["split"] == "train"]
    assert [record["epoch"] for record in train] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])
    assert train[2]["tokens"] == sum(group.num_tokens for group in data.train)  # an epoch
    assert sum(record["num_scored_tokens"] for record in train[:3]) == sum(group.num_scored for group in data.train)
    for growing in ("step", "tokens", "seconds"):
        assert all(a[growing] < b[growing] for a, b in pairwise(train))
    assert all(record["changed_fraction"] > 0 and record["update_ratio"] > 0 for record in train)


def test_the_margins_of_every_step(runs: Any) -> None:
    run = runs(groups_per_step=5, num_epochs=2, max_steps=None)
    assert [(line["epoch"], line["step"], line["global_step"]) for line in run.margins] == [
        (0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 4), (1, 1, 5), (1, 2, 6),
    ]  # fmt: skip
    for line in run.margins:
        values = np.load(run.path / "logs" / "margins" / line["npy"])
        assert line["npy"] == f"epoch_{line['epoch']:03d}/step_{line['step']:05d}.npy"
        assert (values.dtype, values.shape) == (np.float32, (line["batch_size"],))
        wide = values.astype(float)
        wanted = {"mean": wide.mean(), "std": wide.std(ddof=0), "min": wide.min(), "max": wide.max()}
        wanted |= {"p10": np.quantile(wide, 0.1), "median": np.median(wide), "p90": np.quantile(wide, 0.9)}
        wanted |= {"pos_frac": (wide > 0).mean()}
        names = {"epoch", "step", "global_step", "batch_size", "npy", "sample"}
        assert line.keys() == wanted.keys() | names
        assert {name: line[name] for name in wanted} == pytest.approx(wanted)
        assert line["sample"] == values[:8].tolist()
    assert run.margins[-1]["std"] > 0


def test_an_evaluation_that_is_not_finite_is_not_the_best(runs: Any, watched: pytest.MonkeyPatch) -> None:
    scores, num = Validation.scores, 0

    def broken_once(self: Validation, where: str) -> Any:
        nonlocal num
        num += 1
        found = scores(self, where)
        assert found is not None
        return replace(found, terms={t: x * (math.nan if num == 2 else 1) for t, x in found.terms.items()})

    watched.setattr(Validation, "scores", broken_once)
    run = runs(load_best_model_at_end=True, eval_steps=1, max_steps=3)
    assert run.series("loss", "eval")[1] is None
    assert run.checkpoints == [2, 3]


# ---- what is left behind


@pytest.mark.share(1)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("keys", [{"method": "sft"}, {"bf16": True}, LORA], ids=["full", "bf16", "lora"])
def test_final_is_the_policy_for_everybody(
    keys: dict[str, Any], runs: Any, built: list[Policy], logps_by_hand: Callable[..., list[Tensor]]
) -> None:
    final = runs(keys).path / "final"
    (policy,) = built
    base = runs.files["model"] if policy.has_adapters else final
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(plain, final) if policy.has_adapters else plain
    trained = {weight.data_ptr(): name for name, weight in policy.model.named_parameters()}
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[trained[w.data_ptr()]], w) for w in policy.trainable().values())
    tolerance = 0.1 if "bf16" in keys else 1e-4
    with policy.scoring():
        for group in runs.prepare(keys).data.eval:
            by_hand = torch.cat(logps_by_hand(model.eval(), group))
            torch.testing.assert_close(policy(policy.collate([group])).logps.double(), by_hand, rtol=0, atol=tolerance)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False).startswith(
        "<|im_start|>"
    )


@pytest.mark.nightly
@pytest.mark.parametrize(
    "keys", [{"auto_precision": True}, {**LORA, "load_best_model_at_end": True}], ids=["full", "lora"]
)
def test_config_yaml_makes_the_run_again(keys: dict[str, Any], runs: Any) -> None:
    first = runs(keys)
    again = strop.load_config(first.path / "config.yaml")
    (result,) = strop.train(again, overwrite=True)
    assert strop.load_config(result.run_dir / "config.yaml") == again
    elsewhere = strop.load_config(first.path / "config.yaml", overrides={"output_dir": str(runs.new_folder())})
    (result,) = strop.train(elsewhere)
    second = runs.at(result.run_dir)
    assert runs.same_run(first, second) and first.margins == second.margins
    assert first.data == second.data


def test_environment_json_says_what_the_run_was_made_with(runs: Any) -> None:
    found = json.loads((runs().path / "environment.json").read_text())
    assert torch.__version__.startswith(found["packages"]["torch"])
    assert (found["seed"], found["world_size"]) == (42, 1)


# ---- stopping


def test_early_stopping_logs_the_last_steps_once(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"method": "sft", "greater_is_better": True, "early_stopping_patience": 1, "eval_steps": 1}
    keys |= {"logging_steps": 10, "save_steps": 1, "output_dir": str(runs.new_folder())}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDir, "publish_final", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        runs(keys)  # dies between the last checkpoint and final/
    (result,) = strop.train(runs.config(keys), resume="auto")
    run = runs.at(result.run_dir)
    assert [(r["split"], r["step"]) for r in run.metrics] == [("eval", 0), ("eval", 1), ("eval", 2), ("train", 2)]
    assert run.series("num_groups") == [8]


def test_a_signal_stops_after_the_step_and_the_rest_follows(
    runs: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unbroken = runs(LORA)
    models = [{"name": name, "huggingface_id": str(runs.files["model"])} for name in ("run", "next")]
    config = runs.config({**LORA, "models": models})
    step = loop.Loop.step
    before = signal.getsignal(signal.SIGTERM)

    def stopped(self: loop.Loop, number: int) -> None:
        step(self, number)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        patch.setattr(loop.Loop, "step", stopped)
        strop.train(config)
    assert stop.value.step == 2 and Path(stop.value.checkpoint).name == "checkpoint-2"
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (Path(config.training.output_dir) / "next").exists()
    results = strop.train(config, resume="auto")
    assert [result.step for result in results] == [4, 4]
    assert all(runs.same_run(runs.at(result.run_dir), unbroken) for result in results)


@pytest.mark.share(1)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_signal_ends_an_evaluation_and_the_resume_makes_up_for_it(
    at: int, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"load_best_model_at_end": True, "eval_steps": 2, "save_steps": 10}
    unbroken = runs(keys)
    config = runs.config({**keys, "output_dir": str(runs.new_folder())})
    evaluating = RunOutputs.evaluating
    folder = Path(config.training.output_dir) / "run"

    @contextmanager
    def interrupted(self: RunOutputs, num_groups: int) -> Iterator[Callable[[int], None]]:
        if self.training.completed == at:
            os.kill(os.getpid(), signal.SIGTERM)
        with evaluating(self, num_groups) as done:
            yield done

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        patch.setattr(RunOutputs, "evaluating", interrupted)
        strop.train(config)
    assert (stop.value.step, stop.value.checkpoint) == (at, str(folder / f"checkpoint-{at}"))
    if at:
        assert runs.at(folder).steps("eval") == list(range(0, at, 2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed when it has made up for it
        patch.setattr(loop.Loop, "step" if at < 4 else "load_best", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        strop.train(config, resume="auto")
    (result,) = strop.train(config, resume="auto")
    run = runs.at(result.run_dir)
    assert runs.same_run(run, unbroken) and run.steps("eval") == [0, 2, 4]


def test_a_stop_does_not_wait_for_an_evaluation(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.Loop.step

    def stopped(self: loop.Loop, number: int) -> None:
        step(self, number)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop.Loop, "step", stopped)
        runs({"eval_steps": 1, "output_dir": (folder := str(runs.new_folder()))})
    assert runs.at(Path(folder) / "run").steps("eval") == [0, 1]


# ---- how it ended


def test_a_run_says_why_it_ended_and_whether_it_got_worse(runs: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "strop")
    for rate, worse in ((1e-2, False), (5.0, True)):
        caplog.clear()
        config = runs.config({"learning_rate": rate, "method": "sft", "output_dir": str(runs.new_folder())})
        (result,) = strop.train(config)
        records = [r for r in runs.at(result.run_dir).metrics if r["split"] == "eval"]
        assert result.metrics["eval_at_start"] == records[0] and result.metrics["eval"] == records[-1]
        assert result.metrics["train"]["step"] == result.step == 4
        assert result.got_worse is worse is (records[-1]["loss"] > records[0]["loss"])
        assert result.reason == "all 4 steps are done" and result.reason in caplog.text
        assert f"loss {records[0]['loss']:.4f} -> {records[-1]['loss']:.4g}"[:12] in caplog.text
        assert ("got worse" in caplog.text) is worse
        (again,) = strop.train(config, resume="auto")
        assert again == result  # finished: it is read back


def test_early_stopping_is_told(runs: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "strop")
    keys = {"method": "sft", "greater_is_better": True, "early_stopping_patience": 1, "eval_steps": 1}
    (result,) = strop.train(runs.config({**keys, "output_dir": str(runs.new_folder())}))
    assert result.ending.early and result.step == 2
    assert "stopped early after step 2 of 4" in result.reason and result.reason in caplog.text


def test_a_run_that_ended_early_has_its_pairs(runs: Any) -> None:
    keys = {"num_epochs": 5, "max_steps": None, "eval_steps": 1, "greater_is_better": True}
    run = runs(keys, early_stopping_patience=1)
    assert run.margins[-1]["global_step"] == 2  # the first evaluation is the best one
    listed = json.loads((run.path / "pairs.json").read_text())
    assert len(listed["worst"]) == len(listed["best"]) > 0
    assert {pair["step"] for pair in (*listed["worst"], *listed["best"])} == {1, 2}


def test_writing_out_what_null_stands_for_is_no_change(runs: Any) -> None:
    plain = runs.config()
    written = runs.config(bf16=False, fp16=False, output_dir=plain.training.output_dir)
    assert recipe_of(plain) == recipe_of(written) != recipe_of(runs.config(bf16=True))


# ---- several models


def test_one_model_that_fails_stops_no_other(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(runs.files["model"], tmp_path / "broken")
    for weights in broken.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])
    places = {"one": runs.files["model"], "broken": broken, "two": runs.files["other"]}
    models = [{"name": name, "huggingface_id": str(place)} for name, place in places.items()]
    config = runs.config({"models": models, "output_dir": str(tmp_path / "out"), "max_steps": 1})
    file = tmp_path / "c.json"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    with pytest.raises(TrainingError, match="1 of 3 models failed: broken: "):
        strop.train(config)
    folder = tmp_path / "out"
    assert [(folder / name / "final").is_dir() for name in places] == [True, False, True]
    assert cli.main(["train", "--config", str(file), "--overwrite"]) == 1
    said = capsys.readouterr().err
    assert "broken failed" in said and "1 of 3 models failed" in said and "Traceback" not in said
    assert [(folder / name / "final").is_dir() for name in places] == [True, False, True]

    indexed = ["train", "--config", str(file), "--output-dir", str(tmp_path / "indexed"), "--model-index"]
    assert cli.main([*indexed, "2"]) == 0
    assert [path.name for path in (tmp_path / "indexed").iterdir()] == ["two"]
    assert cli.main([*indexed, "1"]) == 1
    assert "model broken" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="there is no model 3"):
        strop.train(config, model_index=3)


def test_of_several_models_one_is_in_memory_at_a_time(runs: Any, tmp_path: Path, watched: pytest.MonkeyPatch) -> None:
    before: list[weakref.ref[Policy]] = []
    build, step = session.build_policy, loop.Loop.step

    def built(*args: Any, **kwargs: Any) -> Policy:
        assert [one() for one in before] == [None] * len(before)
        policy = build(*args, **kwargs)
        before.append(weakref.ref(policy))
        return policy

    def fails(self: Any, number: int) -> None:
        if len(before) == 2:
            raise TrainingError("the loss is nan")
        step(self, number)

    watched.setattr(session, "build_policy", built)
    watched.setattr(loop.Loop, "step", fails)
    models = [{"name": name, "huggingface_id": str(runs.files["model"])} for name in ("one", "bad", "two")]
    with pytest.raises(TrainingError, match="1 of 3 models failed: bad: "):
        strop.train(runs.config({"models": models, "output_dir": str(tmp_path), "max_steps": 1}))
    assert len(before) == 3 and not any(one() for one in before)


def test_all_models_are_looked_at_before_the_first_trains(runs: Any, tmp_path: Path) -> None:
    places = {"one": runs.files["model"], "gone": tmp_path / "gone"}
    models = [{"name": name, "huggingface_id": str(place)} for name, place in places.items()]
    config = runs.config({"models": models, "output_dir": str(tmp_path / "out")})
    with pytest.raises(StropError, match="there is no such folder"):
        strop.train(config)
    assert not (tmp_path / "out").exists()
    assert [result.name for result in strop.train(config, model_index=0)] == ["one"]


# ---- from Python


def test_a_path_trains_as_its_configuration_does(runs: Any, tmp_path: Path) -> None:
    for number, kind in enumerate((str, Path)):
        config = runs.config({"output_dir": str(runs.new_folder())})
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(config.model_dump(mode="json")))
        (result,) = strop.train(kind(file))
        assert runs.same_run(runs.at(result.run_dir), runs())
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        strop.train(tmp_path / "gone.yaml")


@pytest.mark.nightly
def test_from_python_no_library_has_a_say(runs: Any, tmp_path: Path) -> None:
    config = runs.config({"output_dir": str(tmp_path / "out"), "max_steps": 1, **LORA})
    file = tmp_path / "c.json"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    script = f"""
import logging, strop
(result,) = strop.train({str(file)!r})
print(result.reason)
logging.getLogger("bitsandbytes.backends").warning("no kernels")
logging.basicConfig()
logging.getLogger("peft.x").error("mine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "the one step is done\n"), done.stderr
    ours = re.compile(r"(train|eval) step |training: |reference log-probs: ")
    said = [line for line in done.stderr.splitlines() if not ours.match(line)]
    assert said == ["ERROR:peft.x:mine"], "a caller's own handlers get it, and nobody else"


def test_training_twice_in_a_row(runs: Any) -> None:
    config = runs.config(LORA)
    (first,) = strop.train(config)
    with pytest.raises(CheckpointError, match="the folder holds another run"):
        strop.train(config)
    kept = runs.at(first.run_dir)
    weights, records = kept.final, kept.untimed
    (second,) = strop.train(config, overwrite=True)
    assert (second.run_dir, second.reason, second.step) == (first.run_dir, first.reason, first.step)
    assert runs.same(kept.final, weights) and kept.untimed == records
    assert strop.train(config, resume="auto") == [second]  # finished: nothing to do


def test_a_configuration_made_in_python(runs: Any) -> None:
    config = strop.RunConfig(
        models=[{"huggingface_id": str(runs.files["model"]), "name": "run"}],
        dataset={"train_file": str(runs.files["singles"])},
        training={"output_dir": str(runs.new_folder()), "max_steps": 1, "warmup_ratio": 0.0},
    )
    (result,) = strop.train(config)
    assert runs.at(result.run_dir).series("learning_rate") == [2e-5]  # the default of sft
    assert (result.final / "model.safetensors").is_file()


def test_what_fails_before_the_first_step_leaves_no_run(
    runs: Any, tmp_path: Path, make_model: Any, make_tokenizer: Any
) -> None:
    foreign = make_tokenizer()
    foreign.add_tokens(["<more>"])
    foreign.save_pretrained(tmp_path / "foreign")
    make_model(vocab_size=401).save_pretrained(tmp_path / "foreign")
    keys = {"output_dir": str(runs.new_folder()), "max_steps": 1}
    for error, wrong in (
        (DataError, {"train_file": str(tmp_path / "none.jsonl")}),
        (ModelError, {"models.0.huggingface_id": str(tmp_path / "none")}),
        (ModelError, {"ref_model_id": str(tmp_path / "foreign")}),
        (ModelError, {"target_modules": ["none"], "lora.enabled": True}),
    ):
        with pytest.raises(error):
            runs({**keys, **wrong})
    assert runs(keys).steps() == [1]


def test_gradients_of_exactly_0_are_said_once(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A hinge that every pair has passed."""
    runs(loss_type="hinge", beta=1e6, num_epochs=4)
    assert capsys.readouterr().err.count("every gradient is exactly 0") == 1


def test_weights_that_are_not_finite_are_no_final_model(runs: Any) -> None:
    config = runs.config(output_dir=str(runs.new_folder()), max_steps=1, weight_decay=1e300)
    with pytest.raises(CheckpointError, match="no checkpoint of step 1: NaN or infinity in"):
        strop.train(config)
    (run,) = Path(config.training.output_dir).iterdir()
    assert not (run / "final").exists()


def test_a_mirror_that_failed_is_made_up_for(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = runs.config(output_dir=str(runs.new_folder()), mount_dir=str(tmp_path), max_steps=1)

    def full(self: RunDir, mount_dir: str) -> Path:
        raise CheckpointError("no room", where=mount_dir)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "mirror", full)
        with pytest.raises(CheckpointError, match="no room"):
            strop.train(config)
    assert not (tmp_path / "run" / "final").exists()
    (result,) = strop.train(config, resume="auto")
    assert result.step == 1 and result.final.is_dir()
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_a_mirror_that_will_be_replaced_is_told(runs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run" / "final").mkdir(parents=True)
    config = runs.config(output_dir=str(runs.new_folder()), mount_dir=str(tmp_path), max_steps=1)
    said = f"{tmp_path / 'run' / 'final'} is there already, and will be replaced"
    strop.train(config)
    assert said in caplog.text
    caplog.clear()
    strop.train(config, resume="auto")
    assert said not in caplog.text, "it is the mirror of this run"


@pytest.mark.nightly
def test_the_best_model_may_be_from_before_the_resume(runs: Any, caplog: pytest.LogCaptureFixture) -> None:
    keys = {"save_steps": 1, "save_total_limit": None, "load_best_model_at_end": True, "greater_is_better": True}
    first = runs(keys)  # the first evaluation is the best one
    assert runs.same(first.final, first.weights(2))
    checkpoint = first.path / "checkpoint-3"
    (result,) = strop.train(runs.config(keys), resume=str(checkpoint))  # into another folder
    assert runs.same(runs.at(result.run_dir).final, first.final)
    moved = runs.new_folder()
    moved.mkdir(parents=True)
    shutil.copytree(checkpoint, moved / "checkpoint-3")
    (result,) = strop.train(runs.config(keys), resume=str(moved / "checkpoint-3"))  # it is gone: said at once
    assert "checkpoint-2, is gone" in caplog.text
    assert not runs.same(runs.at(result.run_dir).final, first.final)


def test_a_resume_from_the_working_folder_finds_what_lies_beside_it(
    runs: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"save_steps": 1, "save_total_limit": None, "load_best_model_at_end": True, "greater_is_better": True}
    first = runs(keys)
    monkeypatch.chdir(first.path / "checkpoint-3")
    (result,) = strop.train(runs.config(keys), resume=".")
    assert result.ending.final_step == 2 and "is gone" not in caplog.text
    environment = json.loads((result.run_dir / "environment.json").read_text())
    assert [resume["after_step"] for resume in environment["resumes"]] == [3]


def test_a_best_model_that_is_damaged_is_told_before_the_training(runs: Any, caplog: pytest.LogCaptureFixture) -> None:
    keys = {"save_steps": 1, "save_total_limit": None, "load_best_model_at_end": True, "greater_is_better": True}
    first = runs(keys)  # the first evaluation is the best one
    moved = runs.new_folder()
    moved.mkdir(parents=True)
    for step in (2, 3):
        shutil.copytree(first.path / f"checkpoint-{step}", moved / f"checkpoint-{step}")
    (moved / "checkpoint-2" / "state.json").write_text("{}")
    (result,) = strop.train(runs.config(keys), resume=str(moved / "checkpoint-3"))
    assert re.search(r"checkpoint-2, cannot be used \(.*state.json.*\): a later one will be final", caplog.text)
    assert result.ending.final_step == 4


def test_a_failure_is_told_where_the_disk_does_not_take_its_record(
    runs: Any, watched: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: Any, number: int) -> None:
        raise TrainingError("the loss is nan", where=f"step {number}")

    write = RunDir.write_json

    def is_full(self: RunDir, name: str, value: object) -> Path:
        if name == FAILURE:
            raise CheckpointError("cannot be written: No space left on device")
        return write(self, name, value)

    watched.setattr(loop.Loop, "step", fails)
    watched.setattr(RunDir, "write_json", is_full)
    with pytest.raises(TrainingError, match="the loss is nan"):
        runs()
    assert "No space left on device" in caplog.text


def test_one_checkpoint_is_not_for_several_models(tmp_path: Path, model_dir: Path) -> None:
    models = [{"name": name, "huggingface_id": str(model_dir)} for name in ("a", "b")]
    config = strop.load_config(overrides={"models": models, "training.output_dir": str(tmp_path / "out")})
    with pytest.raises(ConfigError, match="--model-index"):
        strop.train(config, resume=str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "out").exists()


def test_a_bad_mount_dir_is_found_before_training(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    config = strop.load_config(
        overrides={
            "models": [{"huggingface_id": str(model_dir)}],
            "training": {"output_dir": str(tmp_path / "out"), "mount_dir": str(tmp_path / "file" / "below")},
            "dataset.train_file": str(tmp_path / "rows.jsonl"),
        }
    )
    with pytest.raises(CheckpointError, match="mount_dir"):
        strop.train(config)
    assert not list((tmp_path / "out").rglob("data.json"))


@pytest.mark.nightly
def test_overwriting_keeps_the_charts_of_the_run_that_is_under_way_and_its_report(tmp_path: Path, runs: Any) -> None:
    config = runs.config(output_dir=str(tmp_path), report_to=["tensorboard"], max_steps=1)
    strop.train(config)
    (result,) = strop.train(config, overwrite=True)
    (file,) = (result.run_dir / "logs" / "tensorboard").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()
    verdict = json.loads((result.run_dir / "findings.json").read_text())["verdict"]
    (shown,) = events.Tensors("report/verdict/text_summary")
    assert shown.step == 1 and shown.tensor_proto.string_val[0].decode().splitlines()[2:] == [f"| {verdict} |"]
    assert events.Tensors("report/evaluation/text_summary")


def test_a_finished_run_without_metrics_still_says_so(tmp_path: Path, runs: Any) -> None:
    config = runs.config(output_dir=str(tmp_path), max_steps=1)
    (result,) = strop.train(config)
    (result.run_dir / "metrics.jsonl").unlink()
    assert strop.train(config, resume="auto")[0].final.is_dir()
