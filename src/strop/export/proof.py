"""The proof that two models are one: layers, logits and greedy texts side by side. Floor 6.

Rounding is all that may part a merged model from its adapter, and how much rounding moves depends on the model. So it
is measured: the merged model once more, with every weight moved by a few roundings of the dtype that it is stored in,
in a random direction. What lies further away than that is another model.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from strop.errors import ModelError
from strop.export.merged_weights import plain_name
from strop.policy.model.task import is_reward_model

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue.",
    "List three uses of a brick.",
    "2 + 2 =",
    "Translate into German: Good morning.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "def fibonacci(n):",
    "The weather tomorrow will be",
    "Summarise: The cat sat on the mat.",
    "Is 17 a prime number?",
    "Name a country in Africa.",
    "How do I boil an egg?",
    "Once upon a time",
    "What is the opposite of hot?",
    "Complete: roses are red,",
    "Tell me a joke.",
    "SELECT name FROM users WHERE",
    "In one word, how do you feel?",
)
NEW_TOKENS = 24
ROUNDINGS = 4
"""By how many roundings of the stored dtype every weight is moved, to see what rounding may do."""
SUMS = 64
"""The same for roundings of float32, of which every sum makes some."""
TIE = 8
"""Two tokens are as good as one another where their logits differ by less than this many times what rounding moves."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model answers. texts: the tokens that it goes on with greedily, one list per prompt. logits: [tokens,
    vocabulary] in float32 on the CPU, one tensor per prompt, at the tokens that predict its continuation."""

    texts: Sequence[Sequence[int]]
    logits: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison. found, allowed: the difference, and how large rounding may make it; None where there is no such
    number. holds: whether the difference is allowed."""

    what: str
    found: float | None
    allowed: float | None
    holds: bool
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        shown = ["" if number is None else f"{number:.3g}" for number in (self.found, self.allowed)]
        return (self.what, *shown, "yes" if self.holds else "NO", self.note)


@dataclass(frozen=True)
class Proof:
    """lines: all comparisons. moved: how far the adapter moves logits, as a root mean square. rounded: how far the
    merge moves them from those of the adapter's model."""

    lines: Sequence[Line]
    moved: float
    rounded: float

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines if not line.holds]

    def table(self) -> str:
        """The table as Markdown."""
        rows = [("compared", "differs by", "rounding may do", "holds", "note"), ("---",) * 5]
        return "".join("| " + " | ".join(row) + " |\n" for row in [*rows, *(line.cells() for line in self.lines)])


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], rows: int) -> list[list[int]]:
    """Prompts as a user of the model would give them: as a chat where it has a template. rows: of the embedding."""
    found = []
    for text in prompts:
        ids: list[int]
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(text)["input_ids"]
        found.append([token for token in ids if token < rows] or [0])
    return found


@torch.no_grad()
def greedy(model: nn.Module, prompts: Sequence[Sequence[int]], num_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """So many tokens after each prompt, the likeliest each time; end tokens are tokens like all others.

    Every step reads the whole texts again, padded at their ends, which no earlier token sees: that is right for any
    architecture, and costs short texts little. Empty for a reward model, which writes none.
    """
    if is_reward_model(model):
        return []
    ends = torch.tensor([len(prompt) for prompt in prompts])
    rows, each = _padded(prompts, num_tokens), torch.arange(len(prompts))
    for step in range(num_tokens):
        logits = model(input_ids=rows[:, : int(ends.max()) + step], use_cache=False).logits
        rows[each, ends + step] = logits[each, ends + step - 1].argmax(-1)
    return [row[len(prompt) :][:num_tokens] for prompt, row in zip(prompts, rows.tolist(), strict=True)]


@torch.no_grad()
def logits_of(model: nn.Module, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits by which each continuation would be chosen; of a reward model, the reward of each prompt, [1, 1]."""
    if is_reward_model(model):
        return [model(input_ids=torch.tensor([prompt]), use_cache=False).logits.float() for prompt in prompts]
    rows = _padded([[*prompt, *text[:-1]] for prompt, text in zip(prompts, texts, strict=True)])
    logits = model(input_ids=rows, use_cache=False).logits
    return [
        logits[i, len(prompt) - 1 : len(prompt) - 1 + len(text)].float()
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


def _padded(rows: Sequence[Sequence[int]], more: int = 0) -> Tensor:
    """[rows, the longest + more], filled up at their ends."""
    width = max(map(len, rows)) + more
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


@torch.no_grad()
def move_weights(model: nn.Module, stored: torch.dtype) -> None:
    """Move every weight by what rounding may, up or down at random."""
    share, random = rounding(stored), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.is_floating_point():
            signs = torch.randint(0, 2, weight.shape, generator=random, dtype=torch.int8)
            weight.add_(weight * share * (signs * 2 - 1))


def rounding(stored: torch.dtype) -> float:
    """What rounding may move a weight by, as a share of it."""
    return max(ROUNDINGS * torch.finfo(stored).eps / 2, SUMS * torch.finfo(torch.float32).eps / 2)


def compare_layers(
    merged: nn.Module, products: Mapping[str, tuple[Tensor, Tensor]], stored: torch.dtype
) -> Iterator[Line]:
    """Every merged layer by itself, against what the layer with its adapter made of the same rows.

    Args:
        products: as `adapted.linear_products` gives them.
    """
    parts = {plain_name(name): part for name, part in merged.named_modules()}
    errors: dict[str, tuple[float, float]] = {}
    for name, (rows, expected) in products.items():
        part = parts[name]
        with torch.no_grad():
            weight = part.weight.float().T if not isinstance(part, Conv1D) else part.weight.float()
            found = rows @ weight
            if part.bias is not None:
                found = found + part.bias.float()
            # of independent roundings of all weights
            noise = _rms((rows.square() @ weight.square()).sqrt()) * rounding(stored)
        errors[name] = _rms(found - expected), noise
    if not errors:
        return
    num_bad = sum(not error <= noise for error, noise in errors.values())  # NaN is no number that holds
    worst = max(errors, key=lambda name: _share(*errors[name]))
    note = f"{num_bad} do not" if num_bad else ""
    yield Line(f"layers ({len(errors)}); the worst: {worst}", *errors[worst], num_bad == 0, note)


def _share(error: float, noise: float) -> float:
    """Of what rounding may do; NaN is the worst of all."""
    return math.inf if math.isnan(error) or math.isnan(noise) else error / max(noise, sys.float_info.min)


def compare_answers(adapter: Answers, merged: Answers, moved: Sequence[Tensor]) -> Iterator[Line]:
    """Logits and texts of a merged model against those of the adapter's.

    Args:
        moved: logits of the merged model with moved weights.
    """
    allowed, found = distance(moved, merged.logits), distance(adapter.logits, merged.logits)
    num_tokens = sum(len(row) for row in adapter.logits)
    what = f"logits at {num_tokens} tokens" if adapter.texts else f"rewards of {num_tokens} prompts"
    yield Line(f"{what} (root mean square)", found, allowed, found <= allowed)
    if not adapter.texts:
        return
    same, ties, apart = 0, 0, 0.0
    for ours, theirs, logits in zip(adapter.texts, merged.texts, adapter.logits, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if at is None:
            same += 1
            continue
        gap = float(logits[at, ours[at]] - logits[at, theirs[at]])
        ties += gap <= TIE * allowed
        apart = max(apart, gap)
    total = len(adapter.texts)
    note = f"{ties} part where two tokens are equally likely" if ties else ""
    yield Line(
        f"greedy texts: {same} of {total} equal",
        apart if same < total else None,
        TIE * allowed,
        same + ties == total,
        note,
    )


def distance(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """Root mean square of the differences of logits."""
    return _rms(torch.cat([a - b for a, b in zip(one, two, strict=True)]))


def _rms(numbers: Tensor) -> float:
    return float(numbers.double().square().mean().sqrt())


def refuse(proof: Proof, where: str) -> None:
    """Raises ModelError where the merged model is not the adapter's."""
    if proof.failed:
        line = proof.failed[0]
        raise ModelError(
            f"the merged model is not the model with its adapter: {line.what} {line.note}".rstrip()
            + f"; differs by {line.found:.3g}, rounding explains {line.allowed:.3g}",
            where=where,
            expected="the same layers, logits and texts but for rounding",
            fix="nothing was written, and the adapter is as it was; merge with peft, and tell what model this is",
        )
