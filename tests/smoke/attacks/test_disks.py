"""Disks that fill up at any write, in the final export too: the run can be resumed once there is room again."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import strop
from smoke.attacks.trials import TRAINED, Tally, few_or, outcome
from strop import durable
from strop.policy.policy import Policy

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@few_or(200, few=2)
def test_full_disks(num: int, record_property: Any, runs: Any, watched: pytest.MonkeyPatch) -> None:
    unbroken, tally = runs(TRAINED), Tally("full disks", record_property)
    for seed in range(num):
        rng = random.Random(seed)
        config = runs.config(TRAINED)
        in_export = seed % 4 == 0
        with full_disk(watched, rng, in_export=in_export):
            took = outcome(partial(strop.train, config))
        if took != "done":
            assert outcome(partial(strop.train, config, resume="auto")) == "done", (seed, took)
        run = runs.at(Path(config.training.output_dir) / "run")
        assert runs.same(run.final, unbroken.final), seed
        shutil.rmtree(config.training.output_dir)
        tally.add(f"{'in the export' if in_export else 'anywhere'}: {took}")
    tally.tell(num)


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, rng: random.Random, *, in_export: bool) -> Iterator[None]:
    """From one write on, for some writes; and perhaps in what transformers writes itself.

    in_export: the disk has room until the final model is written.
    """
    first = rng.randrange(1 if in_export else 60)
    last = first + rng.choice((1, 5, 1000))
    write, save, count = durable.write_all, Policy.save_pretrained, 0
    counts = not in_export

    def written(fd: int, view: memoryview) -> None:
        nonlocal count
        count += counts
        if counts and first <= count - 1 < last:
            write(fd, view[: len(view) // 2])
            raise FULL
        write(fd, view)

    def saved(self: Policy, *arguments: Any, **named: Any) -> None:
        nonlocal counts
        counts = True
        if rng.random() < (0.6 if in_export else 0.3):
            raise rng.choice((FULL, Exception("No space left on device (os error 28)")))
        save(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_all", written)
        patch.setattr(Policy, "save_pretrained", saved)
        yield
