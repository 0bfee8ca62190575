"""The pages of the documentation: links and messages are right, and the site is built without a warning. What pages
show is run by test_pages.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from shown import PAGES, ROOT, name_of
from strop.cli import COMMANDS, entry
from strop.cli.compare import PARTED
from strop.cli.replay import DIFFERENT


def test_links_lead_to_pages_and_files() -> None:
    for path in (path for path in PAGES if path.suffix != ".yaml"):
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


@pytest.mark.nightly
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
