"""What is made ahead is what would have been made on the spot, errors too, and nothing is left running."""

from __future__ import annotations

import threading

import pytest

from strop.engine.prefetch import Prefetch


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("strop-ahead")]


@pytest.mark.parametrize("threaded", [True, False])
def test_what_is_taken_is_a_function_of_the_key(threaded: bool) -> None:
    made: list[tuple[int, bool]] = []

    def make(key: int) -> int:
        made.append((key, threading.current_thread() is threading.main_thread()))
        return key * key

    ahead = Prefetch(make, threaded=threaded)
    for key in range(5):
        assert ahead.take(key) == key * key
        ahead.begin(key + 1)
    assert ahead.take(7) == 49  # another than was begun
    ahead.close()
    assert [key for key, _ in made if key not in (5, 7)] == [0, 1, 2, 3, 4]
    assert [on_main for key, on_main in made if key in (1, 2, 3, 4)] == [not threaded] * 4
    assert not thread_names()


def test_what_goes_wrong_in_the_thread_is_raised_where_it_is_taken() -> None:
    failing = True

    def make(key: int) -> int:
        if failing:
            raise MemoryError("no room")
        return key

    ahead = Prefetch(make, threaded=True)
    ahead.begin(1)
    with pytest.raises(MemoryError, match="no room"):
        ahead.take(1)
    failing = False
    assert ahead.take(1) == 1  # again, on the spot
    ahead.close()


def test_an_end_does_not_wait_for_what_has_not_begun() -> None:
    going, release, made = threading.Event(), threading.Event(), []

    def make(key: int) -> int:
        going.set()
        release.wait(10)
        made.append(key)
        return key

    ahead = Prefetch(make, threaded=True)
    ahead.begin(1)
    assert going.wait(10)
    ahead.begin(2)  # waits behind the first
    release.set()
    ahead.close()
    assert made == [1] and not thread_names()
