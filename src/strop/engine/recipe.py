"""The recipe: the settings that decide a run's result. A resume compares them with those of its checkpoint. Floor 3."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from strop.config import RunConfig
from strop.config.guidance import is_default
from strop.engine.checkpoint import Checkpoint
from strop.errors import CheckpointError
from strop.objectives.base import build_objective

log = logging.getLogger("strop")

FREE_SECTIONS = ("gpu", "logging", "dataset")
"""Sections that are not compared. The effect of `dataset` is compared through the fingerprint of the groups."""
FREE_KEYS = frozenset(
    {
        "training.output_dir",
        "training.per_device_train_batch_size",  # compared as groups_per_step
        "training.per_device_eval_batch_size",
        "training.gradient_accumulation_steps",
        "training.micro_batch_tokens",
        "training.logging_steps",
        "training.save_steps",
        "training.eval_at_start",
        "training.save_total_limit",
        "training.async_save",
        "training.mount_dir",
        "training.push_to_hub",
        "training.hub_model_id",
        "training.hub_private_repo",
        "training.gradient_checkpointing",
        "training.reference_store",
        "training.auto_precision",  # compared as bf16 and fp16
        "training.max_seq_length",  # compared through the groups, as the next two
        "training.max_prompt_length",
        "training.max_completion_length",
        "rollout.batch_tokens",
        "rollout.probe_prompts",
        "rollout.vllm_url",
        "rollout.vllm_model",
        "rollout.vllm_timeout",
        "rollout.vllm_retry_seconds",
        "rollout.vllm_requests",
        "rollout.vllm_max_logp_difference",
        "rollout.reward_timeout",
        "rollout.reward_memory_gib",
        "finetuning.resume_from_checkpoint",
        "finetuning.stop_on",
        "finetuning.sample_max_new_tokens",
        "finetuning.sample_prompts",
    }
)

NULL_MEANS = {"training.bf16": False, "training.fp16": False}
"""What null stands for, so that writing it out is no change."""


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """Every setting that decides the result of a run, by dotted key, as plain JSON values."""
    keys = {
        key: NULL_MEANS.get(key) if value is None else value
        for key, value, _ in config.leaves()
        if key not in FREE_KEYS and key.split(".")[0] not in FREE_SECTIONS and not key.endswith(".name")
    }
    if cut_matters(config):
        keys["training.micro_batch_tokens"] = config.training.micro_batch_tokens
    if config.training.packing or build_objective(config.post_training).also:
        # packed rows are filled to it, and completions of other rows are truncated to it
        keys["training.max_seq_length"] = config.training.max_seq_length
    if config.rollout.enabled:  # completions are sampled up to these
        keys["training.max_seq_length"] = config.training.max_seq_length
        keys["training.max_completion_length"] = config.training.max_completion_length
    if config.dataset.date is not None:
        keys["dataset.date"] = config.dataset.date  # so that a resume prints the same day
    plain: dict[str, Any] = json.loads(json.dumps(keys, default=lambda section: section.model_dump()))
    return plain


def cut_matters(config: RunConfig) -> bool:
    """Whether cutting a step differently changes its result: it does under dropout, whose masks are drawn per
    micro-batch."""
    return config.lora.lora_dropout > 0 and any(map(config.adapts, config.models))


MADE_FROM = {
    "data": "data: the training or validation groups are not those of the run (see data.json)",
    "weights": "models: the weights that the run started from have changed",
    "configuration": "models: the model's config.json has changed, and with it what the model computes",
    "reference": "post_training.ref_model_id: the weights of that model have changed",
    "teacher": "post_training.teacher_model_id: the weights of that model have changed",
    "reference_configuration": "post_training.ref_model_id: that model's config.json has changed",
}
"""The hashes of a checkpoint, and the message if one differs."""


LENGTH = ("training.max_steps", "training.num_epochs")
"""Settings by which a finished run can be extended."""


def extends(done: Checkpoint, config: RunConfig, num_steps: int) -> bool:
    """Whether the configuration asks for a longer run than the finished one, which had `num_steps`."""
    before, now = done.state["recipe"], recipe_of(config)
    changed = [key for key in LENGTH if before.get(key) != now[key] and not _is_default(config, key)]
    return bool(changed) and all(_is_raised(before.get(key), now[key], num_steps) for key in changed)


def _is_raised(before: int | None, now: int | None, num_steps: int) -> bool:
    """before: None if epochs decided the length; then a limit of steps is compared with their number, `num_steps`."""
    if now is None:
        return False
    return now > num_steps if before is None else now >= before


def _is_default(config: RunConfig, key: str) -> bool:
    return is_default(config.origins.get(key, "default"))


def check_recipe(
    checkpoint: Checkpoint,
    config: RunConfig,
    made_from: Mapping[str, str],
    allow_changes: bool,
    *,
    extended: int | None = None,
) -> None:
    """Compares this run with the one that wrote `checkpoint`.

    Args:
        made_from: hashes under the names of `MADE_FROM`.
        allow_changes: only warn about differences; the new config.yaml and data.json record them.
        extended: the number of steps of the finished run, if it is extended: then its length may be raised.

    Raises:
        CheckpointError: a setting, the data or the weights differ; every difference is listed.
    """
    before, now = _with_keys_of_now(checkpoint, config), recipe_of(config)
    raised = [key for key in LENGTH if extended is not None and _is_raised(before.get(key), now[key], extended)]
    if changes := _differences(_only(before, set(raised)), _only(now, set(raised))):
        log.info(
            "the finished run is extended (%s): after step %d the learning rate is that of a run of the new length",
            "; ".join(changes),
            checkpoint.step,
        )
        before |= _only(now, set(raised))
    settings = _differences(before, now)
    _refuse(checkpoint, settings + _others(checkpoint, made_from), allow_changes)


def check_made_from(checkpoint: Checkpoint, made_from: Mapping[str, str], allow_changes: bool) -> None:
    """Compares hashes that are known later, such as those of a reference that is another model.

    Raises:
        CheckpointError: one differs, and `allow_changes` is False.
    """
    _refuse(checkpoint, _others(checkpoint, made_from), allow_changes)


def _others(checkpoint: Checkpoint, made_from: Mapping[str, str]) -> list[str]:
    return [MADE_FROM[name] for name, value in made_from.items() if checkpoint.identity.get(name, value) != value]


def _refuse(checkpoint: Checkpoint, differences: Sequence[str], allow_changes: bool) -> None:
    if not differences:
        return
    listed = "".join(f"\n    {line}" for line in differences)
    if not allow_changes:
        raise CheckpointError(
            f"this run is not the one that wrote the checkpoint:{listed}",
            where=str(checkpoint.path),
            expected="the same settings, data and weights, so that the resumed run equals an unbroken one",
            fix="restore these, or accept a different result with --allow-changes",
        )
    log.warning("resuming from %s with changes:%s", checkpoint.path, listed)


_ANEW = "train anew with --overwrite or in another training.output_dir, or leave it out"


def check_given(done: Checkpoint, config: RunConfig, resume: str) -> None:
    """Refuses settings that differ from those of the finished run `done`. Those that are not given are not compared;
    nor is null, which may be decided later: `check_finished` compares all.

    Raises:
        CheckpointError: a checkpoint is named, or a setting is given that the run did not have.
    """
    if resume != "auto":
        raise CheckpointError(
            "the run is finished, so it cannot be resumed from a checkpoint", where=f"--resume {resume}", fix=_ANEW
        )
    before, now = _with_keys_of_now(done, config), recipe_of(config)
    given = {key for key, value in now.items() if value is not None and not _is_default(config, key)}
    _refuse_finished(done, "settings", _differences(before, {**before, **_only(now, given)}))


def check_finished(done: Checkpoint, config: RunConfig, made_from: Mapping[str, str]) -> None:
    """Refuses a configuration that is not that of the finished run `done`; it compares as `check_recipe` does.

    Raises:
        CheckpointError: a setting, the data or the weights differ; every difference is listed.
    """
    differences = _differences(_with_keys_of_now(done, config), recipe_of(config)) + _others(done, made_from)
    _refuse_finished(done, "settings, data or weights", differences)


def _refuse_finished(done: Checkpoint, what: str, differences: Sequence[str]) -> None:
    if differences:
        listed = "".join(f"\n    {line}" for line in differences)
        raise CheckpointError(
            f"the run is finished, with other {what}:{listed}", where=str(done.path.parent), fix=_ANEW
        )


def _with_keys_of_now(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any]:
    """The recipe of a checkpoint. Keys that strop did not have when it was written get their present values where
    nobody has set them: under the default of a new key, runs are what they were without it."""
    before: dict[str, Any] = checkpoint.state["recipe"]
    added = {key: value for key, value in recipe_of(config).items() if key not in before and _is_default(config, key)}
    if added:
        log.info("%s was written without %d settings that are new, at their defaults", checkpoint.path, len(added))
    return before | added


def _only(recipe: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key in keys}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    missing = "absent"
    return [
        f"{key}: {_shown(before.get(key, missing))} then, {_shown(now.get(key, missing))} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, missing) != now.get(key, missing)
    ]


def _shown(value: Any) -> Any:
    return {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else value
