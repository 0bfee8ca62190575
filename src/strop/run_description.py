"""What a run will be, in lines of text, as the dry run and the start of a run print them. Floor 5.

In: a `Prepared` run that knows the size of its micro-batches. Out: one line for each thing that a reader may want to
know before it starts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from strop.engine.optim import learning_rate, warmup_steps
from strop.objectives.base import MISMATCHED
from strop.plan.row_tokens import RowTokens, padded_tokens
from strop.prepared import Prepared
from strop.readable import plain


def describe(run: Prepared, tokens: RowTokens) -> Iterator[str]:
    """Lines of text: what the run will be. tokens: those that groups take."""
    yield from run.objective.describe()
    if run.config.rollout.enabled:
        yield from _sampling(run)
    yield from _step(run)
    yield from _length(run)
    yield from _work(run, tokens)


def _sampling(run: Prepared) -> Iterator[str]:
    """What is sampled, and what scores it."""
    rollout = run.config.rollout
    rewards = ", ".join(f"{reward.weight:g} x {reward.name}" for reward in run.config.rewards)
    rewarded = f"rewarded by {rewards}; the rows' own answers are for the rewards alone" if rewards else "no rewards"
    yield (
        f"sampling: {rollout.num_generations} completions per prompt at temperature {rollout.temperature:g}, "
        f"{rewarded}, and lengths below are the longest there can be"
    )
    if run.objective.rows == "pair":
        yield (
            "pairs: of each prompt's completions the one with the highest reward against the one with the lowest; "
            "prompts whose rewards are all the same give none, and are counted"
        )
    if rollout.sampler == "vllm":
        yield (
            f"the completions are drawn by vLLM at {rollout.vllm_url}, which loads the adapter from the run folder "
            "before each step; every completion is scored again by the training forward"
        )
    together, passes = rollout.steps_per_generation, rollout.num_iterations
    if together * passes > 1:
        yield f"rounds: the prompts of {together} steps are sampled at once, and gone through {passes} times"
    if run.objective.needs_reference:
        yield "the reference scores every group when it is sampled: " + (
            "another model that stays in memory"
            if getattr(run.config.post_training, "ref_model_id", None)
            else "the policy with a copy of the weights that train, as they were before the first step"
        )


def _step(run: Prepared) -> Iterator[str]:
    """What a step is made of, and by how many processes."""
    training, gpu = run.config.training, run.config.gpu
    if run.num_processes > 1:
        size = gpu.shard_size or run.num_processes
        has = f"a part of the model, which lies on {size} of them," if gpu.fsdp else "the whole model"
        yield f"processes: {run.num_processes}, each with {has} and a share of every step"
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    devices = "1 device" if run.num_processes == 1 else f"{run.num_processes} devices"
    made = f" = {batch} per device x {accumulation} accumulation steps x {devices}"
    own = training.groups_per_step != batch * accumulation * run.num_processes
    what = "rows filled with groups" if training.packing else "groups"
    yield f"effective batch: {training.groups_per_step} {what} per step{'' if own else made}"
    if training.packing:
        lengths, num_rows = run.data.train.lengths, run.plan.num_rows
        fill = int(lengths.num_tokens.sum()) / (num_rows * training.max_seq_length)
        yield f"packing: {len(lengths)} groups in {num_rows} rows, {100 * fill:.0f} % full"


def _length(run: Prepared) -> Iterator[str]:
    """How many steps there are, and how many of them warm up."""
    plan, training = run.plan, run.config.training
    if plan.steps_per_epoch == 1:
        yield "note: a step takes every row there is, so it is a whole epoch"
    steps, warmup = plan.num_steps, warmup_steps(plan.num_steps, training)
    epochs = steps / plan.steps_per_epoch
    many = "1 epoch" if epochs == 1 else f"{plain(epochs)} epochs"
    yield f"steps: {steps:,} ({plan.steps_per_epoch:,} per epoch, {many}), {warmup:,} of them warm-up"
    if warmup >= steps > 1:
        last = learning_rate(steps, steps, training)
        yield (
            f"note: the warm-up takes the whole run: the learning rate ends at {last:g} of "
            f"{training.learning_rate:g}; lower training.warmup_steps, or use warmup_ratio"
        )


def _work(run: Prepared, tokens: RowTokens) -> Iterator[str]:
    """The tokens of an epoch, and what is computed more than once."""
    training, lengths = run.config.training, run.data.train.lengths
    budget, sizes = run.budget, run.whole_epoch(tokens).work.tokens
    total = int(sizes.sum())
    yield (
        f"tokens: {total:,} per epoch, in {len(sizes)} micro-batches of at most {budget:,}, "
        f"{100 * total / int(np.maximum(sizes, budget).sum()):.0f} % full"
    )
    if tokens is padded_tokens:
        prompts = lengths.prompt.astype(np.int64)
        again = int((prompts * (lengths.counts - 1)).sum())
        fed = int((prompts * lengths.counts).sum() + lengths.completions.sum(dtype=np.int64))
        if again:
            yield f"plain rows: {100 * again / fed:.0f} % of the tokens are prompts that are computed once more"
    if training.recomputed:
        why = run.config.origins.get("training.gradient_checkpointing", "asked for")
        yield f"activations of {training.recomputed:.0%} of the layers are computed again on the way back ({why})"
    if MISMATCHED in run.objective.also:
        yield f"mismatched completions: about {total:,} tokens more per epoch, scored without gradients"
    if run.objective.whole_step and len(sizes) > run.plan.steps_per_epoch:
        yield "steps of several micro-batches are scored twice: the loss holds a statistic of the whole step"
    if (sync := run.objective.ref_sync) is not None:
        yield f"the reference is a second model, scored in every step; it moves every {sync.every_steps} steps"
