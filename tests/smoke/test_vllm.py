"""Runs whose completions a vLLM server draws: by the real road, with a server of the tests' own.

What is sent and what a server may answer is in tests/unit/rollout/test_vllm.py.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import strop
from fake_vllm import FakeVllm, GoneError
from same_runs import in_many
from strop.config import RunConfig, load_config
from strop.errors import ConfigError, TrainingError
from strop.prepared import prepare

REWARD = """
def codes(completions):
    return [sum(map(ord, text)) % 17 / 17 for text in completions]
"""


def config(folder: Path, model_dir: Path, server: FakeVllm, **keys: Any) -> RunConfig:
    rows = [{"prompt": f"question {i}"} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(REWARD)
    overrides: dict[str, Any] = {
        "models.0.huggingface_id": str(model_dir),
        "models.0.name": "run",
        "dataset.train_file": str(folder / "rows.jsonl"),
        "post_training.method": "grpo",
        "lora.r": 4,
        "rollout.num_generations": 4,
        "rollout.sampler": "vllm",
        "rollout.vllm_url": server.url,
        "rollout.vllm_retry_seconds": 0.0,
        "rewards": [f"{folder / 'own.py'}:codes"],
        "training.output_dir": str(folder / "out"),
        "training.groups_per_step": 3,
        "training.max_steps": 3,
        "training.max_seq_length": 64,
        "training.max_completion_length": 6,
        "training.learning_rate": 2e-2,
        "training.warmup_steps": 0,
        "training.logging_steps": 1,
        **keys,
    }
    return load_config(overrides={name: value for name, value in overrides.items() if value is not ...})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rollout__sampler(tmp_path: Path, model_dir: Path) -> None:
    """Each step samples with its own weights, trains on what was drawn, and is evaluated by the server, too."""
    keys = {"dataset.validation_split": 0.34, "training.eval_steps": 3, "rollout.stop": ["e"]}
    keys |= {"post_training.sampler_correction": "token_truncate", "training.max_steps": 4}
    with FakeVllm(model_dir) as server:
        (result,) = strop.train(config(tmp_path, model_dir, server, **keys, **{"training.groups_per_step": 2}))
        assert not server.adapters and not (result.run_dir / "served").exists(), "nothing stays behind"
        drawn = [body for body in server.asked("/v1/completions") if body["temperature"] == 1]
        greedy = [body for body in server.asked("/v1/completions") if body["temperature"] == 0]
    assert len(drawn) == 4 * 2 and len(greedy) == 3 * 2, "evaluated before, after 3 and at the end"
    names = [{body["model"] for body in drawn[i : i + 2]} for i in range(0, 8, 2)]
    assert all(len(own) == 1 for own in names) and len(set.union(*names)) == 4
    rollouts = lines(result.run_dir / "rollouts.jsonl")
    assert len(rollouts) == 8
    for row in rollouts:
        for own, again, text, ended in zip(
            row["sampler_logps"], row["old_logps"], row["texts"], row["ended"], strict=True
        ):
            assert own == pytest.approx(again, abs=1e-4) and own != again, "told by two programs"
            assert "e" not in text or ended
    train = [line for line in lines(result.run_dir / "metrics.jsonl") if line["split"] == "train"]
    assert all(0 < line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in train)
    assert all("entropy" not in line and line["time/score"] > 0 for line in train)
    assert len({line["weights_digest"] for line in train}) == 4


@pytest.mark.nightly
def test_a_server_that_dies_in_the_middle_costs_nothing(tmp_path: Path, model_dir: Path) -> None:
    """The run stops with a message; resumed with a server, it ends where an unbroken one ends, bit for bit."""
    keys = {"training.save_steps": 1, "finetuning.load_best_model_at_end": False, "lora.lora_dropout": 0.1}
    with FakeVllm(model_dir) as server:
        (whole,) = strop.train(config(tmp_path, model_dir, server, **keys))
        kept = shutil.copytree(whole.run_dir, tmp_path / "kept")
        answered = [0]

        def dies(path: str, body: dict[str, Any]) -> None:
            answered[0] += path == "/v1/completions"
            if answered[0] > 4:  # of 9: within the second step
                raise GoneError

        server.before = dies
        given = config(tmp_path, model_dir, server, **keys)
        with pytest.raises(TrainingError, match="cannot be reached") as gone:
            strop.train(given, overwrite=True)
        assert "strop train --resume" in gone.value.fix
        server.before = lambda path, body: None
        (again,) = strop.train(given, resume="auto")
    for name in ("rollouts.jsonl", "final/adapter_model.safetensors"):
        assert (again.run_dir / name).read_bytes() == (kept / name).read_bytes(), name


@pytest.mark.nightly
def test_rollout__staleness(tmp_path: Path, model_dir: Path) -> None:
    """The server draws for the next step while this one trains, with weights that are a step older; log-probs are those
    of the weights that drew. A run that goes on ends where an unbroken one ends, bit for bit."""
    keys = {"rollout.staleness": 1, "training.max_steps": 4, "training.save_steps": 1, "post_training.epsilon": 1e-4}
    keys |= {"finetuning.load_best_model_at_end": False, "dataset.validation_split": 0.34, "training.eval_steps": 2}
    # the server is in this process and draws from the same random state as dropout would
    keys |= {"training.groups_per_step": 2, "lora.lora_dropout": 0.0}
    file = tmp_path / "out" / "run" / "metrics.jsonl"

    def drawn(server: FakeVllm) -> list[dict[str, Any]]:
        return [body for body in server.asked("/v1/completions") if body["temperature"] == 1]

    with FakeVllm(model_dir) as server:

        def waits(path: str, body: dict[str, Any]) -> None:
            until = time.monotonic() + 60
            while path == "/v1/completions" and len(drawn(server)) > 4:  # what step 3 draws, by the weights of step 1
                if file.exists() and any(line["step"] == 2 and line["split"] == "train" for line in lines(file)):
                    return
                assert time.monotonic() < until, "step 2 waits for what step 3 draws"
                time.sleep(0.01)

        server.before = waits
        (whole,) = strop.train(config(tmp_path, model_dir, server, **keys))
        assert not server.adapters and not (whole.run_dir / "served").exists()
        by_step = [{body["model"] for body in drawn(server)[i : i + 2]} for i in range(0, 8, 2)]
        assert by_step[0] == by_step[1] and len(set.union(*by_step)) == 3 and all(len(own) == 1 for own in by_step)
        kept = shutil.copytree(whole.run_dir, tmp_path / "kept")
        num_before = len(drawn(server))

        def dies(path: str, body: dict[str, Any]) -> None:
            if len(drawn(server)) > num_before + 6:  # what step 4 draws, after step 2
                raise GoneError

        server.before = dies
        given = config(tmp_path, model_dir, server, **keys)
        with pytest.raises(TrainingError, match="cannot be reached"):
            strop.train(given, overwrite=True)
        assert not (whole.run_dir / "checkpoint-3").exists(), "it would have to hold what could not be drawn"
        server.before = lambda path, body: None
        (again,) = strop.train(given, resume="auto")
    for name in ("rollouts.jsonl", "final/adapter_model.safetensors"):
        assert (again.run_dir / name).read_bytes() == (kept / name).read_bytes(), name
    with pytest.raises(ConfigError, match=r"rollout\.staleness is 1, and 2 processes train"):
        prepare(given, given.models[0], num_processes=2)
    rollouts = lines(kept / "rollouts.jsonl")
    assert [row["step"] for row in rollouts] == [1, 1, 2, 2, 3, 3, 4, 4]
    for row in rollouts:
        for own, scored in zip(row["sampler_logps"], row["old_logps"], strict=True):
            assert own == pytest.approx(scored, abs=1e-4), "of the weights that drew"
    clipped = [r["clip_ratio/region_mean"] for r in lines(kept / "metrics.jsonl") if r["split"] == "train"]
    assert clipped[0] == 0 < min(clipped[1:]), "the ratio sees how old they are"


@pytest.mark.nightly
def test_rollout__vllm_max_logp_difference(tmp_path: Path, model_dir: Path) -> None:
    """A server that goes on with its first adapter under every name is found."""
    with FakeVllm(model_dir) as server:
        stale: dict[str, str] = {}

        def keeps_the_first(path: str, body: dict[str, Any]) -> None:
            if path == "/v1/load_lora_adapter":
                first = stale.setdefault("folder", str(tmp_path / "first"))
                if not Path(first).exists():
                    shutil.copytree(body["lora_path"], first)
                body["lora_path"] = first

        server.before = keeps_the_first
        keys = {"training.learning_rate": 0.5}
        with pytest.raises(TrainingError, match="nats per token apart, on average") as apart:
            strop.train(config(tmp_path, model_dir, server, **keys))
        assert apart.value.where == "step 2"
        wide = {**keys, "rollout.vllm_max_logp_difference": 1e6}
        strop.train(config(tmp_path, model_dir, server, **wide), overwrite=True)


@pytest.mark.nightly
def test_processes_share_a_server(tmp_path: Path, model_dir: Path) -> None:
    runs = []
    with FakeVllm(model_dir) as server:
        for size in (1, 2):
            folder = tmp_path / str(size)
            folder.mkdir()
            keys = {"lora.lora_dropout": 0.0, "training.max_steps": 2}  # masks are drawn per micro-batch
            given = config(folder, model_dir, server, **keys)
            path = strop.train(given)[0].run_dir if size == 1 else in_many(size, given)
            runs.append([{k: v for k, v in row.items() if "logps" not in k} for row in lines(path / "rollouts.jsonl")])
            assert len(server.asked("/v1/load_lora_adapter")) == 2 * size, "one process publishes"
    (alone, many) = (
        [{**row, "where": Path(row["where"]).name, "rewards_by_name": None} for row in run] for run in runs
    )
    assert alone == many


@pytest.mark.nightly
def test_a_server_draws_pairs_for_online_dpo(tmp_path: Path, model_dir: Path) -> None:
    keys = {"post_training.method": "dpo", "post_training.online": True, "training.max_steps": 2}
    with FakeVllm(model_dir) as server:
        (result,) = strop.train(config(tmp_path, model_dir, server, **keys))
        assert len(server.asked("/v1/load_lora_adapter")) == 2
    for row in lines(result.run_dir / "rollouts.jsonl"):
        assert [len(ids) for ids in row["completion_ids"]] == [len(logps) for logps in row["old_logps"]]
        assert row["pair"] is None or row["rewards"][row["pair"][0]] > row["rewards"][row["pair"][1]]


def test_rollout__vllm_url(tmp_path: Path, model_dir: Path) -> None:
    with FakeVllm(model_dir) as named, FakeVllm(model_dir) as other:
        strop.train(config(tmp_path, model_dir, named, **{"training.max_steps": 1}))
        assert named.asked("/v1/completions") and not other.requests


def test_rollout__vllm_timeout(tmp_path: Path, model_dir: Path) -> None:
    with FakeVllm(model_dir) as server:
        server.before = lambda path, body: time.sleep(1) if path == "/v1/load_lora_adapter" else None
        with pytest.raises(TrainingError, match=r"no whole answer to .* within 0\.4 seconds"):
            strop.train(config(tmp_path, model_dir, server, **{"rollout.vllm_timeout": 0.4}))


@pytest.mark.nightly
def test_rollout__vllm_retry_seconds(tmp_path: Path, model_dir: Path) -> None:
    """A server that is starting, and one that never does."""
    with FakeVllm(model_dir) as server:
        answers = iter([(503, "starting")])
        server.before = lambda path, body: next(answers, None)
        keys = {"training.max_steps": 1, "rollout.vllm_retry_seconds": 5.0}
        strop.train(config(tmp_path, model_dir, server, **keys))
    with pytest.raises(TrainingError, match=r"tried again for 0\.1 seconds"):
        strop.train(config(tmp_path, model_dir, server, **{"rollout.vllm_retry_seconds": 0.1}), overwrite=True)


@pytest.mark.nightly
def test_rollout__vllm_requests(tmp_path: Path, model_dir: Path) -> None:
    def most_at_once(allowed: int) -> int:
        lock, now, most = threading.Lock(), [0], [0]

        def begins(path: str, body: dict[str, Any]) -> None:
            if path == "/v1/completions":
                with lock:
                    now[0] += 1
                    most[0] = max(most[0], now[0])
                time.sleep(0.1)

        def ends(path: str, answer: dict[str, Any]) -> dict[str, Any]:
            if path == "/v1/completions":
                with lock:
                    now[0] -= 1
            return answer

        with FakeVllm(model_dir) as server:
            server.before, server.after = begins, ends
            keys = {"training.max_steps": 1, "rollout.vllm_requests": allowed}
            strop.train(config(tmp_path, model_dir, server, **keys), overwrite=allowed > 1)
        return most[0]

    assert most_at_once(1) == 1 and most_at_once(3) > 1


@pytest.mark.nightly
def test_rollout__vllm_model(tmp_path: Path, model_dir: Path) -> None:
    with FakeVllm(model_dir) as server:
        with pytest.raises(ConfigError, match="and not another") as other:
            strop.train(config(tmp_path, model_dir, server, **{"rollout.vllm_model": "another"}))
        assert "rollout.vllm_model" in other.value.fix
        named = {"rollout.vllm_model": str(model_dir), "training.max_steps": 1}
        strop.train(config(tmp_path, model_dir, server, **named), overwrite=True)


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"lora.r": ...}, "all weights train"),
        ({"lora.use_dora": True}, r"does not serve adapters with lora\.use_dora"),
        ({"lora.modules_to_save": ["embed_tokens"]}, r"does not serve adapters with lora\.modules_to_save"),
        ({"models.0.add_tokens": ["<think>"]}, "does not know the tokens that .* gets by add_tokens"),
        ({"rollout.batch_tokens": 100}, "batch_tokens is given, and sampler vllm does not read it"),
        (
            {"rollout.sampler": "policy", "rollout.vllm_retry_seconds": ..., "rollout.vllm_url": "http://a:1"},
            "vllm_url is given, and sampler policy does not read it",
        ),
        ({"rollout.vllm_url": "localhost:8000"}, "vllm_url is localhost:8000"),
        (
            {
                "rollout.sampler": "policy",
                "rollout.vllm_retry_seconds": ...,
                "rollout.vllm_url": ...,
                "rollout.staleness": 1,
            },
            "staleness is 1, and sampler policy samples and trains on one device",
        ),
        ({"rollout.temperature": 0.7, "rollout.top_p": 0.9}, "before both or behind both"),
        (
            {"rollout.top_p": 0.9, "post_training.sampler_correction": "token_mask"},
            r"with rollout\.top_p the sampler draws from a part",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    keys: dict[str, Any], found: str, tmp_path: Path, model_dir: Path
) -> None:
    nobody: Any = type("Nobody", (), {"url": "http://127.0.0.1:9"})
    with pytest.raises(ConfigError, match=found):
        config(tmp_path, model_dir, nobody, **keys)


def test_what_the_server_does_not_say_decides_nothing(tmp_path: Path, model_dir: Path) -> None:
    """Before anything is asked of it."""
    nobody: Any = type("Nobody", (), {"url": "http://127.0.0.1:9"})
    keys = {"finetuning.metric_for_best_model": "eval_entropy", "dataset.validation_split": 0.34}
    with pytest.raises(ConfigError, match="no evaluation has a metric 'entropy'"):
        strop.train(config(tmp_path, model_dir, nobody, **keys))
