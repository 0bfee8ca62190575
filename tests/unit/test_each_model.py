"""Several models in one run: one that fails does not stop the others, unless nobody is left to train them with."""

from __future__ import annotations

import pytest

from strop.config import RunConfig
from strop.config.sections import ModelSection
from strop.each_model import for_each_model
from strop.errors import LostError, ModelError, StropError, TrainingError
from strop.world import World


def _tried(error: StropError, expected: type[StropError]) -> list[str]:
    """The models that are tried where the first of two raises this error; in the end, one of this type is raised."""
    models, tried = tuple(ModelSection(name=name, huggingface_id=name) for name in ("first", "second")), []

    def work(model: ModelSection) -> None:
        tried.append(model.name)
        if model.name == "first":
            raise error

    with pytest.raises(expected):
        for_each_model(models, RunConfig(models=models), World.alone("cpu"), work)
    return tried


def test_a_model_that_fails_does_not_stop_the_others() -> None:
    assert _tried(ModelError("bad"), TrainingError) == ["first", "second"]


def test_a_broken_connection_stops_all() -> None:
    assert _tried(LostError("process 0 has lost the others"), LostError) == ["first"]
