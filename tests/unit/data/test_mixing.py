"""Several sources: each with its own split, number, share and weight; nothing lost, always the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from strop.config import DatasetSection, load_config
from strop.data.load import load_data
from strop.errors import DataError

Make = Callable[..., Any]


def rows(path: Path, num: int) -> str:
    path.write_text("".join(json.dumps({"text": f"{path.stem} {i}"}) + "\n" for i in range(num)))
    return str(path)


@pytest.fixture
def load(make_config: Make, make_tokenizer: Make) -> Callable[..., Any]:
    def run(sources: list[Any], seed: int = 42, **dataset: Any) -> Any:
        dataset = {"validation_split": 0.0, **dataset}
        return load_data(make_config(seed=seed, sources=sources, **dataset), make_tokenizer(), "single")

    return run


def origins(groups: Any) -> list[tuple[str, int]]:
    return [(Path(group.origin.file).stem, group.origin.line) for group in groups]


def test_b1_sources_stand_one_behind_the_other(tmp_path: Path, load: Make) -> None:
    a, b = rows(tmp_path / "a.jsonl", 4), rows(tmp_path / "b.jsonl", 3)
    data = load([a, {"name": f"jsonl:{b}", "num_samples": 2}])
    assert origins(data.train) == [("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 1), ("b", 2)]
    counts = data.report.splits["train"]
    assert (counts.rows_read, counts.kept) == (6, 6) and a in counts.source and b in counts.source
    assert origins(load([a, b], max_samples=5).train)[-1] == ("b", 1)
    assert {name for name, _ in origins(load([a, b], max_samples=4).train)} == {"a"}


def test_b1_shares_and_weights(tmp_path: Path, load: Make) -> None:
    a, b = rows(tmp_path / "a.jsonl", 40), rows(tmp_path / "b.jsonl", 10)
    sources = [{"name": a, "fraction": 0.25}, {"name": b, "weight": 2.5}]
    data = load(sources)
    met = Counter(origins(data.train))
    assert sum(name == "a" for name, _ in met) == 10 and {n for (name, _), n in met.items() if name == "a"} == {1}
    assert sorted(n for (name, _), n in met.items() if name == "b") == [2] * 5 + [3] * 5
    assert origins(load(sources).train) == origins(data.train) != origins(load(sources, seed=1).train)
    counts = data.report.splits["train"]
    assert (counts.rows_read, counts.kept, counts.not_used) == (50, 20, 30)
    # rows that are held out are held out once, and are not trained on
    split = load(sources, validation_split=0.2)
    held = origins(split.eval)
    assert len(set(held)) == len(held) == 4 and not set(held) & set(origins(split.train))


def test_b1_prefixes(tmp_path: Path, load: Make, make_config: Make, make_tokenizer: Make) -> None:
    text, odd = tmp_path / "words.txt", tmp_path / "rows.data"
    text.write_bytes("one\n\ntw\u2028o\nbr\xffoken\n".encode("latin-1", errors="ignore"))
    odd.write_text('{"text": "x"}\n')
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["y", "z"]}).save_to_disk(str(saved))
    data = load([f"text:{text}", f"jsonl:{odd}", f"local:{saved}"], on_error="skip", max_dropped_fraction=1.0)
    assert [g.origin.line for g in data.train] == [1, 3, 1, 1, 2]
    assert [r["reason"] for r in data.rejected] == ["invalid_utf8"]
    one = load_data(make_config(train_file=f"text:{text}", max_samples=1), make_tokenizer(), "single")
    assert len(one.train) == 1
    for name in ("local:nowhere", "jsonl:nowhere", "text:nowhere"):
        with pytest.raises(DataError, match="there is no such"):
            load([name])


@pytest.mark.parametrize("streaming", [False, True])
def test_b13_data_sets_are_read_once(
    streaming: bool, tmp_path: Path, make_config: Make, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, num in (("train", 5), ("test", 2)):
        rows(folder / f"{name}.jsonl", num)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    config = make_config(name=str(folder), split="train", streaming=streaming, validation_split=0.0)
    data = load_data(config, make_tokenizer(), "single")
    assert len(data.train) == 5 and data.train[4].origin.line == 5
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", None)  # a second start does not ask for it
        assert load_data(config, make_tokenizer(), "single").report.fingerprint == data.report.fingerprint
    test = make_config(name=str(folder), split="test", streaming=streaming, validation_split=0.0)
    assert len(load_data(test, make_tokenizer(), "single").train) == 2


def test_b1_sources_in_a_file_are_read_and_written_back(tmp_path: Path) -> None:
    from strop.config import to_yaml

    path = tmp_path / "c.yaml"
    path.write_text(
        "models: [{huggingface_id: x}]\ndataset:\n  sources:\n    - jsonl:a.jsonl\n    - {name: b, weight: 0.5}\n"
    )
    config = load_config(path)
    assert [(s.name, s.weight) for s in config.dataset.sources] == [("jsonl:a.jsonl", 1.0), ("b", 0.5)]
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again).dataset == config.dataset == DatasetSection(sources=config.dataset.sources)


def test_a_prompt_as_text_and_as_a_message_is_one_prompt(
    tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    texts = [{"prompt": f"q {i}", "completion": "x"} for i in range(40)]
    talks = [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "x"}]} for i in range(40)
    ]
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, some in ((a, texts), (b, talks)):
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    config = make_config(sources=[str(a), str(b)], validation_split=0.3)
    data = load_data(config, make_tokenizer(), "single")
    trained, held = ({line for _, line in origins(groups)} for groups in (data.train, data.eval))
    assert not trained & held and data.report.findings["eval"].leaked_prompts == 0
    assert data.report.findings["train"].duplicates == len(trained)
    beside = load_data(make_config(train_file=str(a), val_file=str(b)), make_tokenizer(), "single")
    assert beside.report.findings["eval"].leaked_prompts == 40
