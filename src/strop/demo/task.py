"""The demo's task: sort a shopping list. Who demonstrates it, what is preferred, and how an answer is checked. Floor 9.

In: a seed. Out: files of demonstrations, of preference pairs, of questions with their answers, and of held-out prompts.

Demonstrators know how to sort, but most of them rush when a list is long: they put the first three items in order and
leave the rest as it stood. SFT learns the form, the skill and the rush. The preference pairs put the sorted list above
the rushed one, and DPO carries that over to lists that stand in no file. What is still wrong is mostly long lists; the
questions are such lists, and their answers are there to check by.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from strop.durable import published

# fmt: off
ITEMS = (
    "apples", "bananas", "beans", "bread", "butter", "carrots", "cheese", "coffee", "eggs", "fish", "flour", "garlic",
    "grapes", "honey", "jam", "lemons", "milk", "oats", "onions", "pasta", "peas", "rice", "salt", "soup", "tea",
    "yogurt",
)
# fmt: on
NUM_ITEMS = range(3, 7)
"""How long the lists are."""
LONG = (5, 6)
"""How long the lists are that answers are sampled for."""
SORTED_BY_RUSH = 3
"""A demonstrator in a rush puts this many items in order."""
RUSH = 2 / 3
"""Share of the demonstrations that are made in a rush."""
ASK = "Sort:"

Items = tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """How much the demo does. The defaults are what `strop demo` runs: a minute or two on two cores."""

    num_demonstrations: int = 10_000
    num_pairs: int = 2_000
    num_questions: int = 1_920
    num_validation: int = 200
    num_heldout_per_length: int = 100
    sft_epochs: int = 4


def in_rush(items: Items) -> Items:
    """The answer of somebody who stops sorting after the first few items."""
    return (*sorted(items[:SORTED_BY_RUSH]), *items[SORTED_BY_RUSH:])


def shopping_lists(rng: random.Random, avoid: set[frozenset[str]]) -> Iterator[Items]:
    """Lists without end, no two alike, none with the same items as one in `avoid`."""
    seen: set[Items] = set()
    while True:
        items = tuple(rng.sample(ITEMS, rng.choice(NUM_ITEMS)))
        if items not in seen and frozenset(items) not in avoid:
            seen.add(items)
            yield items


def heldout_lists(rng: random.Random, num_per_length: int) -> list[Items]:
    """The same number of lists of each length, no two with the same items."""
    found: dict[frozenset[str], Items] = {}
    for length in NUM_ITEMS:
        goal = len(found) + num_per_length
        while len(found) < goal:
            items = tuple(rng.sample(ITEMS, length))
            found.setdefault(frozenset(items), items)
    return list(found.values())


def prompt_of(items: Iterable[str]) -> list[dict[str, str]]:
    """The question, as messages."""
    return [{"role": "user", "content": f"{ASK} {' '.join(items)}"}]


def completion_of(items: Iterable[str]) -> list[dict[str, str]]:
    """`items` in this order as an answer, as messages."""
    return [{"role": "assistant", "content": " ".join(items)}]


def write_data(folder: Path, seed: int, size: Size) -> tuple[list[Items], Path]:
    """Write demonstrations, pairs, questions and held-out prompts: all of them or none, in place of those of an
    earlier demo.

    Returns:
        The held-out lists and their file.
    """
    rng = random.Random(seed)
    heldout = heldout_lists(rng, size.num_heldout_per_length)
    lists = shopping_lists(rng, avoid={frozenset(items) for items in heldout})

    def demonstration() -> dict[str, Any]:
        items = next(lists)
        shown = in_rush(items) if rng.random() < RUSH else sorted(items)
        return {"messages": prompt_of(items) + completion_of(shown)}

    def pair() -> dict[str, Any]:
        items = next(i for i in lists if in_rush(i) != tuple(sorted(i)))
        return {
            "prompt": prompt_of(items),
            "chosen": completion_of(sorted(items)),
            "rejected": completion_of(in_rush(items)),
        }

    def question(items: Items) -> dict[str, Any]:
        right = sorted(items)
        return {"prompt": prompt_of(items), "completion": completion_of(right), "answer": " ".join(right)}

    with published(folder, replaces=True) as new:
        for name, row, num_train in (("sft", demonstration, size.num_demonstrations), ("dpo", pair, size.num_pairs)):
            _write_jsonl(new / f"{name}.train.jsonl", [row() for _ in range(num_train)])
            _write_jsonl(new / f"{name}.val.jsonl", [row() for _ in range(size.num_validation)])
        long = islice((items for items in lists if len(items) in LONG), size.num_questions)
        _write_jsonl(new / "grpo.train.jsonl", [question(items) for items in long])
        tests = [{"prompt": prompt_of(items), "answer": " ".join(sorted(items))} for items in heldout]
        _write_jsonl(new / "heldout.jsonl", tests)
    return heldout, folder / "heldout.jsonl"


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def accuracy(heldout: Sequence[Items], answers: Sequence[str]) -> float:
    """Share of the lists that were answered sorted and whole, in [0, 1]."""
    return sum(is_right(items, given) for items, given in zip(heldout, answers, strict=True)) / len(heldout)


def is_right(items: Items, given: str) -> bool:
    """Whether `given` is the sorted list, whole and nothing else."""
    return given.split() == sorted(items)
