"""A run that dies at any step and goes on is the run that never died: weights bit for bit, metrics but for timings."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import strop
from commands import Command
from strop.engine.loop import Loop
from strop.engine.recipe import recipe_of
from strop.errors import CheckpointError
from strop.plan import micro_batch_size
from strop.policy import build

STEPS = 7
TIMINGS = {"seconds", "tokens_per_second", "peak_memory_gib"}


def rows(path: Path, pair: bool, n: int = 17) -> Path:
    lines = []
    for i in range(n):
        prompt = [{"role": "user", "content": f"question {i % 5} " + "hello " * (i % 3)}]
        answers = [[{"role": "assistant", "content": w * (1 + i % 3)}] for w in ("yes ", "no maybe ")]
        lines.append(
            {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
            if pair
            else {"prompt": prompt, "completion": answers[i % 2]}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(
    folder: Path, model: Path, method: str, lora: bool, options: dict[str, Any] | None = None, **training: Any
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "models": [{"name": "run", "huggingface_id": str(model)}],
        "dataset": {"train_file": str(rows(folder / "rows.jsonl", method != "sft")), "validation_split": 0.25},
        "post_training": {"method": method, **(options or {})},
        "training": {
            "output_dir": str(folder / "out"),
            "num_epochs": 2,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "logging_steps": 2,
            "eval_steps": 3,
            "save_steps": 2,
            "save_total_limit": 2,
            **training,
        },
    }
    if lora:
        found["lora"] = {"r": 4, "lora_dropout": 0.3, "target_modules": "all-linear"}
    return found


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "final").glob("*.safetensors")
    return load_file(file)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def margins(run: Path) -> list[str]:
    file = run / "logs" / "margins" / "margins_log.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def assert_same_run(a: Path, b: Path) -> None:
    one, two = final_weights(a), final_weights(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert metrics(a) == metrics(b)
    assert margins(a) == margins(b)


class Died(BaseException):
    """Stands for kill -9: nothing in strop may catch it."""


def die_in_step(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    unbroken = Loop.step

    def step(self: Loop, number: int) -> None:
        if number == at:
            raise Died
        unbroken(self, number)

    monkeypatch.setattr(Loop, "step", step)


MODEL = Path("base")
"""Where `dead_run` puts the model, from the working folder: a resume compares the names of models, too."""


@pytest.fixture(scope="module")
def runs_that_died() -> dict[str, Path]:
    return {}


@pytest.fixture
def dead_run(
    tmp_path: Path,
    model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    runs_that_died: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, bool, int], None]:
    """`dead_run(method, lora, at)` makes a folder of one's own the working folder, with a model and a run of
    `settings(tmp_path, MODEL, method, lora)` that died in step `at`. Each is made once and copied."""

    def put(method: str, lora: bool, at: int) -> None:
        name = f"{method} {lora} {at}"
        if name not in runs_that_died:
            folder = tmp_path_factory.mktemp("dead")
            shutil.copytree(model_dir, folder / MODEL)
            with monkeypatch.context() as patch:
                patch.chdir(folder)
                die_in_step(patch, at)
                with pytest.raises(Died):
                    strop.train(strop.load_config(overrides=settings(folder, MODEL, method, lora)))
            runs_that_died[name] = folder
        for part in (MODEL, "out"):
            shutil.copytree(runs_that_died[name] / part, tmp_path / part)
        monkeypatch.chdir(tmp_path)

    return put


SOME_STEPS = (1, 3, 4, 7)
"""Before the first checkpoint, behind one, behind an evaluation, and the last."""
ALL_STEPS = range(1, STEPS + 1)


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("method", "lora", "training", "steps"),
    [
        ("sft", False, {}, (3,)),
        ("dpo", True, {}, SOME_STEPS),
        pytest.param("sft", False, {}, ALL_STEPS, marks=pytest.mark.nightly),
        pytest.param("dpo", True, {}, ALL_STEPS, marks=pytest.mark.nightly),
        pytest.param("dpo", True, {"bf16": True, "optim": "adamw_torch_fused"}, ALL_STEPS, marks=pytest.mark.nightly),
        pytest.param(
            "dpo",
            False,
            {"options": {"ref_sync_steps": 2, "ref_mixup_alpha": 0.3}},
            ALL_STEPS,
            marks=pytest.mark.nightly,
        ),
    ],
    ids=[
        "sft-full-some",
        "dpo-lora-dropout-some",
        "sft-full",
        "dpo-lora-dropout",
        "dpo-lora-bf16",
        "dpo-full-synced",
    ],
)
def test_dying_in_any_step_changes_nothing(
    method: str,
    lora: bool,
    training: dict[str, Any],
    steps: Sequence[int],
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(name: str, resume: str | None = None) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        config = strop.load_config(overrides=settings(tmp_path / name, model_dir, method, lora, **training))
        return strop.train(config, resume=resume)[0].run_dir

    unbroken = run("unbroken")
    for at in steps:
        with monkeypatch.context() as patch:
            die_in_step(patch, at)
            with pytest.raises(Died):
                run(f"died-{at}")
        assert_same_run(run(f"died-{at}", resume="auto"), unbroken)


def test_where_sharing_is_refused_a_run_keeps_the_micro_batches_that_it_really_used(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws its masks per micro-batch, so the size of these belongs to the recipe."""
    monkeypatch.setattr(build, "probe", lambda policy, own: "refused by this test")
    monkeypatch.setattr(micro_batch_size, "CPU_TOKENS", 1)  # so that the longest group decides
    cuts: list[int] = []
    init = Loop.__init__

    def watched(self: Loop, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        cuts.append(self.gradients.budget_tokens)

    monkeypatch.setattr(Loop, "__init__", watched)
    folders = [tmp_path / "unbroken", tmp_path / "died"]
    for folder in folders:
        folder.mkdir()
    whole, broken = (strop.load_config(overrides=settings(folder, model_dir, "dpo", True)) for folder in folders)
    (unbroken,) = strop.train(whole)
    with monkeypatch.context() as patch, pytest.raises(Died):
        die_in_step(patch, 4)
        strop.train(broken)
    (resumed,) = strop.train(broken, resume="auto")

    written = yaml.safe_load((unbroken.run_dir / "config.yaml").read_text())
    assert cuts == [written["training"]["micro_batch_tokens"]] * 3
    assert_same_run(unbroken.run_dir, resumed.run_dir)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("keys", "speeds"),
    [
        ({"bf16": True}, (2.0, 0.3)),
        ({"auto_precision": True}, (0.3, 2.0)),
        pytest.param({"bf16": True}, (0.3, 2.0), marks=pytest.mark.nightly),
        pytest.param({"auto_precision": True}, (2.0, 0.3), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_a_resumed_run_multiplies_as_it_began(
    keys: dict[str, bool],
    speeds: tuple[float, float],
    tmp_path: Path,
    model_dir: Path,
    pretend: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though another speed of bfloat16 is measured by then, by which a new run would multiply otherwise."""

    def run(name: str, resume: str | None = None) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        config = strop.load_config(overrides=settings(tmp_path / name, model_dir, "dpo", True, **keys))
        return strop.train(config, resume=resume)[0].run_dir

    pretend(bf16=speeds[0])
    unbroken = run("unbroken")
    with monkeypatch.context() as patch:
        die_in_step(patch, 4)
        with pytest.raises(Died):
            run("died")
    pretend(bf16=speeds[1])
    assert metrics(run("new")) != metrics(unbroken)
    assert_same_run(run("died", resume="auto"), unbroken)
    records = [
        json.loads((tmp_path / n / "out" / "run" / "environment.json").read_text()) for n in ("died", "unbroken")
    ]
    assert records[0]["products"] == records[1]["products"]


@pytest.mark.nightly
def test_dying_again_and_again(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, resume: str | None) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        return strop.train(
            strop.load_config(overrides=settings(tmp_path / name, model_dir, "sft", False)), resume=resume
        )[0].run_dir

    for at in range(1, STEPS + 1):
        with monkeypatch.context() as patch:
            die_in_step(patch, at)
            with pytest.raises(Died):
                run("broken", "auto")
    assert_same_run(run("broken", "auto"), run("unbroken", None))


def test_a_finished_run_says_so(tmp_path: Path, model_dir: Path) -> None:
    config = strop.load_config(overrides=settings(tmp_path, model_dir, "sft", False))
    run = strop.train(config)[0].run_dir
    before = (run / "metrics.jsonl").read_bytes()
    strop.train(config, resume="auto")
    assert (run / "metrics.jsonl").read_bytes() == before
    with pytest.raises(CheckpointError, match="holds another run"):
        strop.train(config)


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("changes", "resume", "said"),
    [
        ({"learning_rate": 2e-3}, "auto", r"finished, with other settings:\n    training.learning_rate: 0.001 then"),
        ({"max_steps": 5}, "auto", "training.max_steps: 7 then, 5 now"),
        ({}, "checkpoint-6", "cannot be resumed from a checkpoint"),
    ],
    ids=str,
)
def test_a_finished_run_takes_no_other_settings(
    changes: dict[str, Any], resume: str, said: str, tmp_path: Path, model_dir: Path
) -> None:
    run = strop.train(strop.load_config(overrides=settings(tmp_path, model_dir, "sft", False)))[0].run_dir
    before = (run / "metrics.jsonl").read_bytes()
    changed = strop.load_config(overrides=settings(tmp_path, model_dir, "sft", False, **changes))
    with pytest.raises(CheckpointError, match=said):
        strop.train(changed, resume=resume if resume == "auto" else str(run / resume))
    more_often = strop.load_config(overrides=settings(tmp_path, model_dir, "sft", False, logging_steps=1))
    strop.train(more_often, resume="auto")  # what changes no result is no other setting
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 2e-3}, "training.learning_rate: 0.001 then, 0.002 now"),
        ({"groups_per_step": 5}, "training.groups_per_step: 4 then, 5 now"),
        ({"max_steps": 9}, "training.max_steps: 7 then, 9 now"),
        ({"weight_decay": 0.5}, "training.weight_decay: "),
        ({"max_grad_norm": 0.5}, "training.max_grad_norm: "),
    ],
)
def test_changes_of_the_recipe_are_refused(
    change: dict[str, Any], named: str, tmp_path: Path, dead_run: Callable[[str, bool, int], None]
) -> None:
    dead_run("sft", False, 5)
    changed = strop.load_config(overrides=settings(tmp_path, MODEL, "sft", False, **change))
    with pytest.raises(CheckpointError, match="allow-changes") as refused:
        strop.train(changed, resume="auto")
    assert named in str(refused.value)
    assert strop.train(changed, resume="auto", allow_changes=True)[0].final.is_dir()


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("key", "method", "lora", "said"),
    [
        ("base", "sft", True, "models: the weights"),
        ("base", "dpo", False, "models: the weights"),
        ("ref", "dpo", True, "post_training.ref_model_id: the weights"),
        ("base", "sft", False, None),  # all of them stand in the checkpoint
    ],
)
def test_other_weights_in_the_same_folder_are_refused(
    key: str,
    method: str,
    lora: bool,
    said: str | None,
    tmp_path: Path,
    model_dir: Path,
    dead_run: Callable[[str, bool, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if key == "base":
        dead_run(method, lora, 5)
        config = strop.load_config(overrides=settings(tmp_path, MODEL, method, lora))
    else:
        options = {"ref_model_id": str(shutil.copytree(model_dir, tmp_path / "ref"))}
        config = strop.load_config(overrides=settings(tmp_path, model_dir, method, lora, options))
        with monkeypatch.context() as patch:
            die_in_step(patch, 5)
            with pytest.raises(Died):
                strop.train(config)
    file = tmp_path / key / "model.safetensors"
    save_file({name: weight * 1.01 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    if said is not None:
        with pytest.raises(CheckpointError, match=said):
            strop.train(config, resume="auto")
    assert strop.train(config, resume="auto", allow_changes=said is not None)[0].final.is_dir()


def test_a_run_leaves_the_callers_random_state(tmp_path: Path, model_dir: Path) -> None:
    torch.manual_seed(1)
    strop.train(strop.load_config(overrides=settings(tmp_path, model_dir, "sft", True)))
    assert torch.initial_seed() == 1
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))


def test_other_hardware_is_no_change_and_other_data_is(
    tmp_path: Path, dead_run: Callable[[str, bool, int], None]
) -> None:
    dead_run("sft", False, 5)
    config = settings(tmp_path, MODEL, "sft", False)
    file = Path(config["dataset"]["train_file"])
    file.write_text(file.read_text().replace("question 1", "question one"))
    with pytest.raises(CheckpointError, match="data: the training or validation groups"):
        strop.train(strop.load_config(overrides=config), resume="auto")
    smaller = settings(tmp_path, MODEL, "sft", False, per_device_train_batch_size=1)  # a batch half as large, but
    (result,) = strop.train(strop.load_config(overrides=smaller), resume="auto")  # groups_per_step stands
    assert result.step == STEPS
    assert "groups_per_step: 4" in (result.run_dir / "config.yaml").read_text()


def _edited(lines: list[str]) -> list[str]:
    return [lines[0].replace("question", "answer"), *lines[1:]]


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        (_edited, True),
        (lambda lines: lines[::-1], True),
        (lambda lines: [*lines, lines[0]], True),
        (lambda lines: lines[:-1], True),
        (lambda lines: lines, False),
    ],
    ids=["edited", "reordered", "appended", "cut", "written again as it was"],
)
def test_rows_that_changed_are_refused_until_they_are_allowed(
    change: Callable[[list[str]], list[str]],
    is_refused: bool,
    tmp_path: Path,
    dead_run: Callable[[str, bool, int], None],
) -> None:
    dead_run("sft", False, 3)
    keys = settings(tmp_path, MODEL, "sft", False)
    file = Path(keys["dataset"]["train_file"])
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
    os.utime(file, (1e9, 1e9))
    config = strop.load_config(overrides=keys)
    if is_refused:
        with pytest.raises(CheckpointError, match=r"data: (.|\n)*allow-changes"):
            strop.train(config, resume="auto")
    (result,) = strop.train(config, resume="auto", allow_changes=is_refused)
    assert result.step == STEPS


def start(folder: Path, model: Path) -> Command:
    (folder / "c.json").write_text(json.dumps(settings(folder, model, "dpo", True, max_steps=400, save_steps=1)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return Command(["train", "--config", str(folder / "c.json")], folder / "said", environment)


def go_on(folder: Path, num_steps: int, caplog: pytest.LogCaptureFixture) -> None:
    """In this process, to fewer steps."""
    caplog.set_level(logging.INFO, "strop")
    config = strop.load_config(folder / "c.json", overrides={"training.max_steps": num_steps})
    strop.train(config, resume="auto", allow_changes=True)
    assert "resuming from" in caplog.text


def wait_for(found: Callable[[], bool], process: Command) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path, model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = start(tmp_path, model_dir)
    run = tmp_path / "out" / "run"
    wait_for(lambda: any(run.glob("checkpoint-*/MANIFEST.json")), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "--resume" in said and "Traceback" not in said
    go_on(tmp_path, 2, caplog)


def test_kill_9_leaves_something_to_go_on_from(
    tmp_path: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(tmp_path, model_dir)
    run = tmp_path / "out" / "run"
    wait_for(lambda: len(list(run.glob("checkpoint-*/MANIFEST.json"))) > 1, process)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    go_on(tmp_path, 2, caplog)


CHANGES: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
    {"rms_norm_eps": 1e-3},
    {"hidden_act": "gelu"},
    {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},  # twice as many in the same weights
]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "lora", "change"),
    [
        pytest.param(
            method, lora, change, id=f"{method} {next(iter(change))}", marks=pytest.mark.nightly if i in seldom else ()
        )
        for method, lora, seldom in (("sft", False, (1, 2)), ("dpo", True, (0, 3)))
        for i, change in enumerate(CHANGES)
    ],
)
def test_a_changed_model_configuration_is_refused(
    method: str, lora: bool, change: dict[str, Any], tmp_path: Path, dead_run: Callable[[str, bool, int], None]
) -> None:
    dead_run(method, lora, 5)
    base, config = tmp_path / MODEL, strop.load_config(overrides=settings(tmp_path, MODEL, method, lora))
    before = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**before, **change}))
    with pytest.raises(CheckpointError, match=r"models: the model's config\.json"):
        strop.train(config, resume="auto")
    (base / "config.json").write_text(json.dumps(before))
    assert strop.train(config, resume="auto")[0].final.is_dir()


@pytest.mark.nightly
def test_another_seed_loss_template_or_tokenizer_is_refused(
    tmp_path: Path, dead_run: Callable[[str, bool, int], None]
) -> None:
    dead_run("dpo", True, 5)
    config = strop.load_config(overrides=settings(tmp_path, MODEL, "dpo", True))
    for key, value, said in (
        ("seed", 7, "seed: 42 then, 7 now"),
        ("post_training.loss_type", "hinge", "post_training.loss_type: sigmoid then, hinge now"),
    ):
        with pytest.raises(CheckpointError, match=said):
            strop.train(config.with_values({key: value}, "test"), resume="auto")
    template, tokenizer = (tmp_path / MODEL / name for name in ("chat_template.jinja", "tokenizer.json"))
    without_merges = json.loads(tokenizer.read_text())
    without_merges["model"]["merges"] = []
    for file, changed in (
        (template, template.read_text().replace("<|im_end|>\n", "<|im_end|>")),
        (tokenizer, json.dumps(without_merges)),
    ):
        before = file.read_text()
        assert changed != before
        file.write_text(changed)
        with pytest.raises(CheckpointError, match="data: the training or validation groups are not those of the run"):
            strop.train(config, resume="auto")
        file.write_text(before)


def test_changed_weights_of_a_source_are_refused(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = settings(tmp_path, model_dir, "sft", False)
    file = keys["dataset"].pop("train_file")

    def config(weight: float) -> strop.RunConfig:
        return strop.load_config(overrides={**keys, "dataset.sources": [{"name": file, "weight": weight}]})

    with monkeypatch.context() as patch:
        die_in_step(patch, 5)
        with pytest.raises(Died):
            strop.train(config(1.0))
    for weight in (2.0, 0.5, 1.5):
        with pytest.raises(CheckpointError, match="data: the training or validation groups"):
            strop.train(config(weight), resume="auto")
    assert strop.train(config(1.0), resume="auto")[0].final.is_dir()


def test_lengths_that_cut_other_rows_completions_belong_to_the_recipe() -> None:
    def recipe(method: str, length: int) -> dict[str, Any]:
        model = {"huggingface_id": "org/model"}
        keys = {"models": [model], "method": method, "max_seq_length": length}
        return recipe_of(strop.load_config(overrides=keys))

    assert recipe("kto", 100) != recipe("kto", 200)
    assert recipe("dpo", 100) == recipe("dpo", 200)  # seen in the groups


@pytest.mark.nightly
def test_another_environment_is_told_and_the_launchs_record_stays(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = strop.load_config(overrides=settings(tmp_path, model_dir, "sft", False))
    file = tmp_path / "out" / "run" / "environment.json"
    for at in (3, 5):
        with monkeypatch.context() as patch, pytest.raises(Died):
            die_in_step(patch, at)
            strop.train(config, resume="auto")
    launch = json.loads(file.read_text())
    assert [resume.pop("after_step") for resume in launch.pop("resumes")] == [2]
    assert "changed since the launch" not in caplog.text
    launch["packages"]["torch"], launch["num_threads"], launch["devices"] = "1.0", 77, [{"name": "a GPU"}]
    file.write_text(json.dumps(launch))
    strop.train(config, resume="auto")
    for line in ("torch 1.0 then", "num_threads 77 then", "devices [{'name': 'a GPU'}] then, [] now"):
        assert f"changed since the launch, so the last digits may differ: {line}" in caplog.text
    after = json.loads(file.read_text())
    (resume,) = after.pop("resumes")
    assert after == launch and resume["after_step"] == 4 and resume["packages"]["torch"] == torch.__version__


@pytest.mark.nightly
@pytest.mark.parametrize(("method", "lora"), [("sft", False), ("dpo", True)])
def test_a_finished_run_is_extended(
    method: str, lora: bool, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a constant rate, which no length changes, an extended run is one that was as long from the start."""

    def config(name: str, **training: Any) -> strop.RunConfig:
        (tmp_path / name).mkdir(exist_ok=True)
        shape = {"lr_scheduler": "constant", "warmup_steps": 0, **training}
        return strop.load_config(overrides=settings(tmp_path / name, model_dir, method, lora, **shape))

    (straight,) = strop.train(config("straight", max_steps=9, eval_steps=9))
    (short,) = strop.train(config("extended", max_steps=6, eval_steps=9))
    old = final_weights(short.run_dir)
    with pytest.raises(CheckpointError, match="max_steps: 6 then, 5 now"):
        strop.train(config("extended", max_steps=5, eval_steps=9), resume="auto")
    with pytest.raises(CheckpointError, match="learning_rate"):
        strop.train(config("extended", max_steps=9, eval_steps=9, learning_rate=1.0), resume="auto")
    with monkeypatch.context() as patch, pytest.raises(Died):
        die_in_step(patch, 9)
        strop.train(config("extended", max_steps=9, eval_steps=9), resume="auto")
    assert all(torch.equal(old[name], weight) for name, weight in final_weights(short.run_dir).items())  # until then
    for _ in range(2):  # the second time there is nothing to do
        (long,) = strop.train(config("extended", max_steps=9, eval_steps=9), resume="auto")
        assert (long.step, long.ending.final_step) == (9, straight.ending.final_step)
        one, two = final_weights(straight.run_dir), final_weights(long.run_dir)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert [m["step"] for m in metrics(long.run_dir) if m["split"] == "eval"] == [0, 6, 9]


@pytest.mark.nightly
def test_a_finished_run_is_extended_by_epochs(tmp_path: Path, model_dir: Path) -> None:
    def run(epochs: int, resume: str | None = None) -> int:
        keys = settings(tmp_path, model_dir, "sft", False, num_epochs=epochs, max_steps=None)
        return strop.train(strop.load_config(overrides=keys), resume=resume)[0].step

    once = run(1)
    assert run(3, "auto") == 3 * once


@pytest.mark.nightly
def test_a_run_of_epochs_is_extended_by_steps(tmp_path: Path, model_dir: Path) -> None:
    """Up to more steps than its epochs came to; as many or fewer extend nothing."""

    def run(max_steps: int | None, resume: str | None = None) -> int:
        keys = settings(tmp_path, model_dir, "sft", False, num_epochs=2, max_steps=max_steps)
        return strop.train(strop.load_config(overrides=keys), resume=resume)[0].step

    steps = run(None)
    for as_many in (steps, steps - 1):
        with pytest.raises(CheckpointError, match=f"max_steps: null then, {as_many} now"):
            run(as_many, "auto")
    assert run(steps + 1, "auto") == run(steps + 1, "auto") == steps + 1
