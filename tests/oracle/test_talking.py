"""From training to talking: a model that has learned eight answers says all eight, and stops by itself.

What is asked is the template's own generation prompt, by plain transformers, with the model, the tokenizer and the
generation settings that stand in the run's folder `final`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle.contract import Oracle
from oracle.families import family, names
from oracle.talking import Talker, base_model, learn, rows

TALKING = names()
SOME = ("deepseek_r1_distill", "glm4moe")
"""Answers that end in an own token, and in the next turn's; `make nightly` asks all."""

pytestmark = pytest.mark.skipif(not TALKING, reason="the package trl, whose templates are the measure, is not there")


@pytest.mark.share(1)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SOME else [pytest.mark.nightly]) for name in TALKING]
)
def test_it_says_what_it_has_learned(name: str, tmp_path: Path) -> None:
    one = family(name)
    base_model(one, tmp_path / "base", one.stops)
    made = rows(one)
    talker = Talker(learn(tmp_path, made))
    for row in made:
        oracle = Oracle(one, one.template, row)
        (turn,) = oracle.expected().trained
        said, stops = talker.answer(oracle.messages[:1])
        assert (said, stops) == (turn.text.rstrip("\n"), True)
