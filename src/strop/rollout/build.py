"""The step source of a run that samples, from its configuration. Floor 4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from strop.config import RunConfig
from strop.config.sections import ModelSection
from strop.data.prompts import PromptGroups
from strop.plan.order import Plan
from strop.policy.model.generation import end_tokens
from strop.policy.policy import Policy
from strop.rollout.drawing import Drawing
from strop.rollout.sampler import Sampler
from strop.rollout.scoring import Scorer
from strop.rollout.source import RolloutSource
from strop.runfiles import ROLLOUTS
from strop.world import World


def rollout_source(
    config: RunConfig,
    model: ModelSection,
    plan: Plan,
    prompts: PromptGroups,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    note: Callable[[str], None],
    world: World,
) -> RolloutSource:
    """Has completions sampled by the policy and rewarded.

    Args:
        prompts: the rows to train on. folder: of the run, where what is sampled is written down. note: called with a
            message about rewards that fail.

    Raises:
        ConfigError: a reward cannot be found, or nothing ends a completion.
    """
    how = config.rollout
    sampler = Sampler(
        policy,
        how.num_generations,
        end_tokens(model, tokenizer),
        drawing=Drawing(how.top_k, how.top_p, how.min_p, len(tokenizer)),
        seed=config.seed,
        batch_tokens=how.batch_tokens,
    )
    scorer = Scorer(config.rewards, how)
    return RolloutSource(plan, prompts, sampler, scorer, tokenizer, folder / ROLLOUTS, note, world)
