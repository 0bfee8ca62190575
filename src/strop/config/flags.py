"""Any key of the configuration as a flag. Floor 1, no torch.

In: the tokens of a command line. Out: overrides for `load_config`, and the tokens that are the command's own.

    --section.key VALUE    --section.key=VALUE    --learning-rate VALUE    --learning_rate VALUE
    --bf16    --no-bf16    --bf16 true
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from strop.config.layers import CommandLine
from strop.config.names import closest, matches, numbered
from strop.config.other_tools import RENAMED, instead_of
from strop.config.schema import KEYS, SECTIONS, Key, key_at
from strop.config.yamlfile import KeyPath, dotted, scalar
from strop.errors import ConfigError

ALIASES: Mapping[str, str] = {
    "model": "huggingface_id",
    "ckpt_paths": "huggingface_id",
    "epochs": "num_epochs",
    "dpo_train_file": "train_file",
    "dpo_val_file": "val_file",
}
"""Short names of the command line; the schema itself has none."""


def split_flags(tokens: Sequence[str], own: Collection[str]) -> tuple[CommandLine, list[str]]:
    """Takes the flags of configuration keys out of a command line. A configuration file that follows no flag stays.

    Args:
        tokens: what follows the command.
        own: the command's own flags, with their dashes; they and what follows them come back in the rest.

    Raises:
        ConfigError: an unknown flag, a flag without its value, a key given twice, a word that belongs to no flag.
    """
    overrides, rest = CommandLine(), list[str]()
    given: dict[KeyPath, str] = {}
    waiting = list(tokens)
    while waiting:
        token = waiting.pop(0)
        flag, equals, text = token.partition("=")
        if flag in own:
            rest.append(token)
            while waiting and _is_value(waiting[0]):
                rest.append(waiting.pop(0))
            continue
        if not token.startswith("--") or token == "--":
            if is_file(token):
                rest.append(token)
                continue
            raise ConfigError(
                f"{token[:80]!r} belongs to no flag", fix="a value follows its flag: --learning-rate 1e-6"
            )
        name, path, negated = _named(flag, own)
        key = key_at(path)
        if key is None:
            keys = ", ".join(f"--{path[0]}.{key}" for key in list(SECTIONS[str(path[0])])[:3])
            raise ConfigError(f"{flag} is a section", fix=f"give its keys: {keys}, ...")
        if path in given:
            where = f"{given[path]} and {flag}"
            raise ConfigError(f"{dotted(path)} is given twice", where=where, fix="keep one of the two")
        given[path] = flag
        overrides[name] = _value(flag, key, negated, text if equals else None, waiting)
        overrides.flags[name] = flag
    return overrides, rest


def is_file(token: str) -> bool:
    """Whether a word of the command line names a configuration file."""
    return token.endswith((".yaml", ".yml")) and not token.startswith("-")


def _named(flag: str, own: Collection[str]) -> tuple[str, KeyPath, bool]:
    """The key's name, its path, and whether the flag is `--no-KEY`."""
    name = flag[2:].replace("-", "_")
    name = ALIASES.get(name, name)
    for spelled, negated in ((name, False), (name.removeprefix("no_"), True)):
        found = [path for path in matches(spelled) if path != ("preset",)]
        if len(found) > 1:
            choices = " or ".join("--" + dotted(numbered(path)) for path in found)
            raise ConfigError(f"{flag} could mean several keys", fix=f"write {choices}")
        if found:
            path = numbered(found[0])
            key = key_at(path)
            if not negated or (key is not None and bool in key.kinds):
                return spelled, path, negated
    raise ConfigError(f"unknown flag {flag[:80]}", fix=_nearest_flag(name, own))


def _nearest_flag(name: str, own: Collection[str]) -> str:
    section, _, last = name.rpartition(".")
    if homes := [key for key in KEYS if key.name == last]:
        wrong = f"{last} belongs in {' or '.join(k.section or 'the top' for k in homes)}; " if section else ""
        return f"{wrong}write {' or '.join(_dotted_flag(key) for key in homes)}"
    if (known := RENAMED.get(last, RENAMED.get(name))) is not None:
        return f"did you mean --{known.replace('.N.', '.0.')}?"
    if instead := instead_of(last):
        return instead
    flags = {key.name: _dotted_flag(key) if section else _flag(key.name) for key in KEYS}
    flags |= {alias: _flag(alias) for alias in ALIASES} | {flag.lstrip("-").replace("-", "_"): flag for flag in own}
    close = closest(last, flags)
    return f"did you mean {flags[close]}?" if close is not None else "strop train --help lists all flags"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dotted_flag(key: Key) -> str:
    return "--" + key.dotted.replace(".N.", ".0.")


def _is_value(token: str) -> bool:
    return not token.startswith("-") or isinstance(scalar(token), int | float)


def _value(flag: str, key: Key, negated: bool, text: str | None, waiting: list[str]) -> str:
    """The flag's value, taken from behind the `=` or from the tokens that follow."""
    if negated:
        if text is not None or (waiting and _is_value(waiting[0]) and not is_file(waiting[0])):
            raise ConfigError(f"{flag} takes no value", fix=f"write {flag}, or {flag.replace('--no-', '--', 1)} VALUE")
        return "false"
    if text is not None:
        return text
    is_switch = bool in key.kinds
    if waiting and _is_value(waiting[0]) and not (is_switch and is_file(waiting[0])):
        return waiting.pop(0)
    if is_switch:
        return "true"
    raise ConfigError(f"{flag} needs a value", expected=key.expected)
