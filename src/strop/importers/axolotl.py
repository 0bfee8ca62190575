"""axolotl's YAML. Floor 2, no torch.

Facts: the documentation and examples of axolotl, 2026.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from strop.config.yamlfile import KeyPath
from strop.importers import axolotl_data, transformers_trainer, trl, trl_groups
from strop.importers.key_answers import (
    KeyAnswer,
    Rules,
    View,
    absent,
    always,
    carried,
    chosen,
    idle,
    is_on,
    listed,
    of_4_bits,
    of_methods,
    off,
    only,
    packing,
    real,
    refused,
    same,
    simpo_gamma,
    straight,
    translated,
    validation_size,
    whole,
)

METHODS: Mapping[str, str] = {m: m for m in ("dpo", "kto", "orpo", "simpo", "grpo")} | {"ipo": "dpo"}
"""`rl` -> the method."""


def method_of(given: Mapping[str, Any], calls: tuple[str, ...]) -> str:
    """By `rl`; without it, sft."""
    rl = given.get("rl")
    if rl is None:
        if is_on(given.get("process_reward_model")):
            raise refused("process_reward_model", True, "", "a method of strop", "name one: --method reward")
        return "reward" if is_on(given.get("reward_model")) else "sft"
    if str(rl) not in METHODS:
        raise refused("rl", rl, "rl", ", ".join(METHODS), "name a method of strop: --method dpo")
    return METHODS[str(rl)]


def defaults(method: str, given: Mapping[str, Any], folder_type: str) -> Mapping[str, Any]:
    """What axolotl takes for names that are not given."""
    found = {
        **{key: transformers_trainer.DEFAULTS[key] for key in ("max_grad_norm", "load_best_model_at_end", "seed")},
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "weight_decay": 0.0,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "save_total_limit": 4,
        "sequence_len": 512,
        "warmup_ratio": 0.03,
        "val_set_size": 0.0,
        "excess_length_strategy": "drop",
        "eval_batch_size": whole(given.get("micro_batch_size")) or 1,
    }
    if given.get("adapter"):
        found["lora_dropout"] = 0.0
    if is_on(given.get("load_in_4bit")):
        found["bnb_4bit_use_double_quant"] = True
    if method in ("dpo", "kto", "orpo", "simpo"):
        found["rl_beta"] = 0.1
    if method == "simpo":
        found |= {"simpo_gamma": 0.5, "cpo_alpha": 1.0}
    return found


def decided(view: View) -> Iterator[tuple[str, Any]]:
    """Keys of strop that follow from its definitions."""
    yield "lora.enabled", bool(view.given.get("adapter"))
    if view.given.get("rl") == "ipo" and view.method == "dpo":
        yield "post_training.loss_type", "ipo"
    if view.method == "orpo":
        yield "post_training.orpo_nll", "full"
    if view.method == "grpo":
        yield from _grpo(view)
    else:
        yield "training.max_prompt_length", None
        yield "training.max_completion_length", None


def _grpo(view: View) -> Iterator[tuple[str, Any]]:
    """Its `trl:` block is TRL's GRPOConfig."""
    values, inner = _as_trl(view.given.get("trl"), view)
    yield from trl_groups.sampling(inner)
    for name in OF_TRL:
        if name not in values:
            answer = trl.RULES[name](inner.get(name), inner)
            yield from answer.values.items() if isinstance(answer, KeyAnswer) else ()


OF_TRL = ("num_generations", "max_completion_length", "epsilon", "loss_type", "vllm_importance_sampling_correction")
"""Names that have TRL's defaults where its block has none."""
BESIDE = {"adapter": "adapter", "peft_use_dora": "use_dora"} | {
    name: name for name in ("lora_modules_to_save", "lora_target_parameters")
}
"""Names beside the block that rules of the block ask for -> what they are called there."""


def _as_trl(block: Any, view: View) -> tuple[Mapping[str, Any], View]:
    """(the names of the block that have a value, the block as TRL's rules see it: with what stands beside it)."""
    values = {k: v for k, v in block.items() if v is not None} if isinstance(block, Mapping) else {}
    beside = {theirs: view.given[ours] for ours, theirs in BESIDE.items() if ours in view.given}
    beside["per_device_train_batch_size"] = whole(view.get("micro_batch_size")) or 1
    beside["gradient_accumulation_steps"] = whole(view.get("gradient_accumulation_steps")) or 1
    return values, View("trl", {**beside, **values}, trl.defaults(view.method, values, ""), view.method, view.folder)


def notes(view: View) -> Iterator[str]:
    """What means something else in strop."""
    if view.method == "sft":
        yield "axolotl drops rows that are longer than sequence_len; so does filter_overlength_samples here"
        yield ("it divides by the tokens of each device; strop divides by all tokens of a step")
    else:
        yield "its preference losses are TRL's, means per micro-batch; strop takes them over the whole step"
    if view.get("rl") == "orpo":
        yield "its ORPO trainer gets no adapter and trains all weights; strop trains adapters if the file asks for them"
    if real(view.get("warmup_steps")) or real(view.get("warmup_ratio")):
        yield transformers_trainer.WARM_UP
        yield "a warm-up share is rounded down there (and at most 100 steps where nothing is said); strop rounds it up"
    if view.get("val_set_size"):
        yield "there rows are held out by a fixed shuffle; in strop the seed and the rows' content decide which"


# ---- rules


def _adapter(value: Any, view: View) -> KeyAnswer:
    if value not in ("lora", "qlora"):
        raise refused("adapter", value, "adapter", "lora, qlora or nothing", "add --lora.enabled true or false")
    return translated({"lora.enabled": True})


def _rl(value: Any, view: View) -> KeyAnswer:
    if value == "ipo" and view.method == "dpo":
        return translated({"post_training.loss_type": "ipo"}, "dpo with the loss ipo, per token as TRL has it")
    return idle(f"it is method {view.method}")


def _beta(value: Any, view: View) -> KeyAnswer:
    return trl.RULES["beta"](value, view)  # type: ignore[return-value]


def _length(value: Any, view: View) -> KeyAnswer:
    return idle("the trl block says it") if view.method == "grpo" else carried("training.max_seq_length", value)


def _excess(value: Any, view: View) -> KeyAnswer:
    if view.method == "grpo":
        return idle("rows are prompts")
    return translated({"dataset.filter_overlength_samples": value != "truncate"})


def _target_linear(value: Any, view: View) -> KeyAnswer:
    return translated({"lora.target_modules": "all-linear"}) if is_on(value) else idle("lora_target_modules names them")


def _block(value: Any, view: View) -> Mapping[KeyPath, KeyAnswer]:
    """`trl:`, settings of TRL's GRPOConfig."""
    values, inner = _as_trl(value, view)
    found: dict[KeyPath, KeyAnswer] = {}
    for name, item in values.items():
        answer = trl.RULES[name](item, inner) if name in trl.RULES else None
        if isinstance(answer, KeyAnswer):
            found[name,] = answer
    return found


def _warmup_ratio(value: Any, view: View) -> KeyAnswer:
    return transformers_trainer.RULES["warmup_ratio"](value, view)  # type: ignore[return-value]


def _evaluations(value: Any, view: View) -> KeyAnswer:
    return carried("training.eval_steps", value)


def _trackers(view: View) -> list[str]:
    """The trackers that the file switches on. A project of W&B switches W&B on."""
    names = [name for name in ("tensorboard", "wandb", "mlflow", "trackio") if is_on(view.get(f"use_{name}"))]
    return names if "wandb" in names or not view.get("wandb_project") else [*names, "wandb"]


def _tracker(value: Any, view: View) -> KeyAnswer:
    return translated({"logging.report_to": _trackers(view)}) if is_on(value) else idle("it is off")


PER_EPOCH = "strop counts steps: set {key} to the steps of an epoch (the dry run shows them), divided by this"
RULES: Rules = {
    **{
        name: transformers_trainer.RULES[name]
        for name in (
            *("learning_rate", "weight_decay", "max_grad_norm", "gradient_accumulation_steps", "warmup_steps"),
            *(
                "warmup_ratio",
                "max_steps",
                "seed",
                "output_dir",
                "trust_remote_code",
                "save_total_limit",
                "bf16",
                "fp16",
            ),
            *(
                "tf32",
                "gradient_checkpointing",
                "gradient_checkpointing_kwargs",
                "load_best_model_at_end",
                "adam_beta1",
            ),
            *("adam_beta2", "adam_epsilon", "auto_find_batch_size", "save_only_model", "save_safetensors"),
            *("metric_for_best_model", "greater_is_better", "resume_from_checkpoint", "optim_args", "torch_compile"),
            *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "logging_steps"),
            *("eval_strategy", "evaluation_strategy", "save_strategy", "remove_unused_columns", "attn_implementation"),
        )
    },
    **straight(
        "base_model revision_of_model micro_batch_size eval_batch_size logging_steps save_steps lora_r lora_alpha "
        "early_stopping_patience dataset_processes dataset_num_proc chat_template_jinja lora_model_dir lora_dropout "
        "loraplus_lr_ratio peft_use_dora peft_use_rslora"
    ),
    "eval_steps": _evaluations,
    "num_epochs": lambda value, view: transformers_trainer.RULES["num_train_epochs"](value, view),
    "optimizer": transformers_trainer.RULES["optim"],
    "lr_scheduler": chosen(
        "training.lr_scheduler",
        transformers_trainer.SCHEDULERS,
        "strop has linear, cosine and constant; the rate now falls linearly",
    ),
    "base_model_config": always("the configuration beside the weights is taken"),
    "tokenizer_config": off("the tokenizer beside the weights is taken"),
    "model_type": always("the model's own configuration says it"),
    "tokenizer_type": always("the tokenizer's own configuration says it"),
    "is_llama_derived_model": always("the model's own configuration says it"),
    "is_mistral_derived_model": always("the model's own configuration says it"),
    "is_falcon_derived_model": always("the model's own configuration says it"),
    "is_qwen_derived_model": always("the model's own configuration says it"),
    "strict": always("strop refuses every key that it does not know"),
    "adapter": _adapter,
    "lora_target_modules": listed("lora.target_modules", {"all-linear": "all-linear"}),
    "lora_target_linear": _target_linear,
    "lora_target_parameters": listed("lora.target_parameters"),
    "lora_modules_to_save": listed("lora.modules_to_save"),
    "lora_fan_in_fan_out": always("the layer's own kind says it"),
    "peft_init_lora_weights": same("lora.init_lora_weights"),
    "lora_mlp_kernel": always("fused layers are chosen by device"),
    "lora_qkv_kernel": always("fused layers are chosen by device"),
    "lora_o_kernel": always("fused layers are chosen by device"),
    "load_in_8bit": trl.RULES["load_in_8bit"],
    "load_in_4bit": trl.RULES["load_in_4bit"],
    "bnb_4bit_use_double_quant": of_4_bits("bnb_4bit_use_double_quant"),
    "rl": _rl,
    "rl_beta": _beta,
    "dpo_beta": _beta,
    "orpo_alpha": of_methods("beta", "orpo"),
    "simpo_gamma": simpo_gamma("rl_beta"),
    "cpo_alpha": trl.RULES["cpo_alpha"],
    "rpo_alpha": of_methods("sft_weight", "dpo", "simpo"),
    "kto_desirable_weight": of_methods("desirable_weight", "kto"),
    "kto_undesirable_weight": of_methods("undesirable_weight", "kto"),
    "dpo_label_smoothing": of_methods("label_smoothing", "dpo"),
    "dpo_use_weighting": of_methods("wpo_weighting", "dpo"),
    "dpo_use_logits_to_keep": always("the head is evaluated at scored tokens alone"),
    "precompute_ref_log_probs": always("the reference is scored once, before the first step, in any case"),
    "reward_model": lambda value, view: idle(f"it is method {view.method}"),
    "trl": _block,
    "sequence_len": _length,
    "excess_length_strategy": _excess,
    "min_sample_len": off("rows with nothing to train are dropped and counted"),
    "sample_packing": packing,
    "eval_sample_packing": always("evaluations are not packed"),
    "sample_packing_group_size": always("rows are filled first fit"),
    "sample_packing_bin_size": always("rows are filled first fit"),
    "multipack_real_batches": always("attention never crosses examples"),
    "flex_attention": always("attention kernels are chosen by device"),
    "eager_attention": always("attention kernels are chosen by device"),
    "datasets": axolotl_data.datasets,
    "test_datasets": axolotl_data.test_datasets,
    "val_set_size": validation_size,
    "dataset_prepared_path": always("tokenised rows lie in the cache folder"),
    "skip_prepare_dataset": off("rows are prepared by strop's own way"),
    "shuffle_merged_datasets": only((True,), "the seed decides the order", "the seed decides the order of all rows"),
    "dataset_exact_deduplication": off("strop prepare removes duplicates; a run counts them"),
    "chat_template": axolotl_data.template,
    "default_system_message": off("a chat template has its own"),
    "special_tokens": always("padding is never trained, and a row ends as the chat template says"),
    "hub_model_id": lambda value, _: translated({"training.push_to_hub": True, "training.hub_model_id": value}),
    "tokens": same("models.0.add_tokens"),
    "batch_size": off("micro_batch_size and gradient_accumulation_steps say it"),
    "train_on_inputs": off("answers alone are trained, never prompts"),
    "group_by_length": off("every micro-batch holds rows of like length anyway; steps are drawn at random"),
    "evals_per_epoch": off(PER_EPOCH.format(key="training.eval_steps")),
    "saves_per_epoch": off(PER_EPOCH.format(key="training.save_steps")),
    "eval_table_size": off("strop generate writes answers"),
    "do_causal_lm_eval": off("strop eval evaluates"),
    "loss_watchdog_threshold": off("a loss that is not finite stops the run; the report has findings for the others"),
    "loss_watchdog_patience": off("a loss that is not finite stops the run; the report has findings for the others"),
    "save_first_step": always("it changes no result"),
    "auto_resume_from_checkpoints": off("strop train --resume"),
    "use_tensorboard": _tracker,
    "use_wandb": _tracker,
    "use_mlflow": _tracker,
    "use_trackio": _tracker,
    "wandb_project": lambda value, view: (
        translated({"logging.report_to": _trackers(view), "logging.wandb_project": value}) if value else idle("none")
    ),
    "wandb_name": lambda value, view: carried("logging.run_name", value) if _trackers(view) else idle("no tracker"),
    "plugins": always("what plugins of axolotl add is listed by its own keys"),
    **{
        f"liger_{name}": always("fused layers are chosen by device, and compared with the model's own")
        for name in ("rope", "rms_norm", "glu_activation", "layer_norm", "fused_linear_cross_entropy", "swiglu")
    },
    "cut_cross_entropy": always("the head never holds all logits"),
    "unsloth_cross_entropy_loss": always("the head never holds all logits"),
    **absent(
        "relora cosine_min_lr_ratio cosine_constant_lr_ratio lr_groups embedding_lr embedding_lr_scale "
        "peft_layers_to_transform unfrozen_parameters noisy_embedding_alpha overrides_of_model_config "
        "overrides_of_model_kwargs pretraining_dataset curriculum_sampling",
        "strop has no such setting",
    ),
    "neftune_noise_alpha": off("there is no NEFTune noise"),
}
