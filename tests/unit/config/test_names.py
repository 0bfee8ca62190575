"""Names as people write them: hints lead to keys that are there."""

from __future__ import annotations

import pytest

from strop.config.names import ELSEWHERE, closest
from strop.config.schema import KEYS


def test_every_name_of_another_tool_leads_to_a_key() -> None:
    keys = {key.dotted for key in KEYS}
    assert set(ELSEWHERE.values()) <= keys
    assert not set(ELSEWHERE) & {key.name for key in KEYS}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("gpu", "gpu-bf16"), ("cpuu", "cpu"), ("memory", "memory-efficient"), ("xyz", None), ("g", None)],
)
def test_the_closest_name(name: str, meant: str | None) -> None:
    assert closest(name, ["gpu-fp16-long", "gpu-bf16", "cpu", "memory-efficient"]) == meant
