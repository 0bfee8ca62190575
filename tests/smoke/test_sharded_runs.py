"""Whole runs with `gpu.fsdp`: the losses, margins and weights of one process, also after resumes on other meshes."""

from __future__ import annotations

from typing import Any

import pytest

from same_runs import CUT, KINDS, LORA, RELATIVE, assert_close, assert_same_run, in_many, train
from strop.config.layers import load_config
from strop.errors import CheckpointError, ConfigError

FSDP = {"gpu.fsdp": True}
SAVED = {"training.save_steps": 2, "training.save_total_limit": None}


def test_a_sharded_run_is_that_of_one_process_and_goes_on_anywhere(runs: Any) -> None:
    """All weights train; sharded over 2, then one process, then 2 x 2: the steps that follow are the same."""
    settings = {**KINDS["dpo"], **CUT, **SAVED, "training.max_steps": 6, "training.reference_store": True}
    best = {"finetuning.load_best_model_at_end": True, "finetuning.metric_for_best_model": "eval_loss"}
    settings |= best
    alone = runs(settings)  # which leaves log-probs of the reference in the store
    begun = in_many(2, runs.config({**settings, **FSDP}))
    assert_same_run(alone, runs.at(begun))
    files = {path.name for path in (begun / "checkpoint-2").iterdir()}
    assert files == {
        "MANIFEST.json",
        "state.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
    }
    then = train(runs.config(settings), resume=str(begun / "checkpoint-2"))[0]
    last = in_many(4, runs.config({**settings, **FSDP, "gpu.shard_size": 2}), str(then / "checkpoint-4"))
    for run, first in ((runs.at(then), 3), (runs.at(last), 5)):
        assert run.steps() == list(range(first, 7))
        assert run.series("loss") == pytest.approx(alone.series("loss")[first - 1 :], rel=RELATIVE)
        assert_close(alone.final, run.final)
    (last / "checkpoint-6" / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="shard-00002"):
        train(runs.config(settings), resume=str(last / "checkpoint-6"))


def test_sharded_adapters(runs: Any) -> None:
    """Also adapters and modules that train whole are gathered for final/ and found again by a resume."""
    settings = {**KINDS["kto"], **LORA, **CUT, **SAVED, "lora.modules_to_save": ["lm_head"]}
    alone = runs(settings)
    config = runs.config({**settings, **FSDP})
    run = runs.at(in_many(2, config))
    assert_same_run(alone, run)
    (run.path / "final").rename(run.path / "elsewhere")
    for path in run.path.glob("checkpoint-4"):
        path.rename(path.with_name("away"))
    assert in_many(2, config, "auto") == run.path
    assert_same_run(alone, run)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_sharded_adapters_of_a_base_in_4_bits(runs: Any, kind: str) -> None:
    """The reference is the base without adapters; a checkpoint goes on in one process, whose base lies in bytes."""
    pytest.importorskip("bitsandbytes")
    settings = {**KINDS[kind], **LORA, **CUT, **SAVED, "lora.enabled": True, "models.0.quant": "4bit"}
    alone = runs(settings)
    run = runs.at(in_many(2, runs.config({**settings, **FSDP})))
    assert_same_run(alone, run)
    then = runs.at(train(runs.config(settings), resume=str(run.path / "checkpoint-2"))[0])
    assert then.steps() == [3, 4]
    assert_close(alone.final, then.final)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"training.optim": "adamw_8bit"}, "adamw_8bit, which looks at more of a weight"),
        ({"models.0.quant": "8bit", "lora.enabled": True}, "models.0.quant is 8bit"),
        ({"models.0.quant": "4bit", "lora.enabled": True, "lora.use_dora": True}, "use_dora is true"),
        ({"post_training.method": "dpo", "post_training.ref_sync_steps": 2}, "ref_sync_steps keeps a second"),
        ({"gpu.use_ddp": True}, "fsdp and use_ddp are both true"),
        ({"training.fp16": True}, "training.fp16 scales its loss"),
        ({"post_training.method": "reward"}, "method reward needs a whole model"),
        ({"finetuning.sample_prompts": 2}, "sample_prompts are answered by a whole model"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings: dict[str, Any], found: str) -> None:
    models = [{"huggingface_id": "org/a", "quant": settings.pop("models.0.quant", "none")}]
    with pytest.raises(ConfigError, match=found):
        load_config(overrides={"models": models, **FSDP, **settings})


def test_one_process_is_not_sharded(runs: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert runs({**FSDP, "training.max_steps": 1}).steps() == [1]
    assert "there is one process: nothing is sharded" in caplog.text
