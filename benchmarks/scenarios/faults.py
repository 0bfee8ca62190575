"""What is broken of a run beside its rows and settings: while it trains, or in its folder behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def says(key: str, value: str) -> Callable[[Path], None]:
    """The run was trained with something else than its configuration says of a key of post_training."""

    def rewrite(folder: Path) -> None:
        path = folder / "config.yaml"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines = [f"  {key}: {value}" if line.strip().startswith(f"{key}:") else line for line in lines]
        path.write_text("\n".join(lines) + "\n", "utf-8")

    return rewrite


@contextlib.contextmanager
def _replaced(owner: Any, name: str, other: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextlib.contextmanager
def sampler_lags() -> Iterator[None]:
    """Log-probs of what is sampled are those of another model, as those of a sampler whose weights lag."""
    from strop.rollout.sampler import Sampler

    own = Sampler.sample

    def lagging(self: Any, *args: Any) -> Any:
        found = own(self, *args)
        for completions in found:
            for completion in completions:
                for i in range(len(completion.logps)):
                    completion.logps[i] -= 0.3 * (1 + i % 2)
        return found

    with _replaced(Sampler, "sample", lagging):
        yield


@contextlib.contextmanager
def sampler_repeats() -> Iterator[None]:
    """All completions of a prompt are the same once the training has begun, as where a cache repeats an answer."""
    from strop.rollout.forecast import STEP
    from strop.rollout.sampler import Sampler

    own = Sampler.sample

    def repeating(self: Any, step: int, *args: Any) -> Any:
        found = own(self, step, *args)
        return found if step == STEP else [[completions[0]] * len(completions) for completions in found]

    with _replaced(Sampler, "sample", repeating):
        yield


@contextlib.contextmanager
def rate_of_zero() -> Iterator[None]:
    """A schedule that keeps the rate at 0."""
    from strop.engine import loop

    with _replaced(loop, "learning_rate", lambda *_: 0.0):
        yield
