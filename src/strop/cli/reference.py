"""`strop reference`: scores the reference of a configuration, so that its runs find the scores. Floor 10."""

from __future__ import annotations

from strop.cli.run_config import load, parse, parser_of_run, run_in_processes


def usage() -> str:
    return "usage: strop reference [--config] FILE [--preset NAME] [--model-index N] [any key]\n"


def run(arguments: list[str]) -> int:
    options, overrides = parse(parser_of_run("reference"), arguments)
    config = load(options, overrides)

    if (code := run_in_processes(config, "reference", arguments)) is not None:
        return code

    from strop.score_reference import fill_references

    fill_references(config, model_index=options.model_index)
    return 0
