"""The loss of every validation row at every evaluation, by which a change is told from noise. Floor 3.

    logs/evaluations/step_00020.npy     float64 [rows], in the order of the validation rows

The mean over the rows is the loss of the evaluation. Of a large evaluation, evenly spaced rows are kept. A loss with a
statistic of all rows is not a mean over rows: nothing is kept of it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strop import durable
from strop.batch import Scores
from strop.columns import Columns, Structure
from strop.config.methods import MethodSettings
from strop.objectives.base import Objective
from strop.runfiles import EVALUATIONS, row_losses_array, step_of_row_losses

MOST_ROWS = 256


def row_losses(objective: Objective[MethodSettings], whole: Scores, order: Sequence[int]) -> NDArray[np.float64] | None:
    """[rows] what each row adds to the loss of an evaluation, times the number of rows.

    None for a loss with a statistic of all rows.

    Args:
        whole: the scores of all rows. order: for each row in them, its place in the evaluation's rows.
    """
    if objective.whole_step:
        return None
    scores = replace(
        whole,
        logps=whole.logps.cpu(),
        columns=whole.columns.map(Tensor.cpu),
        also={name: _on_cpu(others) for name, others in whole.also.items()},
    )
    num_rows = len(order)
    scale = {term: num_rows / unit(whole.structure) for term, unit in objective.units.items()}
    number = {place: at for at, place in enumerate(order)}
    places = np.linspace(0, num_rows - 1, min(num_rows, MOST_ROWS)).astype(int).tolist()
    parts = _Parts(scores)
    with torch.no_grad():
        terms = [objective.terms(parts.of(number[place])) for place in places]
    return np.array([sum(float(value) * scale[term] for term, value in row.items()) for row in terms])


def _on_cpu(scores: Scores) -> Scores:
    moved: Mapping[str, Tensor] = {
        name: getattr(scores, name).cpu() for name in ("logps", "completion_index", "group_index")
    }
    return replace(scores, columns=scores.columns.map(Tensor.cpu), **moved)  # type: ignore[arg-type]


class _Parts:
    """The scores of single groups, cut out of those of many."""

    def __init__(self, whole: Scores) -> None:
        self._whole, structure = whole, whole.structure
        self._completions = [0, *accumulate(structure.completions_per_group)]
        self._tokens = [0, *accumulate(structure.tokens_per_completion)]
        self._prompts = [0, *accumulate(n - 1 for n in structure.prompt_lengths)]

    def of(self, group: int) -> Scores:
        """The scores of one group alone."""
        whole = self._whole
        completions = slice(self._completions[group], self._completions[group + 1])
        tokens = slice(self._tokens[completions.start], self._tokens[completions.stop])
        prompt = slice(self._prompts[group], self._prompts[group + 1])
        structure = Structure(
            (completions.stop - completions.start,),
            tuple(whole.structure.tokens_per_completion[completions]),
            (whole.structure.prompt_lengths[group],),
        )
        places = (tokens, completions, slice(group, group + 1), prompt)
        columns = Columns(
            *({name: column[at] for name, column in level.items()}
              for level, at in zip(whole.columns, places, strict=True))
        )  # fmt: skip
        index, groups = structure.completion_index(), structure.group_index()
        return Scores(structure, whole.logps[tokens], index, groups, columns, whole.also)


class RowLosses:
    """The arrays of one run; `logs` is the folder of its logs."""

    def __init__(self, logs: Path) -> None:
        self.folder = logs / EVALUATIONS

    def write(self, step: int, losses: NDArray[np.float64]) -> None:
        """Keeps the losses of an evaluation.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = io.BytesIO()
        np.save(whole, losses, allow_pickle=False)
        durable.write_file(self.folder / row_losses_array(step), whole.getvalue())

    def rewind(self, step: int) -> None:
        """Removes what is of evaluations after `step`, for a resume from there.

        Raises:
            OSError: the folder cannot be written.
        """
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                at = step_of_row_losses(path.name)
                if at is not None and at > step:
                    durable.remove(path)
