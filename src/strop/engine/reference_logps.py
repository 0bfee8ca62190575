"""The reference log-probs of a run: read from the store or scored, and written to one memory-mapped file. Floor 3.

In: groups and their numbers. Out: `ReferenceLogps`, which returns the log-probs of any of these groups.

The last bits of a log-prob depend on the micro-batch in which it was scored. So all completions that the run wants are
cut into micro-batches as if nothing were stored, and the store keeps whole micro-batches under a hash of their content.
What an earlier run stored saves time and does not change a bit.
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strop.columns import Columns
from strop.disk import unusable
from strop.engine.progress import Progress
from strop.engine.reference_cut import CutInto, Ints, ReferenceCut, Wanted
from strop.engine.step import ALONE
from strop.engine.step_source import Cut, GroupSet, Part
from strop.plan.cutting import cut
from strop.policy.group_logps import micro_batch_logps
from strop.policy.policy import Policy
from strop.policy.reference_store import ReferenceStore
from strop.types import Group
from strop.world import World

log = logging.getLogger("strop")

AT_ONCE = 8
"""Micro-batches that each of several processes scores before they exchange the log-probs."""
STORED_AT_ONCE = 256
"""Micro-batches whose log-probs rank 0 gives to the others at once."""
NUM_VERIFIED = 4
"""Groups that are scored again to check the store before it is used."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
"""How far the mean log-prob per token of a group, in nats, may change when it is scored alone instead of in its
micro-batch, by compute dtype."""


class ReferenceLogps:
    """The log-probs of the scored tokens of some groups, in a file without a name that vanishes with the process.

    Memory: 8 bytes per group, twice that if `numbers` is not 0, 1, 2, ...

    Args:
        numbers: those of the groups, each once.
        starts: [groups + 1] where the log-probs of each group begin, in tokens.
        dtype: of the values.
        folder: a folder on the disk that takes the file.

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
            self._file.truncate(int(starts[-1]) * dtype.itemsize)  # so that it can be mapped before all is written
        except OSError as error:
            raise unusable(folder, error) from error
        weakref.finalize(self, self._file.close)

    def write(self, placed: Iterable[tuple[int, NDArray[Any]]]) -> None:
        """Writes values, each array at its place, which is counted in tokens.

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
        """[scored tokens of these groups], ordered by group, completion and token, on the CPU.

        Raises:
            KeyError: a group that was not scored.
        """
        at = [self._place(i) for i in indices]
        return torch.from_numpy(np.concatenate([self._mapped[self._starts[n] : self._starts[n + 1]] for n in at]))

    def joined(self, spans: Iterable[tuple[int, int]]) -> NDArray[Any]:
        """The values of these spans of tokens, one span after the other. A span is (start, stop)."""
        return np.concatenate([self._mapped[start:stop] for start, stop in spans])

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
    world: World,
    indices: Sequence[int] | np.ndarray | None = None,
    visits: np.ndarray | None = None,
) -> GroupSet:
    """The groups with a column `ref_logps`: the log-probs of the reference.

    Args:
        store: where log-probs are looked up and kept; None: all are scored.
        cut_by: how scoring is cut into micro-batches.
        folder: a folder on the disk that holds the log-probs during the run.
        indices: which groups to score; None: all.
        visits: which of the further groups (`also`) to score; None: all.
    """
    cut_into = partial(cut, budget=cut_by.budget_tokens, tokens=cut_by.tokens)
    numbers = range(len(groups.groups)) if indices is None else indices
    found = reference_logps_of(reference, store, groups.groups, numbers, cut_into, progress, folder, world)
    also = {
        name: scored(reference, store, others, cut_by, progress, folder, world, visits)
        for name, others in groups.also.items()
    }

    def ref_logps(part: Part) -> Columns:
        return Columns(per_token={"ref_logps": found.values(part)})

    return replace(groups, columns={**groups.columns, "ref_logps": ref_logps}, also=also)


def reference_logps_of(
    reference: Policy,
    store: ReferenceStore | None,
    groups: Sequence[Group],
    numbers: Sequence[int] | np.ndarray,
    cut_into: CutInto,
    progress: Progress,
    folder: Path,
    world: World = ALONE,
) -> ReferenceLogps:
    """The log-probs under the reference of the groups with these numbers.

    The result depends on the model, on these groups in this order and on `cut_into`, but not on the content of the
    store, nor on where an earlier pass was interrupted. Equal completions of equal prompts are scored once. Each
    process scores a share of the micro-batches, and all of them return all log-probs.

    Args:
        store: where rank 0 looks log-probs up and keeps them; None: all are scored.
        folder: a folder on the disk that holds the log-probs during the run.

    Raises:
        CheckpointError: the disk does not take them.
        ConfigError: the store has to be written and cannot be.
    """
    wanted = Wanted.of(groups, numbers)
    parts = ReferenceCut.of(wanted, cut_into)
    dtype = np.dtype(np.float64 if reference.precision.master == torch.float64 else np.float32)
    results = ReferenceLogps(wanted.numbers, wanted.token_starts[wanted.starts], dtype, folder)
    done = np.zeros(len(parts), bool)
    if store is not None:
        _read(reference, store, groups, parts, results, done)
    if world.size > 1:
        done = _share(parts, results, done, world)
    missing = np.flatnonzero(~done).tolist()
    if not missing:
        return results
    task = progress.task("reference log-probs", sum(parts.num_tokens(n) for n in missing))
    at_once = world.size * (AT_ONCE if world.size > 1 else 1)
    with reference.scoring():
        for begin in range(0, len(missing), at_once):
            own, together = [], missing[begin : begin + at_once]
            with reference.strategy.passes():
                for n in world.own_share(together):
                    logps, in_one = micro_batch_logps(reference, parts.groups(n, groups))
                    own.append((n, logps.numpy(), in_one))
                for _ in range(-(-len(together) // world.size) - len(own)):
                    reference.strategy.idle(False)
            for n, values, in_one in chain(*world.gather(own)):
                results.write(parts.places(n, values))
                if store is not None and in_one:  # one that had to be halved has other bits, which no other run may get
                    store.append(parts.key(n), values)
                task.step(n=parts.num_tokens(n))
    return results


def _share(parts: ReferenceCut, results: ReferenceLogps, done: NDArray[np.bool_], world: World) -> NDArray[np.bool_]:
    """Gives the log-probs that rank 0 has to all processes. Returns which micro-batches are done then, for all.

    done: which micro-batches this process has.
    """
    done = world.on_main(lambda: done)
    known = np.flatnonzero(done).tolist()
    for begin in range(0, len(known), STORED_AT_ONCE):
        some = known[begin : begin + STORED_AT_ONCE]
        values = world.on_main(partial(_values, results, parts, some))
        if not world.is_main:
            for n, logps in zip(some, values, strict=True):
                results.write(parts.places(n, logps))
    return done


def _values(results: ReferenceLogps, parts: ReferenceCut, numbers: Iterable[int]) -> list[NDArray[Any]]:
    """The log-probs of the micro-batches with these numbers."""
    return [results.joined(parts.spans(n)) for n in numbers]


def _read(
    reference: Policy,
    store: ReferenceStore,
    groups: Sequence[Group],
    parts: ReferenceCut,
    results: ReferenceLogps,
    done: NDArray[np.bool_],
) -> None:
    """Takes what the store has, and marks it as done. A few groups are scored again as a check: if they differ by more
    than rounding, the store is emptied, with a warning."""
    number_of = {parts.key(n): n for n in range(len(parts))}
    for key, values in store.read(number_of.keys()):
        n = number_of[key]
        results.write(parts.places(n, values))
        done[n] = True
    known = np.flatnonzero(done)
    if not len(known):
        return
    difference = 0.0  # nats per token
    with reference.scoring():
        for n in known[:: max(1, len(known) // NUM_VERIFIED)][:NUM_VERIFIED].tolist():
            first = parts.groups(n, groups)[0]
            live, _ = micro_batch_logps(reference, [first])
            stored = results.joined(parts.spans(n)[: len(first.completions)])
            difference = max(difference, float(np.abs(live.numpy() - stored).mean()))
    if not difference <= (tolerance := TOLERANCE[reference.precision.compute]):
        log.warning(
            "%s: stored reference log-probs are not those of the model: they differ by %.2g nats per token in a group, "
            "and rounding explains at most %.2g; the file is emptied and all are scored again",
            store.path,
            difference,
            tolerance,
        )
        store.clear()
        done[:] = False
        return
    num_read = sum(len(parts.completions(n)) for n in known.tolist())
    log.info(
        "reference log-probs of %d of %d completions are taken from the store: %s",
        num_read,
        parts.num_completions,
        store.path,
    )
