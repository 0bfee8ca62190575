"""Small runs that sample, for tests: a few prompts, rewards of a file, a handful of steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import strop
from strop.config import RunConfig, load_config

REWARDS = """
def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / (1 + len(text)) for text in completions]

def same(completions, **_):
    return [1.0 for _ in completions]

def odd(completions, answer, **_):
    return [len(text) * float(a % 2) for text, a in zip(completions, answer)]
"""


def sampling(
    folder: Path, model: Path, method: dict[str, Any], *rewards: Any, functions: str = REWARDS, **keys: Any
) -> RunConfig:
    """The configuration of a run over six prompts, three per step, with four completions of each. A reward's name is
    one of `functions`, or all that a reward may be."""
    rows = [{"prompt": f"question {i}", "completion": "yes", "answer": i} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(functions)
    named = [f"{folder / 'own.py'}:{r}" if isinstance(r, str) and r.isidentifier() else r for r in rewards]
    overrides: dict[str, Any] = {
        "models": [{"huggingface_id": str(model), "name": "run"}],
        "dataset.train_file": str(folder / "rows.jsonl"),
        **{f"post_training.{key}": value for key, value in method.items()},
        "rollout.num_generations": 4,
        **({"rewards": named} if named else {}),
        "training.output_dir": str(folder / "out"),
        "training.groups_per_step": 3,
        "training.max_steps": 4,
        "training.max_seq_length": 64,
        "training.max_completion_length": 8,
        "training.learning_rate": 1e-2,
        "training.warmup_steps": 0,
        "training.logging_steps": 1,
        **keys,
    }
    if overrides["rollout.num_generations"] is None:  # nothing is sampled
        del overrides["rollout.num_generations"]
    return load_config(overrides=overrides)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_resumes(config: RunConfig, folder: Path, steps: tuple[int, ...]) -> None:
    """A run that goes on after each of these steps samples and trains the same, to the last bit.

    config: saves every step, and keeps all checkpoints.
    """
    (whole,) = strop.train(config)
    kept = shutil.copytree(whole.run_dir, folder / "kept")
    for step in steps:
        shutil.rmtree(whole.run_dir)
        shutil.copytree(kept, whole.run_dir)
        for later in range(step + 1, config.training.max_steps + 1 if config.training.max_steps else step):
            shutil.rmtree(whole.run_dir / f"checkpoint-{later}")
        shutil.rmtree(whole.run_dir / "final")
        (again,) = strop.train(config, resume="auto")
        for name in ("rollouts.jsonl", "final/model.safetensors"):
            assert (again.run_dir / name).read_bytes() == (kept / name).read_bytes(), f"{name}, resumed after {step}"
        digests = [[r["weights_digest"] for r in lines(f / "metrics.jsonl")] for f in (kept, again.run_dir)]
        assert digests[0] == digests[1]
