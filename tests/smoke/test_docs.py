"""The pages of the documentation: commands, YAML and links are right, and the site is built without a warning.

Some pages have tests of their own that run all of their commands: data.md, using-your-model.md.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from strop.cli import COMMANDS, entry, main
from strop.cli.compare import PARTED
from strop.cli.replay import DIFFERENT
from strop.config import load_config
from strop.config.flags import ALIASES
from strop.config.names import matches
from strop.config.schema import SECTIONS
from strop.config.yamlfile import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md", "llms.txt")),
]
PAIRS = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(24)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced(path: Path, kind: str) -> Iterator[str]:
    yield from re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands() -> Iterator[Any]:
    """Every line of a shell block, and every inline command, that begins with `strop`."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        lines = [line for block in fenced(path, "sh") for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`(strop [a-z][^`\n]*)`", text)
        for line in dict.fromkeys(line.strip() for line in lines):
            if line.startswith("strop "):
                yield pytest.param(line, id=f"{name_of(path)}:{line[:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_and_its_flags_are_there(line: str) -> None:
    words = shlex.split(line.partition("  #")[0].replace("|", " "), comments=True)
    if words[1].startswith("-"):
        assert words[1] in ("--help", "--version")
        return
    assert words[1] in COMMANDS, line
    own = set(re.findall(r"--[a-z][\w-]*", COMMANDS[words[1]].load().usage()))
    for word in words[2:]:
        flag = word.partition("=")[0].rstrip(",.;:)")
        if not re.fullmatch(r"--[a-z][\w.-]+", flag) or flag in own:
            continue
        key = flag[2:].replace("-", "_")
        assert matches(ALIASES.get(key, key)) or matches(key.removeprefix("no_")), f"{line}: {flag}"


def configurations() -> Iterator[Any]:
    for path in PAGES:
        for i, block in enumerate(fenced(path, "yaml")):
            if set(re.findall(r"^([a-z_]+):", block, flags=re.MULTILINE)) <= {*SECTIONS, *SECTIONS[""], "preset"}:
                yield pytest.param(block, id=f"{name_of(path)}:{i}")


@pytest.mark.parametrize("block", list(configurations()))
def test_a_configuration_is_valid(block: str) -> None:
    data = parse(block.encode(), "block").data
    load_config(overrides={"models": [{"huggingface_id": "org/model"}], **data})


def test_links_lead_to_pages_and_files() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{name_of(path)}: {target}"


def test_messages_of_the_troubleshooting_page_are_messages() -> None:
    """A message that is quoted there is one that strop gives."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| (?:rows dropped: )?`([^`]+)`", text, flags=re.MULTILINE)
    assert len(quoted) > 15
    for message in quoted:
        for part in re.split(r"\.\.\.|`, `", message):
            assert part.strip() in code, message


def test_the_first_run_of_the_page(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_model: Callable[..., Any],
    make_tokenizer: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every command, in its order."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    page = ROOT / "docs" / "first-run.md"
    lines = [line for block in fenced(page, "sh") for line in block.splitlines()]
    assert [shlex.split(line)[1] for line in lines] == ["doctor", "init", "train", "train", "report", "generate"]
    for line in lines:
        words = shlex.split(line)[1:]
        code = main(words)
        assert code == 0 or words[0] == "doctor", (
            line,
            capsys.readouterr().err,
        )  # doctor: this computer may lack things
    assert Path("outputs/model/report.html").is_file()


@pytest.mark.skipif(find_spec("material") is None, reason="mkdocs-material is not installed: the extra `docs`")
def test_the_site_is_built_without_a_warning_and_asks_nobody(tmp_path: Path) -> None:
    for name in ("docs", "mkdocs.yml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\"\s>]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect)[^>]*href=\"?(https?:[^\"\s>]+)", text)
        assert not loaded, (page.name, loaded)
        links = re.findall(r"href=\"?([^\"\s>#]+)", text)
        for link in links:
            if "://" not in link and not link.startswith(("mailto:", "javascript:")):
                assert (page.parent / link).exists() or page.name == "404.html", (page.name, link)


def test_pages_for_machines_name_what_is_there() -> None:
    """And speak of using strop alone."""
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    for command in re.findall(r"`strop (\w+)", text):
        assert command in COMMANDS
    assert (ROOT / "llms.txt").read_text(encoding="utf-8").startswith("# strop\n\n> ")


@pytest.mark.parametrize(
    ("page", "begins"),
    [
        ("docs/guide.md", "| exit code |"),
        ("docs/reliability.md", "- Exit codes:"),
        ("AGENTS.md", "0: done."),
        ("llms.txt", "- Exit codes:"),
    ],
)
def test_a_list_of_exit_codes_names_them_all(page: str, begins: str) -> None:
    """Those of the command line, and no others."""
    assert entry.__doc__ is not None
    codes = {int(code) for code in re.findall(r"^ {4}(\d+) ", entry.__doc__, re.M)}
    assert codes >= {0, 1, PARTED, DIFFERENT, entry.FOUND, entry.RESUMABLE, entry.STOPPED}
    text = (ROOT / page).read_text(encoding="utf-8")
    listed = text[text.index(begins) :].split("\n\n")[0].split(" Where a signal kills")[0]
    assert {int(code) for code in re.findall(r"(?<!-)\b\d+\b", listed)} == codes
