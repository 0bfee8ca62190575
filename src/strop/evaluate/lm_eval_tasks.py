"""Tasks of lm-eval (the extra `eval`), by the same table as rows of one's own. Floor 8.

lm-eval asks the questions and marks the answers, on the model as `strop generate` loads it. What it marks question by
question gets an interval by the same bootstrap; a number that is no mean over questions, such as a perplexity by words,
stands without one.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from strop.config.names import did_you_mean
from strop.errors import ConfigError, DataError, foreign_errors
from strop.evaluate.intervals import Metric, Ratio
from strop.evaluate.scoring import Evaluated, Evaluation
from strop.generate.loading import Loaded, Source, load
from strop.policy.model.configuration import quiet

log = logging.getLogger("strop")

CPU_BATCH = 8
"""Questions at once on a CPU; on a GPU, lm-eval finds out how many fit."""
PLACE = "https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks"


@dataclass(frozen=True)
class Tasks:
    """names: as lm-eval has them. include_path: a folder with tasks of one's own. limit: questions per task at most;
    None: all. num_fewshot: examples before each question; None: as the task says. chat: write questions by the chat
    template of the model."""

    names: Sequence[str]
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False


def evaluate_tasks(sources: Sequence[str], tasks: Tasks) -> Evaluation:
    """Evaluate models on tasks. Their metrics are called `task/metric`.

    Args:
        sources: the models: runs, adapters, model folders or hub ids.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
        ModelError: a model cannot be read. DataError: a task fails, such as one whose data cannot be had.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "the package lm-eval is not installed",
            where=f"--tasks {','.join(tasks.names)}",
            expected="lm-eval, which is the extra `eval`",
            fix="pip install -c constraints.txt -e '.[eval]' in strop's folder",
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each thing that it is given ready-made
    manager, found, num_questions = _manager(tasks), [], 0
    for given in sources:
        gc.collect()
        log.info("asking %s: %s", given, ", ".join(tasks.names))
        answers = _asked(load(Source.of(given)), tasks, manager)
        by_row = dict(_by_question(answers))
        numbers = dict(_numbers(answers))
        # a mean over questions is what lm-eval says as well, or it is no mean over questions
        same = {n: m for n, m in by_row.items() if n in numbers and np.isclose(m[0].sums.mean(), numbers[n])}
        found.append(Evaluated(given, numbers, same))
        num_questions = sum(count["effective"] for count in answers["n-samples"].values())
    return Evaluation(found, num_questions, None)


def joined(rows: Evaluation, tasks: Evaluation) -> Evaluation:
    """The numbers of the same models on rows and on tasks, as one."""
    models = [
        Evaluated(a.name, {**a.numbers, **b.numbers}, {**a.by_row, **b.by_row})
        for a, b in zip(rows.models, tasks.models, strict=True)
    ]
    return Evaluation(models, rows.num_rows + tasks.num_rows, rows.reference)


def _manager(tasks: Tasks) -> Any:
    """lm-eval's own list of tasks. Reading all of it takes a while, so a folder that has them all is read alone.

    Raises:
        ConfigError: there is no such folder or task.
    """
    where = f"--tasks {','.join(tasks.names)}"
    if tasks.include_path is not None and not Path(tasks.include_path).is_dir():
        raise ConfigError("there is no such folder", where=f"--include-path {tasks.include_path}", fix="check the path")
    from lm_eval.tasks import TaskManager  # slow to import, and needed here alone

    def failed(why: str) -> ConfigError:
        return ConfigError(f"the tasks cannot be read: {why}", where=where, fix="look at the files in --include-path")

    with foreign_errors(failed):
        if tasks.include_path is not None:
            own = TaskManager(include_path=tasks.include_path, include_defaults=False)
            if set(tasks.names) <= set(own.all_tasks):
                return own
        manager = TaskManager(include_path=tasks.include_path)
    if unknown := [name for name in tasks.names if name not in set(manager.all_tasks)]:
        raise ConfigError(
            f"lm-eval has no task {', '.join(unknown)}",
            where=where,
            expected=f"one of its {len(manager.all_tasks):,} tasks and groups ({PLACE}), or of --include-path",
            fix=did_you_mean(unknown[0], list(manager.all_tasks)),
        )
    return manager


def _asked(model: Loaded, tasks: Tasks, manager: Any) -> Mapping[str, Any]:
    """What lm-eval answers of one model.

    Raises:
        DataError: it fails.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if tasks.chat and not model.tokenizer.chat_template:
        raise ConfigError("--apply-chat-template: its tokenizer has none", where=model.where, fix="leave it out")

    def failed(why: str) -> DataError:
        return DataError(
            f"lm-eval fails: {why}",
            where=f"--tasks {','.join(tasks.names)}",
            fix="most tasks load their questions from a hub: see that it can be reached",
        )

    with foreign_errors(failed), quiet():
        batch = CPU_BATCH if model.device.type == "cpu" else "auto"
        asked = HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=batch)
        answers: Mapping[str, Any] = simple_evaluate(
            asked,
            tasks=list(tasks.names),
            task_manager=manager,
            limit=tasks.limit,
            num_fewshot=tasks.num_fewshot,
            apply_chat_template=tasks.chat,
            bootstrap_iters=0,
            log_samples=True,
        )
    return answers


def _numbers(answers: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of every task and group; lm-eval calls them `metric,filter`."""
    for task, found in answers["results"].items():
        for key, number in found.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(number, int | float):
                yield _name(task, metric, filtered), float(number)


def _by_question(answers: Mapping[str, Any]) -> Iterator[tuple[str, Metric]]:
    for task, samples in answers["samples"].items():
        marks: dict[str, dict[int, float]] = {}
        for sample in samples:
            for metric in sample["metrics"]:
                if isinstance(mark := sample.get(metric), int | float):
                    marks.setdefault(_name(task, metric, sample["filter"]), {})[sample["doc_id"]] = float(mark)
        for name, by_id in marks.items():
            values = np.array([by_id[i] for i in sorted(by_id)])
            yield name, [Ratio(values, np.ones(len(values)))]


def _name(task: str, metric: str, filtered: str) -> str:
    return f"{task}/{metric}" if filtered == "none" else f"{task}/{metric},{filtered}"
