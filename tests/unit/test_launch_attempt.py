"""Processes that a launcher starts again meet those of their own attempt, whatever earlier ones left in its store."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from strop.launch_attempt import LaunchAttempt, newest

SECONDS = 20.0


def _client(server: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=SECONDS))


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))


def _asked_by(server: TCPStore, rank: int) -> tuple[threading.Thread, list[LaunchAttempt]]:
    found: list[LaunchAttempt] = []
    thread = threading.Thread(target=lambda: found.append(LaunchAttempt(_client(server), rank, SECONDS)))
    thread.start()
    return thread, found


def _whole(server: TCPStore) -> tuple[LaunchAttempt, LaunchAttempt]:
    """An attempt of two processes, as both know it. The other one may ask before the first begins."""
    thread, found = _asked_by(server, 1)
    main = LaunchAttempt(_client(server), 0, SECONDS)
    while thread.is_alive():
        main.answer(1)
        thread.join(0.01)
    return main, found[0]


def test_the_keys_of_an_attempt_are_its_own(server: TCPStore) -> None:
    for number in range(3):
        main, other = _whole(server)
        assert not main.store.check(["address"]), "what the attempt before left"
        main.store.set("address", str(number))
        assert other.store.get("address") == newest(server).get("address") == str(number).encode()


def test_a_question_of_a_dead_process_does_no_harm(server: TCPStore) -> None:
    """It was ended before its answer came, and so was the first of its attempt, before or after it was counted."""
    server.set("strop/question/1", "of one that is dead")
    LaunchAttempt(_client(server), 0, SECONDS)
    main = LaunchAttempt(_client(server), 0, SECONDS)
    main.answer(1)
    thread, found = _asked_by(server, 1)
    while thread.is_alive():
        main.answer(1)
        thread.join(0.01)
    main.store.set("address", "here")
    assert found[0].store.get("address") == b"here"


def test_a_first_process_that_never_begins_is_named(server: TCPStore) -> None:
    with pytest.raises(TimeoutError, match="rank 0 does not answer within 0 seconds"):
        LaunchAttempt(_client(server), 1, 0.2)
