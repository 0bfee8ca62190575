"""The columns that rewards get: of the rows that are trained on, and no further than the last of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from strop.config import load_config, resolve
from strop.data.read.row import Row
from strop.data.read.sources import Source, Sources, choose_sources
from strop.prepared import prepare
from strop.rollout import rows as rollout_rows
from strop.rollout.rows import rows_by_origin
from strop.types import Origin


@pytest.mark.parametrize("most", [None, 5])
def test_a_source_is_read_up_to_its_last_row_that_trains(
    most: int | None, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies behind the rows that a source is cut off at can be endless, where it is a stream."""
    sources = []
    for name in ("a", "b", "c"):
        rows = [{"prompt": f"{name} {i}", "completion": "yes", "answer": f"{name}{i}"} for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"name": str(tmp_path / f"{name}.jsonl"), "num_samples": {"a": 2, "b": 4, "c": 1}[name]})
    overrides = {
        "models.0.huggingface_id": str(model_dir),
        "dataset.sources": sources,
        "dataset.max_samples": most,
        "dataset.validation_split": 0.0,
        "method": "grpo",
        "rollout.num_generations": 2,
        "rewards": ["format"],
    }
    config = resolve(load_config(overrides=overrides))
    read: list[Origin] = []

    def watched(source: Source) -> Iterator[Row]:
        for row in source.read():
            read.append(row.origin)
            yield row

    def chosen(*args: object) -> Sources:
        found = choose_sources(*args)  # type: ignore[arg-type]
        train = tuple(
            Source(s.label, lambda s=s: watched(s), s.identity)  # type: ignore[misc]
            for s in found.train
        )
        return Sources(train, found.eval)

    train = prepare(config, config.models[0]).data.train
    monkeypatch.setattr(rollout_rows, "choose_sources", chosen)
    found = rows_by_origin(config.dataset, config.rows, train)  # type: ignore[arg-type]
    wanted = ["a0", "a1", "b0", "b1", "b2", *([] if most else ["b3", "c0"])]
    assert [row["answer"] for row in found.values()] == wanted
    assert read == list(found) and found.keys() == {group.origin for group in train}
