"""LLaMA-Factory: its YAML, and the `dataset_info.json` that says what a data set is. Floor 2, no torch.

Facts: the documentation and examples of LLaMA-Factory, 2026.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from strop.config.yamlfile import MAX_BYTES
from strop.errors import ConfigError
from strop.importers import transformers_trainer
from strop.importers.axolotl_data import FILES
from strop.importers.key_answers import (
    Fate,
    KeyAnswer,
    Rules,
    View,
    absent,
    always,
    carried,
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
    simpo_gamma,
    straight,
    translated,
    validation_size,
    whole,
)

TEMPLATES: Mapping[str, str] = {
    "llama3": "llama3_instruct",
    "qwen": "qwen2.5_instruct",
    "chatml": "chatml",
    "olmo": "olmo2_instruct",
    "mistral": "mistral",
    "gemma": "gemma",
    "zephyr": "zephyr",
}
"""Its template -> the shipped one of strop that writes the same turns."""
LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair")
NATIVE: Mapping[str, tuple[str, ...]] = {
    "prompt": ("instruction", "question", "prompt"),
    "query": ("input", "context"),
    "response": ("output", "response", "answer"),
    "history": ("history",),
    "system": ("system",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "messages": ("conversations", "messages"),
    "tools": ("tools",),
    "kto_tag": ("label", "kto_tag"),
}
"""Its name of a column -> the names under which strop finds that column by itself."""

TAGS: Mapping[str, tuple[str, ...]] = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "chatgpt", "assistant"),
    "observation_tag": ("observation", "function_response", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}
"""Its name of a key of turns, or of a role -> the names under which strop finds it by itself."""


def method_of(given: Mapping[str, Any], calls: tuple[str, ...]) -> str:
    """By `stage` and, for dpo, by `pref_loss`."""
    stage = str(given.get("stage", "sft"))
    if stage not in ("sft", "pt", "dpo", "kto", "rm"):
        raise refused("stage", stage, "stage", "sft, pt, rm, dpo or kto", "name a method of strop: --method dpo")
    loss = given.get("pref_loss")
    if stage == "dpo" and loss in ("orpo", "simpo"):
        return str(loss)
    return {"pt": "sft", "rm": "reward"}.get(stage, stage)


def defaults(method: str, given: Mapping[str, Any], folder_type: str) -> Mapping[str, Any]:
    """What LLaMA-Factory takes for names that are not given."""
    found = {**transformers_trainer.DEFAULTS, "cutoff_len": 2048, "val_size": 0.0}
    if uses_lora(given):
        rank = whole(given.get("lora_rank")) or 8
        found |= {"lora_rank": 8, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "lora_target": "all"}
    if method in ("dpo", "kto", "orpo", "simpo"):
        found["pref_beta"] = 0.1
    if method == "simpo":
        found["simpo_gamma"] = 0.5
    if given.get("stage") == "pt":
        found["packing"] = True
    return found


def uses_lora(given: Mapping[str, Any]) -> bool:
    """Whether adapters train, which they do unless the file says otherwise."""
    return str(given.get("finetuning_type", "lora")) == "lora"


def decided(view: View) -> Iterator[tuple[str, Any]]:
    """Keys of strop that follow from its definitions."""
    yield "lora.enabled", uses_lora(view.given)
    yield "training.max_prompt_length", None
    yield "training.max_completion_length", None


def notes(view: View) -> Iterator[str]:
    """What means something else in strop."""
    yield (
        "LLaMA-Factory shares cutoff_len out between prompt and answer and keeps the beginning of each, so that a long "
        "prompt loses its end; strop cuts prompts at the left, by whole messages first, and answers at the right"
    )
    if real(view.get("warmup_steps")) or real(view.get("warmup_ratio")):
        yield transformers_trainer.WARM_UP
    if view.method not in ("sft",):
        yield "its preference losses are means per micro-batch; strop takes them over the whole step"
    if view.method in ("dpo", "kto") and view.given.get("adapter_name_or_path") and not view.given.get("ref_model"):
        yield "there the reference is the base without the adapter; in strop it is the model with its adapter"
    if is_on(view.get("packing")) and not is_on(view.get("neat_packing")) and view.method == "sft":
        yield "there packed examples see each other unless neat_packing is true; in strop they never do"
    if whole(view.get("max_samples")) and "," in str(view.get("dataset", "")):
        yield "max_samples counts the rows of each data set there; in strop it counts all of them"
    if view.method == "orpo":
        yield "its orpo weighs the odds ratio by pref_beta and takes the likelihood of the chosen answer per token"


# ---- rules


def _stage(value: Any, view: View) -> KeyAnswer:
    return idle(f"it is method {view.method}")


def _finetuning(value: Any, view: View) -> KeyAnswer:
    if value not in ("lora", "full"):
        raise refused("finetuning_type", value, "finetuning_type", "lora or full", "add --lora.enabled true or false")
    return translated({"lora.enabled": value == "lora"})


def _beta(value: Any, view: View) -> KeyAnswer:
    if view.method not in ("dpo", "ipo", "kto", "orpo", "cpo", "simpo"):
        return idle(f"method {view.method} has no beta of preferences")
    return translated({"post_training.simpo_beta" if view.method == "simpo" else "post_training.beta": value})


def _loss(value: Any, view: View) -> KeyAnswer:
    if view.method in ("orpo", "simpo"):
        return idle(f"it is method {view.method}")
    if view.method != "dpo":
        return idle(f"method {view.method} does not read it")
    if value not in LOSSES:
        raise refused("pref_loss", value, "pref_loss", ", ".join((*LOSSES, "orpo", "simpo")), "add --loss-type sigmoid")
    return carried("post_training.loss_type", value)


def _template(value: Any, view: View) -> KeyAnswer:
    if str(value) in TEMPLATES:
        return translated({"dataset.template": TEMPLATES[str(value)]})
    if value in ("default", "empty"):
        return translated({"dataset.template": "plain"}, "strop's plain turns")
    return left("the model's own chat template is taken; name another in dataset.template (docs/templates.md)")


def _bits(value: Any, view: View) -> KeyAnswer:
    bits = whole(value)
    return translated({"models.0.quant": f"{bits}bit"}) if bits in (4, 8) else left("strop quantises to 4 or 8 bits")


def _adapters(value: Any, view: View) -> KeyAnswer:
    names = [n.strip() for n in str(value).split(",")]
    return (
        carried("models.0.adapter", names[0])
        if len(names) == 1
        else left("strop continues one adapter: merge the others into the base first (strop merge)")
    )


def _pissa(value: Any, view: View) -> KeyAnswer:
    rounds = whole(view.get("pissa_iter", 16)) or 16
    name = "pissa" if rounds < 0 else f"pissa_niter_{rounds}"
    return translated({"lora.init_lora_weights": name}) if is_on(value) else idle("adapters begin as plain LoRA does")


def _names(value: Any) -> list[str]:
    """Data sets, given as a list or as `a,b`."""
    if isinstance(value, list):
        return [str(name) for name in value]
    return [name.strip() for name in str(value).split(",") if name.strip()]


def _dataset(value: Any, view: View) -> KeyAnswer:
    values, why = _sources(_names(value), view)
    return _with_lost_columns(values, why) if values else left(why)


def _eval_dataset(value: Any, view: View) -> KeyAnswer:
    trained = view.given.get("dataset")
    known, _ = _sources(_names(trained), view) if trained is not None else ({}, "")
    columns = {key.partition(".")[2]: told for key, told in known.items() if key.endswith("_column")}
    values, why = _sources(_names(value), view, columns)
    file = values.get("dataset.train_file")
    if file is None:
        return left(
            why or "strop validates on one file: write the rows of all into it, and name it as dataset.val_file"
        )
    return _with_lost_columns({"dataset.val_file": file}, why)


def _with_lost_columns(values: Mapping[str, Any], why: str) -> KeyAnswer:
    """Data sets, and what is to be said of columns that strop would not find in them: they are not carried over."""
    answer = translated(values)
    return KeyAnswer(Fate.LEFT, answer.values, answer.why or why) if why else answer


def _sources(names: list[str], view: View, known: Mapping[str, str] | None = None) -> tuple[dict[str, Any], str]:
    """The keys of `dataset` for the data sets of these names, and what is to be said. known: columns that have a name
    already, which holds for all data sets."""
    info, folder, trouble = _info(view)
    sources, columns, unread = [], dict(known or {}), list[str]()
    for name in names:
        entry = info.get(name)
        if not isinstance(entry, Mapping):
            return {}, trouble or f"{name} is not in {folder / 'dataset_info.json'}"
        sources.append(_source(entry, folder))
        own = dict[str, str]()
        unread += [*_columns(entry, view, own), *_tags(entry)]
        unread += [f"{column} ({name})" for key, column in own.items() if columns.setdefault(key, column) != column]
    if any(not source for source in sources):
        return {}, "its rows come from a script or another hub"
    only_file = len(sources) == 1 and set(sources[0]) == {"name"} and Path(sources[0]["name"]).suffix in FILES
    values: dict[str, Any] = {f"dataset.{key}": column for key, column in columns.items()}
    values["dataset.train_file" if only_file else "dataset.sources"] = sources[0]["name"] if only_file else sources
    why = f"strop does not find the columns {', '.join(unread)} by itself: rename them (docs/data.md)" if unread else ""
    return values, why


def _source(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(entry.get("hf_hub_url"), str):  # goes before a file there, too
        found["name"] = entry["hf_hub_url"]
    elif isinstance(entry.get("file_name"), str):
        found["name"] = str(folder / entry["file_name"])
    else:
        return {}
    pairs = (("subset", "subset"), ("split", "split"), ("num_samples", "num_samples"))
    return found | {ours: entry[theirs] for theirs, ours in pairs if entry.get(theirs) is not None}


def _columns(entry: Mapping[str, Any], view: View, found: dict[str, str]) -> list[str]:
    """Fills in the names of columns that strop is told; the names of those that it would not find."""
    given = entry.get("columns")
    unread = []
    told = {"chosen": "chosen_column", "rejected": "rejected_column", "kto_tag": "label_column"}
    for theirs, column in given.items() if isinstance(given, Mapping) else ():
        if theirs in NATIVE and column in NATIVE[theirs] and theirs != "kto_tag":
            continue
        if theirs == "prompt" and view.given.get("stage") == "pt":
            unread += [f"{column} (text)"] if column != "text" else []
        elif theirs in told:
            found[told[theirs]] = str(column)
        elif theirs == "prompt" and isinstance(given, Mapping) and "query" not in given:
            found["prompt_column"] = str(column)
        elif theirs == "response":
            found["completion_column"] = str(column)
        else:
            unread.append(f"{column} ({theirs})")
    return unread


def _tags(entry: Mapping[str, Any]) -> list[str]:
    """The names of keys and roles of turns that strop would not find, of those that `tags` gives."""
    given = entry.get("tags")
    return [
        f"{name} ({theirs})"
        for theirs, name in (given.items() if isinstance(given, Mapping) else ())
        if name not in TAGS.get(str(theirs), (name,))
    ]


def _info(view: View) -> tuple[Mapping[str, Any], Path, str]:
    """(`dataset_info.json`, its folder, what is wrong). It lies where strop is started, or beside the file."""
    named = str(view.given.get("dataset_dir", "data"))
    for folder in (Path(named), view.folder / named, view.folder):
        file = folder / "dataset_info.json"
        try:
            if not file.is_file():
                continue
            if file.stat().st_size > 16 * MAX_BYTES:
                return {}, folder, f"{file} is larger than {16 * MAX_BYTES >> 20} MiB"
            info = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise ConfigError("not readable as JSON", where=str(file)) from None
        return (info, folder, "") if isinstance(info, dict) else ({}, folder, f"{file} holds no data sets")
    return {}, Path(named), f"there is no dataset_info.json in {named}"


RULES: Rules = {
    **transformers_trainer.RULES,
    **straight(
        "model_name_or_path lora_alpha lora_dropout lora_rank loraplus_lr_ratio use_rslora use_dora cutoff_len "
        "max_samples streaming upcast_lmhead_output"
    ),
    "adapter_name_or_path": _adapters,
    "model_revision": lambda value, _: idle("the default") if value == "main" else carried("models.0.revision", value),
    "stage": _stage,
    "finetuning_type": _finetuning,
    "lora_target": listed("lora.target_modules", {"all": "all-linear"}),
    "additional_target": listed("lora.modules_to_save"),
    "pissa_init": _pissa,
    "pissa_iter": lambda value, view: idle(
        "pissa_init names it" if is_on(view.get("pissa_init")) else "pissa_init is off"
    ),
    "pissa_convert": always("adapters are saved so that they load on the base as it is"),
    "create_new_adapter": off("strop goes on with the adapter that is named"),
    "pref_beta": _beta,
    "dpo_beta": _beta,
    "pref_loss": _loss,
    "pref_ftx": of_methods("sft_weight", "dpo", "simpo"),
    "pref_bco_weight": off("strop has no such term"),
    "dpo_label_smoothing": of_methods("label_smoothing", "dpo"),
    "kto_chosen_weight": of_methods("desirable_weight", "kto"),
    "kto_rejected_weight": of_methods("undesirable_weight", "kto"),
    "simpo_gamma": simpo_gamma("pref_beta"),
    "ld_alpha": of_methods("ld_alpha", "dpo"),
    "ref_model": of_methods("ref_model_id", "dpo", "kto"),
    "ref_model_adapters": off("merge them into the reference first (strop merge)"),
    "ref_model_quantization_bit": off("another reference is loaded as it is"),
    "template": _template,
    "dataset": _dataset,
    "eval_dataset": _eval_dataset,
    "dataset_dir": always("dataset_info.json is read there"),
    "val_size": validation_size,
    "mix_strategy": only(("concat",), "sources stand one behind the other", "give sources a weight (dataset.sources)"),
    "interleave_probs": off("give sources a weight (dataset.sources)"),
    "packing": packing,
    "neat_packing": lambda value, view: packing(value, view) if is_on(value) else idle("it is off"),
    "train_on_prompt": off("answers alone are trained, never prompts"),
    "mask_history": lambda value, view: (
        translated({"dataset.train_on": "last"}) if is_on(value) else idle("all answers are trained")
    ),
    "overwrite_cache": always("rows are found again by what they were made of"),
    "overwrite_output_dir": always("strop train --overwrite starts anew in the folder of another run"),
    "preprocessing_batch_size": always("it changes no result"),
    "tokenized_path": always("tokenised rows lie in the cache folder"),
    "media_dir": always("strop trains on text"),
    "ignore_pad_token_for_loss": only((True,), "padding is never trained", "padding is never trained"),
    "quantization_bit": _bits,
    "quantization_method": only(("bnb", "bitsandbytes"), "it is bitsandbytes", "strop quantises by bitsandbytes"),
    "quantization_type": of_4_bits("quantization_type"),
    "double_quantization": of_4_bits("double_quantization"),
    "pure_bf16": off("weights that train are float32 in strop; training.bf16 computes in 16 bits"),
    "upcast_layernorm": always("norms are computed in float32"),
    "flash_attn": always("attention kernels are chosen by device"),
    "disable_gradient_checkpointing": always("training.gradient_checkpointing is auto"),
    "use_fast_tokenizer": always("it changes no result"),
    "low_cpu_mem_usage": always("it changes no result"),
    "cache_dir": off("HF_HOME names the cache of the hub"),
    "add_tokens": listed("models.0.add_tokens"),
    "resize_vocab": always("the embedding gets a row for each new token"),
    "rope_scaling": off("positions are those of the model's own configuration"),
    "shift_attn": off("attention is the model's own"),
    "plot_loss": always("report.html has the curves"),
    "include_effective_tokens_per_second": always("metrics.jsonl counts tokens per second"),
    "compute_accuracy": always("preference methods have accuracies"),
    "freeze_vision_tower": always("strop trains on text"),
    "freeze_multi_modal_projector": always("strop trains on text"),
    "image_max_pixels": always("strop trains on text"),
    "video_max_pixels": always("strop trains on text"),
    **absent(
        "use_galore use_apollo use_badam use_adam_mini use_muon use_llama_pro mixture_of_depths "
        "use_dft_loss use_eaft_loss use_asft_loss use_kt",
        "strop has no such way to train",
    ),
}
