"""Help, documentation and JSON Schema, all made from the section classes. Floor 1, no torch."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from strop.config.flags import ALIASES
from strop.config.methods import METHODS
from strop.config.run import RunConfig
from strop.config.schema import KEYS, PRESET, SECTIONS, Key
from strop.config.sections import ModelSection

LAYERS = """\
Values come in layers; a later one wins, key by key:

    built-in defaults  <  preset  <  configuration file  <  command line

A preset is a small YAML file laid under the configuration: cpu, gpu-bf16, gpu-fp16, memory-efficient, one of your own
in configs/presets/, or a path. A configuration may name one (preset: cpu); --preset wins over that name. A later layer
that sets bf16 or fp16 switches the other one off, and warmup_steps and warmup_ratio replace each other.

Every key is also a flag: --section.key VALUE, and --key VALUE where no other section has a key of that name (dashes
or underscores). Switches take no value (--bf16, --no-bf16) or one (--bf16 true); lists are given as a,b,c. Keys of a
model are written --models.0.key, or --key where there is one model.
"""

PRECISE = """\
Values are YAML 1.2: `5e-7` is a number, only `true` and `false` are booleans, text that looks like a number needs
quotes. Unknown keys, repeated keys, anchors and tags are refused with file and line. Null for a key that does not
take null means its default. Paths are relative to the folder where strop is started.
"""


def json_schema() -> str:
    """The JSON Schema of a configuration file, for editors."""
    schema = _without_titles(RunConfig.model_json_schema())
    preset = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "description": PRESET}
    schema["properties"] = {"preset": preset, **schema["properties"]}
    for method, settings in METHODS.items():
        if method != "sft":  # what a block without a method is
            schema["$defs"][settings.__name__]["required"] = ["method"]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "strop configuration"}
    return json.dumps({**head, **schema}, indent=2) + "\n"


def _without_titles(node: Any) -> Any:
    """The schema without the titles that only repeat names."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {k: _without_titles(v) for k, v in node.items() if k != "title" or not isinstance(v, str)}


def markdown() -> str:
    """The reference page of the documentation."""
    parts = [
        "# Configuration\n\n<!-- written by `strop schema --format markdown`; do not edit -->\n",
        LAYERS,
        PRECISE,
        "In Python the same keys are classes: `strop.RunConfig(models=[...], ...)`, or `strop.load_config(path, "
        'preset="cpu", overrides={"training.learning_rate": 1e-6})`. `strop schema` prints the JSON Schema.\n',
        _table("", [Key("", "preset", _preset_field()), *SECTIONS[""].values()]),
    ]
    for section, keys in SECTIONS.items():
        if section:
            parts.append(_table(section, list(keys.values())))
    aliases = ", ".join(f"`--{a.replace('_', '-')}` for `{key}`" for a, key in ALIASES.items())
    parts.append(f"## Short flags\n\n{aliases}.\n")
    return "\n".join(parts)


def _preset_field() -> Any:
    field = ModelSection.model_fields["revision"]  # text or null
    copy = type(field)(annotation=field.annotation, default=None, description=PRESET)
    return copy


def _table(section: str, keys: list[Key]) -> str:
    heading = {"": "At the top", "models": "models: a list"}.get(section, section)
    purpose = "" if section in ("", "models", "post_training") else _purpose(section)
    methods = section == "post_training"
    rows = [f"## {heading}", "", *([purpose, ""] if purpose else [])]
    rows += ["| key | value | default |" + (" read by |" if methods else "") + " meaning |"]
    rows += ["|---|---|---|---|" + ("---|" if methods else "")]
    for key in keys:
        readers = f" {', '.join(key.methods)} |" if methods else ""
        meaning = key.description.replace("|", "\\|")
        rows.append(f"| `{key.name}` | {key.expected} | {key.default} |{readers} {meaning} |")
    return "\n".join(rows) + "\n"


def _purpose(section: str) -> str:
    annotation = RunConfig.model_fields[section].annotation
    return " ".join((getattr(annotation, "__doc__", None) or "").split())


FOR_DATA = (
    ("conversations or answers to imitate", "sft", ""),
    ("answers, and a better model to learn from", "distill", "learns the teacher's whole distribution"),
    ("texts without prompts", "sft", "the whole text is trained"),
    ("pairs of a better and a worse answer", "dpo", "after sft on such answers"),
    ("pairs, some labelled the wrong way round", "dpo", "loss_type: robust, with their share as label_smoothing"),
    ("pairs whose margins grow without end under dpo", "ipo", "a margin of fixed size"),
    ("pairs, where answers grow longer or a reference costs too much", "simpo", "compares per token, no reference"),
    ("pairs, and a model that had no sft", "orpo", "sft and preference in one run, no reference"),
    ("pairs of translations", "cpo", "made for translation, no reference"),
    ("pairs, if you want a number for every answer", "reward", "a reward model, for grpo or for choosing answers"),
    ("single answers marked as good or bad", "kto", "needs no pairs; one kind may be rare"),
    ("several answers per prompt with rewards", "grpo", "algorithm: dapo, gspo, rloo and others"),
    ("prompts, and rewards that can check an answer", "grpo", "rollout: the model samples the answers itself"),
)
"""What the data is, the method for it, and what to know of it."""


def method_list() -> str:
    """Every method with its purpose, and which is for which data, a line each."""
    width = max(map(len, METHODS))
    lines = [f"  {name:{width}}  {' '.join((cls.__doc__ or '').split())}" for name, cls in METHODS.items()]
    room = max(len(data) for data, _, _ in FOR_DATA)
    lines += ["", "Which one for the data that is there:", ""]
    lines += [f"  {data:{room}}  {name:{width}}  {note}".rstrip() for data, name, note in FOR_DATA]
    return "\n".join(lines) + "\n\n  strop methods NAME explains one\n"


def key_help(width: int) -> str:
    """Every key as a flag, with what it takes, its default and its meaning."""
    lines: list[str] = []
    section = None
    for key in KEYS:
        if key.section != section:
            section = key.section
            lines += ["", f"{section or 'top'}:"]
        bare = sum(other.name == key.name for other in KEYS) == 1
        flag = f"--{key.name.replace('_', '-')}" if bare else f"--{key.dotted.replace('.N.', '.0.')}"
        lines.append(f"  {flag}  ({key.expected}; default {key.default})")
        readers = f" [{', '.join(key.methods)}]" if key.methods else ""
        lines += textwrap.wrap(key.description + readers, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines).lstrip("\n") + "\n"
