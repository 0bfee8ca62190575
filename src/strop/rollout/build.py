"""The step source of a run that samples, from its configuration. Floor 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from strop.config import RunConfig
from strop.config.sections import ModelSection
from strop.data.prompts import PromptGroups
from strop.engine.source import Cut
from strop.errors import ConfigError
from strop.plan.order import Plan
from strop.policy.model.generation import end_tokens
from strop.policy.policy import Policy
from strop.policy.reference import FrozenReference, reference_logps
from strop.rollout.collect import Collector, Scoring
from strop.rollout.drawing import Drawing
from strop.rollout.sampler import Sampler
from strop.rollout.scoring import Scorer
from strop.rollout.source import RolloutSource
from strop.rollout.stops import StopTexts
from strop.runfiles import ROLLOUTS
from strop.types import Group
from strop.world import World


def rollout_source(
    config: RunConfig,
    model: ModelSection,
    plan: Plan,
    prompts: PromptGroups,
    held_out: PromptGroups | None,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    cut: Cut,
    folder: Path,
    note: Callable[[str], None],
    world: World,
    *,
    reference: Scoring | None = None,
    scores_again: bool = False,
    wants: frozenset[str] = frozenset(),
    pairs: bool = False,
) -> RolloutSource:
    """Has completions sampled by the policy and rewarded.

    Args:
        prompts: the rows to train on. held_out: those to evaluate on. cut: how groups are cut into micro-batches where
            they are scored without gradients. folder: of the run, where what is sampled is written down. note: called
            with a message about rewards that fail. reference: scores under the reference, where the objective reads it.
            scores_again: score what was sampled by the forward pass of training, too. wants: names of the columns that
            the policy has to supply. pairs: train on the best and the worst completion of each prompt.

    Raises:
        ConfigError: a reward cannot be found, or nothing ends a completion.
    """
    how, vocabulary = config.rollout, len(tokenizer)
    ends, stops = completion_ends(config, model, tokenizer), stop_texts(config, tokenizer)
    scorer = Scorer(config.rewards, config.reward_names, how, policy.device)

    def sampler(num_completions: int, drawing: Drawing) -> Sampler:
        more: dict[str, Any] = {"drawing": drawing, "seed": config.seed, "batch_tokens": how.batch_tokens}
        return Sampler(policy, num_completions, ends, stops=stops, **more)

    drawing = Drawing(how.top_k, how.top_p, how.min_p, vocabulary)
    collector = Collector(
        prompts,
        sampler(how.num_generations, drawing),
        scorer,
        tokenizer,
        world,
        cut,
        reference=reference,
        policy=policy if scores_again else None,
        pairs=pairs,
    )
    evaluation = None
    if held_out is not None:
        if how.temperature_eval == 0:
            drawing = Drawing(top_k=1, vocabulary=vocabulary)
        else:
            drawing = Drawing(how.top_k, how.top_p, how.min_p, vocabulary, how.temperature / how.temperature_eval)
        evaluation = Collector(held_out, sampler(how.num_generations_eval, drawing), scorer, tokenizer, world, cut)
    refills = how.max_refills if how.dynamic_sampling else None
    return RolloutSource(plan, collector, evaluation, folder / ROLLOUTS, note, world, refills=refills, wants=wants)


def completion_ends(config: RunConfig, model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end what is sampled in a run: those of the model and those of rollout.stop_token_ids.

    Raises:
        ConfigError: the tokenizer has no such token.
        ModelError: as `end_tokens`.
    """
    for token in config.rollout.stop_token_ids:
        if token >= len(tokenizer):
            raise ConfigError(
                f"{token} is to end completions, and the tokenizer has no such token",
                where="rollout.stop_token_ids",
                expected=f"ids from 0 to {len(tokenizer) - 1}",
            )
    return tuple(dict.fromkeys((*end_tokens(model, tokenizer), *config.rollout.stop_token_ids)))


def stop_texts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> StopTexts | None:
    """The texts that end what is sampled in a run, too; None where there are none."""
    return StopTexts(tokenizer, config.rollout.stop) if config.rollout.stop else None


def scores_of(reference: Policy | FrozenReference) -> Scoring:
    """Log-probs under the policy as it was, or under another model that stays in memory."""
    if isinstance(reference, FrozenReference):
        return reference.logps

    def scored(micro_batches: Sequence[Sequence[Group]]) -> list[Tensor]:
        return reference_logps(reference, micro_batches)

    return scored
