"""Groups to tensors: the micro-batch that a policy scores and what an objective sees of it. Floor 1.

Shapes: B rows, T tokens a row, M scored tokens, P scored prompt tokens, C completions, G groups.
The M scored tokens stand in the order group by group, completion by completion, token by token, whatever the rows look
like; so log-probs of one row layout can be laid beside those of any other.

Shifting happens here and nowhere else: `scored_positions[m]` is the position whose hidden state predicts
`targets[m]`. A completion's last token predicts nothing and is not fed at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from strop.types import Completion, Group

Unit = Literal["groups", "completions", "tokens", "chosen_tokens", "chosen_row_tokens"]
"""What a loss term is divided by: groups, completions, scored tokens, scored tokens of the first completions, or
those and the scored tokens of the prompts."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What is scored beside the tokens of completions, where an objective reads it.

    prompts: the log-probs of each prompt's own tokens but the first, once a prompt. collisions: of each scored token,
    log(sum over the vocabulary of p^2), the log-prob that two tokens drawn there are the same; without gradients.
    """

    prompts: bool = False
    collisions: bool = False


NOTHING = Extras()


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Where a group lies in a shared-prefix row: prompt at [start, start + prompt), then the completions."""

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.prompt + sum(self.completions)


class Membership:
    """Which completion each scored token belongs to, and which group each completion: what losses are counted by."""

    completion_index: Tensor
    group_index: Tensor
    prompt_index: Tensor | None

    @property
    def num_groups(self) -> int:
        return int(self.group_index[-1]) + 1

    @property
    def num_completions(self) -> int:
        return len(self.group_index)

    @property
    def is_first(self) -> Tensor:
        """[C] bool: the first completion of its group (the chosen one of a pair)."""
        first = torch.ones_like(self.group_index, dtype=torch.bool)
        first[1:] = self.group_index[1:] != self.group_index[:-1]
        return first

    def count(self, unit: Unit) -> int:
        """How many of `unit` are here. Over a whole step, this is what a term with that unit is divided by."""
        match unit:
            case "groups":
                return self.num_groups
            case "completions":
                return self.num_completions
            case "tokens":
                return len(self.completion_index)
            case "chosen_tokens":
                return int(self.is_first[self.completion_index].sum())
            case "chosen_row_tokens":
                assert self.prompt_index is not None
                return self.count("chosen_tokens") + len(self.prompt_index)


@dataclass(frozen=True)
class Batch(Membership):
    """A micro-batch.

    input_ids, position_ids: [B, T] int64. `layout` is set for one shared-prefix row (B = 1, no padding);
    `attention_mask` [B, T] bool is set for plain rows, one completion each, right-padded.
    scored_positions: [M + P] int64 into the flattened B * T, those of prompts at the end. targets: [M + P] int64.
    completion_index: [M] int64 in [0, C). group_index: [C] int64 in [0, G). ref_logps: [M] float32, where the objective
    needs them. labels: [G] bool, where the groups have them. prompt_index: [P] int64 in [0, G), where prompts are
    scored. collisions: as in `Extras`.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    layout: tuple[GroupSpan, ...] | None
    scored_positions: Tensor
    targets: Tensor
    completion_index: Tensor
    group_index: Tensor
    ref_logps: Tensor | None = None
    labels: Tensor | None = None
    prompt_index: Tensor | None = None
    collisions: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens fed to the model, padding left out."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Scores(Membership):
    """What an objective sees: log-probs of the scored tokens and which completion and group each belongs to.

    logps: [M] natural log, under the policy. ref_logps: [M], under the reference, or None.
    completion_index: [M]. group_index: [C]. labels: [G] bool, or None. mismatched: where the objective asks for them,
    the scores of the step's prompts with completions of others; of the whole step in each of its micro-batches, and
    without gradients. prompt_logps, prompt_index: [P] each, and collisions: [M], where it asks for these `Extras`. Sums
    over tokens are taken in float64: in float32 a sum near -2500 is off by 5e-4, which the gradient of a preference
    loss shows.
    """

    logps: Tensor
    ref_logps: Tensor | None
    completion_index: Tensor
    group_index: Tensor
    labels: Tensor | None = None
    mismatched: Scores | None = None
    prompt_logps: Tensor | None = None
    prompt_index: Tensor | None = None
    collisions: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, scored: Tensor, mismatched: Scores | None = None) -> Scores:
        """scored: what a policy returns for `batch`."""
        logps, collisions = scored if batch.collisions else (scored, None)
        completions = len(batch.completion_index)
        return cls(
            logps[:completions],
            batch.ref_logps,
            batch.completion_index,
            batch.group_index,
            batch.labels,
            mismatched,
            None if batch.prompt_index is None else logps[completions:],
            batch.prompt_index,
            None if collisions is None else collisions[:completions],
        )

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of several micro-batches of a step as if they had been one."""
        completions = groups = 0
        completion_index, group_index, prompt_index = [], [], []
        for p in parts:
            completion_index.append(p.completion_index + completions)
            group_index.append(p.group_index + groups)
            prompt_index.append(None if p.prompt_index is None else p.prompt_index + groups)
            completions += len(p.group_index)
            groups += p.num_groups
        return cls(
            torch.cat([p.logps for p in parts]),
            _joined([p.ref_logps for p in parts]),
            torch.cat(completion_index),
            torch.cat(group_index),
            _joined([p.labels for p in parts]),
            parts[0].mismatched,
            _joined([p.prompt_logps for p in parts]),
            _joined(prompt_index),
            _joined([p.collisions for p in parts]),
        )

    def detached(self) -> Scores:
        """The same without gradients."""
        prompts, collisions = (None if x is None else x.detach() for x in (self.prompt_logps, self.collisions))
        return replace(self, logps=self.logps.detach(), prompt_logps=prompts, collisions=collisions)

    @property
    def lengths(self) -> Tensor:
        """[C] float64: scored tokens of each completion."""
        return self.sums(torch.ones_like(self.logps, dtype=torch.float64))

    @property
    def log_ratios(self) -> Tensor:
        """[C] float64: each completion's log-prob under the policy minus that under the reference."""
        assert self.ref_logps is not None
        # summed apart, subtracted in float64: the two are close, their sums are large
        return self.sums(self.logps) - self.sums(self.ref_logps)

    def sums(self, per_token: Tensor) -> Tensor:
        """[M] -> [C] float64: the sum over each completion's scored tokens."""
        zeros = torch.zeros(self.num_completions, dtype=torch.float64, device=per_token.device)
        return zeros.index_add(0, self.completion_index, per_token.double())


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """All parts have it, or none has."""
    found = [p for p in parts if p is not None]
    assert len(found) in (0, len(parts))
    return torch.cat(found) if found else None


def pack(groups: Sequence[Group], ref_logps: Sequence[Tensor] | None = None, extras: Extras = NOTHING) -> Batch:
    """One shared-prefix row: each prompt once, then its completions, whose positions restart at the prompt's length."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[GroupSpan] = []
    scored: list[int] = []
    prompts: list[int] = []
    for group in groups:
        start, prompt = len(ids), len(group.prompt_ids)
        prompts.extend(range(start, start + prompt - 1))
        ids.extend(group.prompt_ids)
        positions.extend(range(prompt))
        for completion in group.completions:
            # token j of the completion is predicted from the one before it; token 0 from the prompt's last
            first = len(ids)
            scored.extend(
                first + j - 1 if j else start + prompt - 1 for j, trained in enumerate(completion.loss_mask) if trained
            )
            ids.extend(completion.ids[:-1])
            positions.extend(range(prompt, prompt + len(completion.ids) - 1))
        spans.append(GroupSpan(start, prompt, tuple(len(c.ids) - 1 for c in group.completions)))
    rows = torch.tensor([ids]), torch.tensor([positions]), None, tuple(spans)
    return _batch(groups, *rows, scored, prompts, ref_logps, extras)


def pad(groups: Sequence[Group], ref_logps: Sequence[Tensor] | None = None, extras: Extras = NOTHING) -> Batch:
    """Plain rows: every completion after its own copy of the prompt, padded at the right to the longest."""
    rows = [(g, c) for g in groups for c in g.completions]
    width = max(len(g.prompt_ids) + len(c.ids) - 1 for g, c in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    scored: list[int] = []
    prompts: list[int] = []
    for i, (group, completion) in enumerate(rows):
        if completion is group.completions[0]:
            prompts.extend(range(i * width, i * width + len(group.prompt_ids) - 1))
        row = [*group.prompt_ids, *completion.ids[:-1]]
        ids[i, : len(row)] = torch.tensor(row)
        ids[i, len(row) :] = row[
            -1
        ]  # masked; a token that is only padding may have zeros, of which norms have no slope
        mask[i, : len(row)] = True
        before_first = i * width + len(group.prompt_ids) - 1
        scored.extend(before_first + j for j, trained in enumerate(completion.loss_mask) if trained)
    positions = torch.arange(width).expand(len(rows), width).contiguous()
    return _batch(groups, ids, positions, mask, None, scored, prompts, ref_logps, extras)


def _batch(
    groups: Sequence[Group],
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    layout: tuple[GroupSpan, ...] | None,
    scored: list[int],
    prompts: list[int],
    ref_logps: Sequence[Tensor] | None,
    extras: Extras,
) -> Batch:
    completions: list[Completion] = [c for g in groups for c in g.completions]
    labels = [g.label for g in groups if g.label is not None]
    assert len(labels) in (0, len(groups))
    targets = [t for c in completions for t, trained in zip(c.ids, c.loss_mask, strict=True) if trained]
    if extras.prompts:
        scored = [*scored, *prompts]
        targets.extend(t for g in groups for t in g.prompt_ids[1:])
    prompt_lengths = torch.tensor([len(g.prompt_ids) - 1 for g in groups])
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        layout=layout,
        scored_positions=torch.tensor(scored),
        targets=torch.tensor(targets),
        completion_index=torch.repeat_interleave(torch.tensor([c.num_scored for c in completions])),
        group_index=torch.repeat_interleave(torch.tensor([len(g.completions) for g in groups])),
        ref_logps=torch.cat(list(ref_logps)) if ref_logps is not None else None,
        labels=torch.tensor(labels) if labels else None,
        prompt_index=torch.repeat_interleave(prompt_lengths) if extras.prompts else None,
        collisions=extras.collisions,
    )
