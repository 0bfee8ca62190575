"""The store of reference log-probs on the command line and across runs."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from strop import cli, training
from strop.config import to_yaml
from strop.policy import build, policy
from strop.policy.reference_store import ReferenceStore


def groups_scored(forwards: list[Any]) -> int:
    """In all passes before the first step, the reference's."""
    first = next((i for i, (with_gradients, _) in enumerate(forwards) if with_gradients), len(forwards))
    return sum(batch.structure.num_groups for _, batch in forwards[:first] if "ref_logps" not in batch.columns.names)


@pytest.fixture
def config(runs: Any, own_store: Path, tmp_path: Path, watched: pytest.MonkeyPatch) -> Path:
    watched.setattr(build, "probe", lambda *_: None)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(runs.config(reference_store=True)))
    return path


@pytest.mark.nightly
def test_it_is_filled_ahead_and_elsewhere(
    runs: Any,
    config: Path,
    own_store: Path,
    forwards: list[Any],
    tmp_path: Path,
    watched: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["reference", "--config", str(config), "--model-index", "0"]) == 0
    assert groups_scored(forwards) == 16
    assert "log-probs are in the store" in capsys.readouterr().err
    forwards.clear()
    shutil.move(own_store.parent, tmp_path / "elsewhere")
    watched.setenv("STROP_CACHE", str(tmp_path / "elsewhere"))
    run = runs(reference_store=True)
    assert 0 < groups_scored(forwards) <= 4 + 4  # of a few micro-batches one each, to be sure
    assert run.series("loss")[0] == pytest.approx(0.6931472, abs=1e-5)
    assert abs(run.series("rewards/margins")[0]) <= 1e-5
    assert runs.same_run(run, runs())


def test_a_killed_pass_goes_on(
    runs: Any, config: Path, forwards: list[Any], watched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = runs()
    append, count = ReferenceStore.append, itertools.count(1)

    def killed(store: ReferenceStore, *record: Any) -> None:
        append(store, *record)
        if next(count) == 1:
            raise KeyboardInterrupt

    forwards.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceStore, "append", killed)
        assert cli.main(["reference", "--config", str(config)]) == 130
    done = groups_scored(forwards)
    assert 0 < done < 16
    forwards.clear()
    again = runs(reference_store=True)
    assert groups_scored(forwards) == 16 - done + 1  # one of those that are there, to be sure
    assert runs.same_run(again, whole)


@pytest.mark.nightly
def test_a_resume_reads_what_the_start_has_scored(runs: Any, own_store: Path, forwards: list[Any]) -> None:
    whole = runs(reference_store=True, save_steps=2)
    metrics, final = whole.untimed, whole.final
    output = whole.path.parent
    (whole.path / "final").rename(output / "set-aside")
    forwards.clear()
    training.train(runs.config(reference_store=True, save_steps=2, output_dir=str(output)), resume="auto")
    again = runs.at(whole.path)
    assert runs.same(again.final, final) and again.untimed == metrics


@pytest.fixture
def repeated(runs: Any, tmp_path: Path) -> Path:
    """Every other row has the chosen completion of the row before it and a rejected one of its own."""
    rows = [json.loads(line) for line in runs.files["pairs"].read_text().splitlines()]
    for row, other in zip(rows[::2], rows[1::2], strict=True):
        other["prompt"], other["chosen"] = row["prompt"], row["chosen"]
    path = tmp_path / "repeated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.share(1)
@pytest.mark.parametrize("keys", [{}, {"method": "kto", "max_steps": 8}], ids=["dpo", "kto"])
def test_a_completion_that_comes_again_is_scored_once_and_resumed_exactly(
    runs: Any, own_store: Path, repeated: Path, forwards: list[Any], keys: dict[str, Any]
) -> None:
    asked = {"dataset.train_file": str(repeated), "reference_store": True, "save_steps": 2, **keys}
    whole = runs(asked)
    first = next(i for i, (with_gradients, _) in enumerate(forwards) if with_gradients)
    scored = sum(b.structure.num_completions for _, b in forwards[:first] if "ref_logps" not in b.columns.names)
    assert keys or scored < 2 * 16, "every completion of 16 pairs"
    metrics, final, output = whole.untimed, whole.final, whole.path.parent
    (whole.path / "final").rename(output / "set-aside")
    training.train(runs.config(asked, output_dir=str(output)), resume="auto")
    again = runs.at(whole.path)
    assert runs.same(again.final, final) and again.untimed == metrics


@pytest.mark.parametrize(
    "keys", [["--method", "orpo"], ["--reference-store", "false"], ["--ref-sync-steps", "2"]], ids=lambda k: k[0]
)
def test_nothing_to_fill_is_an_error(keys: list[str], config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = config.read_text()
    if "orpo" in keys:
        text = text.replace("method: dpo", "method: orpo")
        post = text.index("post_training:")
        text = text[:post] + "post_training:\n  method: orpo\n" + text[text.index("\ntraining:", post) + 1 :]
        config.write_text(text)
        keys = []
    assert cli.main(["reference", "--config", str(config), *keys]) == 1
    assert "nothing to score ahead" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_an_error(
    config: Path, tmp_path: Path, watched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    watched.setenv("STROP_CACHE", str(tmp_path / "file"))
    assert cli.main(["reference", "--config", str(config)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "it cannot be written" in said and "set STROP_CACHE" in said and "are in the store" not in said


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reference", "--help"]) == 0
    assert "strop reference [--config] FILE" in capsys.readouterr().out


@pytest.mark.nightly
def test_memory_that_runs_out_is_explained(
    config: Path, watched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    watched.setattr(policy.Policy, "forward", no_room)
    assert cli.main(["reference", "--config", str(config)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "memory ran out: CUDA out of memory" in said and "max_seq_length" in said and "Traceback" not in said
