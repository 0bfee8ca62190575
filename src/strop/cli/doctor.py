"""`strop doctor`: what strop finds on this computer, to paste where one asks for help. Floor 10."""

from __future__ import annotations

from strop.cli.parser import Parser
from strop.terminal import show


def usage() -> str:
    return (
        "usage: strop doctor\n\n"
        "  Versions, devices, memory, disks, caches and missing extras on one screen, without secrets.\n"
        "  Exits with 1 where something keeps strop from working.\n"
    )


def run(arguments: list[str]) -> int:
    Parser("doctor").parse_args(arguments)

    from strop.installation import look

    found = look()
    lines = [*found.lines, *(f"PROBLEM     {problem}" for problem in found.problems)]
    show("\n".join(lines if found.problems else [*lines, "nothing keeps strop from working here"]) + "\n")
    return int(bool(found.problems))
