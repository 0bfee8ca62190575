"""Rows worked on by several processes, in the order of the rows. Floor 2.

In: a workshop and a stream of rows. Out: what became of them, batch by batch. The first batches are worked on here,
so that small files start no process; no more batches are under way than keep the processes busy, so memory does not
grow with the file.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import count, islice

from strop import machine
from strop.data.rows import Row
from strop.data.workshop import Worked, Workshop
from strop.errors import DataError

ROWS_AT_ONCE = 512
ALONE = 8
"""Batches that are worked on before other processes are started."""

MOST = 8
"""Processes at most, where their number is left open."""

_workshop: Workshop | None = None
logger = logging.getLogger("strop")


def work_all(
    workshop: Workshop, rows: Iterator[Row], *, limit: int | None, num_workers: int | None
) -> Iterator[tuple[str, Worked]]:
    """The rows' file names and what became of them, in order.

    Args:
        limit: stop behind so many good rows; none behind them is looked at.
        num_workers: processes; None: by the number of processors.
    """
    batches = _Batches(rows, limit)
    wanted = num_workers or min(MOST, machine.processor().cores)
    for n in count():
        if n == ALONE and wanted > 1 and (pool := _pool(workshop, wanted)) is not None:
            yield from _in_processes(pool, batches, wanted)
            return
        batch = batches.next()
        if batch is None:
            return
        done = workshop.work(*batch)
        batches.finished(len(batch[0]), done)
        yield batches.files[batch[1]], done


class _Batches:
    """Batches of one file each, of no more rows than may still be wanted."""

    def __init__(self, rows: Iterator[Row], limit: int | None) -> None:
        self._rows, self._missing, self._under_way = rows, limit, 0
        self._held: list[Row] = []
        self.files: list[str] = []

    def next(self) -> tuple[list[Row], int] | None:
        """Rows and the number of their file; None where there are no more, or none may be asked for now."""
        size = ROWS_AT_ONCE if self._missing is None else min(ROWS_AT_ONCE, self._missing - self._under_way)
        if size <= 0:
            return None
        rows = self._held[:size]
        rows += islice(self._rows, size - len(rows))
        if not rows:
            return None
        file = rows[0].origin.file
        stop = next((i for i, row in enumerate(rows) if row.origin.file != file), len(rows))
        self._held = rows[stop:] + self._held[size:]
        rows = rows[:stop]
        if file not in self.files:
            self.files.append(file)
        self._under_way += len(rows)
        return rows, self.files.index(file)

    def finished(self, num_rows: int, done: Worked) -> None:
        self._under_way -= num_rows
        if self._missing is not None:
            self._missing -= done.num_good


def _pool(workshop: Workshop, num_workers: int) -> ProcessPoolExecutor | None:
    """The processes; None where the system has no locks for them to share, such as a container without /dev/shm."""
    # a fork has the tokenizer already, and does not run the main module again
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        return ProcessPoolExecutor(num_workers, context, _enter, (workshop,))
    except (OSError, ImportError, NotImplementedError) as error:
        logger.warning("rows are worked on in one process, since others cannot be started here: %s", error)
        return None


def _in_processes(pool: ProcessPoolExecutor, batches: _Batches, num_workers: int) -> Iterator[tuple[str, Worked]]:
    waiting: deque[tuple[int, int, Future[Worked]]] = deque()
    with ExitStack() as stack:
        stack.enter_context(pool)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        while True:
            while len(waiting) < 2 * num_workers and (batch := batches.next()) is not None:
                waiting.append((len(batch[0]), batch[1], _quietly(pool.submit, _work, *batch)))
            if not waiting:
                return
            num_rows, file, future = waiting.popleft()
            try:
                done = future.result()
            except BrokenProcessPool as error:
                raise DataError(
                    "a process that tokenises was killed",
                    expected="memory for all of them",
                    fix="set dataset.num_workers: 1, or free memory",
                ) from error
            batches.finished(num_rows, done)
            yield batches.files[file], done


def _quietly(submit: Callable[..., Future[Worked]], *arguments: object) -> Future[Worked]:
    with warnings.catch_warnings():
        # Python warns of forks beside threads; the children touch nothing that threads of ours hold
        warnings.simplefilter("ignore", DeprecationWarning)
        return submit(*arguments)


def _enter(workshop: Workshop) -> None:
    global _workshop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what is there stays there: not to be looked through, nor copied, at every collection
    _workshop = workshop


def _work(rows: list[Row], file: int) -> Worked:
    assert _workshop is not None
    return _workshop.work(rows, file)
