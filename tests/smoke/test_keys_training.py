"""Every key of `training` arrives where it acts: `test_{section}__{key}`.

The other sections stand in the other files test_keys_*.py; test_keys_run.py sees that no key is without a test.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention

from strop import session
from strop.batch import TokenScores
from strop.engine import checkpoint_writer, loop
from strop.errors import ConfigError, TrainingError
from strop.plan.micro_batch_size import default_budget
from strop.plan.row_tokens import packed_tokens
from strop.policy import build, policy
from strop.policy.kernels import elementwise
from strop.policy.policy import Policy
from strop.policy.precision import resolve_precision
from strop.prepared import with_budget

WORSE = {"method": "sft", "greater_is_better": True, "eval_steps": 1, "max_steps": 6}
"""The loss falls and higher counts as better: the first evaluation is the best, and every later one is worse."""


@pytest.fixture
def updates(watched: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the optimizer is given, one entry per step."""
    seen: list[dict[str, Any]] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, closure: None = None) -> None:
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

    watched.setattr(torch.optim.AdamW, "step", noted)
    return seen


@pytest.fixture
def attention(watched: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of what attention layers gave, one an evaluation of a layer with gradients."""
    seen: list[torch.dtype] = []
    forward = LlamaAttention.forward

    def noted(self: LlamaAttention, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        if torch.is_grad_enabled():
            seen.append(out[0].dtype)
        return out

    watched.setattr(LlamaAttention, "forward", noted)
    return seen


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
    return [(batch.structure.num_groups, batch.num_tokens) for with_gradients, batch in forwards if with_gradients]


@pytest.mark.parametrize("size", [1, 4])
def test_training__per_device_train_batch_size(size: int, runs: Any, forwards: list[Any]) -> None:
    run = runs(per_device_train_batch_size=size)
    assert run.config["training"]["groups_per_step"] == 2 * size
    assert run.config["training"]["micro_batch_tokens"] == 64  # of `conftest.py`, whatever a batch is
    assert 32 < max(tokens for _, tokens in sizes(forwards)) <= 64
    prepared = runs.prepare(per_device_train_batch_size=size)
    longest = max(group.num_tokens for group in prepared.data.train)
    on_gpu = with_budget(prepared, packed_tokens, "cuda").config.training.micro_batch_tokens
    assert on_gpu == size * longest


def test_training__per_device_eval_batch_size(runs: Any, forwards: list[Any], watched: pytest.MonkeyPatch) -> None:
    watched.setattr(session, "default_budget", lambda *args: default_budget(*args[:3], "cuda"))  # a CPU has its own
    losses = []
    for size, num in ((4, [4]), (1, [1, 1, 1, 1])):
        forwards.clear()
        run = runs(method="sft", per_device_eval_batch_size=size, max_steps=1)
        trained = [with_gradients for with_gradients, _ in forwards].index(True)
        assert [batch.structure.num_groups for with_gradients, batch in forwards[trained:] if not with_gradients] == num
        losses.append(run.series("loss", "eval"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_training__gradient_accumulation_steps(runs: Any) -> None:
    run = runs(gradient_accumulation_steps=3, max_steps=3)
    assert run.config["training"]["groups_per_step"] == 6
    assert [line["batch_size"] for line in run.margins] == [6, 6, 6]


def test_training__groups_per_step(runs: Any) -> None:
    run = runs(groups_per_step=5, max_steps=None)
    assert [line["batch_size"] for line in run.margins] == [5, 5, 2]  # the last step of an epoch takes what is left


@pytest.mark.nightly
def test_training__packing(runs: Any, forwards: list[Any]) -> None:
    keys = {"method": "sft", "max_prompt_length": None, "max_completion_length": None, "max_steps": 2}
    groups = runs.prepare(max_seq_length=500, **keys).data.train
    assert sum(group.num_tokens for group in groups) <= 500  # so that one row holds them all
    packed = runs(max_seq_length=500, packing=True, groups_per_step=1, **keys)
    assert {batch.structure.num_groups for with_gradients, batch in forwards if with_gradients} == {len(groups)}
    plain = runs(max_seq_length=500, groups_per_step=len(groups), **keys)
    assert packed.series("loss") == pytest.approx(plain.series("loss"), rel=1e-5)
    assert packed.config["training"]["micro_batch_tokens"] == 500  # more than a CPU gains by
    on_gpu = with_budget(runs.prepare(max_seq_length=500, packing=True, **keys), packed_tokens, "cuda")
    assert on_gpu.config.training.micro_batch_tokens == 2 * 500
    # rows of less tokens: a step has as many groups as fill one
    forwards.clear()
    longest = max(group.num_tokens for group in groups)
    runs(max_seq_length=longest + 2, packing=True, groups_per_step=1, **keys)
    for with_gradients, batch in forwards:
        assert not with_gradients or batch.input_ids.numel() <= longest + 2
    with pytest.raises(ConfigError, match=r"training\.packing is true, and the method is dpo"):
        runs(packing=True)


@pytest.mark.nightly
def test_training__micro_batch_tokens(runs: Any, forwards: list[Any]) -> None:
    whole = runs(micro_batch_tokens=100_000)
    assert {groups for groups, _ in sizes(forwards)} == {4}
    forwards.clear()
    cut = runs(micro_batch_tokens=1)
    assert {groups for groups, _ in sizes(forwards)} == {1}
    assert cut.series("loss") == pytest.approx(whole.series("loss"), rel=1e-4)


def test_margins_stand_in_the_order_of_the_plan(runs: Any) -> None:
    """However a step is cut, and by whatever length its groups are sorted for it."""
    margins = []
    for steps, batch, tokens in ((3, 4, 1), (1, 12, 100_000)):
        keys = {"method": "simpo", "learning_rate": 1e-30, "max_steps": steps, "groups_per_step": batch}
        run = runs(keys, micro_batch_tokens=tokens)
        found = [np.load(run.path / "logs" / "margins" / line["npy"]) for line in run.margins]
        margins.append(np.concatenate(found))
    assert len(set(margins[0].tolist())) > 6
    np.testing.assert_allclose(*margins, atol=1e-5)


# ---- training: rates


@pytest.mark.nightly
def test_training__learning_rate(runs: Any, updates: list[Any]) -> None:
    before = runs.policy().trainable()
    for rate in (1e-2, 1e-3):
        after = runs(learning_rate=rate, max_steps=1).final
        moved = max(float((after[name] - weight).detach().abs().max()) for name, weight in before.items())
        assert moved == pytest.approx(rate, rel=1e-2)  # AdamW's first step
    assert [update["lr"] for update in updates] == [{1e-2}, {1e-3}]
    for method, rate in (("sft", 2e-5), ("dpo", 5e-7)):
        assert runs(method=method, learning_rate=None, max_steps=1).series("learning_rate") == [rate]
        adapted = runs(r=4, method=method, learning_rate=None, max_steps=1)
        assert adapted.series("learning_rate") == [pytest.approx(10 * rate)]


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [(1 + math.cos(math.pi * done / 4)) / 2 for done in range(4)]),
    ],
)
def test_training__lr_scheduler(name: str, shares: list[float], runs: Any, updates: list[Any]) -> None:
    run = runs(lr_scheduler=name)
    assert run.series("learning_rate") == pytest.approx([1e-2 * share for share in shares])
    assert [list(update["lr"]) for update in updates] == [[rate] for rate in run.series("learning_rate")]


@pytest.mark.nightly
def test_training__warmup_steps(runs: Any) -> None:
    rates = runs(warmup_steps=2, lr_scheduler="constant").series("learning_rate")
    assert rates == pytest.approx([0.5e-2, 1e-2, 1e-2, 1e-2])
    default = runs(warmup_steps=None, lr_scheduler="constant", max_steps=11).series("learning_rate")
    assert default == pytest.approx([0.5e-2, *[1e-2] * 10])  # a tenth of the steps, rounded up


@pytest.mark.nightly
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


def test_training__eval_at_start(runs: Any) -> None:
    plain, late = runs(), runs(eval_at_start=False)
    assert (plain.steps("eval"), late.steps("eval")) == ([0, 2, 4], [2, 4])
    assert runs.same(plain.final, late.final)


def test_training__eval_steps(runs: Any) -> None:
    assert runs(eval_steps=3).steps("eval") == [0, 3, 4]


def test_training__save_steps(runs: Any) -> None:
    run = runs(save_steps=2, max_steps=5)
    assert run.checkpoints == [2, 4, 5]
    assert not runs.same(run.weights(2), run.weights(4))
    assert runs().checkpoints == [4]  # the last step always


@pytest.mark.nightly
def test_training__save_total_limit(runs: Any) -> None:
    every = {"save_steps": 1, "max_steps": 5}
    assert runs(every, save_total_limit=2).checkpoints == [4, 5]
    assert runs(every, save_total_limit=None).checkpoints == [1, 2, 3, 4, 5]
    best = {**WORSE, "save_steps": 1, "load_best_model_at_end": True}
    assert runs(best, save_total_limit=2).checkpoints == [1, 5, 6]  # besides the best one


def test_training__async_save(runs: Any, watched: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    write = checkpoint_writer.write_tensor_files

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return write(*arguments)

    watched.setattr(checkpoint_writer, "write_tensor_files", noted)
    one, two = runs(save_steps=2), runs(save_steps=2, async_save=True)
    assert threads == ["MainThread"] * 2 + ["strop-save_0"] * 2
    assert one.checkpoints == two.checkpoints == [2, 4] and runs.same_run(one, two)


def test_training__mount_dir(runs: Any, tmp_path: Path) -> None:
    run = runs(mount_dir=str(tmp_path / "mount"))
    mirror = tmp_path / "mount" / "run"
    copied = {str(p.relative_to(mirror)): p.read_bytes() for p in mirror.rglob("*") if p.is_file()}
    original = {str(p.relative_to(run.path)): p for part in ("final", "logs") for p in (run.path / part).rglob("*")}
    assert copied == {name: path.read_bytes() for name, path in original.items() if path.is_file()}
    assert {"final/model.safetensors", "logs/margins/margins_log.jsonl"} <= copied.keys()


# ---- training: numbers


@pytest.mark.nightly
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


@pytest.mark.share(1)
@pytest.mark.parametrize("low", [False, True])
def test_training__auto_precision(
    low: bool,
    runs: Any,
    watched: pytest.MonkeyPatch,
    attention: list[torch.dtype],
    pretend: Callable[..., None],
) -> None:
    pretend(bf16=2.0 if low else 0.3)
    on_cpu = runs(auto_precision=True, max_steps=1)
    assert set(attention) == {torch.bfloat16 if low else torch.float32}
    assert on_cpu.config["training"]["bf16"] is low
    attention.clear()
    assert runs(auto_precision=True, fp16=True, max_steps=1).config["training"]["fp16"] is True  # given is given
    assert set(attention) == {torch.float16}
    watched.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    config = runs.config(auto_precision=True)
    assert resolve_precision(config.training, torch.device("cuda")).compute is torch.bfloat16


def test_training__fp32_logits(runs: Any, watched: pytest.MonkeyPatch) -> None:
    heads = []
    token_logps = policy.token_logps

    def noted(*args: Any, compute: torch.dtype, **kwargs: Any) -> Tensor:
        heads.append(compute)
        return token_logps(*args, compute=compute, **kwargs)

    watched.setattr(policy, "token_logps", noted)
    for wanted, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        heads.clear()
        runs(bf16=True, fp32_logits=wanted, max_steps=1)
        assert set(heads) == {dtype}


def test_training__save_dtype(runs: Any) -> None:
    for asked, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        assert {tensor.dtype for tensor in runs(save_dtype=asked, max_steps=1).final.values()} == {dtype}
    with pytest.raises(ConfigError, match="adapters are trained, which are saved in float32"):
        runs({"lora.enabled": True}, save_dtype="bfloat16", max_steps=1)


@pytest.mark.nightly
def test_training__torch_compile(runs: Any, watched: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    elementwise.compiled.cache_clear()
    request.addfinalizer(elementwise.compiled.cache_clear)
    calls: Counter[str] = Counter()

    def compile_(function: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        assert dynamic

        def run(*args: Any) -> Any:
            calls[function.__name__] += 1
            return function(*args)

        return run

    watched.setattr(torch, "compile", compile_)
    plain = runs(torch_compile=False)
    assert not calls
    assert runs.same_run(runs(torch_compile=True), plain)
    assert calls.keys() == {function.__name__ for function in elementwise.EAGER} and min(calls.values()) > 8

    def fail(*_: Any) -> None:
        raise RuntimeError("\nno C++ compiler was found\nand so on")

    elementwise.compiled.cache_clear()
    watched.setattr(torch, "compile", lambda function, dynamic: fail)
    with pytest.raises(ConfigError, match=r"training.torch_compile: true: torch.compile failed: no C\+\+ compiler"):
        runs(torch_compile=True)


@pytest.mark.nightly
@pytest.mark.parametrize(("share", "layers"), [(False, 2), (0.5, 3), (True, 4)])
def test_training__gradient_checkpointing(
    share: bool | float, layers: int, runs: Any, attention: list[torch.dtype], forwards: list[Any]
) -> None:
    run = runs(gradient_checkpointing=share)
    assert len(attention) == layers * len(sizes(forwards))
    assert runs.same(run.final, runs().final)


@pytest.mark.nightly
def test_training__reference_store(
    runs: Any, forwards: list[Any], own_store: Path, watched: pytest.MonkeyPatch
) -> None:
    """Other betas, losses and rates score nothing a second time but a few groups to be sure."""
    watched.setattr(build, "probe", lambda *_: None)

    def scored(**keys: Any) -> tuple[int, Any]:
        forwards.clear()
        run = runs(keys, reference_store=True, eval_steps=100)
        first = [with_gradients for with_gradients, _ in forwards].index(True)
        return sum(b.structure.num_groups for _, b in forwards[:first] if "ref_logps" not in b.columns.names), run

    plain = runs(eval_steps=100)
    assert not own_store.exists()
    first, run = scored()
    assert first == 16 and runs.same_run(run, plain)
    verified = range(1, 4 + 4 + 1)  # of a few micro-batches of each set of rows
    again, run = scored(beta=0.3, learning_rate=1e-3)
    assert again in verified and run.series("loss")[0] == pytest.approx(0.6931472, abs=1e-5)
    assert scored(loss_type="hinge")[0] in verified
    assert scored(method="kto")[0] == 2 * (16 + 8)  # what is scored together is another; the mismatched ones, too
    assert len(list(own_store.glob("*.logps"))) == 1
    assert scored(bf16=True)[0] == 16
    assert len(list(own_store.glob("*.logps"))) == 2


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("adamw_8bit", bnb.optim.AdamW8bit),
        ("paged_adamw_8bit", bnb.optim.PagedAdamW8bit),
        ("paged_lion_32bit", bnb.optim.PagedLion32bit),
        ("ademamix_8bit", bnb.optim.AdEMAMix8bit),
        ("lion_8bit", bnb.optim.Lion8bit),
        ("adafactor", torch.optim.Adafactor),
        ("sgd", torch.optim.SGD),
    ],
)
def test_training__optim(name: str, kind: type, runs: Any, watched: pytest.MonkeyPatch) -> None:
    made = []

    def build(*args: Any) -> torch.optim.Optimizer:
        made.append(build_optimizer(*args))
        return made[-1]

    build_optimizer = loop.build_optimizer
    watched.setattr(loop, "build_optimizer", build)
    rate = {"sgd": 1.0, "lion_8bit": 2e-3, "paged_lion_32bit": 2e-3}.get(name, 1e-2)
    run = runs(optim=name, learning_rate=rate)
    assert [type(optimizer) for optimizer in made] == [kind]
    assert bool(made[0].defaults.get("fused")) is (name == "adamw_torch_fused")
    assert run.series("loss")[-1] < run.series("loss")[0]


@pytest.mark.nightly
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
def poison(watched: pytest.MonkeyPatch) -> Callable[[str, range], None]:
    """poison(what, steps): in these steps, the loss of the first group or the whole gradient is not finite."""
    forward = Policy.forward

    def set_up(what: str, steps: range) -> None:
        num_steps = 0

        def poisoned(self: Policy, batch: Any) -> TokenScores:
            nonlocal num_steps
            scored = forward(self, batch)
            num_steps += torch.is_grad_enabled()
            if torch.is_grad_enabled() and num_steps in steps:
                if what == "loss":
                    first = batch.group_index[batch.completion_index] == 0
                    return scored._replace(logps=torch.where(first, torch.nan, scored.logps))
                scored.logps.register_hook(lambda gradient: gradient * torch.inf)
            return scored

        watched.setattr(Policy, "forward", poisoned)

    return set_up


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_training__on_nonfinite(
    what: str, runs: Any, poison: Any, built: list[Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"micro_batch_tokens": 100_000, "save_steps": 1, "max_steps": 4, "save_total_limit": None}
    keys |= {"output_dir": str(tmp_path)}
    poison(what, range(2, 3))
    prepared = runs.prepare()
    groups = [prepared.data.train[i] for i in prepared.plan.groups(2)]
    rows = [str(g.origin) for g in sorted(groups, key=lambda g: g.num_tokens, reverse=True)]  # as they are fed
    with pytest.raises(TrainingError, match="the weights were not updated") as refused:
        runs(keys)
    assert refused.value.where == "step 2"
    named = [row for row in rows if re.search(rf"{re.escape(row)}(?!\d)", refused.value.found)]  # :1 begins :12, too
    assert named == rows[: 1 if what == "loss" else 4]
    before = runs.at(tmp_path / "run").weights(1)
    assert runs.same({name: w.detach() for name, w in built[0].trainable().items()}, before)

    poison(what, range(2, 3))
    run = runs(keys, on_nonfinite="skip", output_dir=str(runs.new_folder()))
    assert [record.get("num_skipped_steps", 0) for record in run.metrics if record["split"] == "train"] == [0, 1, 0, 0]
    assert run.series("loss")[1] is None
    assert "skipped (1 in a row)" in capsys.readouterr().err
    assert runs.same(run.weights(1), run.weights(2)) and not runs.same(run.weights(2), run.weights(3))
    poison(what, range(1, 100))
    with pytest.raises(TrainingError) as refused:
        runs(keys, on_nonfinite="skip", max_steps=20, log_level="error", output_dir=str(runs.new_folder()))
    assert refused.value.where == "step 11"
    assert capsys.readouterr().err == ""
