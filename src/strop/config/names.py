"""Names of keys as people write them: dotted or bare, with the nearest valid one for a wrong one. Floor 1, no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from strop.config.schema import KEYS, SECTIONS, Key
from strop.config.yamlfile import KeyPath, dotted
from strop.errors import ConfigError

ELSEWHERE: Mapping[str, str] = {
    "lr": "training.learning_rate",
    "epochs": "training.num_epochs",
    "num_train_epochs": "training.num_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size_per_gpu": "training.per_device_train_batch_size",
    "gradient_accum_steps": "training.gradient_accumulation_steps",
    "lr_scheduler_type": "training.lr_scheduler",
    "wd": "training.weight_decay",
    "max_length": "training.max_seq_length",
    "max_len": "training.max_seq_length",
    "max_seq_len": "training.max_seq_length",
    "model": "models.N.huggingface_id",
    "model_name": "models.N.huggingface_id",
    "model_name_or_path": "models.N.huggingface_id",
    "dataset_name": "dataset.name",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "dpo_beta": "post_training.beta",
    "ref_name": "post_training.ref_model_id",
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
    if close := difflib.get_close_matches(name, own, n=1):
        return f"did you mean {close[0]}?" if not section else f"did you mean {_in(section)}{close[0]}?"
    if close := difflib.get_close_matches(name, [key.name for key in KEYS], n=1):
        return f"did you mean {' or '.join(key.dotted for key in KEYS if key.name == close[0])}?"
    if section in SECTIONS and section:
        return f"the keys of {section}: {', '.join(SECTIONS[section])}"
    return f"the sections: {', '.join(s for s in SECTIONS if s)}" if not section else ""


def _section_of(home: str) -> str:
    return home.rpartition(".")[0] or "the top of the file"


def _in(section: str) -> str:
    return "" if section == "models" else f"{section}."
