"""What a checkpoint's run was configured and fed with, and whether a resume may go on from it. Floor 3."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from strop.config import RunConfig
from strop.engine.checkpoint import Checkpoint
from strop.errors import CheckpointError
from strop.objectives.base import build_objective

log = logging.getLogger("strop")

FREE_SECTIONS = ("gpu", "logging", "dataset")
"""Sections that change no result: what `dataset` makes of the rows is compared as the fingerprint of the groups."""
FREE_KEYS = frozenset(
    {
        "training.output_dir",
        "training.per_device_train_batch_size",  # groups_per_step stands for the batch
        "training.per_device_eval_batch_size",
        "training.gradient_accumulation_steps",
        "training.micro_batch_tokens",
        "training.logging_steps",
        "training.save_steps",
        "training.eval_at_start",
        "training.save_total_limit",
        "training.mount_dir",
        "training.gradient_checkpointing",
        "training.reference_store",
        "training.auto_precision",  # bf16 and fp16 say what came of it
        "training.max_seq_length",  # seen in the groups, as the next two
        "training.max_prompt_length",
        "training.max_completion_length",
        "finetuning.resume_from_checkpoint",
    }
)

NULL_MEANS = {"training.bf16": False, "training.fp16": False}
"""What null stands for, where writing it out changes nothing."""


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """Every setting that decides the result of a run, by dotted key, as JSON holds it."""
    keys = {
        key: NULL_MEANS.get(key) if value is None else value
        for key, value, _ in config.leaves()
        if key not in FREE_KEYS and key.split(".")[0] not in FREE_SECTIONS and not key.endswith(".name")
    }
    if cut_matters(config):
        keys["training.micro_batch_tokens"] = config.training.micro_batch_tokens
    if config.training.packing or build_objective(config.post_training).also:
        # rows are filled to it; completions of other rows are cut to it
        keys["training.max_seq_length"] = config.training.max_seq_length
    if config.dataset.date is not None:
        keys["dataset.date"] = config.dataset.date  # so that a resume can keep it
    plain: dict[str, Any] = json.loads(json.dumps(keys))
    return plain


def cut_matters(config: RunConfig) -> bool:
    """Whether the cut of a step into micro-batches is part of the recipe: dropout draws its masks by micro-batch."""
    return config.lora.lora_dropout > 0 and any(map(config.adapts, config.models))


MADE_FROM = {
    "data": "data: the training or validation groups are not those of the run (see data.json)",
    "weights": "models: the weights that the run began with are others by now",
    "configuration": "models: the model's config.json says something else by now, and so computes something else",
    "reference": "post_training.ref_model_id: the weights of that model are others by now",
    "reference_configuration": "post_training.ref_model_id: that model's config.json says something else by now",
}
"""What a checkpoint has hashes of, and what to say where they differ."""


LENGTH = ("training.max_steps", "training.num_epochs")
"""Settings that a finished run can be extended by."""


def extends(done: Checkpoint, config: RunConfig, num_steps: int) -> bool:
    """Whether a longer run is asked for than the finished one was, which had `num_steps`."""
    before, now = done.state["recipe"], recipe_of(config)
    changed = [key for key in LENGTH if before.get(key) != now[key] and not _is_default(config, key)]
    return bool(changed) and all(_is_raised(before.get(key), now[key], num_steps) for key in changed)


def _is_raised(before: int | None, now: int | None, num_steps: int) -> bool:
    """before: null where epochs decided; then a limit of steps is longer than the `num_steps` that they came to."""
    if now is None:
        return False
    return now > num_steps if before is None else now >= before


def _is_default(config: RunConfig, key: str) -> bool:
    return config.origins.get(key, "default").startswith("default")


def check_recipe(
    checkpoint: Checkpoint,
    config: RunConfig,
    made_from: Mapping[str, str],
    allow_changes: bool,
    *,
    extended: int | None = None,
) -> None:
    """Compare this run with the one that wrote `checkpoint`. made_from: hashes by the names of `MADE_FROM`. extended:
    the steps of the finished run that is extended, so its length may be raised; None: it was not finished.

    Raises:
        CheckpointError: a setting, the data or the weights differ; every difference is listed. With `allow_changes`
            they are only said, and the run's new config.yaml and data.json record them.
    """
    before, now = dict(checkpoint.state["recipe"]), recipe_of(config)
    raised = [key for key in LENGTH if extended is not None and _is_raised(before.get(key), now[key], extended)]
    if changes := _differences(_only(before, set(raised)), _only(now, set(raised))):
        log.info(
            "the finished run is extended (%s): after step %d the learning rate goes on as in a run of the new length",
            "; ".join(changes),
            checkpoint.step,
        )
        before |= _only(now, set(raised))
    settings = _differences(before, now)
    _refuse(checkpoint, settings + _others(checkpoint, made_from), allow_changes)


def check_made_from(checkpoint: Checkpoint, made_from: Mapping[str, str], allow_changes: bool) -> None:
    """The same of what is known later.

    Raises:
        CheckpointError: it differs, without `allow_changes`.
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
            fix="put these back, or accept another result with --allow-changes",
        )
    log.warning("going on from %s with changes:%s", checkpoint.path, listed)


_ANEW = "train anew with --overwrite or in another training.output_dir, or leave it out"


def check_given(done: Checkpoint, config: RunConfig, resume: str) -> None:
    """The settings that are given are those of the finished run `done`.

    Raises:
        CheckpointError: a checkpoint is named, or a setting is given that the run did not have.
    """
    if resume != "auto":
        raise CheckpointError(
            "the run is finished; no checkpoint is gone on from", where=f"--resume {resume}", fix=_ANEW
        )
    before, now = done.state["recipe"], recipe_of(config)
    given = {key for key, origin in config.origins.items() if not origin.startswith("default")}
    _refuse_finished(done, "settings", _differences(before, {**before, **_only(now, given)}))


def check_finished(done: Checkpoint, config: RunConfig, made_from: Mapping[str, str]) -> None:
    """All that `check_recipe` compares is as it was in the finished run `done`.

    Raises:
        CheckpointError: a setting, the data or the weights differ; every difference is listed.
    """
    differences = _differences(done.state["recipe"], recipe_of(config)) + _others(done, made_from)
    _refuse_finished(done, "settings, data or weights", differences)


def _refuse_finished(done: Checkpoint, what: str, differences: Sequence[str]) -> None:
    if differences:
        listed = "".join(f"\n    {line}" for line in differences)
        raise CheckpointError(
            f"the run is finished, with other {what}:{listed}", where=str(done.path.parent), fix=_ANEW
        )


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
