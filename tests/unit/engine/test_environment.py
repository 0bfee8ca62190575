"""environment.json says what a run was made with, and no secret."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from strop.durable import to_json
from strop.engine.environment import changed_since, describe_environment, launch_record, resumed

SECRET = "hf_" + "a1B2c3D4e5" * 3
KEY = "0123456789abcdef" * 2 + "01234567"


def test_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_ODD_VARIABLE", "never-written-down")
    facts = describe_environment(seed=7, processes=2 * [{}], command=["strop", "train"])
    assert facts["python"] == platform.python_version()
    packages = facts["packages"]
    assert isinstance(packages, dict) and packages["torch"] == torch.__version__ and packages["strop"]
    assert (facts["seed"], facts["world_size"], facts["command"]) == (7, 2, ["strop", "train"])
    assert json.loads(to_json(facts)) == facts
    assert "never-written-down" not in to_json(facts)


def test_what_changed_since_the_launch(tmp_path: Path) -> None:
    launch = describe_environment(seed=1, processes=[{}])
    assert list(changed_since(launch, describe_environment(seed=2, processes=[{}], command=["other"]))) == []
    packages = launch["packages"]
    assert isinstance(packages, dict)
    now = {**launch, "packages": {**packages, "torch": "0.1", "strop": "9"}, "num_threads": 99, "git_commit": "x"}
    told = list(changed_since(launch, now))
    assert [line.split()[0] for line in told] == ["strop", "torch", "num_threads"]
    assert told[1] == f"torch {torch.__version__} then, 0.1 now"
    assert list(changed_since({}, now)) == []  # a record of an older version has less in it
    once = resumed(launch, 3, now)
    assert resumed(once, 5, launch) == {**launch, "resumes": [{"after_step": 3, **now}, {"after_step": 5, **launch}]}
    for text in (None, "{", "[]"):
        if text is not None:
            (tmp_path / "environment.json").write_text(text)
        assert launch_record(tmp_path) is None


def test_no_secret_of_the_command_line_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    command = ["strop", "train", "--hub-token", "x" * 20, f"--name={SECRET}", f"https://u:pw@host/{KEY}"]
    text = to_json(describe_environment(seed=1, processes=[{}], command=command))
    assert not any(s in text for s in (SECRET, KEY, "x" * 20, "pw@"))


def test_the_commit_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert describe_environment(seed=1, processes=[{}])["git_commit"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    commit = describe_environment(seed=1, processes=[{}])["git_commit"]
    assert isinstance(commit, str) and len(commit) == 40
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert describe_environment(seed=1, processes=[{}])["git_commit"] is None
