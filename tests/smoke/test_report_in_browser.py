"""The page in a real browser, where there is one: nothing on its console, no request, no scroll bar on a phone."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from strop.runfiles import REPORT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MEASURE = """<!doctype html><meta charset="utf-8"><iframe id="f" width="{width}" height="800" srcdoc="{page}"></iframe>
<p id="told"></p><script>
document.getElementById("f").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  document.getElementById("told").textContent = [root.scrollWidth, root.clientWidth, page.images.length,
    performance.getEntriesByType("resource").length, page.querySelectorAll("svg").length].join(" ");
}};
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser on the PATH: {', '.join(NAMES)}")
    return found


def opened(browser: str, path: Path, tmp_path: Path) -> tuple[str, str]:
    """(the document once it is loaded, what the browser said)."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom")
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_the_page_opens_with_an_empty_console(runs: Any, browser: str, tmp_path: Path) -> None:
    run = runs(max_steps=3, logging_steps=1)
    document, console = opened(browser, run.path / REPORT, tmp_path)
    assert "strop report" in document and console == ""


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_is_wider_than_the_screen(width: int, runs: Any, browser: str, tmp_path: Path) -> None:
    run = runs(max_steps=3, logging_steps=1)
    page = (run.path / REPORT).read_text(encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8")
    document, _ = opened(browser, outer, tmp_path)
    told = re.search(r'<p id="told">([\d ]+)</p>', document)
    assert told is not None
    scrolled, seen, images, requests, charts = map(int, told[1].split())
    assert scrolled <= seen <= width
    assert images == requests == 0 and charts > 3
