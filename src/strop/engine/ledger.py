"""The ledger: one line per optimizer step that says exactly what the step was. Floor 3.

In: a `StepRecord`. Out: a line of ledger.jsonl, by which `strop replay` checks a step that it takes again, and by which
`strop compare` finds the first step where two runs part. Numbers are written with all their digits.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from strop.engine.step_records import StepRecord
from strop.types import Group

HASH_BYTES = 6
"""Of a row: two different rows of a million have the same hash with a probability of 0.2 %."""


def ledger_line(record: StepRecord) -> dict[str, Any]:
    """The line of a step. docs/run-folder.md explains the fields."""
    return {
        "step": record.step,
        "epoch": record.epoch,
        "rows": list(record.rows),
        "cut": [list(part) for part in record.cut],
        "budget_tokens": record.budget_tokens,
        "seed": list(record.seed),
        "learning_rate": record.learning_rate,
        "weights": record.weights,
        "loss": record.loss,
        "terms": dict(record.terms),
        "grad_norm": record.grad_norm,
        "clipped": record.clipped,
        "skipped": record.skipped,
        "scored_tokens": record.num_scored_tokens,
    }


def row_hash(group: Group) -> str:
    """A hash of all that a group gives to training: its tokens, which of them are trained, label and numbers. Where it
    was read from is left out, so the same row has the same hash in another file."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)

    def add(part: bytes) -> None:
        digest.update(struct.pack("<q", len(part)))  # so that no byte can move from one part to the next
        digest.update(part)

    add(_ids(group.prompt_ids))
    for completion in group.completions:
        add(_ids(completion.ids))
        add(bytes(completion.loss_mask))
    add(b"" if group.label is None else bytes([group.label]))
    for name in sorted(group.numbers):
        add(name.encode())
        add(bytes(group.numbers[name]))
    return digest.hexdigest()


def _ids(ids: Sequence[int]) -> bytes:
    """Token ids as bytes, which do not depend on how wide the integers of the array are."""
    return np.asarray(ids).astype("<i8").tobytes()
