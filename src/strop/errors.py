"""Every error a user can meet. Floor 0: stdlib only.

    StropError
    |- ConfigError      (ValueError)    a configuration, a flag, a preset
    |- DataError        (ValueError)    a data file or one of its rows
    |- ModelError       (ValueError)    a model folder, a tokenizer, an adapter
    |- CheckpointError  (RuntimeError)  a run folder or a checkpoint in it
    |  `- SaveError                     the disk did not take what was to be saved; what was there is untouched
    |- TrainingError    (RuntimeError)  a step that must not be taken
    `- PeerError                        another process of the same training failed, and this one ends with it
       `- LostError                     the connection to the others broke
          `- GoneError                  because one of them is gone
    Interrupted         (Exception)     not an error: stopped by a signal, saved, resumable
    `- StoppedByFinding                 the same, by a finding of finetuning.stop_on

A message says where, what was found, what was expected and what to do, in this order and in one line each.
The command line prints it and exits with code 1; `Interrupted` exits with 75, `StoppedByFinding` with 3. Anything else
is a bug of strop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StropError(Exception):
    """A problem that the user can fix.

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


class SaveError(CheckpointError):
    """The disk did not take what was to be saved. What was saved before is as it was, and the run can go on."""


class TrainingError(StropError, RuntimeError):
    """A step that must not be taken: the weights are those of the step before."""


class PeerError(StropError):
    """Another process of the same training failed or is gone. This one is well, and ends with it."""


class LostError(PeerError):
    """The connection to the other processes broke."""


class GoneError(LostError):
    """Another process is gone, without a word."""


class Interrupted(Exception):  # noqa: N818 (it is not an error)
    """Stopped by a signal after a finished step, with a checkpoint on disk; `step` is that step."""

    def __init__(self, step: int, checkpoint: str) -> None:
        super().__init__(step, checkpoint)
        self.step, self.checkpoint = step, checkpoint


class StoppedByFinding(Interrupted):
    """Stopped after a finished step, with a checkpoint on disk, because of a finding that `finetuning.stop_on` names.

    finding: its id. claim: its sentence.
    """

    def __init__(self, step: int, checkpoint: str, finding: str, claim: str) -> None:
        super().__init__(step, checkpoint)
        self.args = (step, checkpoint, finding, claim)  # what pickling calls the class with
        self.finding, self.claim = finding, claim


@contextmanager
def foreign_errors(as_error: Callable[[str], StropError]) -> Iterator[None]:
    """Whatever a library raises at a file that strop did not write, as one of strop's errors.

    Libraries in Rust and C++ raise what they like: `Exception` itself, classes of their own, and (a panic of Rust) one
    that is no `Exception`. Errors of strop, running out of memory and being stopped come through as they are.

    Args:
        as_error: the error to raise, from the first line of what the library says.
    """
    try:
        yield
    except (StropError, Interrupted, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise as_error(first_line(error)) from error
        raise


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, and the one below it where it ends with a colon: what other libraries
    say further below is advice about their own API."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1].strip()}"
    if isinstance(error, KeyError) and lines:
        return f"{lines[0].strip()} is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return lines[0].strip() if lines else type(error).__name__
