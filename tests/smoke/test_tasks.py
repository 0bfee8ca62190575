"""`strop eval --tasks`: questions of lm-eval, here of tasks made by the tests."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.cli import main
from strop.export.merge import merge
from strop.generate.loading import Source, load

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [hello, maybe]
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: prose
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity}}
"""
NUM = 12

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval (lm-eval)")
# what lm-eval and its packages warn of
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks, and where the package datasets keeps what it reads."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows, folder = tmp_path / "questions.jsonl", tmp_path / "tasks"
    folder.mkdir()
    questions = [{"question": f"question {i}: yes or no", "answer": i % 2} for i in range(NUM)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "choice.yaml").write_text(TASK.format(name="choice", rows=rows))
    (folder / "prose.yaml").write_text(ROLLING.format(rows=rows))
    return folder


def by_hand(source: str) -> list[float]:
    """Whether the likelier answer is the right one, question by question, by plain transformers."""
    model = load(Source.of(source))
    marks = []
    for i in range(NUM):
        question = model.tokenizer(f"question {i}: yes or no")["input_ids"]
        scores = []
        for answer in (" hello", " maybe"):
            ids = model.tokenizer(f"question {i}: yes or no{answer}")["input_ids"]
            with torch.no_grad():
                logps = model.module(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logps[at - 1, ids[at]]) for at in range(len(question), len(ids))))
        marks.append(float((scores[1] > scores[0]) == bool(i % 2)))
    return marks


@needs_lm_eval
@pytest.mark.nightly
def test_base_adapter_and_merged_model_are_asked_the_same(
    runs: Any, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(r=4, learning_rate=5e-2)
    merge(str(run.path), tmp_path / "merged")
    models = [str(runs.files["model"]), str(run.path), str(tmp_path / "merged")]
    numbers = tmp_path / "numbers.json"
    line = ["eval", *models, "--tasks", "choice,prose", "--include-path", str(tasks), "--output", str(numbers)]
    assert main([*line, "--data", str(runs.files["singles"]), "--method", "sft"]) == 0
    found = [model["metrics"] for model in json.loads(numbers.read_text())["models"]]
    for metrics, model in zip(found, models, strict=True):
        marks = by_hand(model)
        assert metrics["choice/acc"]["value"] == pytest.approx(sum(marks) / NUM)
        low, high = metrics["choice/acc"]["interval"]
        assert low <= metrics["choice/acc"]["value"] <= high and (low < high or len(set(marks)) == 1)
        assert metrics["prose/word_perplexity"].get("interval") is None
        assert "interval" in metrics["loss"]
    assert found[1]["prose/word_perplexity"]["value"] != found[0]["prose/word_perplexity"]["value"]
    for name in ("choice/acc", "prose/word_perplexity"):
        assert found[1][name]["value"] == pytest.approx(found[2][name]["value"], rel=1e-3)
    said = capsys.readouterr().out
    assert "choice/acc" in said and "loss" in said

    assert main([*line[:-2], "--limit", "4", "--num-fewshot", "0"]) == 0
    assert "8 rows" in capsys.readouterr().out


@needs_lm_eval
def test_an_adapter_is_asked(runs: Any, tasks: Path, tmp_path: Path) -> None:
    run, numbers = runs(r=4, learning_rate=5e-2), tmp_path / "numbers.json"
    line = ["eval", str(run.path), "--tasks", "choice", "--include-path", str(tasks), "--output", str(numbers)]
    assert main(line) == 0
    (found,) = json.loads(numbers.read_text())["models"]
    assert found["metrics"]["choice/acc"]["value"] == pytest.approx(sum(by_hand(str(run.path))) / NUM)
    assert found["metrics"]["choice/acc"]["interval"]


@needs_lm_eval
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--tasks", "choise"], "lm-eval has no task choise"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "choice", "--limit", "0"], "--limit 0"),
        (["--limit", "3", "--data", "x"], "--tasks is missing"),
        (["--tasks", "choice", "--include-path", "/nowhere"], "there is no such folder"),
    ],
)
def test_bad_questions_get_one_message(
    line: list[str], said: str, runs: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import lm_eval.tasks as theirs

    manager = theirs.TaskManager
    # all of lm-eval's own tasks take half a minute to be listed
    monkeypatch.setattr(
        theirs,
        "TaskManager",
        lambda include_path=None, include_defaults=True: manager(
            include_path=include_path or str(tasks), include_defaults=False
        ),
    )
    assert main(["eval", str(runs.files["model"]), *line]) == 1
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


@needs_lm_eval
def test_a_task_that_fails_is_one_message(runs: Any, tasks: Path, capsys: Any) -> None:
    (tasks / "choice.yaml").write_text(TASK.format(name="choice", rows=tasks / "nowhere.jsonl"))
    line = ["eval", str(runs.files["model"]), "--tasks", "choice", "--include-path", str(tasks)]
    assert main(line) == 1
    assert "lm-eval fails" in capsys.readouterr().err


def test_without_the_package_the_extra_is_named(
    runs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("strop.evaluate.lm_eval_tasks.find_spec", lambda name: None)
    assert main(["eval", str(runs.files["model"]), "--tasks", "hellaswag"]) == 1
    err = capsys.readouterr().err
    assert "lm-eval is not installed" in err and ".[eval]" in err
