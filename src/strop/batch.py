"""Groups to tensors: the micro-batch that a policy scores, and what an objective sees of it. Floor 1.

Shapes: B rows, T tokens per row, M scored tokens, P scored prompt tokens, C completions, G groups.
Scored tokens are ordered by group, then completion, then token, in both row layouts; so log-probs from one layout can
be compared with those from the other. A group has any number of completions.

Other values of a batch are in named columns, and its counts are Python integers (`columns.py`). Only few columns are
known here by name: `prompt_logps`, whose tokens have to be gathered as well, and those that groups carry themselves.

Shifting happens here and nowhere else: `scored_positions[m]` is the position whose hidden state predicts
`targets[m]`. A completion's last token predicts nothing, so it is not fed to the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from strop.columns import NO_COLUMNS, Columns, Structure
from strop.types import OF_COMPLETIONS, OF_GROUPS, OF_TOKENS, Group


class TokenScores(NamedTuple):
    """What a policy returns for a batch.

    logps: [M] natural log-probs of the scored tokens of completions; of a reward model, whose groups have one scored
    place per completion (`types.judged`), the rewards. columns: the other columns that the batch wants.
    """

    logps: Tensor
    columns: Columns = NO_COLUMNS


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Where a group lies in a shared-prefix row: its prompt at [start, start + prompt), then its completions.

    completions: the number of tokens of each that are fed, which leaves out the last one.
    """

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.prompt + sum(self.completions)


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    input_ids, position_ids: [B, T] int64. `layout` is set for one shared-prefix row (B = 1, no padding);
    `attention_mask` [B, T] bool is set for plain rows, one completion each, right-padded. row_lengths: tokens of each
    of the B rows, padding left out.
    scored_positions: [M] int64 into the flattened B * T, or [M + P] if prompts are scored, whose positions come last.
    targets: the tokens predicted there. completion_index: [M] int64 in [0, C). group_index: [C] int64 in [0, G).
    columns: those that came with the groups. wants: names of the columns that the policy has to supply.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    layout: tuple[GroupSpan, ...] | None
    row_lengths: tuple[int, ...]
    scored_positions: Tensor
    targets: Tensor
    structure: Structure
    completion_index: Tensor
    group_index: Tensor
    columns: Columns = NO_COLUMNS
    wants: frozenset[str] = frozenset()

    @property
    def num_tokens(self) -> int:
        """Tokens fed to the model, padding left out."""
        return sum(self.row_lengths)

    def token_scores(self, logps: Tensor, **per_token: Tensor) -> TokenScores:
        """Splits values of all `targets` into those of completions and those of prompts.

        Args:
            logps: [M] or [M + P], the log-probs of `targets`.
            per_token: further columns of the same length. Those that the batch does not want are left out.
        """
        n = self.structure.num_tokens
        prompts = {PROMPT_LOGPS: logps[n:]} if PROMPT_LOGPS in self.wants else {}
        beside = {name: column[:n] for name, column in per_token.items() if name in self.wants}
        return TokenScores(logps[:n], Columns(per_token=beside, per_prompt_token=prompts))

    def to(self, device: torch.device) -> Batch:
        """The same on that device."""
        moved: dict[str, Any] = {k: to_device(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, columns=self.columns.map(lambda column: to_device(column, device)), **moved)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on that device. To a GPU it goes through pinned memory, which the GPU reads by itself: the copy waits
    for nothing, and nothing waits for it but what computes with it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


PROMPT_LOGPS = "prompt_logps"
"""A column per scored prompt token: the log-probs of a prompt's tokens, without its first, once per prompt."""


@dataclass(frozen=True)
class Scores:
    """What an objective sees: log-probs of the scored tokens, further columns, and which completion each belongs to.

    logps: [M] natural log, under the policy; of a reward model, rewards. completion_index: [M]. group_index: [C].
    columns: those of the batch and of the policy; `scores["ref_logps"]` reads one. also: further groups by name, if the
    objective asks for them; they are those of the whole step, the same for each of its micro-batches, and scored
    without gradients.

    Sums over tokens are taken in float64: in float32 a sum near -2500 is off by 5e-4, which is visible in the gradient
    of a preference loss.
    """

    structure: Structure
    logps: Tensor
    completion_index: Tensor
    group_index: Tensor
    columns: Columns = NO_COLUMNS
    also: Mapping[str, Scores] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, scored: TokenScores, also: Mapping[str, Scores] | None = None) -> Scores:
        """scored: what a policy returned for `batch`."""
        columns = batch.columns.beside(scored.columns)
        return cls(batch.structure, scored.logps, batch.completion_index, batch.group_index, columns, also or {})

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of several micro-batches of a step, as if they were one."""
        num_completions = num_groups = 0
        completion_index, group_index = [], []
        for p in parts:
            completion_index.append(p.completion_index + num_completions)
            group_index.append(p.group_index + num_groups)
            num_completions += p.structure.num_completions
            num_groups += p.structure.num_groups
        return cls(
            Structure.join(p.structure for p in parts),
            torch.cat([p.logps for p in parts]),
            torch.cat(completion_index),
            torch.cat(group_index),
            Columns.join([p.columns for p in parts]),
            parts[0].also,
        )

    def __getitem__(self, name: str) -> Tensor:
        """The column of that name."""
        return self.columns.find(name)

    def detached(self) -> Scores:
        """The same without gradients."""
        return replace(self, logps=self.logps.detach(), columns=self.columns.map(Tensor.detach))

    @property
    def lengths(self) -> Tensor:
        """[C] float64: scored tokens of each completion."""
        return self.sums(torch.ones_like(self.logps, dtype=torch.float64))

    @property
    def log_ratios(self) -> Tensor:
        """[C] float64: each completion's log-prob under the policy minus that under the reference."""
        # each is summed in float64 before subtracting: the sums are large and nearly equal
        return self.sums(self.logps) - self.sums(self["ref_logps"])

    def sums(self, per_token: Tensor) -> Tensor:
        """[M] -> [C] float64: the sum over each completion's scored tokens."""
        zeros = torch.zeros(self.structure.num_completions, dtype=torch.float64, device=per_token.device)
        return zeros.index_add(0, self.completion_index, per_token.double())


def own_columns(groups: Sequence[Group]) -> Columns:
    """The columns that groups have themselves: labels, and numbers in float64. All have the same ones."""
    names = own_names(groups[0])
    assert all(own_names(g) == names for g in groups)

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([np.frombuffer(g.numbers[name]) for g in groups]))

    return Columns(
        per_token={name: joined(name) for name in OF_TOKENS if name in names},
        per_completion={name: joined(name) for name in OF_COMPLETIONS if name in names},
        per_group={
            **({"labels": torch.tensor([g.label for g in groups])} if "labels" in names else {}),
            **{name: joined(name) for name in OF_GROUPS if name in names},
        },
    )


def own_names(group: Group) -> frozenset[str]:
    """Names of the columns that a group has itself."""
    return frozenset(group.numbers) | (frozenset() if group.label is None else {"labels"})


def structure_of(groups: Sequence[Group]) -> Structure:
    """Counts the groups, their completions and their tokens."""
    return Structure(
        tuple(len(g.completions) for g in groups),
        tuple(c.num_scored for g in groups for c in g.completions),
        tuple(len(g.prompt_ids) for g in groups),
    )


def pack(groups: Sequence[Group], columns: Columns = NO_COLUMNS, wants: Iterable[str] = ()) -> Batch:
    """One shared-prefix row: each prompt once, then its completions, whose positions restart at the prompt's length.

    Args:
        columns: values that come with the groups, in the order of the groups.
        wants: names of the columns that the policy has to supply.

    Raises:
        ValueError: a column has another length than the groups.
    """
    structure = structure_of(groups)
    segments: list[NDArray[np.integer]] = []  # token ids: prompt, its completions, next prompt, ...
    firsts: list[int] = []  # position id of each segment's first token
    prompt_starts, starts = [], []  # places in the row where prompts and completions begin
    before = []  # place in the row that predicts each completion's first token: the end of its prompt
    spans = []
    at = 0
    for group, prompt in zip(groups, structure.prompt_lengths, strict=True):
        segments.append(np.asarray(group.prompt_ids))
        firsts.append(0)
        prompt_starts.append(start := at)
        at += prompt
        for completion in group.completions:
            segments.append(np.asarray(completion.ids)[:-1])
            firsts.append(prompt)
            starts.append(at)
            before.append(start + prompt - 1)
            at += len(completion.ids) - 1
        spans.append(GroupSpan(start, prompt, tuple(len(c.ids) - 1 for c in group.completions)))
    position_ids = _ranges(firsts, [len(s) for s in segments])
    return _batch(
        groups,
        structure,
        columns,
        wants,
        input_ids=torch.from_numpy(np.concatenate(segments, dtype=np.int64))[None],
        position_ids=torch.from_numpy(position_ids)[None],
        attention_mask=None,
        layout=tuple(spans),
        row_lengths=(at,),
        starts=starts,
        before=before,
        prompt_starts=prompt_starts,
    )


def pad(groups: Sequence[Group], columns: Columns = NO_COLUMNS, wants: Iterable[str] = ()) -> Batch:
    """Plain rows: each completion after its own copy of the prompt, padded on the right to the longest row.

    Arguments and errors are those of `pack`.
    """
    structure = structure_of(groups)
    segments: list[NDArray[np.integer]] = []
    row_lengths: list[int] = []
    prompts, prompt_rows = [], []
    for group in groups:
        prompt_rows.append(len(row_lengths))  # a prompt is scored in the row of its first completion
        for completion in group.completions:
            segments += [np.asarray(group.prompt_ids), np.asarray(completion.ids)[:-1]]
            prompts.append(len(group.prompt_ids))
            row_lengths.append(len(group.prompt_ids) + len(completion.ids) - 1)
    num_rows, width = len(row_lengths), max(row_lengths)
    row_starts = np.arange(num_rows) * width
    places = _ranges(row_starts, row_lengths)
    tokens = np.concatenate(segments, dtype=np.int64)
    # Padding is masked and repeats its row's last token. The embedding of a pad token may be all zeros, where the
    # gradient of a norm is not defined.
    ids = np.repeat(tokens[np.cumsum(row_lengths) - 1], width)
    mask = np.zeros(num_rows * width, dtype=np.bool_)
    ids[places] = tokens
    mask[places] = True
    starts = row_starts + prompts
    return _batch(
        groups,
        structure,
        columns,
        wants,
        input_ids=torch.from_numpy(ids).view(num_rows, width),
        position_ids=torch.arange(width).expand(num_rows, width).contiguous(),
        attention_mask=torch.from_numpy(mask).view(num_rows, width),
        layout=None,
        row_lengths=tuple(row_lengths),
        starts=starts,
        before=starts - 1,
        prompt_starts=row_starts[prompt_rows],
    )


def _batch(
    groups: Sequence[Group],
    structure: Structure,
    columns: Columns,
    wants: Iterable[str],
    *,
    starts: ArrayLike,
    before: ArrayLike,
    prompt_starts: ArrayLike,
    **rows: Any,
) -> Batch:
    """Finds what is scored, which is alike in both layouts.

    Args:
        starts: [C] where each completion begins in the flattened rows.
        before: [C] the place that predicts each completion's first token.
        prompt_starts: [G] where each prompt begins.
        rows: the fields of `Batch` that describe the rows.
    """
    completions = [c for g in groups for c in g.completions]
    lengths = np.array([len(c.ids) for c in completions])
    trained = np.frombuffer(b"".join(c.loss_mask for c in completions), dtype=np.uint8) != 0
    scored = _ranges(np.asarray(starts) - 1, lengths)  # each token is predicted from the place before it
    scored[np.cumsum(lengths) - lengths] = before
    positions, targets = [scored[trained]], [np.concatenate([np.asarray(c.ids) for c in completions])[trained]]
    wants = frozenset(wants)
    if PROMPT_LOGPS in wants:
        positions.append(_ranges(prompt_starts, np.array(structure.prompt_lengths) - 1))
        targets += [np.asarray(g.prompt_ids)[1:] for g in groups]
    columns = columns.beside(own_columns(groups))
    columns.check(structure)
    return Batch(
        scored_positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets, dtype=np.int64)),
        structure=structure,
        completion_index=structure.completion_index(),
        group_index=structure.group_index(),
        columns=columns,
        wants=wants,
        **rows,
    )


def _ranges(starts: ArrayLike, lengths: ArrayLike) -> NDArray[np.int64]:
    """Concatenates the ranges [start, start + length) without a Python loop over tokens."""
    counts = np.asarray(lengths, dtype=np.int64)
    shifts = np.asarray(starts, dtype=np.int64) - (np.cumsum(counts) - counts)
    places: NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(shifts, counts)
    return places
