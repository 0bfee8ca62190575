"""`strop import`: a configuration of another tool, as strop's. Floor 10."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from strop.cli.parser import Parser
from strop.config.flags import split_flags
from strop.config.names import numbered, target
from strop.config.yamlfile import dotted, parse_value
from strop.durable import write_file
from strop.errors import ConfigError
from strop.terminal import show

HELP = """\
usage: strop import FILE [--from TOOL] [--output FILE] [--KEY VALUE ...]

  FILE                   a configuration of TRL (YAML, JSON, or a Python file with DPOConfig(...) and the like),
                         LLaMA-Factory (YAML), axolotl (YAML), unsloth or OpenSloth (a Python file); Python is read
                         and never run
  --from TOOL            trl, llamafactory, axolotl, unsloth or opensloth (default: by the keys of the file)
  --output FILE          where the configuration goes (default: strop.yaml); a file that is there is not replaced
  --model, --method, --train-file, ...
                         any key of strop, for what the file does not say, or to say it otherwise

Every key of the file is carried over, translated, or listed as not carried over with what differs without it.
"""


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    from strop.importers.tools import TOOLS

    parser = Parser("import")
    parser.once("--from", dest="tool", choices=tuple(TOOLS))
    parser.once("--output", default="strop.yaml")
    file = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if not file:
        raise ConfigError("FILE is missing", expected="strop import FILE ...", fix="see strop import --help")
    flags, own = split_flags(arguments[1:], parser.flags)
    options = parser.parse_args(own)
    path = Path(options.output).expanduser()
    if path.exists():
        raise ConfigError("there is a file of this name", where=str(path), fix="remove it, or give another --output")

    from strop.importers import import_file, to_text

    found = import_file(Path(file).expanduser(), options.tool, _typed(flags, flags.flags))
    text = to_text(found)
    try:
        write_file(path, text.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror or error}", where=str(path), fix="--output") from error
    show(f"{_lists(found)}\nwritten to {path}\nnext: strop train --config {quote(str(path))} --dry-run\n")
    return 0


def _typed(given: Any, flags: Any) -> dict[str, Any]:
    """Keys of the command line as dotted keys with values."""
    from strop.importers.key_answers import coerced

    found = {}
    for name, text in given.items():
        key = dotted(numbered(target(name, flags[name])))
        try:
            value = parse_value(text, flags[name])
            found[key] = coerced(key, [value] if key == "rewards" and isinstance(value, str) else value)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{flags[name]} is {text[:60]!r}", expected=str(error)) from None
    return found


def _lists(found: Any) -> str:
    """What became of every key."""
    from strop.importers.key_answers import Fate
    from strop.importers.translate import in_words
    from strop.redact import redact

    lines = [f"{found.tool}, method {found.method}: {len(found.entries)} keys"]
    for fate in Fate:
        entries = found.of(fate)
        lines.append(f"{len(entries)} {fate.value}")
        for entry in entries:
            to = ", ".join(f"{key} {in_words(value)}" for key, value in entry.answer.values.items())
            words = "; ".join(part for part in (to, entry.answer.why) if part)
            lines.append(redact(f"  {entry.key}: {in_words(entry.value)} -> {words}"))
    defaults = [k for k, origin in found.origins.items() if origin.startswith((f"{found.tool}'s", "as "))]
    lines += [f"{len(defaults)} defaults of {found.tool} that differ are written out: {', '.join(defaults)}"]
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join(lines)
