"""TRL's GRPO: completions that are sampled, rewards, and the losses on them. Floor 2, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from strop.importers import trl_serving
from strop.importers.key_answers import (
    KeyAnswer,
    Rules,
    View,
    absent,
    always,
    carried,
    idle,
    left,
    off,
    only,
    real,
    refused,
    same,
    straight,
    translated,
    whole,
)
from strop.importers.rewards import reward_functions, reward_weights


def sampling(view: View) -> Iterator[tuple[str, Any]]:
    yield "rollout.enabled", True
    completion = whole(view.get("max_completion_length")) or 512
    yield "training.max_seq_length", completion + (whole(view.get("max_prompt_length")) or 512)
    yield "training.max_prompt_length", None
    high = real(view.get("epsilon_high")) or real(view.get("epsilon"))
    loss = view.get("loss_type")
    if loss == "cispo":
        if high is not None and high > 1:
            yield "post_training.epsilon_high", high - 1
    elif loss != "sapo":
        yield "post_training.epsilon_high", high or 0.2
    completions = (whole(view.get("per_device_train_batch_size")) or 8) * (
        whole(view.get("gradient_accumulation_steps")) or 1
    )
    yield "training.groups_per_step", max(1, completions // (whole(view.get("num_generations")) or 8))


def loss(value: Any, view: View) -> KeyAnswer:
    scale = str(view.get("scale_rewards", "group")).lower()
    advantage = {"group": "group", "true": "group", "batch": "batch", "none": "mean", "false": "mean"}.get(
        scale, "group"
    )
    if view.get("multi_objective_aggregation") == "normalize_then_sum":
        advantage = "gdpo"  # which reads no scale_rewards
    axes: dict[str, Any] = {"post_training.advantage": advantage}
    match value:
        case "grpo":
            pass
        case "dapo" | "bnpo":
            axes["post_training.aggregation"] = "token"
        case "dr_grpo":
            axes["post_training.aggregation"] = "constant"
        case "luspo":
            axes["post_training.aggregation"] = "sequence_sum"
        case "cispo":
            axes |= {"post_training.gate": "cispo", "post_training.aggregation": "token"}
        case "sapo":
            axes["post_training.gate"] = "sapo"
        case _:
            raise refused("loss_type", value, "", "grpo, dapo, bnpo, dr_grpo, luspo, cispo or sapo", "--algorithm NAME")
    return translated(axes)


def _epsilon(value: Any, view: View) -> KeyAnswer:
    if view.get("loss_type") == "cispo" and view.get("epsilon_high") is None:
        return _epsilon_high(value, view)  # where that is not given, it is this one
    if view.get("loss_type") in ("cispo", "sapo"):
        return idle(f"{view.get('loss_type')} has no such bound")
    return carried("post_training.epsilon", value)


def _epsilon_high(value: Any, view: View) -> KeyAnswer:
    if view.get("loss_type") == "sapo":
        return idle("sapo has no such bound")
    if view.get("loss_type") == "cispo":
        high = real(value) or 0
        if high <= 1:
            return left("the upper bound of cispo is 1 + epsilon_high in strop, and this one is below 1: 5 is taken")
        return translated({"post_training.epsilon_high": high - 1}, "the bound is 1 + epsilon_high in strop")
    return carried("post_training.epsilon_high", value)


def _steps_per_generation(value: Any, view: View) -> KeyAnswer:
    steps = whole(value)
    return carried("rollout.steps_per_generation", value) if steps is None else _rounds(steps, view)


def _generation_batch(value: Any, view: View) -> KeyAnswer:
    """As many completions of one process as this are sampled at once."""
    size, batch = whole(value), whole(view.get("per_device_train_batch_size")) or 8
    if size is None or size % batch:
        return left("set rollout.steps_per_generation: for how many optimizer steps is sampled at once?")
    return _rounds(size // batch, view)


def _rounds(micro_batches: int, view: View) -> KeyAnswer:
    """So many micro-batches are sampled for at once, of which an optimizer step has gradient_accumulation_steps."""
    of_step = whole(view.get("gradient_accumulation_steps")) or 1
    if micro_batches > 0 and of_step % micro_batches == 0:
        return idle("every step samples its own completions")
    if micro_batches <= 0 or micro_batches % of_step:
        return left(
            f"it is {micro_batches} micro-batches, and an optimizer step has {of_step}: set "
            "rollout.steps_per_generation, which counts optimizer steps"
        )
    return translated({"rollout.steps_per_generation": micro_batches // of_step}, "it counts optimizer steps in strop")


def _max_completion(value: Any, view: View) -> KeyAnswer:
    return carried("training.max_completion_length", value)


RULES: Rules = {
    **trl_serving.RULES,
    **straight(
        "num_generations num_generations_eval num_iterations mask_truncated_completions top_p min_p "
        "chat_template_kwargs delta sapo_temperature_pos sapo_temperature_neg importance_sampling_level "
        "use_bias_correction_kl"
    ),
    "top_k": lambda value, _: carried("rollout.top_k", value) if (whole(value) or 0) >= 0 else idle("from all tokens"),
    "max_completion_length": _max_completion,
    "temperature": same("rollout.temperature"),
    "steps_per_generation": _steps_per_generation,
    "generation_batch_size": _generation_batch,
    "epsilon": _epsilon,
    "epsilon_high": _epsilon_high,
    "scale_rewards": always("it is in post_training.advantage"),
    "reward_funcs": reward_functions,
    "reward_weights": reward_weights,
    "reward_model_name_or_path": lambda value, view: (
        idle("it stands among the rewards") if view.get("reward_funcs") is not None else reward_functions([], view)
    ),
    "repetition_penalty": only((1.0,), "there is none", "strop samples from the policy as it is"),
    "log_completions": always("every group is in rollouts.jsonl"),
    "num_completions_to_print": always("every group is in rollouts.jsonl"),
    "top_entropy_quantile": only((1.0,), "all tokens are trained", "all tokens are trained"),
    "cast_lm_head_to_fp32": lambda value, view: carried("training.fp32_logits", value),
    "multi_objective_aggregation": always("it is in post_training.advantage"),
    "max_tool_calling_iterations": off("completions are of one turn, without tools"),
    **{
        name: always("it changes no result")
        for name in (
            *("cache_implementation", "ds3_gather_for_generation", "log_multimodal", "log_unique_prompts"),
            *("log_completions_hub_repo", "use_transformers_paged", "use_transformers_continuous_batching"),
            "transformers_continuous_batching_config",
        )
    },
    **{
        name: always("its loss is another one, and so not read")
        for name in (
            *("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg", "entropy_coef_delta"),
            *("entropy_coef_min", "entropy_coef_max", "entropy_target"),
        )
    },
    "shuffle_dataset": always("the seed decides the order"),
    "entropy_coef": same("post_training.entropy_coef"),
    **absent("off_policy_mask_threshold", "strop has no such term"),
    **absent("use_adaptive_entropy", "the coefficient stays as it is"),
}
