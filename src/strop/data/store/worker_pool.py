"""Tokenises rows in several processes; the results come in the order of the rows. Floor 2.

In: a pipeline and a stream of rows. Out: the results, batch by batch. The first batches are processed here, so that
small files start no process. If the tokenizer may run for ever (`RowPipeline.may_run_away`), all batches go to other
processes, which the operating system ends when they take too much. Only as many batches are in work as keep the
processes busy, so memory does not grow with the file. The processes end with their parent, however that ends.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from strop import machine, time_limit
from strop.data.read.row import Row
from strop.data.store.row_pipeline import PipelineResult, RowPipeline
from strop.errors import DataError

ROWS_AT_ONCE = 512
BATCHES_BEFORE_POOL = 8
"""Batches that are worked on in this process before others are started."""

MAX_PROCESSES = 8
"""Processes at most, where `dataset.num_workers` is not set."""

logger = logging.getLogger("strop")

SECONDS = 60.0
BYTES_PER_SECOND = 50_000
"""Limit of processor time for a batch: `SECONDS`, and one second more per `BYTES_PER_SECOND` of its rows.
Batches usually take a hundredth of it."""

START = "fork" if time_limit.CAN_FORK else "spawn"
"""A forked process has the tokenizer already, and does not run the main module again."""


def work_all(
    pipeline: RowPipeline, rows: Iterator[Row], *, limit: int | None, num_workers: int | None, start: str = START
) -> Iterator[tuple[str, PipelineResult]]:
    """The rows' file names and what became of them, in order.

    Args:
        limit: stop after this many good rows; the rows after them are not read.
        num_workers: number of processes; None: one per core, at most `MAX_PROCESSES`.
        start: how processes are started: fork or spawn.
    """
    batches = _Batches(rows, limit)
    wanted = num_workers or min(MAX_PROCESSES, machine.processor().cores)
    needs_pool = start == "fork" and pipeline.may_run_away
    for n in count():
        if n == (0 if needs_pool else BATCHES_BEFORE_POOL) and (needs_pool or wanted > 1):
            pool = _start_pool(pipeline, wanted, start)
            if pool is not None:
                yield from _in_processes(pool, batches, wanted)
                return
        batch = batches.next()
        if batch is None:
            return
        done = pipeline.work(*batch)
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

    def finished(self, num_rows: int, done: PipelineResult) -> None:
        self._under_way -= num_rows
        if self._missing is not None:
            self._missing -= done.num_good


def _start_pool(pipeline: RowPipeline, num_workers: int, start: str) -> WorkerPool | None:
    """Processes, the first of them started; None where the system starts none."""
    try:
        return WorkerPool(pipeline, num_workers, start)
    except (OSError, ImportError, NotImplementedError) as error:
        logger.warning("rows are worked on in one process, since others cannot be started here: %s", error)
        return None


def _in_processes(pool: WorkerPool, batches: _Batches, num_workers: int) -> Iterator[tuple[str, PipelineResult]]:
    waiting: deque[tuple[int, int, Future[PipelineResult]]] = deque()
    try:
        while True:
            while len(waiting) < 2 * num_workers and (batch := batches.next()) is not None:
                waiting.append((len(batch[0]), batch[1], pool.submit(*batch)))
            if not waiting:
                return
            num_rows, file, future = waiting.popleft()
            done = future.result()
            batches.finished(num_rows, done)
            yield batches.files[file], done
    finally:
        pool.close()


class WorkerPool:
    """Processes that work on batches: one is started for every batch that finds all others busy, up to a number."""

    def __init__(self, pipeline: RowPipeline, num_workers: int, start: str) -> None:
        self._pipeline, self._most = pipeline, num_workers
        self._context = multiprocessing.get_context(start)
        self._members: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(num_workers)  # one waits for each process
        self._under_way: list[Future[PipelineResult]] = []
        self._start_one()

    def submit(self, rows: list[Row], file: int) -> Future[PipelineResult]:
        """Starts work on a batch.

        Raises (the future):
            DataError: the process that worked on it has ended.
        """
        self._under_way = [future for future in self._under_way if not future.done()]
        if len(self._members) < min(self._most, len(self._under_way) + 1):
            self._start_one()
        self._under_way.append(self._threads.submit(self._work, rows, file))
        return self._under_way[-1]

    def _start_one(self) -> None:
        member = _Worker(self._context, self._pipeline)
        self._members.append(member)
        self._idle.put(member)

    def _work(self, rows: list[Row], file: int) -> PipelineResult:
        member = self._idle.get()
        try:
            return member.work(rows, file)
        finally:
            self._idle.put(member)

    def close(self) -> None:
        """Ends all processes at once."""
        for member in self._members:
            member.end()
        self._threads.shutdown(cancel_futures=True)


class _Worker:
    """One process."""

    def __init__(self, context: Any, pipeline: RowPipeline) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, pipeline, os.getpid()), daemon=True)
        with warnings.catch_warnings():
            # Python warns of forks beside threads; the children touch nothing that threads of ours hold
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def work(self, rows: list[Row], file: int) -> PipelineResult:
        seconds = SECONDS + sum(map(_size, rows)) / BYTES_PER_SECOND
        try:
            self._pipe.send((rows, file, seconds))
            if not self._pipe.poll(time_limit.SLACK * seconds):
                self._process.kill()
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._gone(rows, seconds) from error
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, PipelineResult)
        return answer

    def _gone(self, rows: list[Row], seconds: float) -> DataError:
        self._process.join()
        first, last = rows[0].origin, rows[-1].origin
        where = f"{first.file}:{first.line}" + (f" to {last.line}" if len(rows) > 1 else "")
        if self._process.exitcode == -getattr(signal, "SIGKILL", 9):
            return DataError(
                "a process that tokenises was killed",
                where=where,
                expected="memory for all of them",
                fix="set dataset.num_workers: 1, or free memory",
            )
        return DataError(
            f"tokenising these rows takes more than {time_limit.limit_passed(self._process.exitcode, seconds)}",
            where=where,
            expected="some milliseconds per row",
            fix="look at these rows, and at the normalizer and pre_tokenizer in the model's tokenizer.json: a regular "
            "expression there may never come to an end",
        )

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _size(row: Row) -> int:
    return len(row.raw) if row.raw is not None else len(str(row.data))


def _serve(pipe: Connection, pipeline: RowPipeline, parent: int) -> None:
    """Runs in the other process: receives batches and sends their results until the parent ends it or is gone."""
    time_limit.enter(parent)
    gc.freeze()  # objects that exist now stay: the collector need not look through them, which would copy their pages
    time_limit.bound_memory()
    while True:
        rows, file, seconds = pipe.recv()
        time_limit.bound_time(seconds)
        try:
            answer: PipelineResult | BaseException = pipeline.work(rows, file)
        except Exception as error:  # noqa: BLE001 (raised again in the parent)
            error.add_note(traceback.format_exc())
            answer = error
        pipe.send(answer)
