"""A release: the wheel holds everything that a run needs, and works alone, without the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email import message_from_string
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_paths
from typing import Any

import pytest

import strop

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(find_spec("build") is None, reason="build is not installed: the extra `dev`")


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Path:
    """Wheel and archive of the sources, as `make dist` makes them, from a copy without what lies about."""
    copy: Path = tmp_path_factory.mktemp("dist") / "copy"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", "*.egg-info", "__pycache__", "build", "dist", "site", "outputs", ".*"
        ),
    )
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy.parent / "made")],
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return copy.parent / "made"


def the_only(folder: Path, ending: str) -> Path:
    (found,) = folder.glob(f"*{ending}")
    return found


@pytest.mark.nightly
def test_the_wheel_holds_every_file_of_the_package(made: Path) -> None:
    with zipfile.ZipFile(the_only(made, ".whl")) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = message_from_string(wheel.read(metadata).decode())
    package = ROOT / "src" / "strop"
    files = {
        f"strop/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= names
    assert {name.partition("/")[0] for name in names} == {"strop", f"strop-{strop.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert about["Version"] == strop.__version__ and about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"


@pytest.mark.nightly
def test_the_archive_holds_what_builds_and_tests_it(made: Path) -> None:
    with tarfile.open(the_only(made, ".tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = (
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "SECURITY.md",
        "constraints.txt",
        "mkdocs.yml",
        "docs/index.md",
    )
    assert {*wanted, "configs/dpo.yaml", "tests/conftest.py", "src/strop/py.typed"} <= names


def test_versions_agree() -> None:
    """Of the package, of its metadata and of what is cited."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'version = "{strop.__version__}"' in project
    assert re.search(rf"^version: {re.escape(strop.__version__)}$", cited, flags=re.MULTILINE)


@pytest.fixture
def alone(made: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `strop` of the wheel in an empty environment, with the other packages of this one, far from the checkout."""
    home = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (packages,) = home.glob("lib/python3*/site-packages")
    with zipfile.ZipFile(the_only(made, ".whl")) as wheel:
        wheel.extractall(packages)
    # a folder in a .pth file gives its packages, and not the .pth files in it, by which the checkout would come back
    (packages / "others.pth").write_text(get_paths()["purelib"] + "\n" + get_paths()["platlib"] + "\n")
    place = tmp_path / "work"
    place.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(home / "bin" / "python"), "-m", "strop", *words],
            cwd=place,
            capture_output=True,
            text=True,
            env={**environment, "PYTHONSAFEPATH": "1", "STROP_CACHE": str(tmp_path / "cache")},
        )

    return run


@pytest.mark.nightly
def test_the_wheel_alone_answers(alone: Callable[..., Any], tmp_path: Path) -> None:
    shown = alone("--version")
    assert shown.stdout == f"strop {strop.__version__}\n", shown.stderr
    assert "sigmoid" in alone("methods", "dpo").stdout
    (tmp_path / "work" / "a.yaml").write_text("models: [{huggingface_id: nowhere}]\ndataset: {train_file: a.jsonl}\n")
    refused = alone("train", "--config", "a.yaml", "--preset", "cpu", "--dry-run")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr and "a.jsonl" in refused.stderr


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_the_wheel_alone_trains(
    alone: Callable[..., Any], tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    """Doctor, demo, init, a dry run, a run, its report: with nothing of the checkout at hand."""
    place = tmp_path / "work"
    make_model().save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    rows = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(24)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    doctor = alone("doctor")
    assert f"strop       {strop.__version__}" in doctor.stdout and str(ROOT) not in doctor.stdout
    for line in (
        "init --model model --data pairs.jsonl --output run.yaml",
        "train --config run.yaml --dry-run --no-time",
        "train --config run.yaml --preset cpu --template chatml",
        "report outputs/model",
        "demo",
    ):
        done = alone(*line.split())
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
    assert (place / "outputs" / "model" / "report.html").is_file()
