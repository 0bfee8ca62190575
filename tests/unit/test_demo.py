"""The demo's task is fair, its files are sound, and its model answers the same whatever stands beside it."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from strop import durable
from strop.config import load_config
from strop.demo import model, run, task
from strop.errors import ConfigError

SIZE = task.Size(num_demonstrations=600, num_pairs=120, num_questions=30, num_validation=40, num_heldout_per_length=10)
LISTS = [tuple(random.Random(i).sample(task.ITEMS, n)) for n in task.NUM_ITEMS for i in range(20)]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(row: dict[str, Any]) -> tuple[str, ...]:
    ask, *items = (row.get("prompt") or row["messages"])[0]["content"].split()
    assert ask == task.ASK
    return tuple(items)


def said(row: dict[str, Any], side: str) -> str:
    return str(row[side][-1]["content"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("demo") / "data"
    task.write_data(folder, seed=3, size=SIZE)
    return {path.name.removesuffix(".jsonl"): rows(path) for path in folder.iterdir()}


def test_rush_keeps_the_items_and_sorts_only_the_first() -> None:
    for items in LISTS:
        rushed = task.in_rush(items)
        assert sorted(rushed) == sorted(items)
        assert list(rushed[: task.SORTED_BY_RUSH]) == sorted(items[: task.SORTED_BY_RUSH])
        assert rushed[task.SORTED_BY_RUSH :] == items[task.SORTED_BY_RUSH :]


def test_heldout_items_are_in_no_training_file_in_any_order(data: dict[str, list[dict[str, Any]]]) -> None:
    heldout = [frozenset(asked(row)) for row in data["heldout"]]
    assert len(set(heldout)) == len(heldout) == SIZE.num_heldout_per_length * len(task.NUM_ITEMS)
    prompts = [asked(row) for name in data if name != "heldout" for row in data[name]]
    assert not {frozenset(items) for items in prompts} & set(heldout)
    assert len(set(prompts)) == len(prompts) == 600 + 120 + 30 + 2 * 40


def test_the_checker_agrees_with_the_pairs(data: dict[str, list[dict[str, Any]]]) -> None:
    for row in data["dpo.train"] + data["dpo.val"]:
        assert task.is_right(asked(row), said(row, "chosen"))
        assert not task.is_right(asked(row), said(row, "rejected"))


def test_questions_are_long_and_have_right_answers(data: dict[str, list[dict[str, Any]]]) -> None:
    for row in data["grpo.train"]:
        assert len(asked(row)) in task.LONG
        assert task.is_right(asked(row), row["answer"]) and said(row, "completion") == row["answer"]


def test_most_long_demonstrations_are_rushed(data: dict[str, list[dict[str, Any]]]) -> None:
    long = [row for row in data["sft.train"] if len(asked(row)) == max(task.NUM_ITEMS)]
    wrong = sum(not task.is_right(asked(row), said(row, "messages")) for row in long)
    assert 0.5 < wrong / len(long) < 0.8
    short = [row for row in data["sft.train"] if len(asked(row)) == task.SORTED_BY_RUSH]
    assert all(task.is_right(asked(row), said(row, "messages")) for row in short)


def test_data_is_a_function_of_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        task.write_data(tmp_path / name, seed, SIZE)
    texts = {name: [(tmp_path / name / f).read_bytes() for f in ("sft.train.jsonl", "heldout.jsonl")] for name in "abc"}
    assert texts["a"] == texts["b"]
    assert all(one != other for one, other in zip(texts["a"], texts["c"], strict=True))


@pytest.mark.parametrize("wrong", ["", "apples", "apples milk tea tea", "milk apples tea", "apples, milk, tea"])
def test_only_the_whole_sorted_list_is_right(wrong: str) -> None:
    items = ("tea", "apples", "milk")
    assert task.accuracy([items, items], ["apples milk tea", wrong]) == 0.5


def test_tokenizer_knows_every_word_and_prompts_are_prefixes() -> None:
    tokenizer = model.build_tokenizer()
    for items in LISTS:
        prompt = tokenizer.apply_chat_template(task.prompt_of(items), add_generation_prompt=True, return_dict=False)
        whole = task.prompt_of(items) + task.completion_of(sorted(items))
        ids = tokenizer.apply_chat_template(whole, return_dict=False)
        assert ids[: len(prompt)] == prompt
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) == " ".join(sorted(items))


def test_base_is_a_function_of_the_seed_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model.write_base(tmp_path / name, seed)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]


def test_answers_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    model.write_base(tmp_path, seed=0)
    lists = LISTS[::16]
    assert len({len(items) for items in lists}) > 1  # so that there is padding
    together = model.answer(tmp_path, lists)
    assert together == model.answer(tmp_path, lists, batch_size=1)
    assert any(together)


@pytest.mark.parametrize("name", ["plain", "with space", 'quote" and \\ and: [x] #y'])
def test_configurations_load_and_name_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    paths = run._write_configs(folder, seed=7, size=task.Size(sft_epochs=3))
    stages = [load_config(path) for path in paths.values()]
    assert [stage.post_training.method for stage in stages] == list(paths) == ["sft", "dpo", "grpo"]
    assert stages[0].training.num_epochs == 3
    for stage in stages:
        assert stage.seed == 7 and Path(stage.training.output_dir) == folder
    for before, after in pairwise(stages):
        assert Path(after.models[0].huggingface_id) == folder / before.models[0].name / "final"


def test_only_its_own_folder_is_written_over(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    run._write_configs(mine, seed=0, size=SIZE)
    run._write_configs(mine, seed=1, size=SIZE)
    assert "seed: 1" in (mine / "sft.yaml").read_text(encoding="utf-8")
    (other / "base").mkdir(parents=True)
    with pytest.raises(ConfigError, match="did not write"):
        run._write_configs(other, seed=0, size=SIZE)
    assert [p.name for p in other.iterdir()] == ["base"]
    with pytest.raises(ConfigError, match="did not write"):
        run._write_configs(mine / "sft.yaml", seed=0, size=SIZE)


def test_a_folder_that_cannot_be_made_is_said_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        run._write_configs(tmp_path / "file" / "below", seed=0, size=SIZE)


def test_the_data_of_a_demo_is_the_old_or_the_new_wherever_the_process_dies(tmp_path: Path, on_disk: Any) -> None:
    small = task.Size(num_demonstrations=4, num_pairs=2, num_questions=2, num_validation=1, num_heldout_per_length=1)
    folder = tmp_path / "data"

    def found() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    task.write_data(folder, seed=1, size=small)
    old = found()
    for at in range(1, 60):
        task.write_data(folder, seed=1, size=small)
        disk = on_disk(at, None, lambda: task.write_data(folder, seed=2, size=small))
        durable.recover(tmp_path)
        if not disk.dead:
            assert len(found()) == 6 and found() != old
            return
        new = found()
        if new != old:
            task.write_data(folder, seed=2, size=small)
            assert found() == new
    raise AssertionError("the last call was never reached")
