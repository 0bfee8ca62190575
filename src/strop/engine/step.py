"""Forward and backward passes of one optimizer step: scores, the loss of the whole step, its gradients. Floor 3.

Shapes: M scored tokens of a micro-batch.

The loss of a step is a sum over terms: each term's sum over the step, divided by the count of its unit over the step.
The counts follow from the structure of the batches, so they are known before the first forward pass, and the share of
every micro-batch is divided by the same number. Therefore it does not matter how the step is cut.

Some objectives need a statistic of the whole step. For them, a pass without gradients collects everything that the
policy returns, the loss is differentiated with respect to it, and a second pass carries these coefficients (d loss /
d logp, and those of the policy's columns) back through the model. A step of one micro-batch is already the whole step
and needs no extra pass.

Some objectives read the scores of further groups (`also`). These are scored in one pass without gradients, and every
micro-batch gets the scores of all of them.

No value is read from the device within a step: numbers are returned as tensors, and `StepScores.fetch` takes them all
in one transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from strop.batch import Batch, Scores, TokenScores
from strop.columns import Columns, Unit
from strop.config.methods import MethodSettings
from strop.errors import ConfigError
from strop.objectives.base import Mean, Objective
from strop.types import Group
from strop.world import World

Forward = Callable[[Batch], TokenScores]
"""A policy: scores a micro-batch."""

ALONE = World.alone("cpu")
"""One process. Its device is not used here: batches bring their own."""

Idle = Callable[[bool], None]
"""Takes part in a pass of the other processes where this one has no micro-batch for it. The argument says whether there
is a backward pass, too."""

Counts = Mapping[str, int]
"""Term name -> what its sum is divided by."""


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of a step (or an evaluation), on the host.

    loss: of the step. terms: the share of each term in it. metrics: (sum, count). margins: [G] float64, or None. more:
    further tensors that were fetched with them, in their own shapes and dtypes.
    """

    loss: float
    terms: Mapping[str, float]
    metrics: Mapping[str, tuple[float, int]]
    margins: Tensor | None
    more: Mapping[str, Tensor]


@dataclass(frozen=True)
class StepScores:
    """The results of the forward passes of a step (or an evaluation), detached, on the device that computed them.

    terms: the share of each term in the loss, float64 scalars. metrics: (sum, count). margins: [G] or None.
    """

    scores: Scores
    terms: Mapping[str, Tensor]
    metrics: Mapping[str, Mean]
    margins: Tensor | None

    def fetch(self, **more: Tensor) -> StepNumbers:
        """Copies all of these numbers, and further tensors, to the host in one transfer. All travel as float64."""
        numbers = [*self.terms.values(), *(x for mean in self.metrics.values() for x in mean)]
        margins = () if self.margins is None else (self.margins,)
        tensors = [x for x in (*numbers, *more.values(), *margins) if isinstance(x, Tensor)]
        there = torch.cat([x.double().flatten() for x in tensors])
        flat = torch.split(there.cpu(), [x.numel() for x in tensors])
        fetched = (here.view(x.shape).to(x.dtype) for here, x in zip(flat, tensors, strict=True))

        def number(x: Tensor | float) -> float:
            return next(fetched).item() if isinstance(x, Tensor) else x

        terms = {name: number(share) for name, share in self.terms.items()}
        metrics = {name: (float(number(total)), int(number(n))) for name, (total, n) in self.metrics.items()}
        beside = {name: next(fetched) for name in more}
        return StepNumbers(sum(terms.values()), terms, metrics, next(fetched, None), beside)


def check_columns(
    objective: Objective[MethodSettings], *, policy: Iterable[str], source: Iterable[str], also: Iterable[str]
) -> None:
    """Refuses an objective that reads a column or further groups that nothing supplies.

    Args:
        policy, source: names of the columns that the policy and the step source supply.
        also: names of the further groups that the step source supplies.

    Raises:
        ConfigError: something is missing, or a column is supplied by both.
    """
    where = f"post_training.method: {objective.settings.method}"
    by_policy, by_source, groups = frozenset(policy), frozenset(source), frozenset(also)
    if missing := sorted(objective.reads - by_policy - by_source):
        raise ConfigError(
            f"{type(objective).__name__} reads {', '.join(missing)}, which nothing supplies",
            where=where,
            expected=f"a column of the policy ({_listed(by_policy)}) or of the step source ({_listed(by_source)})",
            fix="train on rows that have it, or with a step source that supplies it",
        )
    if twice := sorted((objective.reads | objective.may_read) & by_policy & by_source):
        raise ConfigError(f"{', '.join(twice)}: supplied by both the policy and the step source", where=where)
    if unknown := sorted(objective.also - groups):
        raise ConfigError(
            f"{type(objective).__name__} reads the scores of {', '.join(unknown)} groups, which nothing supplies",
            where=where,
            expected=f"further groups of the step source ({_listed(groups)})",
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def count_units(units: Mapping[str, Unit], batches: Sequence[Batch]) -> Counts:
    """Term name -> the count of its unit over these micro-batches."""
    return {name: sum(unit(b.structure) for b in batches) for name, unit in units.items()}


def _counts_everywhere(
    units: Mapping[str, Unit], batches: Sequence[Batch], nums_here: list[int], world: World
) -> tuple[Counts, list[list[int]]]:
    """The counts of the whole step, and how many micro-batches of each kind the processes have, by rank."""
    counted, nums = zip(*world.gather((count_units(units, batches), nums_here)), strict=True)
    return {name: sum(own[name] for own in counted) for name in units}, list(nums)


def step_loss(objective: Objective[MethodSettings], scores: Scores, counts: Counts) -> Tensor:
    """The share of `scores` in the loss of a step with these counts; a float64 scalar."""
    terms = objective.terms(scores)
    return torch.stack([terms[t] / counts[t] for t in sorted(terms)]).sum()


def forward_backward(
    policy: Forward,
    objective: Objective[MethodSettings],
    batches: Sequence[Batch],
    also: Mapping[str, Sequence[Batch]] | None = None,
    *,
    seed: tuple[int, int] = (0, 0),
    scale: float | Tensor = 1.0,
    world: World = ALONE,
    idle: Idle = lambda backward: None,
) -> StepScores:
    """Adds the gradients of one step's loss, times `scale`, to the weights, and returns the scores of the step.

    With several processes, the gradients are those of this process's micro-batches, which the caller sums. The scores
    are those of the whole step, ordered by rank, in all processes.

    Args:
        batches: the micro-batches of this process (`Cut.shares`).
        also: the micro-batches of further groups that the objective reads, by name.
        seed: (run seed, step). Together with a micro-batch's place it decides the random state of dropout.
        scale: the loss scale of float16.
        idle: called in place of each micro-batch that other processes have and this one has not.
    """
    further = sorted((also or {}).items())
    nums_here = [len(batches), *(len(own) for _, own in further)]
    counts, nums = _counts_everywhere(objective.units, batches, nums_here, world)
    most, *most_further = (max(of_kind) for of_kind in zip(*nums, strict=True))

    def score(batch: Batch, at: int, first: int = 0) -> TokenScores:
        """at: the place among the batches of this process. first: where batches of this kind begin in the step."""
        return _seeded(policy, batch, seed, first + at * world.size + world.rank)

    others: dict[str, Scores] = {}
    first = world.size * most
    for (name, own), num in zip(further, most_further, strict=True):
        with torch.no_grad():
            read = [Scores.of(batch, score(batch, i, first)) for i, batch in enumerate(own)]
            _idle(idle, num - len(own), backward=False)
            others[name] = join_all(read, world)
        first += world.size * num
    if objective.whole_step and sum(num for num, *_ in nums) > 1:
        with torch.no_grad():
            once = [Scores.of(batch, score(batch, i), others) for i, batch in enumerate(batches)]
            _idle(idle, most - len(batches), backward=False)
            whole = join_all(once, world, others)
        coefficients = _coefficients(objective, whole, once, batches, counts, world)
        for i, (batch, slopes) in enumerate(zip(batches, coefficients, strict=True)):
            torch.autograd.backward(_carried(score(batch, i), slopes) * scale)
        _idle(idle, most - len(batches), backward=True)
        return summarise(objective, whole)
    parts = []
    for i, batch in enumerate(batches):
        scores = Scores.of(batch, score(batch, i), others)
        torch.autograd.backward(step_loss(objective, scores, counts) * scale)
        parts.append(scores.detached())
        # Otherwise the nodes of this graph, which hold no tensors any more, would lie in the heap between those of the
        # next graph and fragment it: rows of 1,900 tokens reached a peak of 4.9 GB instead of 3.6.
        del scores
    _idle(idle, most - len(batches), backward=True)
    return summarise(objective, join_all(parts, world, others))


def _idle(idle: Idle, times: int, *, backward: bool) -> None:
    for _ in range(times):
        idle(backward)


def join_all(parts: Sequence[Scores], world: World, also: Mapping[str, Scores] | None = None) -> Scores:
    """The scores of the micro-batches of all processes, ordered by rank, as if they were one.

    Args:
        parts: those of this process.
        also: the further groups of the whole step, which every process has already.
    """
    everywhere = world.gather([replace(part, also={}) for part in parts])
    return replace(Scores.join([part for own in everywhere for part in own]), also=also or {})


def _coefficients(
    objective: Objective[MethodSettings],
    whole: Scores,
    own: Sequence[Scores],
    batches: Sequence[Batch],
    counts: Counts,
    world: World,
) -> list[TokenScores]:
    """d loss / d of all that the policy has given for each micro-batch of this process, whose scores are `own`: of the
    log-probs, and of the columns that it was asked for."""
    sizes = world.gather([part.structure.of_levels for part in own])
    if not own:
        return []
    given, of_policy = with_leaves(whole, batches[0].wants)
    loss = step_loss(objective, given, counts)
    found = torch.autograd.grad(
        loss, (given.logps, *(x for level in of_policy for x in level.values())), materialize_grads=True
    )
    slopes = iter(found)

    def parts(level: int) -> Sequence[Tensor]:
        """The next slopes, of columns of this level, for each micro-batch of this process."""
        before = sum(n[level] for ranks in sizes[: world.rank] for n in ranks)
        here = [n[level] for n in sizes[world.rank]]
        return torch.split(next(slopes)[before : before + sum(here)], here)

    of_logps = parts(0)
    of_columns = [{name: parts(n) for name in level} for n, level in enumerate(of_policy)]
    return [
        TokenScores(of_logps[i], Columns(*({name: each[i] for name, each in level.items()} for level in of_columns)))
        for i in range(len(own))
    ]


def with_leaves(scores: Scores, wants: Set[str]) -> tuple[Scores, Columns]:
    """Cuts the autograd graph at the policy's outputs, so that the loss can be differentiated by them alone.

    Returns:
        The scores, whose log-probs and columns of the policy (`wants`) are leaves of a new graph; and these columns.
    """

    def leaf(values: Tensor) -> Tensor:
        return values.detach().requires_grad_()

    of_policy = Columns(
        *(
            {name: leaf(column) for name, column in level.items() if name in wants and column.is_floating_point()}
            for level in scores.columns
        )
    )
    columns = Columns(*({**level, **own} for level, own in zip(scores.columns, of_policy, strict=True)))
    return replace(scores, logps=leaf(scores.logps), columns=columns), of_policy


def _carried(scored: TokenScores, slopes: TokenScores) -> Tensor:
    """A scalar whose gradient by the weights is that of the loss.

    Args:
        slopes: the derivatives of the loss by all that the policy gave in `scored`. Columns without a gradient are left
            out.
    """
    carried = (scored.logps * slopes.logps).sum()
    for level, own in zip(scored.columns, slopes.columns, strict=True):
        for name, column in level.items():
            if column.requires_grad:
                carried = carried + (column * own[name]).sum()
    return carried


def summarise(objective: Objective[MethodSettings], scores: Scores) -> StepScores:
    """Computes terms, metrics and margins from the scores of a whole step (or a whole evaluation)."""
    with torch.no_grad():
        terms = objective.terms(scores)
        shares = {t: terms[t] / unit(scores.structure) for t, unit in objective.units.items()}
        return StepScores(scores, shares, objective.metrics(scores), objective.margins(scores))


def _seeded(policy: Forward, batch: Batch, seed: tuple[int, int], micro_batch: int) -> TokenScores:
    number = int(np.random.SeedSequence([*seed, micro_batch]).generate_state(1)[0])
    # torch.manual_seed would also note the seed for devices that are not there, which takes a millisecond
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)
    return policy(batch)


def suspect_rows(result: StepScores, groups: Sequence[Group], most: int = 8) -> str:
    """Names the rows with a log-prob or another number that is not finite, or, if all are finite, those of the step."""
    scores = result.scores
    columns = scores.columns._replace(per_token={**scores.columns.per_token, "log-probs": scores.logps})
    of_groups = enumerate(columns.split(scores.structure))
    bad = [i for i, own in of_groups if not all(bool(x.isfinite().all()) for level in own for x in level.values())]
    rows = [str(groups[i].origin) for i in bad or range(len(groups))]
    return ", ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")
