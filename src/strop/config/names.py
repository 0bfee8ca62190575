"""Names of keys as people write them: dotted or bare, with the nearest valid one for a wrong one. Floor 1, no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from strop.config.schema import KEYS, SECTIONS, Key
from strop.config.yamlfile import KeyPath, dotted
from strop.errors import ConfigError

ELSEWHERE: Mapping[str, str] = {
    "lr": "training.learning_rate",
    "epochs": "training.num_epochs",
    "num_train_epochs": "training.num_epochs",
    "n_epochs": "training.num_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "micro_batch_size_per_gpu": "training.per_device_train_batch_size",
    "per_device_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "gradient_accum_steps": "training.gradient_accumulation_steps",
    "grad_accum": "training.gradient_accumulation_steps",
    "lr_scheduler_type": "training.lr_scheduler",
    "scheduler": "training.lr_scheduler",
    "optimizer": "training.optim",
    "wd": "training.weight_decay",
    "max_length": "training.max_seq_length",
    "max_len": "training.max_seq_length",
    "max_seq_len": "training.max_seq_length",
    "cutoff_len": "training.max_seq_length",
    "sequence_len": "training.max_seq_length",
    "evaluation_strategy": "training.eval_steps",
    "eval_strategy": "training.eval_steps",
    "save_strategy": "training.save_steps",
    "logging_strategy": "training.logging_steps",
    "model": "models.N.huggingface_id",
    "model_name": "models.N.huggingface_id",
    "model_name_or_path": "models.N.huggingface_id",
    "base_model": "models.N.huggingface_id",
    "adapter_name_or_path": "models.N.adapter",
    "attn_impl": "models.N.attn_implementation",
    "dataset_name": "dataset.name",
    "dataset_num_proc": "dataset.num_workers",
    "val_size": "dataset.validation_split",
    "val_set_size": "dataset.validation_split",
    "chat_template": "dataset.template",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "use_lora": "lora.enabled",
    "use_peft": "lora.enabled",
    "dpo_beta": "post_training.beta",
    "pref_beta": "post_training.beta",
    "pref_loss": "post_training.loss_type",
    "ref_name": "post_training.ref_model_id",
    "ref_model": "post_training.ref_model_id",
    "sync_ref_model": "post_training.ref_sync_steps",
    "ref_model_sync_steps": "post_training.ref_sync_steps",
    "ref_model_mixup_alpha": "post_training.ref_mixup_alpha",
    "use_weighting": "post_training.wpo_weighting",
    "rpo_alpha": "post_training.sft_weight",
    "f_divergence_type": "post_training.f_divergence",
    "f_alpha_divergence_coef": "post_training.f_alpha",
}
"""What other tools call a key: known to the hints of error messages, not to the schema."""


def matches(name: str) -> list[KeyPath]:
    """The paths of the keys or sections that a dotted or bare name can mean; none: there is no such key.

    A bare key of a model has "*" where the model's position stands: the only model.
    """
    match name.split("."):
        case [only] if only and (only in SECTIONS[""] or only in SECTIONS or only == "preset"):
            return [(only,)]
        case [only]:
            return [_path(key) for key in KEYS if key.name == only]
        case ["models", index, last] if index.isdecimal() and len(index) < 5 and last in SECTIONS["models"]:
            return [("models", int(index), last)]
        case [section, last] if section != "models" and last in SECTIONS.get(section, ()):
            return [(section, last)]
    return []


def numbered(path: KeyPath) -> KeyPath:
    """The path with the only model's position, 0, in place of "*"."""
    return tuple(0 if part == "*" else part for part in path)


def target(name: str, where: str) -> KeyPath:
    """The one path that a name means.

    Raises:
        ConfigError: no key has this name, or several have it.
    """
    found = matches(name)
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(dotted(numbered(path)) for path in found)
        raise ConfigError(f"{name} stands in several sections", where=where, fix=f"write {names}")
    section, _, last = name.rpartition(".")
    hint = nearest(last, "models" if section.startswith("models") else section)
    raise ConfigError(f"there is no key {dotted([name])}", where=where, fix=hint)


def _path(key: Key) -> KeyPath:
    if key.section == "models":
        return ("models", "*", key.name)
    return (key.section, key.name) if key.section else (key.name,)


def nearest(name: str, section: str = "") -> str:
    """A hint for an unknown key: where it belongs, or what was probably meant. Empty if nothing is near.

    Args:
        name: the unknown key, without its section.
        section: the section in which it was found; "" for the top.
    """
    homes = [key.dotted for key in KEYS if key.name == name and key.section != section]
    if homes:
        return f"{name} belongs in {' or '.join(_section_of(home) for home in homes)}: {' or '.join(homes)}"
    if name in ELSEWHERE:
        return f"did you mean {ELSEWHERE[name]}?"
    own = [*SECTIONS.get(section, ()), *([*SECTIONS, "preset"] if not section else [])]
    if (close := closest(name, own)) is not None:
        return f"did you mean {close}?" if not section else f"did you mean {_in(section)}{close}?"
    if (close := closest(name, [key.name for key in KEYS])) is not None:
        return f"did you mean {' or '.join(key.dotted for key in KEYS if key.name == close)}?"
    if section in SECTIONS and section:
        return f"the keys of {section}: {', '.join(SECTIONS[section])}"
    return f"the sections: {', '.join(s for s in SECTIONS if s)}" if not section else ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: the shortest that `name` begins (`gpu` for `gpu-bf16`), or the most
    similar one; None where nothing is near."""
    known = sorted(known, key=len)
    if len(name) > 2 and (begun := [k for k in known if k.startswith(name)]):
        return begun[0]
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _section_of(home: str) -> str:
    return home.rpartition(".")[0] or "the top of the file"


def _in(section: str) -> str:
    return "" if section == "models" else f"{section}."
