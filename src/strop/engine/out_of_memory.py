"""What to say when a run does not fit into memory. Floor 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from strop.config import RunConfig
from strop.errors import TrainingError
from strop.policy.allocator import is_out_of_memory


def does_not_fit(
    config: RunConfig, why: str, where: str, longest_tokens: int | None = None, *, backward: bool = False
) -> TrainingError:
    """The error, with the ways to fit that this configuration leaves, what costs the least first.

    longest_tokens: the longest group's, where micro-batches of one group each did not fit. backward: it was a training
    step's pass, which keeps activations.
    """
    alone = f", although micro-batches are single groups of at most {longest_tokens:,} tokens" if longest_tokens else ""
    return TrainingError(f"memory ran out{alone}: {why}", where=where, fix="; or ".join(ways_to_fit(config, backward)))


def cut_finer(where: str, why: str, before_tokens: int, now_tokens: int) -> str:
    """What to say when micro-batches become smaller."""
    return (
        f"{where}: memory ran out ({why}); again, and from here on, in micro-batches of at most {now_tokens:,} tokens "
        f"instead of {before_tokens:,}. The result is the same"
    )


def decided_by_auto(config: RunConfig) -> bool:
    """Whether the share of layers that are checkpointed is an estimate's, which may have been too small."""
    return config.origins.get("training.gradient_checkpointing", "").startswith("auto")


def recomputing(where: str, why: str) -> str:
    """What to say when all layers are checkpointed from now on."""
    return (
        f"{where}: memory ran out ({why}), although micro-batches are single groups; again, and from here on, with the "
        "activations of all layers computed again on the way back, since training.gradient_checkpointing is auto. The "
        "result is the same"
    )


@contextmanager
def explaining_memory(config: RunConfig, where: str) -> Iterator[None]:
    """Say what can be done where memory runs out in the block, and nothing could be tried again."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise does_not_fit(config, str(error).partition("\n")[0] or "an allocation failed", where) from error


def ways_to_fit(config: RunConfig, backward: bool = True) -> Iterator[str]:
    """Settings that lower the peak where micro-batches are as small as they get, from those that change no result to
    those that do. backward: the peak is that of a training step's pass."""
    training = config.training
    if backward and training.gradient_checkpointing is not True and not decided_by_auto(config):
        yield "set training.gradient_checkpointing: true"
    if not training.bf16 and not training.fp16:
        yield "set training.bf16: true"
    if getattr(config.post_training, "ref_sync_steps", None):
        yield "remove post_training.ref_sync_steps, which keeps a second model"
    if not all(map(config.adapts, config.models)):
        yield "train adapters (lora.enabled: true)"
        if not training.optim.endswith("8bit"):
            yield "set training.optim: adamw_8bit"
    yield f"lower training.max_seq_length (now {training.max_seq_length}), which cuts rows; a smaller model"
