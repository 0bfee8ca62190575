"""The keys of transformers' Trainer, which TRL, LLaMA-Factory, unsloth and opensloth take. Floor 2, no torch.

Facts: the documentation of transformers' TrainingArguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from strop.config.schema import SECTIONS
from strop.importers.key_answers import (
    Code,
    KeyAnswer,
    Rule,
    Rules,
    View,
    absent,
    always,
    carried,
    chosen,
    idle,
    is_on,
    left,
    off,
    only,
    real,
    schema_key,
    straight,
    translated,
    whole,
)

OPTIMIZERS: Mapping[str, str] = {
    "adamw_hf": "adamw_torch",
    "adamw_apex_fused": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "lion": "lion_32bit",
    "paged_lion": "paged_lion_32bit",
    **{name: name for name in SECTIONS["training"]["optim"].choices},
}
"""Optimizer of transformers -> the one of strop, which has most of their names."""
SCHEDULERS: Mapping[str, str] = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 500,
    "save_steps": 500,
    "save_total_limit": None,
    "optim": "adamw_torch_fused",
    "load_best_model_at_end": False,
    "eval_strategy": "no",
    "seed": 42,
}
"""What transformers' Trainer takes where nothing is said."""
PER_EPOCH = "strop counts steps: {key} says after how many, so set it to the steps of an epoch (the dry run shows them)"
WARM_UP = "the first step of a warm-up has rate 0 there; in strop it has the peak divided by the steps of the warm-up"


def _epochs(value: Any, view: View) -> KeyAnswer:
    if (whole(view.get("max_steps")) or 0) > 0:
        return idle("max_steps decides")
    number = real(value)
    if number is None or number <= 0 or (number.is_integer()):
        return carried("training.num_epochs", value)
    return translated(
        {"training.num_epochs": math.ceil(number)},
        f"strop trains whole epochs, so it trains {math.ceil(number)} of {number:g}: set training.max_steps for fewer",
    )


def _max_steps(value: Any, _: View) -> KeyAnswer:
    number = whole(value)
    return idle("num_epochs decides") if number is not None and number <= 0 else carried("training.max_steps", value)


def _warmup_steps(value: Any, view: View) -> KeyAnswer:
    number = real(value)
    if str(view.get("lr_scheduler_type", "")).lower() == "constant":
        return translated({"training.warmup_steps": 0}, "the scheduler constant does not warm up")
    if number == 0 and (real(view.get("warmup_ratio")) or 0) > 0:
        return idle("warmup_ratio decides")
    if number is not None and 0 < number < 1:
        return translated({"training.warmup_ratio": number}, "below 1 it is a share of all steps")
    return carried("training.warmup_steps", value)


def _warmup_ratio(value: Any, view: View) -> KeyAnswer:
    if (real(view.get("warmup_steps")) or 0) > 0:
        return idle("warmup_steps decides")
    if real(value) == 0 or str(view.get("lr_scheduler_type", "")).lower() == "constant":
        return translated({"training.warmup_steps": 0}, "no warm-up")
    return carried("training.warmup_ratio", value)


def _norm(value: Any, _: View) -> KeyAnswer:
    return (
        translated({"training.max_grad_norm": None}, "0: no clipping")
        if real(value) == 0
        else carried("training.max_grad_norm", value)
    )


def precision(name: str) -> Rule:
    """The rule of `bf16` or `fp16`: a switch, `auto`, or a question to the device."""

    def rule(value: Any, view: View) -> KeyAnswer:
        if (isinstance(value, Code) and "bf" in value.text.lower()) or value == "auto":
            return translated({"training.auto_precision": True}, "bf16 where the device has it")
        if name == "fp16" and isinstance(value, Code):
            return left("it is code, which is not run: set training.fp16")
        if value == "full":
            return translated({"training.bf16": True}, "weights that train stay in float32 in strop")
        return carried(f"training.{name}", value)

    return rule


def _eval_strategy(value: Any, view: View) -> KeyAnswer:
    if not view.evaluates():
        if view.given.get("eval_strategy") is None and view.given.get("evaluation_strategy") is None:
            return translated(_no_validation(view))
        return translated(_no_validation(view), "no rows are held out, and nothing is evaluated")
    if str(value).lower() == "epoch":
        return left(PER_EPOCH.format(key="training.eval_steps"))
    found: dict[str, Any] = {"training.eval_at_start": is_on(view.get("eval_on_start"))}
    steps = whole(view.get("logging_steps"))
    if view.get("eval_steps") is not None or steps is None:
        return translated(found, "eval_steps says how often")
    return translated(found | {"training.eval_steps": steps}, "without eval_steps, as often as logging_steps says")


def _no_validation(view: View) -> Mapping[str, Any]:
    return {"dataset.validation_split": 0.0}


def every(key: str, strategy: str, unit: str) -> Rule:
    """The rule of a number of steps that counts under the strategy `steps`."""

    def rule(value: Any, view: View) -> KeyAnswer:
        kind = str(view.get(strategy, "steps")).lower()
        if kind in ("no", "false", "epoch"):
            return idle(f"{strategy} is {kind}, so it is not read")
        number = real(value)
        if number is not None and 0 < number < 1:
            return left(f"it is a share of all steps; set {key} to a number of them ({unit})")
        return carried(key, value)

    return rule


def _save_strategy(value: Any, _: View) -> KeyAnswer:
    word = str(value).lower()
    if word == "steps":
        return idle("save_steps says how often")
    if word == "epoch":
        return left(PER_EPOCH.format(key="training.save_steps"))
    return left(
        "strop writes checkpoints every training.save_steps steps, of what trains alone, and keeps save_total_limit"
    )


def _report_to(value: Any, _: View) -> KeyAnswer:
    names = [str(v) for v in (value if isinstance(value, list) else [value])]
    key = schema_key("logging.report_to")
    choices = key.choices if key else ()
    if names == ["all"]:
        here = [name for name in choices if find_spec(name) is not None]
        why = f"all that are installed here; strop knows {', '.join(choices)}"
        return translated({"logging.report_to": here}, why)
    wanted = [name for name in names if name in choices]
    missing = [name for name in names if name not in choices and name not in ("none", "None", "[]")]
    if missing and not wanted:
        return left(f"strop has {', '.join(choices)}; every number is in metrics.jsonl of the run folder anyway")
    why = f"{', '.join(missing)} is not there; every number is in metrics.jsonl of the run folder" if missing else ""
    return carried("logging.report_to", value) if wanted == value else translated({"logging.report_to": wanted}, why)


def _run_name(value: Any, view: View) -> KeyAnswer:
    named = _report_to(view.get("report_to", []), view)
    return carried("logging.run_name", value) if named.values.get("logging.report_to") else idle("there is no tracker")


def _log_level(value: Any, _: View) -> KeyAnswer:
    key = schema_key("logging.log_level")
    fits = key is not None and value in key.choices
    return carried("logging.log_level", value) if fits else idle("it changes what is printed")


def _checkpointing(value: Any, _: View) -> KeyAnswer:
    if value == "unsloth":
        return translated({"training.gradient_checkpointing": True})
    return carried("training.gradient_checkpointing", value)


def _of_hub(key: str) -> Rule:
    """The rule of a name that is read with push_to_hub alone."""
    return lambda value, view: carried(key, value) if is_on(view.get("push_to_hub")) else idle("push_to_hub is off")


def _metric(value: Any, _: View) -> KeyAnswer:
    return carried("finetuning.metric_for_best_model", value)


ADAM = "strop's AdamW has beta1 0.9, beta2 0.999 and epsilon 1e-8, which are not to be set"
RULES: Rules = {
    **straight(
        "learning_rate weight_decay gradient_accumulation_steps per_device_train_batch_size "
        "per_device_eval_batch_size seed torch_compile output_dir load_best_model_at_end greater_is_better "
        "trust_remote_code attn_implementation save_total_limit dataset_num_proc preprocessing_num_workers "
        "push_to_hub"
    ),
    "hub_model_id": _of_hub("training.hub_model_id"),
    "hub_private_repo": _of_hub("training.hub_private_repo"),
    "num_train_epochs": _epochs,
    "max_steps": _max_steps,
    "lr_scheduler_type": chosen(
        "training.lr_scheduler", SCHEDULERS, "strop has linear, cosine and constant; the rate now falls linearly"
    ),
    "lr_scheduler_kwargs": off("the schedules of strop have no settings of their own"),
    "warmup_steps": _warmup_steps,
    "warmup_ratio": _warmup_ratio,
    "max_grad_norm": _norm,
    "optim": chosen("training.optim", OPTIMIZERS, "strop has no such optimizer; adamw_torch_fused trains now"),
    "optim_args": off("optimizers of strop have no further settings"),
    "adam_beta1": only((0.9,), ADAM, ADAM),
    "adam_beta2": only((0.999,), ADAM, ADAM),
    "adam_epsilon": only((1e-8,), ADAM, ADAM),
    "bf16": precision("bf16"),
    "fp16": precision("fp16"),
    "tf32": always("float32 products keep their precision, as torch has it"),
    "gradient_checkpointing": _checkpointing,
    "gradient_checkpointing_kwargs": always("strop does it by its own way, with the same result"),
    "eval_strategy": _eval_strategy,
    "evaluation_strategy": _eval_strategy,
    "eval_steps": every("training.eval_steps", "eval_strategy", "the dry run shows how many there are"),
    "eval_on_start": lambda value, view: (
        carried("training.eval_at_start", value) if view.evaluates() else idle("nothing is evaluated")
    ),
    "eval_delay": off("evaluations begin with the first; training.eval_steps says how often"),
    "eval_accumulation_steps": always("evaluations keep sums, not logits"),
    "prediction_loss_only": always("evaluations have loss and metrics"),
    "do_train": only((True, "true"), "strop train trains", "strop train trains; strop eval evaluates"),
    "do_eval": always("eval_strategy decides"),
    "save_strategy": _save_strategy,
    "save_steps": every("training.save_steps", "save_strategy", "the dry run shows how many there are"),
    "save_only_model": off("checkpoints of strop can be resumed from, and hold only what trains and its optimizer"),
    "save_safetensors": always("safetensors are always written"),
    "logging_strategy": only(
        ("steps",), "logging_steps says how often", PER_EPOCH.format(key="training.logging_steps")
    ),
    "logging_steps": every("training.logging_steps", "logging_strategy", "the dry run shows how many there are"),
    "logging_first_step": always("it changes what is printed"),
    "metric_for_best_model": _metric,
    "report_to": _report_to,
    "run_name": _run_name,
    "log_level": _log_level,
    "logging_dir": always("logging.logging_dir is inside the run folder"),
    "disable_tqdm": always("it changes what is printed"),
    "include_num_input_tokens_seen": always("metrics.jsonl counts tokens"),
    "average_tokens_across_devices": only(
        (True,),
        "a step is divided by all of its tokens, on however many devices",
        "strop divides by all tokens of a step",
    ),
    "label_smoothing_factor": off("there is no label smoothing of the likelihood"),
    "label_names": always("strop knows what it trains"),
    "auto_find_batch_size": always("micro-batches are chosen so that they fit"),
    "resume_from_checkpoint": off(
        "a checkpoint of another tool cannot be resumed from: name its model, or its adapter"
    ),
    "data_seed": off("seed decides the order of the rows, too"),
    "full_determinism": off("on a CPU runs are the same to the bit; on a GPU kernels decide"),
    "use_cpu": off("set CUDA_VISIBLE_DEVICES= in the environment to train on the CPU"),
    "ignore_data_skip": off("a resumed run goes on exactly where it was"),
    "remove_unused_columns": always("columns that nobody reads are left alone"),
    "train_sampling_strategy": only(
        ("random",),
        "rows are drawn in an order that the seed decides",
        "rows are drawn in an order that the seed decides",
    ),
    "dataloader_drop_last": off("the last step of an epoch takes the rows that are left; none is dropped"),
    **{
        name: always("rows are tokenised once, ahead, and lie on disk: there is no loader to set")
        for name in (
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
        )
    },
    "activation_checkpointing": _checkpointing,
    "do_predict": off("strop generate answers prompts"),
    "optim_target_modules": off("every weight that trains has the same optimizer"),
    "bf16_full_eval": always("evaluations compute as training does"),
    "fp16_full_eval": always("evaluations compute as training does"),
    "include_for_metrics": always("evaluations keep sums, not logits"),
    "logging_nan_inf_filter": always("a loss that is not finite stops the run, or is skipped and counted"),
    "activation_checkpointing_kwargs": always("strop does it by its own way, with the same result"),
    "accelerator_config": off("processes are those of gpu.device_ids, or of torchrun"),
    "parallelism_config": off("processes are those of gpu.device_ids, or of torchrun"),
    **{
        name: always("it changes no result")
        for name in (
            *("batch_eval_metrics", "dataloader_in_order", "dataloader_multiprocessing_context", "use_cache"),
            *("eval_do_concat_batches", "eval_use_gather_object", "log_level_replica", "log_on_each_node"),
            *("enable_jit_checkpoint", "restore_callback_states_from_checkpoint", "save_on_each_node"),
            *("skip_memory_metrics", "torch_empty_cache_steps", "project", "trackio_bucket_id", "trackio_space_id"),
            "trackio_static_space_id",
        )
    },
    **absent("lr_quadratic_warmup debug torch_compile_backend torch_compile_mode", "strop has no such setting"),
}
