"""TRL: `trl sft|dpo|kto|grpo --config FILE`, and its configuration classes. Floor 2, no torch.

Facts: TRL 1.16. Where its definitions differ from strop's stands in docs/methods/parity.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from strop.config.yamlfile import KeyPath
from strop.importers import transformers_trainer, trl_data, trl_groups
from strop.importers.key_answers import (
    Code,
    KeyAnswer,
    Rules,
    View,
    always,
    carried,
    chosen,
    coerced,
    idle,
    is_on,
    left,
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
    whole,
)
from strop.importers.python_calls import OF_TRL
from strop.importers.trl_serving import uses_lora

CLASSES: Mapping[str, str] = {
    f"{method.upper()}{kind}": method
    for method in ("sft", "dpo", "kto", "grpo", "orpo", "cpo")
    for kind in ("Config", "Trainer")
} | {"RewardConfig": "reward", "RewardTrainer": "reward"}
"""Class of TRL -> the method that it trains by."""
DIVERGENCES: Mapping[str, str] = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
HINTS: Mapping[str, tuple[str, ...]] = {
    "kto": ("desirable_weight", "undesirable_weight"),
    "grpo": ("num_generations", "reward_funcs", "max_completion_length", "scale_rewards", "epsilon", "num_iterations"),
    "dpo": (
        "precompute_ref_log_probs",
        "f_divergence_type",
        "label_smoothing",
        "use_weighting",
        "rpo_alpha",
        "ld_alpha",
    ),
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "sft": ("packing", "completion_only_loss", "assistant_only_loss", "dataset_text_field", "max_seq_length"),
}
"""Keys that one method alone reads. The command names the method, and a file often does not."""
LORA_OF: Mapping[str, str] = {
    **dict.fromkeys(("gpt2", "gpt_bigcode"), "c_attn"),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon", "mpt"), "query_key_value"),
    "phi3": "qkv_proj,o_proj",
}
"""model_type -> the layers that peft adapts where none are named, if they are not q_proj and v_proj."""

LORA_OF_PEFT: Mapping[str, Any] = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
"""What peft's own LoraConfig takes, which a script makes; the command takes other values."""


def method_of(given: Mapping[str, Any], calls: tuple[str, ...]) -> str:
    """The method that a file is for; empty where it does not say."""
    named = {CLASSES[name] for call in calls if (name := call.partition(" ")[0]) in CLASSES}
    if len(named) == 1:
        return _of_loss(named.pop(), given)
    scores = {method: sum(name in given for name in names) for method, names in HINTS.items()}
    best = max(scores, key=lambda m: scores[m])
    others = [m for m, score in scores.items() if score == scores[best] and m != best]
    if not scores[best] or others:
        return "dpo" if given.get("loss_type") in ("sigmoid", "hinge", "ipo") else ""
    return _of_loss(best, given)


def _of_loss(method: str, given: Mapping[str, Any]) -> str:
    return "simpo" if method == "cpo" and given.get("loss_type") == "simpo" else method


# ---- defaults


def defaults(method: str, given: Mapping[str, Any], folder_type: str) -> Mapping[str, Any]:
    """What TRL takes for names that are not given."""
    found = {
        **transformers_trainer.DEFAULTS,
        "learning_rate": {"sft": 2e-5, "reward": 1e-4}.get(method, 1e-6),
        "logging_steps": 10,
        "max_length": 1024,
    }
    if "TrainingArguments" in given and not any(f"{name}Config" in given for name in OF_TRL):
        # a trainer of TRL takes what they hold, and they hold their own defaults
        found |= {key: transformers_trainer.DEFAULTS[key] for key in ("learning_rate", "logging_steps")}
    elif not is_on(given.get("fp16")) and given.get("bf16") is None:
        found["bf16"] = True
    if uses_lora(given):
        found |= LORA_OF_PEFT if "LoraConfig" in given else {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
        found["lora_target_modules"] = LORA_OF.get(folder_type, "q_proj,v_proj")
    if is_on(given.get("load_in_4bit")):
        found["use_bnb_nested_quant"] = False
        if "BitsAndBytesConfig" in given:
            found["bnb_4bit_quant_type"] = "fp4"
    if method in ("dpo", "kto", "orpo", "cpo", "simpo"):
        found["beta"] = 0.1
    if method == "dpo":
        found["loss_type"] = "sigmoid"
    if method in ("orpo", "cpo", "simpo"):
        found |= {"cpo_alpha": 1.0, "simpo_gamma": 0.5} if method != "orpo" else {}
    if method == "sft":
        found["assistant_only_loss"] = False
    if method == "grpo":
        found |= {"num_generations": 8, "max_completion_length": 512, "beta": 0.0, "epsilon": 0.2}
        found |= {"loss_type": "dapo", "scale_rewards": "group", "vllm_importance_sampling_correction": True}
        del found["max_length"]
    return found


def decided(view: View) -> Iterator[tuple[str, Any]]:
    """Keys of strop that the definitions of TRL decide, whatever the file says."""
    yield "lora.enabled", uses_lora(view.given)
    if view.method != "grpo":
        yield "training.max_prompt_length", None
        yield "training.max_completion_length", None
    losses = view.get("loss_type")
    loss = losses[0] if isinstance(losses, list) and losses else losses
    if view.method == "dpo" and loss == "bco_pair":
        yield "post_training.bco_delta", "zero"
    if view.method == "dpo" and loss == "exo_pair" and not real(view.get("label_smoothing")):
        yield "post_training.label_smoothing", 0.001
    if view.method == "orpo":
        yield "post_training.orpo_nll", "full"
    if view.method == "grpo":
        yield from trl_groups.sampling(view)


def notes(view: View) -> Iterator[str]:
    """What means something else in strop, for this file."""
    if real(view.get("warmup_steps")) or real(view.get("warmup_ratio")):
        yield transformers_trainer.WARM_UP
    if view.method == "grpo":
        yield "rewards of strop get completions as texts, never as messages; TRL gives messages for chat prompts"
        yield "TRL cuts no prompts; strop cuts rows at training.max_seq_length, from the left, and counts what it cuts"
        yield (
            "a batch of TRL counts completions; training.groups_per_step counts prompts, here those of one process: "
            "multiply it by the number of processes"
        )
    else:
        yield (
            "TRL cuts prompt and completion together, by default at the end of the completion; strop cuts prompts at "
            "the left and completions at the right, both sides of a pair alike, and counts what it cuts"
        )
    if view.method == "sft":
        yield (
            "in conversations TRL trains every token unless assistant_only_loss is true; strop trains the answers of "
            "the assistant alone"
        )
        yield "both take the mean over all trained tokens of a step"
    elif view.method != "grpo":
        yield "TRL takes means per micro-batch and averages them; strop takes them over the whole step"
    if view.method == "dpo" and real(view.get("label_smoothing")) and view.get("loss_type") == "sigmoid":
        yield "TRL accepts label_smoothing under loss_type sigmoid and does not read it; strop trains conservative DPO"
    if view.method == "kto":
        yield "z0 of KTO is taken over the whole step, from completions of other prompts drawn anew in each epoch"
    if view.method == "simpo":
        yield "TRL adds cpo_alpha times the likelihood (1 where nothing is said); it is post_training.sft_weight here"


# ---- rules


def _loss_type(value: Any, view: View) -> KeyAnswer:
    match view.method:
        case "dpo":
            return _loss_of_dpo(value, view)
        case "grpo":
            return trl_groups.loss(value, view)
        case "kto":
            return carried("post_training.kto_loss", value)
        case "sft":
            return only(("nll", "chunked_nll"), "it is the likelihood", "strop has the likelihood alone")(value, view)  # type: ignore[return-value]
        case "simpo":
            return idle("it is method simpo")
        case "cpo" if value == "sigmoid":
            return idle("it is method cpo")
        case "orpo" | "reward" | "distill" | "ipo":
            return idle(f"method {view.method} has one loss")
    raise refused("loss_type", value, view.method, "sigmoid or simpo", "add --method and --loss-type")


def _loss_of_dpo(value: Any, view: View) -> KeyAnswer:
    names = value if isinstance(value, list) else [value]
    weights = view.get("loss_weights") or [1.0] * len(names)
    first = str(names[0]) if names else ""
    fits = len(names) == 1 or (len(names) == 2 and names[1] == "sft" and real(weights[0]) == 1)
    try:
        coerced("post_training.loss_type", first)
    except ValueError as error:
        raise refused("loss_type", value, "", str(error), "choose one: --loss-type sigmoid") from None
    if not fits:
        raise refused(
            "loss_type", value, "", "one loss, or one with `sft` beside it", "choose one: --loss-type sigmoid"
        )
    if len(names) == 2:
        return translated({"post_training.loss_type": first, "post_training.sft_weight": weights[1]})
    return carried("post_training.loss_type", first)


def _beta(value: Any, view: View) -> KeyAnswer:
    match view.method:
        case "sft" | "reward" | "distill":
            return left(f"method {view.method} has no such beta")
        case "simpo":
            return translated({"post_training.simpo_beta": value})
    return carried("post_training.beta", value)


def _cpo_alpha(value: Any, view: View) -> KeyAnswer:
    return carried("post_training.sft_weight" if view.method == "simpo" else "post_training.cpo_alpha", value)


def _max_length(value: Any, view: View) -> KeyAnswer:
    if value is None:
        return left("nothing is cut there; strop needs a limit: set training.max_seq_length to the longest row")
    return carried("training.max_seq_length", value)


def _sync_steps(value: Any, view: View) -> KeyAnswer:
    if view.method == "dpo" and is_on(view.get("sync_ref_model")):
        return carried("post_training.ref_sync_steps", value)
    return idle("sync_ref_model is off")


def _sync(value: Any, view: View) -> KeyAnswer:
    if not is_on(value):
        return idle("the reference stays as it is")
    if view.method != "dpo":
        return left(f"the reference of {view.method} stays as it is")
    return translated({"post_training.ref_sync_steps": whole(view.get("ref_model_sync_steps")) or 512})


def _bits(bits: str) -> Any:
    def rule(value: Any, view: View) -> KeyAnswer:
        return translated({"models.0.quant": bits}) if is_on(value) else idle("it is off")

    return rule


def _dtype(value: Any, view: View) -> KeyAnswer:
    if str(value) in ("float32", "auto", "None"):
        return idle("weights that train are float32 in any case")
    return left("weights that train are float32 in strop; training.bf16 or fp16 computes in 16 bits")


def _use_peft(value: Any, view: View) -> KeyAnswer:
    return carried("lora.enabled", value)


def _model_init(value: Any, view: View) -> Mapping[KeyPath, KeyAnswer]:
    known = {"trust_remote_code": same("models.0.trust_remote_code"), "revision": same("models.0.revision")}
    known |= {"attn_implementation": same("models.0.attn_implementation"), "dtype": _dtype, "torch_dtype": _dtype}
    items = value.items() if isinstance(value, Mapping) else ()
    return {(name,): known[name](item, view) for name, item in items if name in known and item is not None}  # type: ignore[misc]


def _model(value: Any, view: View) -> KeyAnswer:
    if isinstance(value, Code):
        if "model_name" in view.given:
            return idle("it is the model of from_pretrained")
        return left("it is code, which is not run; name the model with --model")
    return translated({"models.0.huggingface_id": value})


RULES: Rules = {
    **transformers_trainer.RULES,
    **trl_groups.RULES,
    **straight(
        "model_name_or_path lora_r lora_alpha lora_dropout use_rslora use_dora dataset_name dataset_streaming "
        "dataset_config dataset_train_split test_split_size streaming chat_template_path max_prompt_length "
        "lora_task_type "
        "use_weighting f_alpha_divergence_coef"
    ),
    "model": _model,
    "model_name": _model,
    "model_revision": lambda value, _: (
        idle("it is the default") if value == "main" else carried("models.0.revision", value)
    ),
    "model_init_kwargs": _model_init,
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "use_peft": _use_peft,
    "r": same("lora.r"),
    "lora_target_modules": listed("lora.target_modules", {"all-linear": "all-linear", "all": "all-linear"}),
    "target_modules": listed("lora.target_modules", {"all-linear": "all-linear", "all": "all-linear"}),
    "lora_target_parameters": listed("lora.target_parameters"),
    "target_parameters": listed("lora.target_parameters"),
    "lora_modules_to_save": listed("lora.modules_to_save"),
    "modules_to_save": listed("lora.modules_to_save"),
    "bias": same("lora.bias"),
    "init_lora_weights": same("lora.init_lora_weights"),
    "task_type": lambda value, _: (
        idle("strop tunes causal language models") if "CAUSAL_LM" in str(value) else left("strop tunes causal models")
    ),
    "load_in_8bit": _bits("8bit"),
    "load_in_4bit": _bits("4bit"),
    "bnb_4bit_quant_type": of_4_bits("bnb_4bit_quant_type"),
    "use_bnb_nested_quant": of_4_bits("use_bnb_nested_quant"),
    "bnb_4bit_use_double_quant": of_4_bits("bnb_4bit_use_double_quant"),
    "bnb_4bit_quant_storage": always("it changes how the bits lie, not the numbers"),
    "dataset_test_split": trl_data.evaluation_split,
    "datasets": trl_data.mixture,
    "path": trl_data.path,
    "name": same("dataset.subset"),
    "split": trl_data.split,
    "data_files": trl_data.data_files,
    "max_length": _max_length,
    "max_seq_length": lambda value, view: (
        idle("max_length decides") if view.given.get("max_length") else _max_length(value, view)
    ),
    "truncation_mode": only(
        ("keep_start",),
        "completions are cut at the right",
        "strop cuts prompts at the left and completions at the right",
    ),
    "packing": packing,
    "packing_strategy": always("rows are filled first fit, and attention never crosses examples"),
    "eval_packing": always("evaluations are not packed"),
    "shuffle_dataset": always("the seed decides the order"),
    "dataset_text_field": only(("text",), "rows of text are read", "rename the column to text"),
    "dataset_kwargs": off("rows are prepared by strop's own way (docs/data.md)"),
    "eos_token": off("an answer ends with the template's end of turn"),
    "pad_token": always("nothing is padded that counts"),
    "completion_only_loss": only(
        (True,), "completions alone are trained", "completions alone are trained, never prompts"
    ),
    "assistant_only_loss": only(
        (True,),
        "answers of the assistant alone are trained",
        "strop trains the answers of the assistant alone; TRL trains whole conversations unless this is true",
    ),
    "activation_offloading": off("training.gradient_checkpointing makes room instead"),
    "router_aux_loss_coef": off("there is no balancing term for experts"),
    "loss_type": _loss_type,
    "loss_weights": always("it is in post_training.sft_weight"),
    "beta": _beta,
    "label_smoothing": of_methods("label_smoothing", "dpo", "cpo"),
    "f_divergence_type": chosen("post_training.f_divergence", DIVERGENCES, "strop has no such divergence"),
    "ld_alpha": of_methods("ld_alpha", "dpo"),
    "discopop_tau": of_methods("discopop_tau", "dpo"),
    "rpo_alpha": of_methods("sft_weight", "dpo", "simpo"),
    "precompute_ref_log_probs": always("the reference is scored once, before the first step, in any case"),
    "precompute_ref_batch_size": always("micro-batches of the reference are chosen so that they fit"),
    "disable_dropout": only((True,), "the model's own dropout is off", "the model's own dropout is off in strop"),
    "reference_free": off("there is always a reference; simpo, orpo and cpo have none"),
    "sync_ref_model": _sync,
    "ref_model_sync_steps": _sync_steps,
    "ref_model_mixup_alpha": lambda value, view: (
        carried("post_training.ref_mixup_alpha", value) if is_on(view.get("sync_ref_model")) else idle("it is off")
    ),
    "ref_model": lambda value, _: (
        left("it is code, which is not run; name another reference as post_training.ref_model_id")
        if isinstance(value, Code)
        else carried("post_training.ref_model_id", value)
    ),
    "desirable_weight": of_methods("desirable_weight", "kto"),
    "undesirable_weight": of_methods("undesirable_weight", "kto"),
    "center_rewards_coefficient": of_methods("center_rewards_coefficient", "reward"),
    "cpo_alpha": _cpo_alpha,
    "simpo_gamma": simpo_gamma("beta"),
    "ignore_bias_buffers": always("it is for another way of several processes"),
    **{
        name: always("the objects of a script are strop's own")
        for name in ("args", "tokenizer", "processing_class", "peft_config", "callbacks", "data_collator")
    },
    **{
        name: always("the rows are those of load_dataset, or of --train-file")
        for name in ("train_dataset", "eval_dataset", "formatting_func")
    },
}


def model_type(folder: Any) -> str:
    """The type of a model that lies in a folder of this machine; empty where it does not."""
    from pathlib import Path

    try:
        file = Path(str(folder)) / "config.json"
        return str(json.loads(file.read_text(encoding="utf-8")).get("model_type", "")) if file.is_file() else ""
    except (OSError, ValueError, AttributeError):
        return ""
