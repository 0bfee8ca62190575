"""TRL's settings of vLLM, and arguments that it hands to it: what strop's `rollout` section has of them. Floor 2.

TRL gives a server of its own (`trl vllm-serve`) all weights after each step. strop has the adapter loaded by a plain
vLLM server, so what is served has to be plain LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from strop.config.yamlfile import KeyPath
from strop.importers.foreign_file import leaves
from strop.importers.key_answers import (
    Code,
    Fate,
    KeyAnswer,
    Rule,
    Rules,
    View,
    always,
    carried,
    idle,
    is_on,
    left,
    real,
    same,
    translated,
)

START = "start it with `vllm serve MODEL --enable-lora` in place of `trl vllm-serve`: see docs/methods/grpo.md"
_NOT_SERVED = ("use_dora", "modules_to_save", "lora_modules_to_save", "target_parameters", "lora_target_parameters")
LISTENS = "0.0.0.0"
"""TRL's default: where a server listens, not where it is asked."""
_DRAWS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def uses_lora(given: Mapping[str, Any]) -> bool:
    """Whether adapters train."""
    names = ("r", "target_modules", "lora_args", "LoraConfig")
    return is_on(given.get("use_peft")) or any(name in given for name in names)


def why_not_served(view: View) -> str:
    """Why strop cannot draw from a server what TRL draws from one; "": it can."""
    if str(view.get("vllm_mode", "colocate")).lower() != "server":
        return "vLLM does not run inside of strop's process: the policy samples, or a server, see rollout.sampler"
    if not uses_lora(view.given) and not view.given.get("adapter"):
        return "strop gives a server adapters, and all weights train here: the policy samples"
    others = [name for name in _NOT_SERVED if view.given.get(name)]
    if str(view.given.get("bias", "none")).lower() != "none":
        others.append("bias")
    if others:
        return f"strop gives a server no adapters with {others[0]}: the policy samples"
    if _from_a_part(view) and real(view.get("temperature", 1.0)) != 1:
        return "with a temperature beside top_k, top_p or min_p, vLLM's log-probs are not those of training"
    return ""


def _from_a_part(view: View) -> bool:
    """Whether tokens are drawn from a part of the vocabulary."""
    top_k, top_p, min_p = (real(view.get(name)) for name in ("top_k", "top_p", "min_p"))
    return (top_k or 0) > 0 or (top_p is not None and top_p < 1) or (min_p or 0) > 0


def _is_served(view: View) -> bool:
    return is_on(view.get("use_vllm")) and not why_not_served(view)


def _use_vllm(value: Any, view: View) -> KeyAnswer:
    if not is_on(value):
        return (
            left(f"it is {value!r}, and not true or false") if isinstance(value, Code) else idle("the policy samples")
        )
    why = why_not_served(view)
    return left(why) if why else translated({"rollout.sampler": "vllm"}, START)


def _mode(value: Any, view: View) -> KeyAnswer:
    if not is_on(view.get("use_vllm")):
        return idle("use_vllm is off")
    why = why_not_served(view)
    return left(why) if why else idle("it is in rollout.sampler")


def _of_server(rule: Rule) -> Rule:
    """A rule that is asked where a server samples."""
    return lambda value, view: rule(value, view) if _is_served(view) else idle("no server samples")


def _base_url(value: Any, view: View) -> KeyAnswer:
    return carried("rollout.vllm_url", value.rstrip("/") if isinstance(value, str) else value)


def _host_or_port(value: Any, view: View) -> KeyAnswer:
    """Either sets the whole address."""
    if view.get("vllm_server_base_url") is not None:
        return idle("vllm_server_base_url is read")
    host, port = view.get("vllm_server_host", LISTENS), view.get("vllm_server_port", 8000)
    if code := next((part for part in (host, port) if isinstance(part, Code)), None):
        return carried("rollout.vllm_url", code)
    asked = "127.0.0.1" if host == LISTENS else host
    return translated({"rollout.vllm_url": f"http://{asked}:{port}"})


def _correction(value: Any, view: View) -> KeyAnswer:
    """TRL weighs what a server samples by what the policy makes of it, unless that is switched off."""
    if not is_on(value):
        return idle("there is none, unless post_training.sampler_correction says so")
    if _from_a_part(view):
        return left("strop does not correct what is drawn by top_k, top_p or min_p")
    return translated({"post_training.sampler_correction": view.get("vllm_importance_sampling_mode", "sequence_mask")})


def _bound(key: str) -> Rule:
    def rule(value: Any, view: View) -> KeyAnswer:
        if key.endswith("_min") and str(view.get("vllm_importance_sampling_mode", "")).endswith("_truncate"):
            return left("a weight that is cut off above has no lower bound in strop")
        corrects = is_on(view.get("vllm_importance_sampling_correction", True)) and not _from_a_part(view)
        return carried(key, value) if corrects else idle("nothing is corrected")

    return _of_server(rule)


def _generation_kwargs(value: Any, view: View) -> KeyAnswer | Mapping[KeyPath, KeyAnswer]:
    """Arguments of vLLM's SamplingParams, or of transformers' GenerationConfig: a mapping, or one written as JSON."""
    if not value:
        return idle("there are none")
    if isinstance(value, Mapping):
        return {path: _generation(str(path[0]), item) for path, item in leaves(value)}
    try:
        settings = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, Mapping):
        return left("it is no mapping that can be read")
    answers = [_generation(str(name), item) for name, item in settings.items()]
    values = {key: item for answer in answers for key, item in answer.values.items()}
    if lost := [f"{name}: {a.why}" for name, a in zip(settings, answers, strict=True) if a.fate is Fate.LEFT]:
        return KeyAnswer(Fate.LEFT, values, "; ".join(lost))
    return translated(values)


def _generation(name: str, value: Any) -> KeyAnswer:
    if name in ("stop", "stop_strings"):
        return translated({"rollout.stop": value})
    if name == "stop_token_ids":
        return translated({"rollout.stop_token_ids": value})
    if name in _DRAWS:
        return left(f"give {name} by itself, outside of generation_kwargs")
    return left("strop samples by temperature, top_k, top_p, min_p, stop and stop_token_ids alone")


RULES: Rules = {
    "use_vllm": _use_vllm,
    "vllm_mode": _mode,
    "vllm_server_base_url": _of_server(_base_url),
    "vllm_server_host": _of_server(_host_or_port),
    "vllm_server_port": _of_server(_host_or_port),
    "vllm_server_timeout": _of_server(same("rollout.vllm_retry_seconds")),
    "vllm_group_port": always("adapters go to the server as files"),
    "vllm_importance_sampling_correction": _of_server(_correction),
    "vllm_importance_sampling_mode": _of_server(always("it is in post_training.sampler_correction")),
    "vllm_importance_sampling_cap": _bound("post_training.sampler_correction_max"),
    "vllm_importance_sampling_clip_max": _bound("post_training.sampler_correction_max"),
    "vllm_importance_sampling_clip_min": _bound("post_training.sampler_correction_min"),
    "generation_kwargs": _generation_kwargs,
}
