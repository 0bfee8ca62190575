"""`strop generate`: what a model answers. Floor 10."""

from __future__ import annotations

import argparse
from pathlib import Path

from strop.cli.parser import Parser, check_seed
from strop.errors import ConfigError
from strop.generate.output import check_target
from strop.generate.prompts import Prompt, read_prompts
from strop.named_models import check_named
from strop.terminal import log_to_terminal, show

HELP = """\
usage: strop generate MODEL|RUN [PROMPT] [options]

  MODEL|RUN             a run folder, an adapter, a model folder, or a hub id
  PROMPT                a question; without it and without --prompts, a chat in the terminal
  --prompts FILE        lines of a text file, or rows with prompt or messages (JSON Lines, JSON, CSV, Parquet)
  --base                ask the model that it was trained from, too, and show both
  --raw                 a prompt is a text to go on with: no chat template
  --max-new-tokens N    the longest answer, in tokens (default: 256)
  --temperature T       0 takes the likeliest token each time (default: 0)
  --top-p P             of the tokens that together have this probability (default: 1)
  --num-samples N       so many answers to each prompt (default: 1)
  --seed N              what chance follows (default: 42)
  --stop TEXT           ends an answer, too; may be given several times
  --output FILE         the answers as JSON Lines: prompt, sample, completion, tokens, finish (stop or length)
"""


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    options = _options(arguments)
    log_to_terminal("warning")

    target = None if options.output is None else Path(options.output).expanduser()
    check_named(options.source)  # before imports that take seconds
    if target is not None:
        check_target(target)
    prompts = _prompts(options)

    from strop.generate.answers import answer, in_words, stream, write_answers
    from strop.generate.chat import chat
    from strop.generate.loading import Source
    from strop.generate.sampling import Sampling

    settings = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        num_samples=options.num_samples,
        stop=tuple(options.stop),
    )
    source = Source.of(options.source)
    if not prompts:
        chat(source, settings)
        return 0
    if options.prompt is not None and target is None and not options.base and options.num_samples == 1:
        stream(source, prompts[0], settings, raw=options.raw)
        return 0
    found = answer(source, prompts, settings, raw=options.raw, beside=options.base)
    if target is None:
        show("\n".join(in_words(found)) + "\n")
    else:
        write_answers(found, target)
        show(f"{sum(len(item.answers) for item in found)} answers are in {target}\n")
    return 0


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    """What is asked; empty for a chat."""
    if options.prompts is not None:
        return read_prompts(options.prompts)
    return [] if options.prompt is None else [Prompt(options.prompt, "the prompt")]


def _options(arguments: list[str]) -> argparse.Namespace:
    """Refuses flags that are missing, exclude each other or are out of range."""
    parser = Parser("generate")
    parser.add_argument("source", nargs="?")
    parser.add_argument("prompt", nargs="?")
    parser.once("--prompts")
    for switch in ("--base", "--raw"):
        parser.switch(switch)
    parser.once("--max-new-tokens", type=int, default=256)
    parser.once("--temperature", type=float, default=0.0)
    parser.once("--top-p", type=float, default=1.0)
    parser.once("--num-samples", type=int, default=1)
    parser.once("--seed", type=int, default=42)
    parser.add_argument("--stop", action="append", default=[])
    parser.once("--output")
    options = parser.parse_args(arguments)
    if not options.source:
        raise ConfigError("no model and no run is given", fix="strop generate outputs/NAME")
    if options.prompt is not None and options.prompts is not None:
        raise ConfigError("a prompt and --prompts are both given", fix="choose one")
    check_seed(options.seed)
    ranges = {
        "--max-new-tokens": (options.max_new_tokens, options.max_new_tokens >= 1, "at least 1"),
        "--num-samples": (options.num_samples, options.num_samples >= 1, "at least 1"),
        "--temperature": (options.temperature, 0 <= options.temperature < 100, "0, or a number above it"),
        "--top-p": (options.top_p, 0 < options.top_p <= 1, "above 0 and at most 1"),
    }
    for flag, (value, holds, expected) in ranges.items():
        if not holds:
            raise ConfigError(f"{flag} is {value}", expected=expected)
    if "" in options.stop:
        raise ConfigError("--stop is empty, which ends every answer before it begins", expected="a text")
    chats = options.prompt is None and options.prompts is None
    given = {
        "--base": options.base,
        "--raw": options.raw,
        "--output": options.output,
        "--num-samples": options.num_samples > 1,
    }
    if chats and (flags := [flag for flag, value in given.items() if value]):
        raise ConfigError(f"{flags[0]} without a prompt", expected="a prompt, or --prompts FILE: a chat has neither")
    if options.num_samples > 1 and options.temperature == 0:
        raise ConfigError(
            f"--num-samples is {options.num_samples} with --temperature 0, which gives the same answer each time",
            fix="set --temperature, such as 1",
        )
    return options
