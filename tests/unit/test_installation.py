"""`strop doctor`: one screen, no secrets, and an exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strop import installation
from strop.cli import main
from strop.installation import Requirement, numbers, requirements


def test_the_screen_has_what_one_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in (
        "python",
        "platform",
        "processor",
        "memory",
        "packages",
        "torch",
        "device",
        "disk",
        "cache",
        "variables",
    ):
        assert f"\n{word}" in f"\n{out}"
    assert len(out.splitlines()) < 30


def test_no_secret_is_on_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hf_" + "s3cr3t" * 6
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD", "HF_HOME"):
        monkeypatch.setenv(name, secret)
    main(["doctor"])
    out = capsys.readouterr().out
    assert secret not in out and "HF_TOKEN is set" in out


def test_the_home_folder_is_not_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "a-person"))
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "a-person" / "cache"))
    main(["doctor"])
    assert "a-person" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (["no-such-package>=1.0"], "no-such-package is missing"),
        (["numpy>=999"], "is older than 999"),
        (["no-such-package>=1.0; extra == 'more'"], ""),
        (["no-such-package>=1.0; extra == 'dev'"], ""),
    ],
)
def test_what_is_missing_is_told(
    asked: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of strop itself it is a problem; an extra is told with how to get it; those of developers are not told."""

    def metadata(name: str) -> Any:
        return asked

    monkeypatch.setattr(installation, "requires", metadata)
    assert main(["doctor"]) == int(bool(problem))
    out = capsys.readouterr().out
    assert problem in out
    assert ("strop[more]" in out) == ("more" in asked[0])
    assert "dev" not in [line.split()[1].rstrip(":") for line in out.splitlines() if line.startswith("extra")]


def test_requirements_are_read() -> None:
    lines = ["torch>=2.12", "tokenizers", "bitsandbytes>=0.50; extra == 'bnb'", 'x[y]>=1.2 ; extra == "z"']
    assert list(requirements(lines)) == [
        Requirement("torch", "2.12", ""),
        Requirement("tokenizers", "", ""),
        Requirement("bitsandbytes", "0.50", "bnb"),
        Requirement("x", "1.2", "z"),
    ]


@pytest.mark.parametrize(
    ("older", "newer"), [("2.9", "2.13.0+cpu"), ("0.9", "0.50"), ("1.0", "1.0.1"), ("3.30.0rc1", "3.30.1")]
)
def test_versions_are_compared_as_numbers(older: str, newer: str) -> None:
    assert numbers(older) < numbers(newer)
    assert numbers("2.12") == numbers("2.12.0")


def test_a_full_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(installation, "free_bytes", lambda path: 1 << 20)
    assert main(["doctor"]) == 1
    assert "too little" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_named_and_no_other_folder_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cache")]
    assert "cannot be written" in line and "set STROP_CACHE" in line and "in it;" not in line
