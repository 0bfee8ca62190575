"""docs/data.md: every shape of a row stands there with a command, and every command does what the page says."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

import shown
from shown import ROOT
from strop import cli

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SINGLE = [{"prompt": f"question {i}", "completion": "yes"} for i in range(12)]
PAIRS = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
TEXTS = [{"text": f"a text {i}"} for i in range(12)]


def blocks() -> Iterator[tuple[str, str, str]]:
    """Every command, with the section it stands in and the rows that stand before it."""
    section, rows = "", ""
    for block in shown.blocks(PAGE):
        if block.section != section:
            section, rows = block.section, ""
        if block.language == "json":
            rows = block.text
        elif not block.in_sentence:
            for line in shown.commands(block):
                yield section, rows, line


COMMANDS = list(blocks())


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: Any, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Path:
    """A model, and the files that the page speaks of."""
    folder: Path = tmp_path_factory.mktemp("page")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    shutil.copytree(ROOT / "configs", folder / "configs")
    splits, plain = folder / "data" / "splits", folder / "data" / "folder"
    for made in (splits, plain):
        made.mkdir(parents=True)
    for name in ("train", "val"):
        (splits / f"{name}.jsonl").write_text(jsonl(SINGLE))
    for place in (plain / "train.jsonl", folder / "rows.jsonl", folder / "data" / "chats.jsonl"):
        place.write_text(jsonl(SINGLE))
    (folder / "data" / "rare.jsonl").write_text(jsonl(SINGLE[:3]))
    (folder / "rows.json").write_text(json.dumps(SINGLE))
    (folder / "more.csv").write_text("prompt,completion\nq,yes\nr,no\n")
    (folder / "words.txt").write_text("one text\nanother one\n")
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl(SINGLE).encode()))
    pyarrow.parquet.write_table(pa.Table.from_pylist(PAIRS), folder / "pairs.parquet")
    pyarrow.parquet.write_table(pa.Table.from_pylist(SINGLE), folder / "data" / "sums.parquet")
    datasets.Dataset.from_list(TEXTS).save_to_disk(folder / "data" / "saved")
    return folder


@pytest.fixture(autouse=True)
def _own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def test_every_shape_stands_there_with_a_command() -> None:
    sections = [section for section in PAGE.split("\n## ") if section.startswith(("Rows for", "Labelled rows"))]
    assert len(sections) == 3
    for section in sections:
        kinds = re.findall(r"^```(json|sh)$", section, re.MULTILINE)
        assert kinds == ["json", "sh"] * (len(kinds) // 2)
    assert len({rows for _, rows, _ in COMMANDS if rows}) >= 17 and len(COMMANDS) >= 30


@pytest.mark.share(6)
@pytest.mark.parametrize(("title", "rows", "line"), COMMANDS, ids=[f"{n}" for n in range(len(COMMANDS))])
def test_a_command_of_the_page(
    title: str, rows: str, line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if rows:
        (here / "rows.jsonl").write_text(rows)
    program, *words = shlex.split(line)
    assert program == "strop"
    if words[0] == "train":
        words += ["--models.0.huggingface_id", "model", "--validation-split", "0", "--no-time"]
    else:
        shutil.rmtree(here / "data" / "splits")  # which it makes
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert cli.main(words) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    if words[0] == "train":
        num_rows = len(rows.splitlines())
        assert "nothing was trained" in shown and "\u00ab" in shown
        assert not num_rows or f"train: {num_rows} of {num_rows} rows" in shown
        assert before == {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    else:
        assert words[0] == "prepare" and "dataset.splits_dir" in shown


def test_the_sources_of_the_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```yaml\n(dataset:\n  sources:.*?)```", PAGE, re.DOTALL)
    (here / "c.yaml").write_text("models: [{huggingface_id: model}]\n" + block + "  validation_split: 0\n")
    assert cli.main(["train", "--config", "c.yaml", "--dry-run", "--no-time"]) == 0
    # 12 chats, 12 sums, one (a tenth) of the first six saved, three that are rare
    assert "train: 28 of 33 rows" in capsys.readouterr().out
