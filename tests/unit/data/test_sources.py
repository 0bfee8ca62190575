"""Sources: which one wins, what is not read is said, what is not there is named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from strop.config import RunConfig
from strop.data.read.sources import Sources, choose_sources, warn_of_unread
from strop.errors import ConfigError, DataError

Make = Callable[..., RunConfig]


def write(path: Path, *names: str) -> str:
    path.write_text("".join(json.dumps({"prompt": name, "completion": "x"}) + "\n" for name in names))
    return str(path)


def prompts(sources: Sources) -> tuple[list[str], list[str] | None]:
    train = [str(row.data and row.data["prompt"]) for source in sources.train for row in source.read()]
    held = sources.eval and [str(row.data and row.data["prompt"]) for row in sources.eval.read()]
    return train, held


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train.jsonl", "val.jsonl", "train.dpo.jsonl", "val.dpo.jsonl"):
        write(tmp_path / name, name)
    write(tmp_path / "own.jsonl", "own")
    return tmp_path


def test_train_file_wins_over_splits_dir_wins_over_name(folder: Path, make_config: Make) -> None:
    own, other = str(folder / "own.jsonl"), str(folder / "val.dpo.jsonl")

    def chosen(**dataset: str) -> tuple[list[str], list[str] | None]:
        return prompts(choose_sources(make_config(**dataset).dataset, "single"))

    assert chosen(name=own) == (["own"], None)
    assert chosen(name=other, splits_dir=str(folder)) == (["train.jsonl"], ["val.jsonl"])
    assert chosen(name=other, splits_dir=str(folder), train_file=own) == (["own"], ["val.jsonl"])
    assert chosen(splits_dir=str(folder), val_file=own) == (["train.jsonl"], ["own"])
    assert chosen(train_file=own, val_file=other) == (["own"], ["val.dpo.jsonl"])


def test_preferences_have_their_own_split_files(folder: Path, make_config: Make) -> None:
    sources = choose_sources(make_config(splits_dir=str(folder)).dataset, "pair")
    assert prompts(sources) == (["train.dpo.jsonl"], ["val.dpo.jsonl"])


def test_a_source_that_is_not_read_is_said(folder: Path, make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    own = str(folder / "own.jsonl")
    with caplog.at_level(logging.WARNING, logger="strop"):
        warn_of_unread(make_config(train_file=own).dataset)
        warn_of_unread(make_config(train_file=own, splits_dir=str(folder)).dataset)
        assert not caplog.records
        warn_of_unread(make_config(train_file=own, name="x", splits_dir=str(folder), val_file=own).dataset)
    assert [record.getMessage() for record in caplog.records] == [
        "dataset.splits_dir is not read: dataset.train_file wins over it",
        "dataset.name is not read: dataset.train_file wins over it",
    ]


@pytest.mark.parametrize(("gone", "key"), [("train.jsonl", "dataset.train_file"), ("val.jsonl", "dataset.val_file")])
def test_a_missing_split_file_is_named(folder: Path, make_config: Make, gone: str, key: str) -> None:
    (folder / gone).unlink()
    with pytest.raises(DataError) as error:
        choose_sources(make_config(splits_dir=str(folder)).dataset, "single")
    assert gone in error.value.found and key in error.value.fix


def test_no_source_names_the_keys(make_config: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"dataset\.train_file, dataset\.splits_dir, dataset\.sources or dataset\.name"
    ):
        choose_sources(make_config(val_file="x.jsonl").dataset, "single")


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.csv", "gone.jsonl.gz", "gone.parquet"])
def test_a_name_that_looks_like_a_file_is_one(make_config: Make, name: str) -> None:
    for key in ("name", "train_file"):
        with pytest.raises(DataError, match="no such file"):
            choose_sources(make_config(**{key: name}).dataset, "single")


def test_an_unknown_extension_is_refused(tmp_path: Path, make_config: Make) -> None:
    path = tmp_path / "rows.xlsx"
    path.touch()
    with pytest.raises(DataError, match=r"\.jsonl"):
        choose_sources(make_config(train_file=str(path)).dataset, "single")


def test_saved_data_sets_are_read_by_split_and_slice(tmp_path: Path, make_config: Make) -> None:
    table = datasets.Dataset.from_list([{"prompt": str(i), "completion": "x"} for i in range(10)])
    datasets.DatasetDict({"train": table, "extra": table.select(range(2))}).save_to_disk(tmp_path / "both")
    table.save_to_disk(tmp_path / "one")

    def read(name: str, split: str) -> list[str]:
        return prompts(choose_sources(make_config(name=str(tmp_path / name), split=split).dataset, "single"))[0]

    assert read("both", "train") == [str(i) for i in range(10)]
    assert read("both", "train[:20%]+extra") == ["0", "1", "0", "1"]
    assert read("one", "train[8:]") == ["8", "9"]
    source = choose_sources(make_config(name=str(tmp_path / "both"), split="train[3:5]").dataset, "single").train[0]
    assert [str(row.origin) for row in source.read()] == [f"{tmp_path / 'both'}[train]:{i}" for i in (4, 5)]
    with pytest.raises(DataError, match="cannot be read"):
        read("both", "nothing")
    with pytest.raises(DataError, match="save_to_disk"):
        prompts(choose_sources(make_config(name=f"local:{tmp_path}").dataset, "single"))


@pytest.mark.parametrize("own", ["train", "test", "train[:10]", "train+test", "test[:50%]+train[3:]", None])
def test_a_folder_without_named_splits_is_one_split(own: str | None, tmp_path: Path, make_config: Make) -> None:
    table = datasets.Dataset.from_list([{"prompt": str(i), "completion": "x"} for i in range(10)])
    table.info.splits = None
    whole = datasets.Dataset(table.data, split=datasets.NamedSplit(own) if own else None)
    whole.save_to_disk(tmp_path / "one")

    def read(split: str) -> list[str]:
        config = make_config(name=str(tmp_path / "one"), split=split)
        return prompts(choose_sources(config.dataset, "single"))[0]

    everything = [str(i) for i in range(10)]
    assert read("train") == everything and read(own or "train") == everything
    assert read("train[2:4]") == ["2", "3"] and read("train[:10%]+train[90%:]") == ["0", "9"]
    if own and "test" in own:
        assert read("test[8:]") == ["8", "9"]
    else:
        with pytest.raises(DataError, match="holds one split"):
            read("test")
    with pytest.raises(DataError, match="cannot be read"):
        read("train[")


@pytest.mark.parametrize("own", ["test", "train_sft"])
def test_a_dictionary_of_one_split_is_that_split(own: str, tmp_path: Path, make_config: Make) -> None:
    table = datasets.Dataset.from_list([{"prompt": str(i), "completion": "x"} for i in range(10)])
    datasets.DatasetDict({own: table}).save_to_disk(tmp_path / "one")

    def read(split: str) -> list[str]:
        return prompts(choose_sources(make_config(name=str(tmp_path / "one"), split=split).dataset, "single"))[0]

    assert read("train") == read(own) == [str(i) for i in range(10)]
    assert read("train[2:4]") == read(f"{own}[2:4]") == ["2", "3"]
    with pytest.raises(DataError, match=f"holds one split, '{own}'"):
        read("other")


def test_the_subsets_that_there_are_are_named(tmp_path: Path, make_config: Make) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"prompt": "q", "completion": "x"}\n', encoding="utf-8")
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"\['one', 'two'\]") as problem:
        prompts(choose_sources(make_config(name=str(tmp_path)).dataset, "single"))
    assert "dataset.subset" in problem.value.fix


def test_files_of_a_folder_that_do_not_fit_together_say_why(tmp_path: Path, make_config: Make) -> None:
    for name, arguments in (("a", {"x": 1}), ("b", {"y": "z"})):
        row = {"prompt": "q", "completion": "x", "meta": arguments}
        (tmp_path / f"train-{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    source = choose_sources(make_config(name=str(tmp_path)).dataset, "single").train[0]
    with pytest.raises(DataError, match="cast") as problem:
        list(source.read())
    assert "dataset.sources" in problem.value.fix


def test_splits_without_rows_are_said_to_be_empty(tmp_path: Path, make_config: Make) -> None:
    table = datasets.Dataset.from_list([{"prompt": "q", "completion": "x"}])
    empty = table.select([])
    datasets.DatasetDict({"train": table, "test": empty}).save_to_disk(tmp_path / "half")
    datasets.DatasetDict({"train": empty, "test": table}).save_to_disk(tmp_path / "other half")
    empty.save_to_disk(tmp_path / "one")

    def read(name: str, split: str = "train") -> list[str]:
        return prompts(choose_sources(make_config(name=str(tmp_path / name), split=split).dataset, "single"))[0]

    assert read("half") == ["q"] == read("half", "train+test") == read("other half", "test")
    for name, split in (("half", "test"), ("other half", "train"), ("one", "train")):
        with pytest.raises(DataError, match="no rows were saved"):  # never those of another split
            read(name, split)


def test_named_splits_are_named_where_another_is_asked_for(tmp_path: Path, make_config: Make) -> None:
    table = datasets.Dataset.from_list([{"prompt": "q", "completion": "x"}])
    datasets.DatasetDict({"test": table, "extra": table}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"test.*extra"):
        prompts(choose_sources(make_config(name=str(tmp_path / "two")).dataset, "single"))


def test_whatever_reading_raises_names_the_data_set(
    tmp_path: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.Dataset.from_list([{"prompt": "q", "completion": "x"}]).save_to_disk(tmp_path / "one")
    source = choose_sources(make_config(name=str(tmp_path / "one")).dataset, "single").train[0]
    for error in (OSError(28, "No space left"), ImportError("no torchcodec"), KeyError("x"), Exception("panic")):

        def broken(*arguments: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(datasets.Dataset, "iter", broken)
        with pytest.raises(DataError, match="the folder cannot be read") as problem:
            list(source.read())
        assert str(tmp_path / "one") in str(problem.value)


def test_a_hub_data_set_out_of_reach_is_one_clear_error(make_config: Make) -> None:
    source = choose_sources(make_config(name="nobody/nothing", subset="x").dataset, "single").train[0]
    with pytest.raises(DataError, match=r"dataset\.name: nobody/nothing, subset x, split train"):
        next(source.read())


def test_the_home_folder_can_be_written_as_a_tilde(
    folder: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a shell replaces it in words of their own alone, and nobody in a file; paths of models and runs know it, too
    monkeypatch.setenv("HOME", str(folder))
    for given in ({"train_file": "~/own.jsonl"}, {"name": "~/own.jsonl"}, {"name": "jsonl:~/own.jsonl"}):
        assert prompts(choose_sources(make_config(**given).dataset, "single")) == (["own"], None)
    named = choose_sources(make_config(splits_dir="~", sources=["~/own.jsonl"]).dataset, "pair")
    assert prompts(named) == (["train.dpo.jsonl"], ["val.dpo.jsonl"])


def test_parts_of_a_file_that_nobody_reads_are_said(
    folder: Path, make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    own = str(folder / "own.jsonl")
    with caplog.at_level(logging.WARNING, logger="strop"):
        warn_of_unread(make_config(name=own, split="train").dataset)
        warn_of_unread(make_config(name="hub/rows", split="train[:10]", subset="main").dataset)
        warn_of_unread(make_config(sources=["hub/rows", {"name": "hub/rows", "split": "test"}]).dataset)
        assert not caplog.records
        warn_of_unread(make_config(name=own, split="train[:10]").dataset)
        warn_of_unread(make_config(train_file=own, subset="main").dataset)
        warn_of_unread(make_config(sources=["hub/rows", {"name": own, "split": "train[:1%]"}], split="test").dataset)
    assert [record.getMessage() for record in caplog.records] == [
        f"dataset.split: train[:10] is not read: {own} is a file, of which all rows are read",
        "dataset.subset: main is not read: it belongs to dataset.name, and dataset.train_file names the rows",
        f"dataset.sources.1.split: train[:1%] is not read: {own} is a file, of which all rows are read",
        "dataset.split: test is not read: it belongs to dataset.name, and dataset.sources names the rows",
    ]
