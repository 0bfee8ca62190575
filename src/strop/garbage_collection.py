"""How often Python searches for garbage. Floor 0.

Python starts a search after every 700 new objects. Imports of torch and transformers make half a million objects, and
the offsets of a tokenised batch are tens of thousands: all of them stay, so the searches find nothing and cost a tenth
of a start and more of tokenising.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

OBJECTS = 20_000
"""New objects after which a command searches."""


@contextmanager
def paused() -> Iterator[None]:
    """No search in here."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def rare() -> Iterator[None]:
    """A search after every `OBJECTS` new objects in here."""
    before = gc.get_threshold()
    gc.set_threshold(OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
