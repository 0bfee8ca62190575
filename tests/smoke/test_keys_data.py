"""Keys of `dataset` beyond one file: sources, templates, workers, the limit to what may be lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from strop.data.store import worker_pool
from strop.errors import DataError


def test_dataset__completion_column(runs: Any, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in runs.files["singles"].read_text().splitlines()]
    file = tmp_path / "renamed.jsonl"
    file.write_text("".join(json.dumps({"prompt": r["prompt"], "answer": r["completion"]}) + "\n" for r in rows))
    renamed = runs.prepare(method="sft", train_file=str(file), completion_column="answer")
    assert renamed.data.report.fingerprint == runs.prepare(method="sft").data.report.fingerprint


def test_dataset__label_column(runs: Any, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in runs.files["singles"].read_text().splitlines()]
    for name in ("label", "good"):
        labelled = [{**row, name: i % 2 == 0} for i, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    usual = runs.prepare(method="kto", train_file=str(tmp_path / "label.jsonl"))
    renamed = runs.prepare(method="kto", train_file=str(tmp_path / "good.jsonl"), label_column="good")
    assert renamed.data.report.fingerprint == usual.data.report.fingerprint


def test_labels_out_of_balance_are_told_before_training(runs: Any) -> None:
    told = [note for note in runs.prepare(method="kto", desirable_weight=5.0).advice() if "4 : 3" in note]
    assert len(told) == 1 and "post_training.desirable_weight" in told[0]
    assert not any("4 : 3" in note for note in runs.prepare(method="kto").advice())


def test_dataset__on_trailing_user(runs: Any, tmp_path: Path) -> None:
    def talk(i: int, *more: str) -> str:
        turns = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "yes"}]
        return json.dumps({"messages": [*turns, *({"role": "user", "content": text} for text in more)]}) + "\n"

    file, plain = tmp_path / "talks.jsonl", tmp_path / "plain.jsonl"
    file.write_text("".join(talk(i, *["and?"] * (i % 3 == 0)) for i in range(16)))
    plain.write_text("".join(talk(i) for i in range(16)))
    with pytest.raises(DataError, match=r"trailing_turn(.|\n)*on_trailing_user: drop"):
        runs.prepare(method="sft", train_file=str(file))
    report = runs.prepare(method="sft", train_file=str(file), on_trailing_user="drop").data.report
    assert report.fingerprint == runs.prepare(method="sft", train_file=str(plain)).data.report.fingerprint
    assert (
        report.as_dict()["splits"]["train"]["trailing_turns"] + report.as_dict()["splits"]["eval"]["trailing_turns"]
        == 6
    )
    assert any("turns behind the last assistant turn" in line for line in report.lines())


def test_dataset__train_on(runs: Any, tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    file = tmp_path / "talks.jsonl"
    file.write_text((json.dumps({"messages": turns}) + "\n") * 16)
    trained = {}
    for which in ("all", "last", "last_and_tools"):
        data = runs.prepare(method="sft", train_file=str(file), train_on=which).data
        trained[which] = data.train[0].num_scored
    assert 0 < trained["last"] == trained["last_and_tools"] < trained["all"]


def test_dataset__on_dropped_reasoning(runs: Any, tmp_path: Path) -> None:
    def rows(name: str, **more: str) -> str:
        turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes", **more}]
        (tmp_path / name).write_text((json.dumps({"messages": turns}) + "\n") * 16)
        return str(tmp_path / name)

    thinking, plain = rows("thinking.jsonl", reasoning_content="hm"), rows("plain.jsonl")
    with pytest.raises(DataError, match=r"dropped_by_template(.|\n)*on_dropped_reasoning: drop"):
        runs.prepare(method="sft", train_file=thinking)
    report = runs.prepare(method="sft", train_file=thinking, on_dropped_reasoning="drop").data.report
    assert report.fingerprint == runs.prepare(method="sft", train_file=plain).data.report.fingerprint
    assert sum(split["reasoning_dropped"] for split in report.as_dict()["splits"].values()) == 16


def test_dataset__date(runs: Any, tmp_path: Path) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%Y') }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    keys = {"template": str(template), "date": "2001-02-03"}
    prepared = runs.prepare(keys)
    assert prepared.tokenizer.decode(prepared.data.train[0].prompt_ids).startswith("2001")
    assert "text: the template prints the day, 2001-02-03 (dataset.date)" in prepared.data.report.lines()
    assert runs.prepare(template=str(template)).config.dataset.date is not None  # today's is written down


def test_dataset__max_eval_samples(runs: Any) -> None:
    whole, some = runs.prepare(validation_split=0.5).data, runs.prepare(validation_split=0.5, max_eval_samples=3).data
    assert list(some.eval) == list(whole.eval)[:3] and some.train == whole.train
    counts = some.report.splits["eval"]
    assert (counts.kept, counts.not_used, counts.rows_read) == (3, 5, 8)
    file = str(runs.files["pairs"])
    assert len(runs.prepare(val_file=file, max_eval_samples=5).data.eval) == 5
    assert len(runs.prepare(method="kto", val_file=file, max_eval_samples=5).data.eval) == 10  # two of each pair
    assert runs(validation_split=0.5, max_eval_samples=3, max_steps=1).data["splits"]["eval"]["kept"] == 3


def test_dataset__sources(runs: Any) -> None:
    file = str(runs.files["pairs"])
    run = runs({"dataset.sources": [{"name": file, "weight": 2.0}, f"jsonl:{file}"], "train_file": None}, max_steps=1)
    assert run.data["splits"]["train"]["rows_read"] + run.data["splits"]["eval"]["rows_read"] == 32
    kept = runs.prepare({"dataset.sources": [{"name": file, "weight": 2.0}], "train_file": None}, validation_split=0)
    assert len(kept.data.train) == 32


def test_dataset__template(runs: Any) -> None:
    run = runs(template="zephyr", max_steps=1)
    assert "<|user|>" in (run.path / "final" / "chat_template.jinja").read_text()
    assert run.data["rendering"]["template"] == "zephyr"


def test_dataset__chat_template_kwargs(runs: Any, tmp_path: Path) -> None:
    template = tmp_path / "named.jinja"
    template.write_text("{{ assistant }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    prepared = runs.prepare({"template": str(template), "dataset.chat_template_kwargs": {"assistant": "helper: "}})
    assert prepared.tokenizer.decode(prepared.data.train[0].prompt_ids).startswith("helper: ")


def test_dataset__streaming(runs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(runs.files["pairs"].read_text())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    asked = []
    load_dataset = datasets.load_dataset

    def watched(*arguments: Any, **how: Any) -> Any:
        asked.append(how.get("streaming", False))
        return load_dataset(*arguments, **how)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    data = runs.prepare({"dataset.name": str(folder), "train_file": None, "dataset.streaming": True}).data
    assert asked == [True] and data.report.fingerprint == runs.prepare().data.report.fingerprint


def test_dataset__num_workers(runs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    monkeypatch.setattr(worker_pool, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(worker_pool, "BATCHES_BEFORE_POOL", 1)
    started = []
    hire = worker_pool.WorkerPool
    monkeypatch.setattr(worker_pool, "WorkerPool", lambda pipeline, n, how: started.append(n) or hire(pipeline, n, how))
    wanted = runs.prepare(num_workers=1).data.report.fingerprint
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "another"))  # or it would be read from there
    assert runs.prepare(num_workers=3).data.report.fingerprint == wanted and started == [3]


def test_dataset__max_dropped_fraction(runs: Any, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text("{\n" * 2 + runs.files["pairs"].read_text())
    with pytest.raises(DataError, match="2 of 18 rows are lost"):
        runs.prepare(train_file=str(file), on_error="skip")
    data = runs.prepare(train_file=str(file), on_error="skip", max_dropped_fraction=0.2).data
    assert len(data.rejected) == 2
