"""The margins of every optimizer step: one summary line per step, and the full array. Floor 3.

    logs/margins/margins_log.jsonl          one object per step, fields below
    logs/margins/epoch_000/step_00000.npy   float32 [G], one margin per group of the step

A margin is what the objective gives for a group (`Objective.margins`): by how much one completion is ahead of the
other, without beta. Fields: epoch and step (both from 0, the step within its epoch), global_step (the
optimizer step, from 1), batch_size, mean, std (with ddof 0), min, p10, median, p90, max, pos_frac (share above 0), npy
(the array's path from this folder), sample (the first values).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strop import durable
from strop.durable import JsonLines
from strop.rundir import tell_damage
from strop.runfiles import MARGINS_LOG, margins_array

SAMPLE = 8


class MarginsLog:
    """The margins of one run; `folder` is `{logging_dir}/margins`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = JsonLines(folder / MARGINS_LOG)

    def write(self, epoch: int, step_in_epoch: int, global_step: int, margins: NDArray[Any]) -> None:
        """Log one step. margins: [G], at least one.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        values = np.asarray(margins, dtype=np.float32).reshape(-1)
        assert len(values)
        name = margins_array(epoch, step_in_epoch)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = io.BytesIO()
        np.save(whole, values, allow_pickle=False)
        # the array first: no line may name a missing array, while `rewind` removes arrays without a line
        path.write_bytes(whole.getvalue())
        self._lines.append(
            {"epoch": epoch, "step": step_in_epoch, "global_step": global_step, **_summary(values), "npy": name}
        )

    def rewind(self, global_step: int) -> None:
        """Removes lines and arrays after the optimizer step `global_step`, for a resume from there.

        Raises:
            OSError: the folder cannot be written.
        """
        if not self.folder.is_dir():
            return
        durable.recover(self.folder)
        dropped = set()

        def keep(line: dict[str, Any]) -> bool | None:
            at = line.get("global_step")
            if not isinstance(at, int):
                return None
            if at > global_step:
                dropped.add(line.get("npy"))
            return at <= global_step

        damaged = self._lines.retain(keep)
        tell_damage(self._lines.path, damaged)
        named = {line.get("npy") for line in self._lines.read()}
        for path in sorted(self.folder.glob("epoch_*/step_*.npy")):
            name = path.relative_to(self.folder).as_posix()
            # An array without a line was left by a process that died between the two writes. If lines are damaged, it
            # may also be one that belongs to the run.
            if name in dropped or (not damaged and name not in named):
                durable.remove(path)

    def close(self) -> None:
        self._lines.close()


def _summary(values: NDArray[np.float32]) -> dict[str, object]:
    wide = values.astype(np.float64)
    p10, median, p90 = (float(q) for q in np.percentile(wide, (10, 50, 90)))
    return {
        "batch_size": len(values),
        "mean": float(wide.mean()),
        "std": float(wide.std()),
        "min": float(wide.min()),
        "p10": p10,
        "median": median,
        "p90": p90,
        "max": float(wide.max()),
        "pos_frac": float((wide > 0).mean()),
        "sample": [float(v) for v in values[:SAMPLE]],
    }
