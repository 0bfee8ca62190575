"""What runs read, healthy and broken.

The words of a chosen answer come from one half of the vocabulary more often than those of a rejected one, so there is
something to learn, and it cannot be learnt wholly. A function of both splits draws the training rows first; the same
seed gives the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

WORDS = [f"w{i}" for i in range(60)]
NUM_TRAIN, NUM_EVAL = 320, 160
Rows = list[dict[str, Any]]
Splits = tuple[Rows, Rows]
"""The rows of training, and those of the evaluations."""
Draw = random.Random


def pair(draw: Draw, length: int | None = None, bias: float = 0.65) -> dict[str, str]:
    """A prompt and two answers; `bias` of the chosen words, and 1 - `bias` of the rejected, are of the first half."""
    half = len(WORDS) // 2
    prompt = " ".join(draw.choices(WORDS, k=draw.randint(3, 9)))

    def answer(share: float) -> str:
        count = length or draw.randint(6, 12)
        return "".join(f" {draw.choice(WORDS[:half] if draw.random() < share else WORDS[half:])}" for _ in range(count))

    return {"prompt": prompt, "chosen": answer(bias), "rejected": answer(1 - bias)}


def pairs(draw: Draw, count: int = NUM_TRAIN) -> Rows:
    return [pair(draw) for _ in range(count)]


def turned(rows: Rows) -> Rows:
    """Chosen and rejected exchanged."""
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


# -- what a method reads ---------------------------------------------------------------------------------------------


def as_sft(rows: Rows) -> Rows:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def as_kto(rows: Rows) -> Rows:
    """The sides that there are of a pair, with their labels."""
    sides = (("chosen", True), ("rejected", False))
    return [
        {"prompt": r["prompt"], "completion": r[side], "label": label}
        for r in rows
        for side, label in sides
        if side in r
    ]


def as_prompts(rows: Rows) -> Rows:
    """Prompts alone, with a column that says which reward they have (see `quality`)."""
    return [{"prompt": row["prompt"], "paid_otherwise": row.get("paid_otherwise", False)} for row in rows]


AS_READ: Mapping[str, Callable[[Rows], Rows]] = {"sft": as_sft, "distill": as_sft, "kto": as_kto}
"""By method; the others read pairs."""


# -- both splits -----------------------------------------------------------------------------------------------------


def healthy(draw: Draw, num_train: int = NUM_TRAIN, num_held: int = NUM_EVAL) -> Splits:
    return pairs(draw, num_train), pairs(draw, num_held)


def _told_apart(draw: Draw, count: int) -> Rows:
    return [pair(draw, bias=1.0) for _ in range(count)]


def told_apart(draw: Draw) -> Splits:
    """A look at any word tells the sides apart."""
    return _told_apart(draw, NUM_TRAIN), _told_apart(draw, NUM_EVAL)


def told_apart_otherwise(draw: Draw) -> Splits:
    """The same, but that the sides of the evaluation are exchanged."""
    train, held = told_apart(draw)
    return train, turned(held)


def exchanged(draw: Draw, num_held: int = NUM_EVAL) -> Splits:
    """Chosen and rejected are exchanged in training."""
    train, held = healthy(draw, num_held=num_held)
    return turned(train), held


def exchanged_at_random(draw: Draw) -> Splits:
    train = [row if draw.random() < 0.5 else turned([row])[0] for row in pairs(draw)]
    return train, pairs(draw, NUM_EVAL)


def both_ways(draw: Draw) -> Splits:
    """Every training pair in both orders."""
    rows = pairs(draw, NUM_TRAIN // 2)
    return rows + turned(rows), pairs(draw, NUM_EVAL)


def nearly_both_ways(draw: Draw) -> Splits:
    """The same, but that prompts differ by one word, so that no row contradicts another to the letter."""
    rows = pairs(draw, NUM_TRAIN // 2)
    others = [{**row, "prompt": f"{row['prompt']} {draw.choice(WORDS)}"} for row in turned(rows)]
    return rows + others, pairs(draw, NUM_EVAL)


def same_behind_the_cut(draw: Draw) -> Splits:
    """Most training pairs differ behind the 16th token only."""
    rows = [pair(draw, length=24) for _ in range(NUM_TRAIN - 60)]
    train = [{**row, "rejected": f"{row['chosen']} {draw.choice(WORDS)}"} for row in rows] + pairs(draw, 60)
    return train, pairs(draw, NUM_EVAL)


def long_answers(draw: Draw) -> Splits:
    """Training answers of 24 words."""
    return [pair(draw, length=24) for _ in range(NUM_TRAIN)], pairs(draw, NUM_EVAL)


def longer_is_chosen(draw: Draw) -> Splits:
    """The sides of a training pair differ by their length alone."""
    rows = [pair(draw, length=8, bias=0.5) for _ in range(NUM_TRAIN)]
    train = [{**row, "chosen": f"{row['chosen']} {draw.choice(WORDS)} {draw.choice(WORDS)}"} for row in rows]
    return train, pairs(draw, NUM_EVAL)


def leaked(draw: Draw) -> Splits:
    """The evaluation's rows are trained on."""
    train = pairs(draw)
    return train, train[:NUM_EVAL]


def four_times(draw: Draw) -> Splits:
    """Half of the training rows stand there four times."""
    some = pairs(draw, 40)
    return pairs(draw, NUM_TRAIN - 160) + some * 4, pairs(draw, NUM_EVAL)


def one_row(draw: Draw) -> Splits:
    """Half of the training rows are the same one."""
    row = pair(draw)
    return [row] * (NUM_TRAIN // 2) + pairs(draw, NUM_TRAIN // 2), pairs(draw, NUM_EVAL)


def _same_answer(draw: Draw, others: int = 0) -> Rows:
    """One answer to all prompts, but for `others` of them."""
    rows, answer = pairs(draw), " ".join(WORDS[:8])
    return [row if i < others else {**row, "chosen": f" {answer}"} for i, row in enumerate(rows)]


def few_unlike(draw: Draw) -> Splits:
    """One answer to everything, but for six of the training rows."""
    return _same_answer(draw, others=6), _same_answer(draw)[:NUM_EVAL]


def one_word(draw: Draw) -> Splits:
    """The chosen answer is one word, again and again."""
    train, held = healthy(draw)
    return [{**row, "chosen": " w7" * 12} for row in train], [{**row, "chosen": " w7" * 12} for row in held]


def one_side(draw: Draw) -> Splits:
    """Training rows have no rejected side."""
    train, held = healthy(draw)
    return [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in train], held


def one_side_mostly(draw: Draw) -> Splits:
    """Two thirds of the training pairs have no rejected side."""
    rows = pairs(draw, 3 * NUM_TRAIN)
    train = [{k: v for k, v in row.items() if i % 3 == 0 or k != "rejected"} for i, row in enumerate(rows)]
    return train, pairs(draw, NUM_EVAL)


def _as_chat(rows: Rows) -> Rows:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text.strip()}]

    return [
        {"prompt": turn("user", r["prompt"]), **{side: turn("assistant", r[side]) for side in ("chosen", "rejected")}}
        for r in rows
    ]


def chats(draw: Draw) -> Splits:
    """Healthy rows as messages."""
    train, held = healthy(draw)
    return _as_chat(train), _as_chat(held)


def _paid_otherwise(rows: Rows) -> Rows:
    return [{**row, "paid_otherwise": True} for row in rows]


def paid_otherwise(draw: Draw) -> Splits:
    """Prompts of the training have another reward than those of the evaluation (see `quality`)."""
    train, held = healthy(draw)
    return _paid_otherwise(train), held


def all_paid_otherwise(draw: Draw) -> Splits:
    """All prompts have another reward than healthy runs."""
    train, held = healthy(draw)
    return _paid_otherwise(train), _paid_otherwise(held)
