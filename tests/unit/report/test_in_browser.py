"""The page of a sick and hostile run in a real browser: accessible in both colour schemes, printable, and only text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strop.report.page import page
from strop.report.write import examine

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">\u202e"
CHECK = """<pre id="told"></pre><script>
axe.run(document, {resultTypes: ["violations"]}).then(found => {
  const root = document.documentElement;
  document.getElementById("told").textContent = JSON.stringify({
    violations: found.violations.map(v => [v.id, v.nodes.map(n => n.html + " " + n.failureSummary).slice(0, 3)]),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    wide: root.scrollWidth > root.clientWidth,
    title: document.title,
    images: document.images.length,
    requests: performance.getEntriesByType("resource").length,
  });
});
</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser on the PATH: {', '.join(NAMES)}")
    return found


@pytest.fixture(scope="module")
def axe() -> str:
    spec = find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package axe-core-python, of the extra `dev`")
    return (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def sick(make: Callable[..., Any]) -> str:
    """A page with findings of every kind, charts beside them, pairs, tables and hostile text."""
    made = make(
        lambda line: {"rewards/chosen": -1.2 * line["step"] / 100, "loss": 0.7 + 0.01 * line["step"]}, name="run"
    )
    made.margins = [np.linspace(-1, 1 + i / 50, 32) for i in range(100)]
    pair = {"margin": -3.0, "step": 9, **dict.fromkeys(("prompt", "chosen", "rejected", "source"), HOSTILE)}
    made.pairs = {"worst": [pair], "best": [pair], "note": HOSTILE}
    made.settings["models.huggingface_id"] = HOSTILE
    return page(examine([made.write()]))


def run(browser: str, tmp_path: Path, file: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    common = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    command = [browser, *common, f"--user-data-dir={tmp_path / 'profile'}", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.share(1)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_hostile_text_is_text(
    scheme: str, sick: str, browser: str, axe: str, tmp_path: Path
) -> None:
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', sick)
    assert policy is not None
    checked = sick.replace(policy[0], "").replace("</body>", f"<script>{axe}</script>{CHECK}")  # else axe may not run
    file = tmp_path / "page.html"
    file.write_text(checked, encoding="utf-8")
    flags = (f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--virtual-time-budget=30000")
    done = run(browser, tmp_path, file, *flags, "--window-size=500,900", "--dump-dom")
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)
    assert found is not None and found[1], done.stderr
    told = json.loads(unescape(found[1]))
    assert told["dark"] == (scheme == "dark")
    assert told["violations"] == []
    assert told["images"] == told["requests"] == 0 and not told["wide"]
    assert "broken" not in told["title"]
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.nightly
def test_the_page_prints(sick: str, browser: str, tmp_path: Path) -> None:
    file, target = tmp_path / "page.html", tmp_path / "page.pdf"
    file.write_text(sick, encoding="utf-8")
    run(browser, tmp_path, file, f"--print-to-pdf={target}", "--no-pdf-header-footer")
    printed = target.read_bytes()
    assert printed.startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 30
