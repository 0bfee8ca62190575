"""`strop methods`: the list of methods, or one of them explained. Floor 10."""

from __future__ import annotations

import shutil
from typing import get_args

from strop.config.methods import METHODS, LossType
from strop.config.names import did_you_mean
from strop.config.other_tools import instead_of
from strop.errors import ConfigError
from strop.terminal import show


def usage() -> str:
    return "usage: strop methods [NAME]\n"


def run(arguments: list[str]) -> int:
    if len(arguments) > 1:
        found = f"{len(arguments)} names are given"
        raise ConfigError(found, expected="one, or none for the list", fix="name one method")
    if not arguments:
        from strop.config.manual import method_list

        show(method_list())
        return 0
    (name,) = arguments
    if name not in METHODS:
        found = f"there is no method {name[:80]!r}"
        raise ConfigError(found, expected=f"one of {', '.join(METHODS)}", fix=_instead_of_method(name[:80].lower()))

    from strop.method_catalogue import explanation

    show(explanation(name, min(shutil.get_terminal_size().columns, 120)))
    return 0


def _instead_of_method(name: str) -> str:
    """What to type instead of a method that there is not; empty where nothing is near."""
    if name in get_args(LossType):
        return "it is a loss_type of dpo: strop methods dpo"
    return instead_of(name) or did_you_mean(name, METHODS, "strop methods ")
