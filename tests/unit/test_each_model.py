"""Several models in one run: one that fails does not stop the others, unless nobody is left to train them with."""

from __future__ import annotations

import weakref

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


class _Circle:
    """Something that refers to itself, as a loop and its evaluation do."""

    def __init__(self) -> None:
        self.itself = self


def test_one_model_is_in_memory_at_a_time() -> None:
    models = tuple(ModelSection(name=name, huggingface_id=name) for name in ("good", "bad", "last"))
    held: list[weakref.ref[_Circle]] = []
    alive: list[int] = []

    def work(model: ModelSection) -> None:
        alive.append(sum(one() is not None for one in held))
        loaded = _Circle()
        held.append(weakref.ref(loaded))
        if model.name == "bad":
            raise ModelError("bad", where=str(type(loaded)))

    with pytest.raises(TrainingError, match="1 of 3 models failed: bad: "):
        for_each_model(models, RunConfig(models=models), World.alone("cpu"), work)
    alive.append(sum(one() is not None for one in held))
    assert alive == [0, 0, 0, 0]
