"""`strop eval`: models on the same rows, side by side. Floor 10."""

from __future__ import annotations

from argparse import Namespace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.cli.run_config import parse, parser_of_run
from strop.config import load_config
from strop.config.layers import CommandLine
from strop.config.names import target
from strop.config.yamlfile import write_value
from strop.durable import to_json
from strop.errors import ConfigError
from strop.generate.output import check_target, write_target
from strop.named_models import check_named
from strop.preflight import check_rows
from strop.terminal import log_to_terminal, show

if TYPE_CHECKING:
    from strop.evaluate.lm_eval_tasks import Tasks

OF_TASKS = ("--include-path", "--limit", "--num-fewshot")
CHAT = "--apply-chat-template"
LENGTHS = ("max_seq_length", "max_prompt_length", "max_completion_length")
OF_ROWS = {
    "dataset": (
        "prompt_column",
        "chosen_column",
        "rejected_column",
        "completion_column",
        "label_column",
        "render",
        "chat_template_kwargs",
        "date",
        "train_on",
        "on_dropped_reasoning",
        "on_trailing_user",
        "filter_overlength_samples",
    ),
    "training": LENGTHS,
}
"""Section -> keys that decide which tokens a row becomes, beside the chat template, which lies in the run's final/."""
HELP = """\
usage: strop eval MODEL|RUN ... --data FILE [--method NAME] [options] [any key of the configuration]
       strop eval MODEL|RUN ... --tasks NAME[,NAME] [options]

  MODEL|RUN ...      run folders, adapters, model folders, or hub ids; the first is what others are compared with
  --data FILE        the rows, as of dataset.train_file; all of them are scored
  --method NAME      by whose objective; its settings as flags, such as --beta 0.1 (default: of --config; without it,
                     the method and the settings that the first model was trained by, if it is a run; else sft).
                     If it is a run, its columns are taken, too, and its limits of length, unless a flag gives one
  --reference MODEL  what a method with a reference compares with (default: what the first model was trained from)
  --output FILE      the numbers as JSON, too
  --config FILE      settings of data, method and precision from a configuration; its models are not looked at

  --tasks NAME[,NAME]     tasks of lm-eval (the extra eval); in place of --data, or beside it
  --include-path DIR      a folder with tasks of your own, as lm-eval reads them
  --limit N               so many questions per task at most
  --num-fewshot N         examples before each question (default: as the task says)
  --apply-chat-template   write the questions as chats

Gives the loss and the metrics that an evaluation of a run gives, with 95 % intervals over the rows, and each model's
difference to the first on the same rows.
"""


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    sources = list(takewhile(lambda word: not word.startswith("-"), arguments))
    parser = parser_of_run("eval")
    for flag in ("--data", "--reference", "--output", "--tasks", *OF_TASKS):
        parser.once(flag)
    parser.switch(CHAT)
    options, overrides = parse(parser, arguments[len(sources) :])
    if not sources:
        raise ConfigError("no model and no run is given", fix="strop eval outputs/NAME --data FILE")
    if options.model_index is not None:
        raise ConfigError("--model-index: the models are those that are named", fix="leave it out")
    target = None if options.output is None else Path(options.output).expanduser()
    of_tasks = [flag for flag in (*OF_TASKS, CHAT) if getattr(options, flag[2:].replace("-", "_")) not in (None, False)]
    if options.tasks is None and (given := of_tasks):
        raise ConfigError(f"{given[0]} belongs to tasks, and --tasks is missing", fix="strop eval MODEL --tasks NAME")
    has_rows = options.tasks is None or options.data is not None or options.config is not None

    if has_rows and options.config is None and options.data is None and not _names_rows(overrides):
        raise ConfigError(
            "no rows are named", expected="--data FILE, or --tasks NAME", fix="strop eval MODEL --data FILE"
        )
    overrides = _with_rows(overrides, sources[0], options.data)
    if options.config is None and options.preset is None:
        overrides = _with_settings_of(Path(sources[0]).expanduser(), overrides)
    config = load_config(options.config, preset=options.preset, overrides=overrides) if has_rows else None
    log_to_terminal("info" if config is None else config.logging.log_level)
    for named in (*sources, *([options.reference] if options.reference else [])):  # before imports that take seconds
        check_named(named)
    if target is not None:
        check_target(target)
    if config is not None:
        check_rows(config.dataset.model_copy(update={"val_file": None, "validation_split": 0.0}), config.rows)

    from strop.evaluate.scoring import evaluate
    from strop.evaluate.table import as_json, in_words

    rows = None if config is None else evaluate(config, sources, options.reference)
    if options.tasks is not None:
        from strop.evaluate.lm_eval_tasks import evaluate_tasks, joined

        tasks = evaluate_tasks(sources, _tasks(options))
        rows = tasks if rows is None else joined(rows, tasks)
    assert rows is not None
    found = as_json(rows)
    show("\n".join(in_words(found)) + "\n")
    if target is not None:
        write_target(target, f"{to_json(found, indent=2)}\n".encode())
    return 0


def _tasks(options: Namespace) -> Tasks:
    """What is asked, of the options."""
    from strop.evaluate.lm_eval_tasks import Tasks

    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names no task", fix="strop eval MODEL --tasks NAME[,NAME]")
    numbers = {flag: getattr(options, flag[2:].replace("-", "_")) for flag in ("--limit", "--num-fewshot")}
    for flag, text in numbers.items():
        if text is not None and (not text.isdecimal() or (flag == "--limit" and not int(text))):
            raise ConfigError(f"{flag} {text}", expected="a whole number", fix=f"{flag} 5")
    limit, num_fewshot = (None if text is None else int(text) for text in numbers.values())
    return Tasks(names, options.include_path, limit, num_fewshot, options.apply_chat_template)


def _with_rows(overrides: CommandLine, source: str, data: str | None) -> CommandLine:
    overrides["models.0.huggingface_id"] = source
    overrides.flags["models.0.huggingface_id"] = source
    if data is not None:
        overrides["dataset.train_file"] = data
        overrides.flags["dataset.train_file"] = "--data"
    return overrides


def _names_rows(overrides: CommandLine) -> bool:
    return any(target(name, name)[0] in ("dataset", "preset") for name in overrides)


def _names_method(overrides: CommandLine) -> bool:
    return bool({"method", "post_training.method"} & overrides.keys())


def _with_settings_of(run: Path, overrides: CommandLine) -> CommandLine:
    """With what a run says of its rows and, unless a method is named or it sampled its own rows, with its method and
    its settings; flags win over them."""
    file = run / "config.yaml"
    if not file.is_file():
        return overrides
    trained = load_config(file)
    values: dict[str, Any] = {
        f"{section}.{key}": getattr(getattr(trained, section), key) for section, keys in OF_ROWS.items() for key in keys
    }
    if not trained.rollout.enabled and not _names_method(overrides):
        values |= {f"post_training.{name}": value for name, value in trained.post_training if value is not None}
    given = {target(name, name) for name in overrides}
    if any(("training", name) in given for name in LENGTHS):  # the other two follow from what is given
        given |= {("training", name) for name in LENGTHS}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if not given & {(section,), (section, name)}:
            overrides[key] = value if isinstance(value, str) else write_value(value)
            overrides.flags[key] = f"the run {run}"
    return overrides
