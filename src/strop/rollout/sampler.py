"""Prompts to groups of completions: the policy decodes for itself, with the weights that train. Floor 4.

A prompt is fed once. Its completions then decode together over one cache, and those that are done leave it. What is
drawn for a completion depends on (seed, step, prompt, index) and the weights only: the other prompts, the batches and
the number of processes change nothing but the rounding of a forward pass.

Logits are made as in the training forward: by the body, the head at the last position, and the policy's transform,
temperature included. So the recorded log-probs are those that training computes, up to rounding.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from strop.errors import ConfigError, TrainingError
from strop.policy.memory_attempts import attempt
from strop.policy.policy import Policy
from strop.rollout.drawing import FROM_ALL, Drawing, uniforms
from strop.rollout.stop_texts import StopTexts

logger = logging.getLogger("strop")

LEAVE = 0.75
"""Finished rows leave the cache once at most this share of its rows is still decoding; before that, copying the cache
costs more than carrying them along."""

PADDABLE = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers that a mask hides padding from. Prompts of other models decode with prompts of their own length."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """number: of the prompt among all prompts. room: tokens that a completion has at most."""

    number: int
    ids: Sequence[int]
    room: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """A completion: ids with the end token, the natural log-prob of each; whether it came to an end, by an end token or
    a stop text; the sum of the entropies of the distributions that its tokens were drawn from, in nats, where known."""

    ids: array[int]
    logps: array[float]
    ended: bool
    entropy: float | None = None


class Sampler:
    """Samples `num_completions` completions of each prompt.

    Args:
        ends: ids of the tokens that end a completion. stops: texts that end one, too.
        batch_tokens: prompts and completions that are decoded together at most; fewer, for good, if memory does not
            suffice.
    """

    def __init__(
        self,
        policy: Policy,
        num_completions: int,
        ends: Sequence[int],
        *,
        stops: StopTexts | None = None,
        drawing: Drawing = FROM_ALL,
        seed: int = 0,
        batch_tokens: int = 32_768,
    ) -> None:
        if not ends and stops is None:
            raise ConfigError(
                "nothing ends a completion: the model has no end token",
                expected="an EOS token in the tokenizer or in generation_config.json",
                fix="add it, or set rollout.stop or rollout.stop_token_ids",
            )
        self._policy, self._num, self._drawing, self._seed = policy, num_completions, drawing, seed
        self._ends, self._stops = frozenset(ends), stops
        self._batch_tokens = batch_tokens

    def prepare(self) -> Callable[[], None]:
        """There is nothing to do: the weights are those of the policy, whenever it samples."""
        return lambda: None

    def sample(self, step: int, prompts: Sequence[Prompt]) -> list[list[Sampled]]:
        """The completions of each prompt, in the order of the prompts.

        Raises:
            TrainingError: the logits are not finite, or memory does not suffice for one prompt.
        """
        found: dict[int, list[Sampled]] = {}
        with self._policy.generating():
            for batch in self._batches(prompts):
                drawn = self._drawn(step, [prompts[i] for i in batch])
                found.update(zip(batch, drawn, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _drawn(self, step: int, prompts: Sequence[Prompt]) -> list[list[Sampled]]:
        """The completions of prompts that are decoded together or, if memory does not suffice, one half after the
        other."""

        def together() -> list[list[Sampled]]:
            rows = _Rows(self._policy, prompts, self._num, self._seed, step)
            rows.decode(self._drawing, self._ends, self._stops)
            return rows.groups()

        found, why = attempt(together)
        if found is not None:
            return found
        if len(prompts) == 1:
            raise TrainingError(
                f"memory ran out where {self._num} completions of one prompt are sampled: {why}",
                where=f"prompt {prompts[0].number}",
                fix="lower rollout.num_generations or training.max_completion_length, or use a smaller model",
            )
        middle = len(prompts) // 2
        tokens = middle * self._num * max(len(p.ids) + p.room for p in prompts)
        if tokens < self._batch_tokens:
            logger.warning(
                "memory ran out (%s) while completions of %d prompts were sampled together; from now on "
                "rollout.batch_tokens is %d instead of %d; what is drawn is the same, but for rounding",
                *(why, len(prompts), tokens, self._batch_tokens),
            )
            self._batch_tokens = tokens
        return self._drawn(step, prompts[:middle]) + self._drawn(step, prompts[middle:])

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Places of prompts of like length that are decoded together, the longest first."""
        config = self._policy.base.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        one_length = not kinds <= PADDABLE
        batch: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i)):
            longest = prompts[batch[0] if batch else i]
            width = len(longest.ids) + max(prompts[j].room for j in (*batch, i))
            is_full = (len(batch) + 1) * self._num * width > self._batch_tokens
            if batch and (is_full or (one_length and len(longest.ids) != len(prompts[i].ids))):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


class _Rows:
    """Completions that decode together. Row p * num + g is completion g of prompt p."""

    def __init__(self, policy: Policy, prompts: Sequence[Prompt], num: int, seed: int, step: int) -> None:
        self._policy, self._prompts, self._num = policy, prompts, num
        self._rooms = torch.tensor([p.room for p in prompts for _ in range(num)], device=policy.device)
        most = int(self._rooms.max())
        drawn = np.stack([uniforms(seed, step, p.number, g, most) for p in prompts for g in range(num)])
        self._uniforms = torch.from_numpy(drawn).to(policy.device)
        self._tokens: list[Tensor] = []  # [rows] of every step, -1 for rows that are done
        self._logps: list[Tensor] = []
        self._entropy = torch.zeros(len(self._rooms), dtype=torch.float64, device=policy.device)
        self._ended = torch.zeros(len(self._rooms), dtype=torch.bool, device=policy.device)
        self._written: list[list[int]] = [[] for _ in range(len(self._rooms))]  # on the CPU, for stop texts

    def decode(self, drawing: Drawing, end_ids: frozenset[int], stops: StopTexts | None) -> None:
        """Until every row has ended or has no more room."""
        device = self._policy.device
        ends = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
        logits, cache, mask, positions = self._prefill()
        there = torch.arange(len(self._rooms), device=device)  # numbers of the rows in the cache
        going = torch.ones(len(there), dtype=torch.bool, device=device)  # which of these are not done
        for t in range(int(self._rooms.max())):
            tokens, logps, entropies = drawing.draw(logits, self._uniforms[there, t])
            self._note(there, going, tokens, logps)
            self._entropy[there] += torch.where(going, entropies, 0.0)
            ended = torch.isin(tokens, ends)
            if stops is not None:
                ended |= self._stopped(stops, there, going, tokens)
            self._ended[there] |= going & ended
            going &= ~ended & (self._rooms[there] > t + 1)
            left = int(going.sum())  # waits for the device, once per token
            if not left:
                return
            if left <= LEAVE * len(there):
                kept = going.nonzero().squeeze(1)
                cache.reorder_cache(kept)
                there, going, tokens, positions = there[kept], going[kept], tokens[kept], positions[kept]
                mask = None if mask is None else mask[kept]
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=1)
            logits = self._next(tokens[:, None], positions[:, None] + t, mask, cache)[0]

    def _stopped(self, stops: StopTexts, there: Tensor, going: Tensor, tokens: Tensor) -> Tensor:
        """Which of the rows in the cache end by a stop text with the token that was drawn now."""
        found = []
        for row, goes, token in zip(there.tolist(), going.tolist(), tokens.tolist(), strict=True):
            if goes:
                self._written[row].append(token)
            found.append(goes and stops.ends(self._written[row]))
        return torch.tensor(found, device=there.device)

    def _note(self, there: Tensor, going: Tensor, tokens: Tensor, logps: Tensor) -> None:
        now = torch.full_like(self._rooms, -1)
        now[there] = torch.where(going, tokens, -1)
        found = torch.zeros(len(now), dtype=logps.dtype, device=now.device)
        found[there] = logps
        self._tokens.append(now)
        self._logps.append(found)

    def _prefill(self) -> tuple[Tensor, Any, Tensor | None, Tensor]:
        """Logits [R, V], the cache and its mask after the prompts, and the position of each row's first token."""
        device, width = self._policy.device, max(len(p.ids) for p in self._prompts)
        pads = [width - len(p.ids) for p in self._prompts]
        ids = torch.tensor([[p.ids[0]] * n + list(p.ids) for p, n in zip(self._prompts, pads, strict=True)]).to(device)
        mask = None
        if any(pads):
            mask = (torch.arange(width)[None] >= torch.tensor(pads)[:, None]).long().to(device)
        positions = (torch.arange(width)[None] - torch.tensor(pads)[:, None]).clamp(min=0).to(device)
        logits, cache = self._next(ids, positions, mask, None)
        if self._num > 1:
            cache.reorder_cache(torch.arange(len(ids), device=device).repeat_interleave(self._num))
            logits = logits.repeat_interleave(self._num, 0)
            mask = None if mask is None else mask.repeat_interleave(self._num, 0)
        first = torch.tensor([len(p.ids) for p in self._prompts for _ in range(self._num)], device=device)
        return logits, cache, mask, first

    def _next(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> tuple[Tensor, Any]:
        """[R, V] logits after the last of `ids`, and the cache with them."""
        policy = self._policy
        with policy.precision.autocast(ids.device):
            out = policy.body(
                input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
            )
        return policy.logits(out.last_hidden_state[:, -1]), out.past_key_values

    def groups(self) -> list[list[Sampled]]:
        """What was drawn, by prompt.

        Raises:
            TrainingError: some of it was drawn from no distribution.
        """
        tokens, logps = torch.stack(self._tokens, 1).tolist(), torch.stack(self._logps, 1).double().tolist()
        rows: list[Sampled] = []
        for ids, own, ended, entropy in zip(tokens, logps, self._ended.tolist(), self._entropy.tolist(), strict=True):
            n = ids.index(-1) if -1 in ids else len(ids)
            if not all(map(math.isfinite, own[:n])):
                raise TrainingError(
                    "the model's logits are not finite where completions are sampled",
                    where=f"prompt {self._prompts[len(rows) // self._num].number}",
                    expected="finite logits, divided by a temperature that float32 can divide them by",
                    fix="lower training.learning_rate and go on from an earlier checkpoint, or raise "
                    "rollout.temperature or temperature_eval",
                )
            rows.append(Sampled(array("i", ids[:n]), array("d", own[:n]), ended, entropy))
        return [rows[i : i + self._num] for i in range(0, len(rows), self._num)]
