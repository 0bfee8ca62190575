"""The keys of one attempt in the store of a launcher: those that only processes started together read. Floor 0.

torchrun gives all attempts of a launch the same store, in which the beats of the earlier ones and the addresses of
their processes still stand. It counts the attempts per machine, so that the counts may differ. Here the process of
rank 0 counts them in the store and tells the number to each process that asks. A question of an earlier attempt may be
answered too: nobody reads that answer.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

COUNT = "strop/attempts"


class LaunchAttempt:
    """What the process of `rank` knows of its attempt. store: the keys of this attempt.

    Args:
        seconds: how long to wait for the process of rank 0.

    Raises:
        TimeoutError: it has not begun.
        RuntimeError: the store cannot be reached.
    """

    def __init__(self, launch: TCPStore, rank: int, seconds: float) -> None:
        self._launch = launch
        self._number = launch.add(COUNT, 1) if rank == 0 else _ask(launch, rank, seconds)
        self._answered: dict[int, str] = {}
        self.store = self.keys_in(launch)

    def keys_in(self, launch: Store) -> Store:
        """The keys of this attempt, over another connection to the store of the launcher."""
        return PrefixStore(_prefix(self._number), launch)

    def answer(self, rank: int) -> None:
        """Tells the number to the process of this rank if it asks. For the process of rank 0."""
        if not self._launch.check([_question(rank)]):
            return
        question = self._launch.get(_question(rank)).decode()
        if self._answered.get(rank) != question:
            self._launch.set(_reply(question), str(self._number))
            self._answered[rank] = question


def newest(launch: TCPStore) -> Store:
    """The keys of the newest attempt of a launch."""
    return PrefixStore(_prefix(launch.add(COUNT, 0)), launch)


def _ask(launch: TCPStore, rank: int, seconds: float) -> int:
    question = uuid4().hex
    launch.set(_question(rank), question)
    try:
        launch.wait([_reply(question)], timedelta(seconds=seconds))
    except DistStoreError as error:
        raise TimeoutError(f"the process of rank 0 does not answer within {seconds:.0f} seconds") from error
    return int(launch.get(_reply(question)))


def _question(rank: int) -> str:
    return f"strop/question/{rank}"


def _reply(question: str) -> str:
    return f"strop/reply/{question}"


def _prefix(number: int) -> str:
    return f"strop/attempt/{number}"
