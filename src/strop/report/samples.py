"""samples.jsonl, read: what the model answered to the same prompts before training and at the end. Floor 2, no torch.

In: a run folder. Out: one `Sample` per prompt. Lines that are no such answers are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.durable import json_object
from strop.readable import is_number
from strop.runfiles import SAMPLES

NGRAM = 4
"""Words; in text without spaces twice as many characters."""
MOST_PROMPTS = 12
"""That are kept, the first ones."""
MOST_BYTES = 1 << 25
"""That are read at the beginning of the file, and at its end."""


@dataclass(frozen=True)
class Answer:
    """step: after which it was given; 0: before training. ended: whether it ended by itself; None: it is not said."""

    step: int
    text: str
    ended: bool | None
    score: float | None

    @property
    def repeated(self) -> float | None:
        """The share of its runs of `NGRAM` words that stand in it before; None where it is too short to repeat
        itself."""
        words = self.text.split()
        units: Sequence[str] = words if len(words) > 1 else self.text
        size = NGRAM if len(words) > 1 else 2 * NGRAM
        runs = [tuple(units[i : i + size]) for i in range(len(units) - size + 1)]
        return 1 - len(set(runs)) / len(runs) if len(runs) > size else None


@dataclass(frozen=True)
class Sample:
    """A prompt with its first and its last answer; they are one where there is only one."""

    prompt: str
    where: str
    first: Answer
    last: Answer


def read_samples(folder: Path) -> tuple[Sample, ...]:
    """The samples of a run; none where it has none.

    Raises:
        OSError: the file cannot be read.
    """
    path = folder / SAMPLES
    if not path.is_file():
        return ()
    found: dict[int, tuple[Mapping[str, Any], Answer, Answer]] = {}
    for line in _lines(path):
        number, step, text = (line.get(name) for name in ("prompt_number", "step", "completion"))
        if not (isinstance(number, int) and isinstance(step, int) and isinstance(text, str)):
            continue
        if number not in found and len(found) >= MOST_PROMPTS:
            continue
        ended, score = line.get("ended"), line.get("score")
        answer = Answer(step, text, ended if isinstance(ended, bool) else None, score if is_number(score) else None)
        about, first, last = found.get(number, (line, answer, answer))
        found[number] = (about, min(first, answer, key=_step), max(last, answer, key=_step))
    return tuple(
        Sample(str(about.get("prompt", "")), str(about.get("where", "")), first, last)
        for _, (about, first, last) in sorted(found.items())
    )


def _step(answer: Answer) -> int:
    return answer.step


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of the file; of a very long one, those at its beginning and end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        read = file.read(MOST_BYTES)
        if size > MOST_BYTES:
            file.seek(max(MOST_BYTES, size - MOST_BYTES))
            read += b"\n" + file.read(MOST_BYTES)
    yield from (line for raw in read.splitlines() if (line := json_object(raw)) is not None)
