"""The command line. Floor 10.

    entry          `main`: runs a command, turns errors into messages and exit codes
    commands       the table of commands: to add one, write a module here and add its line there
    parser         flags: strict, each given once, unknown ones answered with the nearest known one
    run_config     for commands that work on a run: --config, --preset, --model-index, any key of the schema
    train, ...     one module per command

Configuration, numpy and torch are imported by the commands that need them, so that `strop --help` answers at once.
"""

from strop.cli.commands import COMMANDS
from strop.cli.entry import main

__all__ = ["COMMANDS", "main"]
