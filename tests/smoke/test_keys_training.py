"""Every key of `training`, `gpu`, `finetuning`, `logging` and the top arrives where it acts: `test_{section}__{key}`.

The keys of the other sections stand in test_keys_data_model.py; the last tests here see that no key is without one.
"""

from __future__ import annotations

import ast
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention

import strop
from strop import cli, wiring
from strop.config.schema import KEYS
from strop.engine import loop
from strop.errors import CheckpointError, ConfigError, StropError, TrainingError
from strop.policy import policy
from strop.policy.policy import Policy
from strop.policy.precision import resolve_precision

SFT = {"method": "sft", "validation_split": 0}
WORSE = {"method": "sft", "greater_is_better": True, "eval_steps": 1, "max_steps": 6}
"""The loss falls and higher counts as better: the first evaluation is the best, and every later one is worse."""


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the optimizer is given, an entry a step."""
    seen: list[dict[str, Any]] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, closure: None = None) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(
            {
                "lr": {group["lr"] for group in self.param_groups},
                "decay": [group["weight_decay"] for group in self.param_groups],
                "dims": [{p.ndim for p in group["params"]} for group in self.param_groups],
                "norm": float(torch.nn.utils.get_total_norm(gradients)),
            }
        )
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return seen


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of what attention layers gave, one an evaluation of a layer with gradients."""
    seen: list[torch.dtype] = []
    forward = LlamaAttention.forward

    def watched(self: LlamaAttention, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        if torch.is_grad_enabled():
            seen.append(out[0].dtype)
        return out

    monkeypatch.setattr(LlamaAttention, "forward", watched)
    return seen


# ---- the top


def test_top__seed(runs: Any) -> None:
    keys = {"r": 2, "lora_dropout": 0.3}
    one, again, other = runs(keys, seed=1), runs(keys, seed=1, fresh=True), runs(keys, seed=2)
    assert same(one.final, again.final) and one.untimed == again.untimed
    assert not same(one.final, other.final)
    first, second = runs.prepare(seed=1), runs.prepare(seed=2)
    assert {g.origin.line for g in first.data.eval} != {g.origin.line for g in second.data.eval}
    assert first.plan.groups(1) != second.plan.groups(1)
    starts = [runs.policy(keys, seed=seed).trainable() for seed in (1, 1, 2)]
    assert same(starts[0], starts[1]) and not same(starts[0], starts[2])


# ---- training: how long, how much


def test_training__output_dir(runs: Any, tmp_path: Path) -> None:
    run = runs(output_dir=str(tmp_path / "here"), max_steps=1)
    assert run.path == tmp_path / "here" / "run"
    assert (run.path / "final").is_dir()


def test_training__num_epochs(runs: Any) -> None:
    run = runs(num_epochs=2, max_steps=None)
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in run.margins] == [0, 0, 0, 1, 1, 1]


def test_training__max_steps(runs: Any) -> None:
    assert runs(max_steps=2).steps() == [1, 2]
    assert runs(max_steps=5, num_epochs=1).steps() == [1, 2, 3, 4, 5]  # it wins


def sizes(forwards: list[Any]) -> list[tuple[int, int]]:
    """(groups, tokens) of every micro-batch that was trained on."""
    return [(batch.num_groups, batch.num_tokens) for with_gradients, batch in forwards if with_gradients]


@pytest.mark.parametrize("size", [1, 4])
def test_training__per_device_train_batch_size(size: int, runs: Any, forwards: list[Any]) -> None:
    run = runs(per_device_train_batch_size=size, fresh=True)
    longest = max(group.num_tokens for group in runs.prepare().data.train)
    assert run.config["training"]["micro_batch_tokens"] == size * longest
    assert run.config["training"]["groups_per_step"] == 2 * size
    assert all(tokens <= size * longest for _, tokens in sizes(forwards))
    assert max(groups for groups, _ in sizes(forwards)) >= size


def test_training__per_device_eval_batch_size(runs: Any, forwards: list[Any]) -> None:
    losses = []
    for size, num in ((4, [4]), (1, [1, 1, 1, 1])):
        forwards.clear()
        run = runs(method="sft", per_device_eval_batch_size=size, max_steps=1)
        trained = [with_gradients for with_gradients, _ in forwards].index(True)
        assert [batch.num_groups for with_gradients, batch in forwards[trained:] if not with_gradients] == num
        losses.append(run.series("loss", "eval"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_training__gradient_accumulation_steps(runs: Any) -> None:
    run = runs(gradient_accumulation_steps=3, max_steps=3)
    assert run.config["training"]["groups_per_step"] == 6
    assert [line["batch_size"] for line in run.margins] == [6, 6, 6]


def test_training__groups_per_step(runs: Any) -> None:
    run = runs(groups_per_step=5, max_steps=None)
    assert [line["batch_size"] for line in run.margins] == [5, 5, 2]  # the last step of an epoch takes what is left


def test_training__micro_batch_tokens(runs: Any, forwards: list[Any]) -> None:
    whole = runs(micro_batch_tokens=100_000)
    assert {groups for groups, _ in sizes(forwards)} == {4}
    forwards.clear()
    cut = runs(micro_batch_tokens=1)
    assert {groups for groups, _ in sizes(forwards)} == {1}
    assert cut.series("loss") == pytest.approx(whole.series("loss"), rel=1e-4)


# ---- training: rates


def test_training__learning_rate(runs: Any, updates: list[Any]) -> None:
    before = runs.policy().trainable()
    for rate in (1e-2, 1e-3):
        after = runs(learning_rate=rate, max_steps=1).final
        moved = max(float((after[name] - weight).detach().abs().max()) for name, weight in before.items())
        assert moved == pytest.approx(rate, rel=1e-2)  # AdamW's first step
    assert [update["lr"] for update in updates] == [{1e-2}, {1e-3}]
    for method, rate in (("sft", 2e-5), ("dpo", 5e-7)):
        assert runs(method=method, learning_rate=None, max_steps=1).series("learning_rate") == [rate]


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [(1 + math.cos(math.pi * done / 4)) / 2 for done in range(4)]),
    ],
)
def test_training__lr_scheduler(name: str, shares: list[float], runs: Any, updates: list[Any]) -> None:
    run = runs(lr_scheduler=name, fresh=True)
    assert run.series("learning_rate") == pytest.approx([1e-2 * share for share in shares])
    assert [list(update["lr"]) for update in updates] == [[rate] for rate in run.series("learning_rate")]


def test_training__warmup_steps(runs: Any) -> None:
    rates = runs(warmup_steps=2, lr_scheduler="constant").series("learning_rate")
    assert rates == pytest.approx([0.5e-2, 1e-2, 1e-2, 1e-2])
    assert runs(warmup_steps=None).series("learning_rate") == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])  # 100


def test_training__warmup_ratio(runs: Any) -> None:
    run = runs(warmup_ratio=0.5, warmup_steps=None, lr_scheduler="constant")
    assert run.series("learning_rate") == pytest.approx([0.5e-2, 1e-2, 1e-2, 1e-2])


# ---- training: lengths


def lengths(runs: Any, **keys: Any) -> tuple[int, int, int]:
    """The longest prompt, completion and both together."""
    rows = [(len(g.prompt_ids), len(c.ids)) for g in runs.prepare(keys).data.train for c in g.completions]
    return max(p for p, _ in rows), max(c for _, c in rows), max(p + c for p, c in rows)


def test_training__max_seq_length(runs: Any) -> None:
    assert lengths(runs)[2] > 24
    assert lengths(runs, max_seq_length=24, max_prompt_length=None, max_completion_length=None)[2] == 24
    assert lengths(runs, max_seq_length=24)[:2] == (12, 10)  # half of it for the prompt


def test_training__max_prompt_length(runs: Any) -> None:
    assert lengths(runs, max_prompt_length=7)[0] == 7


def test_training__max_completion_length(runs: Any) -> None:
    assert lengths(runs, max_completion_length=5)[1] == 5


# ---- training: what is written, and when


def test_training__logging_steps(runs: Any) -> None:
    run = runs(logging_steps=3)
    assert run.steps() == [3, 4]  # the last step too
    every = runs().series("loss")
    assert run.series("loss") == pytest.approx([sum(every[:3]) / 3, every[3]])


def test_training__eval_steps(runs: Any) -> None:
    assert runs(eval_steps=3).steps("eval") == [0, 3, 4]


def test_training__save_steps(runs: Any) -> None:
    run = runs(save_steps=2, max_steps=5)
    assert run.checkpoints == [2, 4]
    assert not same(run.weights(2), run.weights(4))
    assert runs().checkpoints == []


def test_training__save_total_limit(runs: Any) -> None:
    every = {"save_steps": 1, "max_steps": 5}
    assert runs(every, save_total_limit=2).checkpoints == [3, 4]
    assert runs(every, save_total_limit=None).checkpoints == [1, 2, 3, 4]
    best = {**WORSE, "save_steps": 1, "load_best_model_at_end": True}
    assert runs(best, save_total_limit=2).checkpoints == [1, 4, 5]  # besides the best one


def test_training__mount_dir(runs: Any, tmp_path: Path) -> None:
    run = runs(mount_dir=str(tmp_path / "mount"))
    mirror = tmp_path / "mount" / "run"
    copied = {str(p.relative_to(mirror)): p.read_bytes() for p in mirror.rglob("*") if p.is_file()}
    original = {str(p.relative_to(run.path)): p for part in ("final", "logs") for p in (run.path / part).rglob("*")}
    assert copied == {name: path.read_bytes() for name, path in original.items() if path.is_file()}
    assert {"final/model.safetensors", "logs/margins/margins_log.jsonl"} <= copied.keys()


# ---- training: numbers


def test_training__bf16(runs: Any, attention: list[torch.dtype], built: list[Policy]) -> None:
    run = runs(bf16=True)
    assert set(attention) == {torch.bfloat16}
    assert {weight.dtype for weight in (*built[0].trainable().values(), *run.final.values())} == {torch.float32}
    assert run.series("loss")[-1] != runs().series("loss")[-1]
    adapted = runs(bf16=True, r=2)
    assert built[-1].base.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in adapted.final.values()} == {torch.float32}


def test_training__fp16(runs: Any, attention: list[torch.dtype], built: list[Policy]) -> None:
    run = runs(fp16=True, max_steps=3, save_steps=1)
    assert set(attention) == {torch.float16}
    assert built[0].precision.scaler
    state = json.loads((run.path / "checkpoint-1" / "state.json").read_text())
    assert state["scaler"]["scale"] > 1
    assert {weight.dtype for weight in run.final.values()} == {torch.float32}
    assert run.series("grad_norm")[0] == pytest.approx(runs().series("grad_norm")[0], rel=0.05)  # unscaled


def test_training__auto_precision(runs: Any, monkeypatch: pytest.MonkeyPatch, attention: list[torch.dtype]) -> None:
    on_cpu = runs(auto_precision=True, max_steps=1)
    assert set(attention) == {torch.float32}
    assert on_cpu.config["training"]["bf16"] is False
    attention.clear()
    assert runs(auto_precision=True, fp16=True, max_steps=1).config["training"]["fp16"] is True  # given is given
    assert set(attention) == {torch.float16}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    config = runs.config(auto_precision=True)
    assert resolve_precision(config.training, torch.device("cuda")).compute is torch.bfloat16
    assert wiring._with_precision(config, torch.device("cuda")).training.bf16 is True  # what config.yaml says


def test_training__fp32_logits(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = []
    token_logps = policy.token_logps

    def watched(*args: Any, compute: torch.dtype, **kwargs: Any) -> Tensor:
        heads.append(compute)
        return token_logps(*args, compute=compute, **kwargs)

    monkeypatch.setattr(policy, "token_logps", watched)
    for wanted, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        heads.clear()
        runs(bf16=True, fp32_logits=wanted, max_steps=1)
        assert set(heads) == {dtype}


@pytest.mark.parametrize(("share", "layers"), [(False, 2), (0.5, 3), (True, 4)])
def test_training__gradient_checkpointing(
    share: bool | float, layers: int, runs: Any, attention: list[torch.dtype], forwards: list[Any]
) -> None:
    run = runs(gradient_checkpointing=share, fresh=True)
    assert len(attention) == layers * len(sizes(forwards))
    assert same(run.final, runs().final)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("adamw_8bit", bnb.optim.AdamW8bit),
        ("paged_adamw_8bit", bnb.optim.PagedAdamW8bit),
    ],
)
def test_training__optim(name: str, kind: type, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def build(*args: Any) -> torch.optim.Optimizer:
        made.append(build_optimizer(*args))
        return made[-1]

    build_optimizer = loop.build_optimizer
    monkeypatch.setattr(loop, "build_optimizer", build)
    run = runs(optim=name)
    assert [type(optimizer) for optimizer in made] == [kind]
    assert bool(made[0].defaults.get("fused")) is (name == "adamw_torch_fused")
    assert run.series("loss")[-1] < run.series("loss")[0]


def test_training__weight_decay(runs: Any, updates: list[Any]) -> None:
    before = runs.policy().trainable()
    plain, decayed = (runs(weight_decay=decay, max_steps=1).final for decay in (0.0, 0.1))
    assert (updates[1]["decay"], updates[1]["dims"]) == ([0.1, 0.0], [{2}, {1}])
    for name, weight in before.items():
        shrunk = 1e-2 * 0.1 * weight.detach() * (weight.ndim == 2)
        torch.testing.assert_close(decayed[name], plain[name] - shrunk, rtol=0, atol=1e-7)


def test_training__max_grad_norm(runs: Any, updates: list[Any]) -> None:
    clipped, free = runs(max_grad_norm=0.01, max_steps=1), runs(max_grad_norm=None, max_steps=1)
    assert clipped.series("grad_norm") == free.series("grad_norm")  # as it was before clipping
    assert (clipped.series("clipped"), free.series("clipped")) == ([1.0], [0.0])
    assert [update["norm"] for update in updates] == pytest.approx([0.01, free.series("grad_norm")[0]], rel=1e-3)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, range], None]:
    """poison(what, steps): in these steps, the loss of the first group or the whole gradient is not finite."""
    forward = Policy.forward

    def set_up(what: str, steps: range) -> None:
        num_steps = 0

        def poisoned(self: Policy, batch: Any) -> Tensor:
            nonlocal num_steps
            logps = forward(self, batch)
            num_steps += torch.is_grad_enabled()
            if torch.is_grad_enabled() and num_steps in steps:
                if what == "loss":
                    return torch.where(batch.group_index[batch.completion_index] == 0, torch.nan, logps)
                logps.register_hook(lambda gradient: gradient * torch.inf)
            return logps

        monkeypatch.setattr(Policy, "forward", poisoned)

    return set_up


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_training__on_nonfinite(what: str, runs: Any, poison: Any, built: list[Policy], tmp_path: Path) -> None:
    keys = {"micro_batch_tokens": 100_000, "save_steps": 1, "max_steps": 4, "output_dir": str(tmp_path)}
    poison(what, range(2, 3))
    prepared = runs.prepare()
    rows = [str(prepared.data.train[i].origin) for i in prepared.plan.groups(2)]
    with pytest.raises(TrainingError, match="the update was not made") as refused:
        runs(keys)
    assert refused.value.where == "step 2"
    assert [row for row in rows if row in re.split("[, ]+", refused.value.found)] == rows[: 1 if what == "loss" else 4]
    before = type(runs())(tmp_path / "run").weights(1)
    assert same({name: w.detach() for name, w in built[0].trainable().items()}, before)

    poison(what, range(2, 3))
    run = runs(keys, on_nonfinite="skip", output_dir=str(runs.new_folder()))
    assert [record.get("num_skipped_steps", 0) for record in run.metrics if record["split"] == "train"] == [0, 1, 0, 0]
    assert run.series("loss")[1] is None
    assert same(run.weights(1), run.weights(2)) and not same(run.weights(2), run.weights(3))
    poison(what, range(1, 100))
    with pytest.raises(TrainingError) as refused:
        runs(keys, on_nonfinite="skip", max_steps=20, output_dir=str(runs.new_folder()))
    assert refused.value.where == "step 11"


# ---- gpu


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine that seems to have two GPUs, and stops when the policy is to be built; the devices it was asked for."""
    asked: list[torch.device] = []

    def build(config: Any, model: Any, device: torch.device, **_: Any) -> None:
        asked.append(device)
        raise StropError("enough seen")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(wiring, "build_policy", build)
    return asked


def test_gpu__device_ids(runs: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs(device_ids=[0, 1], max_steps=1).steps() == [1]
    assert "gpu.device_ids [0, 1]: this machine has no GPU; training on its CPU" in caplog.text


def test_gpu__device_ids_on_gpus(runs: Any, two_gpus: list[torch.device]) -> None:
    for ids in (None, [0], [1]):
        with pytest.raises(StropError, match="enough seen"):
            runs(device_ids=ids)
    assert [device.index for device in two_gpus] == [0, 0, 1]
    for ids, words in (([2], "device 2 is not there"), ([0, 1], "several devices")):
        with pytest.raises(ConfigError, match=words):
            runs(device_ids=ids)


def test_gpu__use_ddp(runs: Any, two_gpus: list[torch.device]) -> None:
    with pytest.raises(ConfigError, match="use_ddp True: several devices"):
        runs(use_ddp=True)
    assert two_gpus == []


# ---- finetuning


class Died(BaseException):
    """Stands for kill -9."""


def die_at(step: int, monkeypatch: pytest.MonkeyPatch, runs: Any, **keys: Any) -> None:
    unbroken = loop.Loop._step

    def die(self: loop.Loop, number: int) -> None:
        if number == step:
            raise Died
        unbroken(self, number)

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(loop.Loop, "_step", die)
        runs(keys, fresh=True)


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
        assert same(run.final, unbroken.final)
        assert run.steps() == ([1, 2, 3, 4] if resume == "auto" else [3, 4])
    with pytest.raises(CheckpointError, match="no such folder"):
        runs(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_finetuning__load_best_model_at_end(runs: Any) -> None:
    best, last = (runs(WORSE, load_best_model_at_end=wanted) for wanted in (True, False))
    losses = best.series("loss", "eval")
    assert losses[1] == max(losses[1:])
    assert best.checkpoints == [1]
    assert same(best.final, best.weights(1))
    assert last.checkpoints == [] and not same(last.final, best.final)
    with pytest.raises(ConfigError, match="no validation rows"):
        runs(load_best_model_at_end=True, validation_split=0)


def test_finetuning__metric_for_best_model(runs: Any) -> None:
    keys = {"load_best_model_at_end": True, "eval_steps": 2}
    for name, best in (("eval_loss", 4), ("rewards/margins", 4), ("eval_lengths/chosen", 2), ("lengths/chosen", 2)):
        run = runs(keys, metric_for_best_model=name)  # lengths never change: the first one stays the best
        assert run.checkpoints[-1] == best
        assert same(run.final, run.weights(best))


def test_finetuning__metric_for_best_model_that_is_none(runs: Any, forwards: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"no evaluation has a metric 'rewards/margin'") as refused:
        runs(load_best_model_at_end=True, metric_for_best_model="eval_rewards/margin")
    assert "rewards/margins" in refused.value.expected
    assert sizes(forwards) == []  # said before anything is trained


def test_finetuning__greater_is_better(runs: Any) -> None:
    for name, given, resolved in (
        ("eval_loss", None, False),
        ("rewards/margins", None, True),
        ("eval_loss", True, True),
    ):
        run = runs(metric_for_best_model=name, greater_is_better=given, load_best_model_at_end=True)
        assert run.config["finetuning"]["greater_is_better"] is resolved
        assert run.checkpoints[-1] == (2 if (name, resolved) == ("eval_loss", True) else 4)


def test_finetuning__early_stopping_patience(runs: Any) -> None:
    for patience, last in ((1, 2), (3, 4), (None, 6)):
        run = runs(WORSE, early_stopping_patience=patience)
        assert run.steps()[-1] == run.steps("eval")[-1] == last
    with pytest.raises(ConfigError, match="no validation rows"):
        runs(early_stopping_patience=2, validation_split=0)


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
    for name in ("wandb", "mlflow", "all"):
        with pytest.raises(ConfigError, match="tensorboard"):
            runs.config(report_to=[name])


def test_logging__logging_dir(runs: Any, tmp_path: Path) -> None:
    inside = runs(logging_dir="./elsewhere")
    assert (inside.path / "elsewhere" / "margins" / "margins_log.jsonl").is_file()
    assert not (inside.path / "logs").exists()
    runs(logging_dir=str(tmp_path))  # others may log there too
    assert (tmp_path / "run" / "margins" / "margins_log.jsonl").is_file()


@pytest.fixture
def _logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # so that the command line need not set it
    names = ("strop", "transformers", "datasets", "huggingface_hub", "peft", "bitsandbytes", "torch")
    before = [(logger, logger.level, list(logger.handlers)) for logger in map(logging.getLogger, names)]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.usefixtures("_logging_as_before")
def test_logging__log_level(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for level in ("debug", "info", "warning", "error"):
        (tmp_path / level).write_text(json.dumps(runs.config(log_level=level).model_dump(mode="json")))
        assert cli.main(["train", "--config", str(tmp_path / level)]) == 0
        said[level] = capsys.readouterr().err
    assert "run: 4 steps; the model of step 4 is in" in said["info"]
    assert "train step 4/4" in said["info"]
    assert said["warning"].splitlines() == [line for line in said["info"].splitlines() if line.startswith("warning: ")]
    assert len(said["warning"].splitlines()) == 1  # a high learning rate
    assert said["error"] == ""


def test_logging__margins(runs: Any) -> None:
    assert len(runs().margins) == 4
    off = runs(margins=False)
    assert not (off.path / "logs" / "margins").exists()
    assert same(off.final, runs().final)


# ---- no key without a test


def test_every_key_has_a_test() -> None:
    names = {
        node.name
        for path in Path(__file__).parent.glob("test_keys_*.py")
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
