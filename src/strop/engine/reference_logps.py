"""The reference's log-probs of a run: read from the store or scored, and laid into one file. Floor 3.

In: groups and their numbers. Out: `ReferenceLogps`, which gives the log-probs of any of these groups.

How a pass is cut into micro-batches moves the last bits of its results. So the cut is made over all completions that
the run wants, as if nothing were stored, and the store keeps whole micro-batches, found by what is in them: what an
earlier run has left there saves time and changes no bit.
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strop.columns import Columns
from strop.disk import unusable
from strop.engine.progress import Progress
from strop.engine.reference_cut import CutInto, Ints, MicroBatches, Wanted
from strop.engine.source import Cut, GroupSet, Part
from strop.plan.cutting import cut
from strop.policy.policy import Policy
from strop.policy.reference import micro_batch_logps
from strop.policy.reference_store import ReferenceStore
from strop.types import Group

log = logging.getLogger("strop")

NUM_VERIFIED = 4
"""Groups that are scored again before what was stored is believed."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Nats per token, in the mean over a group, that scoring it alone instead of in its micro-batch may change, by compute
dtype."""


class ReferenceLogps:
    """The log-probs of the scored tokens of some groups, in the order of the groups, in a file that has no name and is
    gone with the process. In memory stay 8 bytes per group, and as many again where `numbers` is not 0, 1, 2, ...

    Args:
        numbers: of the groups, each once. starts: [groups + 1] where the log-probs of each begin, in tokens.
        dtype: of the values. folder: on whose disk the file lies.

    Raises:
        CheckpointError: no file can be made in `folder`.
    """

    def __init__(self, numbers: Ints, starts: Ints, dtype: np.dtype[Any], folder: Path) -> None:
        self._starts, self._dtype, self._folder = starts, dtype, folder
        self._order: Ints | None = None
        if not np.array_equal(numbers, np.arange(len(numbers))):
            self._order = np.argsort(numbers)
            self._sorted = numbers[self._order]
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (stays open as long as this object)
        except OSError as error:
            raise unusable(folder, error) from error
        weakref.finalize(self, self._file.close)

    def write(self, placed: Iterable[tuple[int, NDArray[Any]]]) -> None:
        """Put values where they begin, in tokens.

        Raises:
            CheckpointError: the disk does not take them.
        """
        try:
            for start, values in placed:
                self._file.seek(start * self._dtype.itemsize)
                self._file.write(values.astype(self._dtype, copy=False).tobytes())
            self._file.flush()
        except OSError as error:
            raise unusable(self._folder, error) from error

    @cached_property
    def _mapped(self) -> NDArray[Any]:
        return np.memmap(self._file, self._dtype, mode="r", shape=(int(self._starts[-1]),))

    def values(self, indices: Sequence[int]) -> Tensor:
        """[scored tokens of these groups], group by group, completion by completion, token by token; on the CPU.

        Raises:
            KeyError: a group whose log-probs were not taken.
        """
        at = [self._place(i) for i in indices]
        return torch.from_numpy(np.concatenate([self._mapped[self._starts[n] : self._starts[n + 1]] for n in at]))

    def _place(self, number: int) -> int:
        if self._order is None:
            if not 0 <= number < len(self._starts) - 1:
                raise KeyError(number)
            return number
        at = int(np.searchsorted(self._sorted, number))
        if at == len(self._sorted) or self._sorted[at] != number:
            raise KeyError(number)
        return int(self._order[at])


def scored(
    reference: Policy,
    store: ReferenceStore | None,
    groups: GroupSet,
    cut_by: Cut,
    progress: Progress,
    folder: Path,
    indices: Sequence[int] | None = None,
    visits: Sequence[int] | None = None,
) -> GroupSet:
    """The set with the reference's log-probs of these groups and of these visits' further groups (default: all).

    folder: on whose disk they lie for the time of the run.
    """
    cut_into = partial(cut, budget=cut_by.budget_tokens, tokens=cut_by.tokens)
    numbers = range(len(groups.groups)) if indices is None else indices
    found = reference_logps_of(reference, store, groups.groups, numbers, cut_into, progress, folder)
    also = {
        name: scored(reference, store, others, cut_by, progress, folder, visits) for name, others in groups.also.items()
    }

    def ref_logps(part: Part) -> Columns:
        return Columns(per_token={"ref_logps": found.values(part)})

    return replace(groups, columns={**groups.columns, "ref_logps": ref_logps}, also=also)


def reference_logps_of(
    reference: Policy,
    store: ReferenceStore | None,
    groups: Sequence[Group],
    numbers: Sequence[int],
    cut_into: CutInto,
    progress: Progress,
    folder: Path,
) -> ReferenceLogps:
    """The log-probs of the groups of these numbers under the reference.

    They are a function of the model, of these groups in this order, and of `cut_into`: not of what the store has, and
    not of where a pass before this one was interrupted. A completion that stands at the same prompt in several groups
    is scored once.

    Args:
        store: where they are looked for and kept; None: they are scored.
        folder: on whose disk they lie for the time of the run.

    Raises:
        CheckpointError: this disk does not take them.
        ConfigError: the store must be written and cannot.
    """
    wanted = Wanted.of(groups, numbers)
    parts = MicroBatches.of(wanted, cut_into)
    dtype = np.dtype(np.float64 if reference.precision.master == torch.float64 else np.float32)
    results = ReferenceLogps(wanted.numbers, wanted.token_starts[wanted.starts], dtype, folder)
    done = np.zeros(len(parts), bool)
    if store is not None:
        _read(reference, store, groups, parts, results, done)
    missing = np.flatnonzero(~done).tolist()
    if not missing:
        return results
    task = progress.task("reference log-probs", sum(parts.num_tokens(n) for n in missing))
    with reference.scoring():
        for n in missing:
            logps, in_one = micro_batch_logps(reference, parts.groups(n, groups))
            values = logps.numpy()
            results.write(parts.places(n, values))
            if store is not None and in_one:  # halves have other bits, which another run may not get
                store.append(parts.key(n), values)
            task.step(n=parts.num_tokens(n))
    return results


def _read(
    reference: Policy,
    store: ReferenceStore,
    groups: Sequence[Group],
    parts: MicroBatches,
    results: ReferenceLogps,
    done: NDArray[np.bool_],
) -> None:
    """Take what the store has, and mark it as done. A few groups are scored again: if they are further off than
    rounding explains, the store is emptied, and it is said."""
    number_of = {parts.key(n): n for n in range(len(parts))}
    for key, values in store.read(number_of.keys()):
        n = number_of[key]
        results.write(parts.places(n, values))
        done[n] = True
    known = np.flatnonzero(done)
    if not len(known):
        return
    apart = 0.0
    some = {parts.key(n) for n in known[:: max(1, len(known) // NUM_VERIFIED)][:NUM_VERIFIED].tolist()}
    with reference.scoring():
        for key, values in store.read(some):
            first = parts.groups(number_of[key], groups)[0]
            live, _ = micro_batch_logps(reference, [first])
            apart = max(apart, float(np.abs(live.numpy() - values[: first.num_scored]).mean()))
    if not apart <= (tolerance := TOLERANCE[reference.precision.compute]):
        log.warning(
            "%s: stored reference log-probs are not those of the model: %.2g nats per token apart in a group, at most "
            "%.2g is rounding; the file is emptied and all are scored again",
            store.path,
            apart,
            tolerance,
        )
        store.clear()
        done[:] = False
        return
    num_read = sum(len(parts.completions(n)) for n in known.tolist())
    log.info(
        "reference log-probs of %d of %d completions were scored before: %s",
        num_read,
        parts.num_completions,
        store.path,
    )
