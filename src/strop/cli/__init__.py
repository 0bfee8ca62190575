"""The command line. Floor 10.

    entry          `main`: runs a command, turns errors into messages and exit codes
    commands       the table of commands: to add one, write a module here and add its line there
    parser         flags: strict, each given once, unknown ones answered with the nearest known one
    run_config     for commands that work on a run: --config, --preset, --model-index, any key of the schema

One module per command:

    init, import_config, prepare, schema, methods, doctor       before a run
    train, reference, demo                                      a run
    report, compare, replay                                     what became of it
    generate, eval, merge, convert, push                        its model

Configuration, numpy and torch are imported by the commands that need them, so that `strop --help` answers at once.
"""

from strop.cli.commands import COMMANDS
from strop.cli.entry import main

__all__ = ["COMMANDS", "main"]
