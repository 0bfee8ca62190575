"""A few architectures by the whole road, as `python -m benchmarks.architectures` takes all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.architectures import Found, check, table, write_table

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("kind", "result", "reason"),
    [
        ("bert", "refused", "sees later tokens"),
        ("qwen3_5_text", "plain", "not among those it is tested with"),
        pytest.param("llama", "shared", "", marks=pytest.mark.nightly),
        pytest.param("gemma3", "plain", "not among", marks=pytest.mark.nightly),
        pytest.param("gpt_oss", "plain", "not among", marks=pytest.mark.nightly),
        pytest.param("mamba2", "plain", "not among", marks=pytest.mark.nightly),
    ],
)
def test_an_architecture_is_right_or_refused(
    kind: str, result: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))  # is set inside
    found = check(kind, tmp_path)
    assert found.result == result, found
    assert reason in found.reason


def test_the_table_stands_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- architectures: begin -->\nold\n<!-- architectures: end -->\nafter\n")
    rows = [Found("llama", "shared", adapted="q_proj"), Found("bert", "refused", "it sees | later tokens")]
    write_table(page, rows)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("-->\nafter\n") and "old" not in text
    assert table(rows) in text and "| llama | shared |  | q_proj |" in text and "sees \\| later" in text
