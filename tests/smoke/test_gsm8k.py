"""The example on grade-school mathematics trains on rows of GSM8K's form, and its reward reads the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import strop

pytest.importorskip("math_verify", reason="the reward math_equal needs it; install the extra `rewards`")

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "gsm8k" / "gsm8k.yaml"


@pytest.mark.nightly
def test_it_trains(tmp_path: Path, model_dir: Path) -> None:
    rows = [
        {"prompt": f"{i} + {i} = ?", "answer": f"{i} and {i} are {2 * i}.\n#### {2 * i}", "final": str(2 * i)}
        for i in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = strop.load_config(
        CONFIG,
        overrides={
            "models.0.huggingface_id": str(model_dir),
            "dataset.train_file": str(tmp_path / "rows.jsonl"),
            "training.output_dir": str(tmp_path / "out"),
            "training.groups_per_step": 2,
            "training.max_completion_length": 8,
            "training.max_steps": 2,
            "training.logging_steps": 1,
            "rollout.num_generations": 3,
        },
    )
    (result,) = strop.train(config)
    sampled = [json.loads(line) for line in (result.run_dir / "rollouts.jsonl").read_text().splitlines()]
    assert len(sampled) == 4
    assert all(reward in (0.0, 1.0) for group in sampled for reward in group["rewards_by_name"]["math_equal"])
