"""Running out of memory: tried again by all processes together, and what to say of it. Floor 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from strop.config import RunConfig
from strop.errors import TrainingError
from strop.policy.memory_attempts import attempt, is_out_of_memory
from strop.policy.strategy import Strategy
from strop.world import PeerMemoryError

T = TypeVar("T")


def attempt_together(compute: Callable[[], T], strategy: Strategy) -> tuple[T | None, str]:
    """(the result, "") in all processes, or (None, why) in all of them where memory ran out in one. If passes cannot be
    repeated, only the process where memory ran out gets (None, why), and the run has to end.

    `compute` may make any number of collective calls. If memory runs out in one process, the next collective call of
    the others fails.
    """
    world = strategy.world
    if not strategy.repeats:
        with strategy.passes():
            return attempt(compute)
    heard = False

    def whole() -> T:
        nonlocal heard
        try:
            found = compute()
            world.any(False)  # waits until all others are done, or fails if memory ran out in one of them
        except PeerMemoryError as error:
            heard = True
            raise MemoryError(str(error)) from None
        return found

    found, why = attempt(whole)
    if found is None and not heard:
        world.tell(MemoryError(why), memory=True)
    return found, why


def does_not_fit(
    config: RunConfig, why: str, where: str, longest_tokens: int | None = None, *, backward: bool = False
) -> TrainingError:
    """The error, with the settings that could still make the run fit, the cheapest first.

    Args:
        longest_tokens: tokens of the longest group, if micro-batches of one group each did not fit.
        backward: it was a pass of a training step, which keeps activations.
    """
    alone = f", although micro-batches are single groups of at most {longest_tokens:,} tokens" if longest_tokens else ""
    return TrainingError(f"memory ran out{alone}: {why}", where=where, fix="; or ".join(ways_to_fit(config, backward)))


def cut_finer(where: str, why: str, before_tokens: int, now_tokens: int) -> str:
    """What to say when micro-batches become smaller."""
    return (
        f"{where}: memory ran out ({why}); repeated, and continued, in micro-batches of at most {now_tokens:,} tokens "
        f"instead of {before_tokens:,}. The result is the same"
    )


def decided_by_auto(config: RunConfig) -> bool:
    """Whether the share of checkpointed layers was chosen by an estimate, which may have been too small."""
    return config.origins.get("training.gradient_checkpointing", "").startswith("auto")


def recomputing(where: str, why: str) -> str:
    """What to say when all layers are checkpointed from now on."""
    return (
        f"{where}: memory ran out ({why}), although micro-batches are single groups; repeated, and continued, with the "
        "activations of all layers recomputed in the backward pass, since training.gradient_checkpointing is auto. The "
        "result is the same"
    )


@contextmanager
def explaining_memory(config: RunConfig, where: str) -> Iterator[None]:
    """Turns running out of memory inside the block into an error that says what can be done."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise does_not_fit(config, str(error).partition("\n")[0] or "an allocation failed", where) from error


def ways_to_fit(config: RunConfig, backward: bool = True) -> Iterator[str]:
    """Settings that lower the peak when micro-batches cannot get smaller, first those that do not change the result.

    backward: the peak is that of a training step, which keeps activations.
    """
    training = config.training
    if backward and training.gradient_checkpointing is not True and not decided_by_auto(config):
        yield "set training.gradient_checkpointing: true"
    if backward and config.gpu.fsdp and training.micro_batch_tokens is not None:
        yield f"lower training.micro_batch_tokens (now {training.micro_batch_tokens:,})"
    if not training.bf16 and not training.fp16:
        yield "set training.bf16: true"
    if getattr(config.post_training, "ref_sync_steps", None):
        yield "remove post_training.ref_sync_steps, which keeps a second model"
    if not all(map(config.adapts, config.models)):
        yield "train adapters (lora.enabled: true)"
        if training.optim.startswith("adamw_torch"):
            yield "set training.optim: adamw_8bit"
    yield f"lower training.max_seq_length (now {training.max_seq_length}), which truncates rows; or use a smaller model"
