"""The table of commands, in the order in which `strop --help` lists them. Floor 10.

To add a command, write a module in this folder with the two functions of `CommandModule`, and add a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast


class CommandModule(Protocol):
    """What the module of a command provides."""

    def usage(self) -> str:
        """The text of `strop NAME --help`; it begins with `usage: strop NAME`."""

    def run(self, arguments: list[str]) -> int:
        """Does the work.

        Args:
            arguments: what follows the command's name; `--help` is not among them.

        Returns:
            The exit code.

        Raises:
            StropError: the user can fix it; `main` prints the message.
        """


@dataclass(frozen=True)
class Command:
    """A line of the table."""

    module: str
    summary: str
    """One line for `strop --help`."""

    def load(self) -> CommandModule:
        """Imports the module. Only the command that runs is imported."""
        return cast(CommandModule, import_module(f"strop.cli.{self.module}"))


COMMANDS: Mapping[str, Command] = {
    "train": Command("train", "train every model of a configuration (strop train --help)"),
    "import": Command(
        "import_config",
        "a configuration of TRL, LLaMA-Factory, axolotl or unsloth as one of strop (strop import --help)",
    ),
    "init": Command("init", "a configuration for a model and a data file, after a look at both (strop init --help)"),
    "reference": Command(
        "reference", "score the reference of a configuration ahead of its runs (strop reference --help)"
    ),
    "report": Command("report", "what is wrong with a run, and a page that shows it (strop report --help)"),
    "compare": Command(
        "compare", "the first step at which two runs part, and what differs first (strop compare --help)"
    ),
    "replay": Command("replay", "a step of a run taken again, and compared with its ledger (strop replay --help)"),
    "doctor": Command("doctor", "versions, devices, disks and what is missing, to paste where one asks for help"),
    "demo": Command("demo", "a real training run on this machine, two to four minutes, with nothing to download"),
    "methods": Command("methods", "what there is to train by; strop methods NAME: formula, settings, data, metrics"),
    "prepare": Command(
        "prepare", "files of rows into split files: checked, without duplicates, with statistics (strop prepare --help)"
    ),
    "generate": Command(
        "generate", "what a model answers: a prompt, a file of them, or a chat (strop generate --help)"
    ),
    "eval": Command("eval", "models on the same rows, side by side, with intervals (strop eval --help)"),
    "convert": Command(
        "convert", "between transformers' folders and consolidated.00.pth, to the bit (strop convert --help)"
    ),
    "merge": Command("merge", "an adapter into its base, compared before it is written (strop merge --help)"),
    "push": Command("push", "the finished model of a run to a hub, private unless said (strop push --help)"),
    "schema": Command("schema", "print the JSON Schema of configuration files"),
}
