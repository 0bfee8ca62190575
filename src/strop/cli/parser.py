"""Flags of a command. Floor 10, no torch.

argparse, made strict: no abbreviations, no flag twice, and errors are raised as the rest of strop raises them.
"""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from strop.config.names import did_you_mean
from strop.config.other_tools import instead_of
from strop.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """The flags of one command.

    Raises:
        ConfigError: a flag that is not there, is given twice or has no good value.
    """

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"strop {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        if unknown:
            message = f"unknown flag {unknown}" if unknown.startswith("-") else f"{unknown!r} belongs to no flag"
        meant = instead_of(unknown) or did_you_mean(unknown, self.flags)
        raise ConfigError(message, fix=meant or f"see {self.prog} --help")

    @property
    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]

    def once(self, *flags: str, **settings: Any) -> None:
        """Adds a flag that may be given once; the settings are those of `add_argument`."""
        self.add_argument(*flags, action=_Once, **settings)

    def switch(self, flag: str) -> None:
        """Adds a flag without a value: False, or True where it is given."""
        self.once(flag, nargs=0, default=False)


class _Once(argparse.Action):
    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if self.dest in (seen := vars(namespace).setdefault("_seen", set())):
            raise ConfigError(f"{option_string} is given twice")
        seen.add(self.dest)
        setattr(namespace, self.dest, True if self.nargs == 0 else values)


def check_seed(seed: int) -> None:
    """Refuses a seed that numpy and torch do not take."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed is {seed}", expected="a whole number of at least 0 and below 4294967296")
