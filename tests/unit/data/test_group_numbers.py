"""What lies beside the completions of a group: read, cut with its tokens, kept on disk, checked."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from strop.batch import own_columns, pack
from strop.config import RunConfig, load_config, resolve
from strop.config.methods import GrpoSettings
from strop.data.read.row import RowRefused
from strop.data.shapes.examples import RowColumns, to_example
from strop.data.text.token_rows import group_from_tokens
from strop.errors import ConfigError, DataError
from strop.prepared import Prepared, prepare
from strop.types import Group, Origin

TOKENS = {"prompt_ids": [5, 6, 7], "completion_ids": [[8, 9, 10], [11]]}
LOGPS = [[-0.5, -1.25, -2.0], [-3.0]]


def config_for(rows: Sequence[dict[str, Any]], folder: Path, model_dir: Path, **keys: Any) -> RunConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "models.0.huggingface_id": str(model_dir),
        "dataset.train_file": str(folder / "rows.jsonl"),
        "dataset.validation_split": 0.0,
        "method": "grpo",
        **keys,
    }
    return resolve(load_config(overrides=overrides))


def prepared(rows: Sequence[dict[str, Any]], folder: Path, model_dir: Path, **keys: Any) -> Prepared:
    config = config_for(rows, folder, model_dir, **keys)
    return prepare(config, config.models[0])


def groups(*args: Any, **keys: Any) -> list[Group]:
    return list(prepared(*args, **keys).data.train)


def test_tokens_and_log_probs_come_back_as_they_were(tmp_path: Path, model_dir: Path) -> None:
    row = {**TOKENS, "rewards": [0.1, 1.0], "old_logps": LOGPS, "sampler_logps": LOGPS}
    (group,) = groups([row], tmp_path, model_dir)
    assert list(group.prompt_ids) == [5, 6, 7] and [list(c.ids) for c in group.completions] == [[8, 9, 10], [11]]
    assert all(c.loss_mask == b"\1" * len(c.ids) for c in group.completions)
    assert group.numbers["rewards"] == array("d", [0.1, 1.0])
    assert group.numbers["old_logps"] == group.numbers["sampler_logps"] == array("d", [-0.5, -1.25, -2.0, -3.0])
    batch = pack([group, group])
    assert batch.columns.find("rewards").tolist() == [0.1, 1.0, 0.1, 1.0]
    assert batch.columns.find("old_logps").tolist() == 2 * [-0.5, -1.25, -2.0, -3.0]


def test_log_probs_of_tokens_that_are_cut_go_with_them(tmp_path: Path, model_dir: Path) -> None:
    row = {**TOKENS, "rewards": [True, False], "old_logps": LOGPS}
    (group,) = groups([row], tmp_path, model_dir, max_seq_length=5)
    assert [list(c.ids) for c in group.completions] == [[8, 9], [11]]
    assert list(group.numbers["old_logps"]) == [-0.5, -1.25, -3.0] and list(group.numbers["rewards"]) == [1.0, 0.0]
    own_columns([group]).check(pack([group]).structure)


def test_log_probs_after_a_prompt_that_is_cut_are_dropped(tmp_path: Path, model_dir: Path) -> None:
    row = {"prompt": "yes no maybe", "completions": ["x", "y"], "rewards": [1.0, 0.0]}
    (whole,) = groups([row], tmp_path, model_dir)
    logps = [[-1.0] * c.num_scored for c in whole.completions]
    keys = {"max_prompt_length": 1, "dataset.max_dropped_fraction": None}
    assert len(groups([row], tmp_path, model_dir, **keys)) == 1, "a reward is that of the answer"
    with pytest.raises(DataError, match="prompt_too_long"):
        groups([{**row, "old_logps": logps}], tmp_path, model_dir, **keys)


@pytest.mark.parametrize(
    ("numbers", "found"),
    [
        ({"rewards": [1.0]}, "1 entries, and there are 2 completions"),
        ({"rewards": 1.0}, "rewards"),
        ({"rewards": [1.0, None]}, r"rewards\[1\]"),
        ({"rewards": [1.0, "good"]}, r"rewards\[1\]"),
        ({"rewards": [1.0, float("nan")]}, r"rewards\[1\]"),
        ({"rewards": [1.0, float("-inf")]}, r"rewards\[1\]"),
        ({"rewards": [1.0, 1e200]}, r"rewards\[1\] is 1e\+200"),
        ({"rewards": [1.0, -(10**400)]}, r"rewards\[1\]"),
        ({"rewards": [1.0, 0.0], "old_logps": [[-1.0], [-(10**400)]]}, r"old_logps\[1\]\[0\]"),
        ({"rewards": [1.0, 0.0], "old_logps": [[-1.0], 2]}, r"old_logps\[1\]"),
        ({"rewards": [1.0, 0.0], "old_logps": [[0.25], [-1.0]]}, "0.25, which is no log-prob"),
        ({"rewards": [1.0, 0.0], "old_logps": "[[-1.0]"}, "old_logps"),
    ],
)
def test_numbers_that_are_none_are_refused(numbers: dict[str, Any], found: str) -> None:
    row = {"prompt": "q", "completions": ["x", "y"], **numbers}
    with pytest.raises(RowRefused) as refused:
        to_example(row, Origin("rows", 1), "group", RowColumns(numbers=GrpoSettings.NUMBERS))
    assert re.search(found, refused.value.found)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_ids": None}, "missing_field"),
        ({"prompt_ids": []}, "empty_field"),
        ({"completion_ids": [[8], []]}, "empty_field"),
        ({"completion_ids": []}, "wrong_type"),
        ({"completion_ids": [[8], [12]]}, "unknown_token"),
        ({"completion_ids": [[8], ["x"]]}, "wrong_type"),
    ],
)
def test_tokens_that_are_none_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowRefused) as refused:
        group_from_tokens({**TOKENS, **change}, 12, GrpoSettings.NUMBERS)
    assert refused.value.reason == reason


def test_log_probs_are_of_the_tokens_that_the_text_comes_to(tmp_path: Path, model_dir: Path) -> None:
    row = {"prompt": "q", "completions": ["yes", "no"], "rewards": [1.0, 0.0], "old_logps": [[-1.0], [-1.0] * 50]}
    with pytest.raises(DataError, match=r"old_logps\[\d\] has \d+ numbers, and completion \d has \d+ trained tokens"):
        groups([row], tmp_path, model_dir)


FULL = {"prompt": "q", "completions": ["x", "y"], "rewards": [1.0, 0.0]}


def test_what_the_objective_needs_stands_in_every_row(tmp_path: Path, model_dir: Path) -> None:
    bare = {name: value for name, value in FULL.items() if name != "rewards"}
    with pytest.raises(DataError, match="the row has no rewards, and 1 of 2 rows have it") as some:
        prepared([FULL, bare], tmp_path, model_dir)
    assert "rows.jsonl:2" in str(some.value)
    tokens = {**TOKENS, "rewards": [1.0, 0.0]}
    with pytest.raises(DataError, match="no old_logps, and 1 of 2 rows have it"):
        prepared([{**tokens, "old_logps": LOGPS}, tokens], tmp_path, model_dir)
    with pytest.raises(DataError, match="the row has no sampler_logps"):
        prepared([tokens], tmp_path, model_dir, sampler_correction="token_truncate")


def test_the_temperature_is_that_of_the_rows(tmp_path: Path, model_dir: Path) -> None:
    row = {**TOKENS, "rewards": [1.0, 0.0], "old_logps": LOGPS}
    at: list[dict[str, Any]] = [{**row, "sampling_temperature": value} for value in (0.7, 0.7, 1.0, 0.0)]
    asked = {"rollout.enabled": False, "rollout.temperature": 0.7}

    def temperature(rows: Sequence[dict[str, Any]], **keys: Any) -> tuple[float, str]:
        config = prepared(rows, tmp_path, model_dir, **keys).config
        return config.rollout.temperature, config.origins["rollout.temperature"]

    assert temperature(at[:2]) == (0.7, "sampling_temperature of the rows")
    assert temperature(at[:2], **asked)[0] == temperature([row], **asked)[0] == 0.7
    assert temperature(at[2:3]) == temperature([row]) == (1.0, "default")
    with pytest.raises(ConfigError, match=r"rollout.temperature: 0.7 \(python\): .* sampled at temperature 1 "):
        temperature(at[2:3], **asked)
    with pytest.raises(DataError, match=r"is 1, and that of the rows before is 0\.7") as differs:
        temperature(at[:3])
    assert "rows.jsonl:3" in str(differs.value)
    with pytest.raises(DataError, match="sampling_temperature is 0 in every training row"):
        temperature(at[3:])
    held_out = tmp_path / "held_out.jsonl"
    for value, rows in ((0.7, at[2:3]), (0.7, [row]), (1.0, at[:2])):
        held_out.write_text(json.dumps({**row, "sampling_temperature": value}) + "\n")
        with pytest.raises(ConfigError, match=f"the validation rows were sampled at temperature {value:g}"):
            temperature(rows, **{"dataset.val_file": str(held_out)})
    with pytest.raises(DataError, match="no sampling_temperature, and 1 of 2 rows have it"):
        temperature([at[0], row])


def test_a_group_of_one_has_nothing_to_be_compared_with(tmp_path: Path, model_dir: Path) -> None:
    rows = [FULL, {"prompt": "p", "completions": ["x"], "rewards": [1.0]}]
    with pytest.raises(DataError, match="one completion, and there is nothing to compare it with") as refused:
        prepared(rows, tmp_path, model_dir)
    assert "rows.jsonl:2" in str(refused.value)
    assert len(prepared(rows, tmp_path, model_dir, algorithm="reinforce++").data.train) == 2


def test_the_axes_and_missing_log_probs_are_said_before(tmp_path: Path, model_dir: Path) -> None:
    found = prepared([FULL], tmp_path, model_dir, algorithm="dr_grpo", max_completion_length=100, max_seq_length=200)
    assert found.objective.units["policy"](pack(list(found.data.train)).structure) == 2 * 100
    assert any("the rows have no old_logps" in note for note in found.advice())
    given = prepared([{**TOKENS, "rewards": [1.0, 0.0], "old_logps": LOGPS}], tmp_path, model_dir)
    assert not any("old_logps" in note for note in given.advice())


def test_rewards_are_a_part_of_what_the_rows_are(tmp_path: Path, model_dir: Path) -> None:
    fingerprints = {
        prepared([{**FULL, "rewards": rewards}], tmp_path, model_dir).data.report.fingerprint
        for rewards in ([1.0, 0.0], [0.0, 1.0])
    }
    assert len(fingerprints) == 2
