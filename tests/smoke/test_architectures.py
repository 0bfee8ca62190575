"""A few architectures by the whole road, as `python -m benchmarks.architectures` takes all of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from benchmarks.architectures import (
    Found,
    causal_kinds,
    check,
    experts_of,
    experts_table,
    limited,
    table,
    write_table,
)

from strop.policy.prefix_sharing import ARCHITECTURES

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("kind", "result", "reason"),
    [
        ("bert", "refused", "sees later tokens"),
        ("qwen3_5_text", "plain", "layers of the kind linear_attention"),
        ("gemma4_text", "shared", ""),
        ("musicgen", "not built", "codes of sound"),
        ("reformer", "refused", "reaches any weight that trains"),
    ],
)
def test_an_architecture_is_right_or_refused(
    kind: str, result: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))  # is set inside
    found = check(kind, tmp_path)
    assert found.result == result, found
    assert reason in found.reason


@pytest.mark.nightly
@pytest.mark.timeout(4 * 3600)
def test_no_architecture_of_the_installed_transformers_ends_in_a_fault() -> None:
    found = [limited(kind) for kind in causal_kinds()]
    assert not [row for row in found if row.result == "fault"]
    counts = Counter(row.result for row in found)
    # as docs/models.md has them, of the tested version of transformers
    assert counts["shared"] >= max(69, len(ARCHITECTURES)) and counts["shared"] + counts["plain"] >= 160, counts
    assert counts["refused"] <= 24 and counts["not built"] <= 5, counts


def test_the_table_stands_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- architectures: begin -->\nold\n<!-- architectures: end -->\nafter\n")
    rows = [Found("llama", "shared", adapted="q_proj"), Found("bert", "refused", "it sees | later tokens")]
    write_table(page, rows)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("-->\nafter\n") and "old" not in text
    assert table(rows) in text and "| llama | shared |  | q_proj |" in text and "sees \\| later" in text


def test_the_table_of_experts_says_what_adapters_reach() -> None:
    assert experts_of("llama") is None
    found = experts_of("mixtral")  # by default, of 7 billion weights
    assert found is not None and found.names == ["experts.down_proj", "experts.gate_up_proj"]
    attention, experts = 2 * 4096 * 4096 + 2 * 4096 * 1024, 8 * 3 * 4096 * 14336
    total = attention + experts  # a router is no layer here
    assert found.auto == found.all_linear == pytest.approx(100 * attention / total)
    assert found.experts == pytest.approx(100 * experts / total)
    assert "| mixtral | experts.down_proj, experts.gate_up_proj | 2.9 % | 2.9 % | 97.1 % |" in experts_table([found])
