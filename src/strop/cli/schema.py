"""`strop schema`: the keys of the configuration, for editors and readers. Floor 10."""

from __future__ import annotations

from strop.cli.parser import Parser
from strop.config.manual import json_schema, markdown
from strop.terminal import show


def usage() -> str:
    return "usage: strop schema [--format json|markdown]\n"


def run(arguments: list[str]) -> int:
    parser = Parser("schema")
    parser.once("--format", choices=("json", "markdown"), default="json")
    options = parser.parse_args(arguments)
    show(json_schema() if options.format == "json" else markdown())
    return 0
