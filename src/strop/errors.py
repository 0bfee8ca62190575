"""Every error a user can meet. Floor 0: stdlib only.

    StropError
    |- ConfigError      (ValueError)    a configuration, a flag, a preset
    |- DataError        (ValueError)    a data file or one of its rows
    |- ModelError       (ValueError)    a model folder, a tokenizer, an adapter
    |- CheckpointError  (RuntimeError)  a run folder or a checkpoint in it
    `- TrainingError    (RuntimeError)  a step that must not be taken
    Interrupted         (Exception)     not an error: stopped by a signal, saved, resumable

A message says where, what was found, what was expected and what to do, in this order and in one line each.
The command line prints it and exits with code 1; `Interrupted` exits with 75. Anything else is a bug of strop.
"""

from __future__ import annotations


class StropError(Exception):
    """A problem that the user can mend.

    Args:
        found: what is wrong, as one sentence with the value that was met.
        where: file:line, configuration key or step; empty where the sentence says it already.
        expected: what would have been right.
        fix: what to do now.
    """

    def __init__(self, found: str, *, where: str = "", expected: str = "", fix: str = "") -> None:
        super().__init__(found, where, expected, fix)
        self.found, self.where, self.expected, self.fix = found, where, expected, fix

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.found}" if self.where else self.found]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  to do:    {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only arguments do not survive the default pickling of exceptions
        return _rebuild, (type(self), self.found, self.where, self.expected, self.fix)


def _rebuild(cls: type[StropError], found: str, where: str, expected: str, fix: str) -> StropError:
    return cls(found, where=where, expected=expected, fix=fix)


class ConfigError(StropError, ValueError):
    """A configuration that cannot be run."""


class DataError(StropError, ValueError):
    """A data file or row that cannot be trained on."""


class ModelError(StropError, ValueError):
    """A model, tokenizer or adapter that cannot be loaded or does not fit."""


class CheckpointError(StropError, RuntimeError):
    """A run folder or checkpoint that cannot be used or written."""


class TrainingError(StropError, RuntimeError):
    """A step that must not be taken: the weights are those of the step before."""


class Interrupted(Exception):  # noqa: N818 (it is not an error)
    """Stopped by a signal after a finished step, with a checkpoint on disk; `step` is that step."""

    def __init__(self, step: int, checkpoint: str) -> None:
        super().__init__(step, checkpoint)
        self.step, self.checkpoint = step, checkpoint
