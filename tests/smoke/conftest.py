"""Tiny runs by the real road, made once for each set of keys, and what they leave behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import strop
from strop import session
from strop.batch import Batch
from strop.engine.checkpoint import open_checkpoint
from strop.policy.build import build_policy
from strop.policy.policy import Policy
from strop.prepared import Prepared, prepare
from strop.types import Completion, Group, Origin

RECIPE = {
    "models.0.name": "run",
    "post_training.method": "dpo",
    "dataset.validation_split": 0.25,
    "training.max_steps": 4,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.learning_rate": 1e-2,
    "training.warmup_steps": 0,
    "training.logging_steps": 1,
    "training.eval_steps": 2,
    "training.reference_store": False,  # so that no test depends on those before it
    "finetuning.load_best_model_at_end": False,
    "finetuning.early_stopping_patience": None,
}
"""What every run of these tests has unless it says otherwise: 12 training rows, 4 a step, and 4 to evaluate on."""
NUM_ROWS = 16
MICRO_BATCH = 64
"""Tokens."""
GROUP_COLUMNS = {"old_logps": "old", "sampler_logps": "sampler"}
TIMINGS = {"seconds", "tokens_per_second", "peak_memory_gib"}


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    path: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def series(self, name: str, split: str = "train") -> list[Any]:
        """A metric's values, one a record."""
        return [record[name] for record in self.metrics if record["split"] == split]

    def steps(self, split: str = "train") -> list[int]:
        return self.series("step", split)

    @property
    def untimed(self) -> list[dict[str, Any]]:
        """The records without what differs from one run to the next."""
        return [{k: v for k, v in x.items() if k not in TIMINGS and "/rank_" not in k} for x in self.metrics]

    @property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.path / "config.yaml").read_text())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads((self.path / "data.json").read_text())

    @property
    def margins(self) -> list[dict[str, Any]]:
        return [json.loads(x) for x in (self.path / "logs/margins/margins_log.jsonl").read_text().splitlines()]

    @property
    def final(self) -> dict[str, Tensor]:
        (file,) = (self.path / "final").glob("*.safetensors")
        return load_file(file)

    @property
    def adapter(self) -> dict[str, Any]:
        return json.loads((self.path / "final" / "adapter_config.json").read_text())

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(p.name.removeprefix("checkpoint-")) for p in self.path.glob("checkpoint-*"))

    def weights(self, step: int) -> dict[str, Tensor]:
        """The policy's weights in a checkpoint."""
        folder = self.path / f"checkpoint-{step}"
        open_checkpoint(folder)  # it is whole
        tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
        return {n.removeprefix("policy."): t for n, t in tensors.items() if n.startswith("policy.")}


class Runs:
    """`runs(keys, key=value)` trains with these keys over RECIPE. The same keys give the same run, made once."""

    def __init__(self, folder: Path, files: Mapping[str, Path]) -> None:
        self.folder, self.files = folder, files
        self._made: dict[str, Run] = {}
        self.watched = False
        self._num_folders = 0

    @staticmethod
    def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
        """Whether these are the same weights, bit for bit."""
        return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    def same_run(self, one: Run, two: Run) -> bool:
        return self.same(one.final, two.final) and one.untimed == two.untimed

    def config(self, keys: Mapping[str, Any] | None = None, **bare: Any) -> strop.RunConfig:
        """Keys are dotted, or bare where that is clear."""
        asked = {**(keys or {}), **bare}
        method = asked.get("post_training.method", asked.get("method", RECIPE["post_training.method"]))
        base = {
            "models.0.huggingface_id": str(self.files["model"]),
            "dataset.train_file": str(self.files["singles" if method in ("sft", "distill") else "pairs"]),
            "training.output_dir": str(self.new_folder()),
            **RECIPE,
        }
        names = {key if key in ("models", "dataset.name") else key.rpartition(".")[2] for key in asked}
        kept = {key: v for key, v in base.items() if not {key.rpartition(".")[2], key.partition(".")[0]} & names}
        return strop.load_config(overrides={**kept, **asked})

    def new_folder(self) -> Path:
        self._num_folders += 1
        return self.folder / str(self._num_folders)

    def __call__(self, keys: Mapping[str, Any] | None = None, *, fresh: bool | None = None, **bare: Any) -> Run:
        """fresh: a run of its own. Default: in a test that watches what happens inside; False is for one that such a
        test compares with, before it changes anything."""
        name = json.dumps({**(keys or {}), **bare}, sort_keys=True)
        known = {} if (self.watched if fresh is None else fresh) else self._made
        if name not in known:
            (result,) = strop.train(self.config(keys, **bare))
            known[name] = Run(result.run_dir)
        return known[name]

    def at(self, path: Path) -> Run:
        """A run that a test has made otherwise."""
        return Run(path)

    def prepare(self, keys: Mapping[str, Any] | None = None, **bare: Any) -> Prepared:
        """The road up to the weights."""
        config = self.config(keys, **bare)
        return prepare(config, config.models[0])

    def policy(self, keys: Mapping[str, Any] | None = None, **bare: Any) -> Policy:
        config = self.config(keys, **bare)
        return build_policy(config, config.models[0], torch.device("cpu"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: Any, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    files = {"model": folder / "model", "other": folder / "other"}
    for seed, path in enumerate(files.values()):
        make_model(seed).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    pairs = [
        {
            "prompt": f"question {i} " + "hello " * (i % 3),
            "chosen": "yes " * (1 + i % 4),
            "rejected": "no maybe " * (2 + i % 3),
        }
        for i in range(NUM_ROWS)
    ]
    singles = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    for name, rows in (("pairs", pairs), ("singles", singles)):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    files["groups"] = folder / "groups.jsonl"  # of `group_step`
    return Runs(folder, files)


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs are compared bit for bit and with float32, wherever the tests run."""
    if "runs" in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def _small_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three of the rows of these tests, so that their steps are cut."""
    monkeypatch.setattr("strop.plan.micro_batch_size.CPU_TOKENS", MICRO_BATCH)


@pytest.fixture
def watched(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """To watch or change what happens inside of runs; each is a fresh one then."""
    monkeypatch.setattr(runs, "watched", True)
    return monkeypatch


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where reference log-probs of this test alone are kept."""
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


@pytest.fixture
def forwards(watched: pytest.MonkeyPatch) -> list[tuple[bool, Batch]]:
    """Every forward pass of every policy, in order: whether gradients are on, and the batch."""
    seen: list[tuple[bool, Batch]] = []
    forward = Policy.forward

    def noted(self: Policy, batch: Batch) -> Tensor:
        seen.append((torch.is_grad_enabled(), batch))
        return forward(self, batch)

    watched.setattr(Policy, "forward", noted)
    return seen


@pytest.fixture
def built(watched: pytest.MonkeyPatch) -> list[Policy]:
    """Every policy that a run builds; after the run, in its last state."""
    policies: list[Policy] = []

    def build(*args: Any, **kwargs: Any) -> Policy:
        policies.append(build_policy(*args, **kwargs))
        return policies[-1]

    watched.setattr(session, "build_policy", build)
    return policies


def _logps_by_hand(model: nn.Module, group: Group) -> list[Tensor]:
    found = []
    for completion in group.completions:
        ids = torch.tensor([[*group.prompt_ids, *completion.ids]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        per_token = logps.gather(1, ids[0, 1:, None])[len(group.prompt_ids) - 1 :, 0]
        found.append(per_token[torch.tensor(list(completion.loss_mask), dtype=torch.bool)])
    return found


@pytest.fixture(scope="session")
def logps_by_hand() -> Callable[[nn.Module, Group], list[Tensor]]:
    """A transformers model and a group -> [trained tokens] log-probs of each completion."""
    return _logps_by_hand


@pytest.fixture(scope="session")
def group_step(
    runs: Runs, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> list[list[dict[str, Any]]]:
    """Four groups as `group_papers` has them, which are the rows of `runs.files["groups"]`. `pi` is the model of the
    runs, `ref` the other one; the rest is made up, on both sides of the bounds of every gate."""
    draw, num_tokens = np.random.default_rng(0), len(make_tokenizer())
    models = {"pi": make_model(0), "ref": make_model(1)}
    step, rows = [], []
    for lengths, rewards in (
        ((3, 5, 1), (0.0, 1.0, 2.0)),
        ((6, 2), (1.0, 0.5)),
        ((4, 4), (1.0, 2.0)),
        ((2, 6), (3, 1)),
    ):
        prompt, *ids = (draw.integers(4, num_tokens, n).tolist() for n in (3, *lengths))
        group = Group(prompt, tuple(Completion(own, b"\1" * len(own)) for own in ids), Origin("made", 1))
        by_hand = {name: [x.numpy() for x in _logps_by_hand(model, group)] for name, model in models.items()}
        completions = []
        with torch.no_grad():
            whole = [models["pi"](input_ids=torch.tensor([prompt + own])).logits[0, 2:-1] for own in ids]
        distributions = [logits.double().softmax(-1).numpy() for logits in whole]
        for pi, ref, p, r in zip(by_hand["pi"], by_hand["ref"], distributions, rewards, strict=True):
            old = np.minimum(pi + draw.normal(0, 0.4, len(pi)), -1e-3)
            sampler = np.minimum(old + draw.normal(0, 0.3, len(pi)), -1e-3)
            completions.append({"pi": pi, "ref": ref, "old": old, "sampler": sampler, "p": p, "r": r})
        step.append(completions)
        columns = {name: [y[key].tolist() for y in completions] for name, key in GROUP_COLUMNS.items()}
        rows.append({"prompt_ids": prompt, "completion_ids": ids, "rewards": list(rewards), **columns})
    runs.files["groups"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return step


@pytest.fixture
def here(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the module's `ground`, which is the working folder."""
    folder = tmp_path / "here"
    shutil.copytree(ground, folder)
    monkeypatch.chdir(folder)
    return folder
