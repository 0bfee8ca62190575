"""The step source of a run that samples, from its configuration. Floor 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from strop.config import RunConfig
from strop.config.methods import MethodSettings
from strop.config.sections import ModelSection
from strop.data.prompt_groups import PromptGroups
from strop.engine.evaluation_contract import Watcher
from strop.engine.step_source import Cut, GroupSet
from strop.engine.validation import Validation
from strop.errors import ConfigError
from strop.objectives.base import Objective
from strop.plan.order import Plan
from strop.policy.group_logps import group_logps
from strop.policy.model.end_tokens import end_tokens
from strop.policy.policy import Policy
from strop.policy.reference_models import FrozenReference
from strop.rollout import forecast
from strop.rollout.collect import Collector, CompletionSampler, ScoreGroups
from strop.rollout.drawing import Drawing
from strop.rollout.held_out import Losses
from strop.rollout.rewarding import Scorer
from strop.rollout.rollout_source import RolloutSource
from strop.rollout.sampler import Sampler
from strop.rollout.stop_texts import StopTexts
from strop.rollout.vllm_client import VllmClient
from strop.rollout.vllm_sampler import DrawSettings, ServedAdapter, VllmSampler
from strop.runfiles import ROLLOUTS, SERVED
from strop.types import Group
from strop.world import World


def rollout_source(
    config: RunConfig,
    model: ModelSection,
    plan: Plan,
    prompts: PromptGroups,
    held_out: PromptGroups | None,
    policy: Policy,
    objective: Objective[MethodSettings],
    tokenizer: PreTrainedTokenizerBase,
    cut: Cut,
    folder: Path,
    note: Callable[[str], None],
    world: World,
    *,
    reference: ScoreGroups | None = None,
) -> RolloutSource:
    """Has completions sampled by the policy and rewarded.

    Args:
        prompts: the rows to train on. held_out: those to evaluate on. cut: how groups are cut into micro-batches where
            they are scored without gradients. folder: of the run, where what is sampled is written down. note: called
            with a message about rewards that fail. reference: scores under the reference, where the objective reads it.

    Raises:
        ConfigError: a reward cannot be found, or nothing ends a completion.
    """
    how, is_served = config.rollout, config.rollout.sampler == "vllm"
    samplers = _served if is_served else _own
    training, evaluating, close = samplers(config, model, policy, tokenizer, folder, note, world)
    normalises = "normalised_rewards" in objective.reads
    scorer = Scorer(config.rewards, config.reward_names, how, policy.device, normalises=normalises)
    collector = Collector(
        prompts,
        training,
        scorer,
        tokenizer,
        world,
        cut,
        reference=reference,
        policy=policy if is_served or "sampler_logps" in objective.reads else None,
        pairs=objective.rows == "pair",
        most_apart=how.vllm_max_logp_difference if is_served else None,
    )
    rest = (scorer, tokenizer, world, cut)
    return RolloutSource(
        plan,
        collector,
        None if held_out is None else Collector(held_out, evaluating, *rest),
        folder / ROLLOUTS,
        note,
        world,
        refills=how.max_refills if how.dynamic_sampling else None,
        temperature=how.temperature,
        objective=objective,
        losses=_losses(config, policy, objective, cut, world) if objective.has_loss_on_samples else None,
        probe=_probe(config, plan, Collector(prompts, training, *rest)),
        also_close=close,
        staleness=how.staleness,
        policy=policy,
    )


def _probe(config: RunConfig, plan: Plan, collector: Collector) -> forecast.Probe | None:
    """What forecasts the groups without signal; None where it is not asked for, or rewards of a group are not
    compared."""
    asked = config.rollout.probe_prompts
    if not config.rewards or (asked is None and config.post_training.compares is None):
        return None
    num_probed = forecast.num_probed(asked, plan, len(collector.prompts))
    return forecast.Probe.of(collector, num_probed, config.seed) if num_probed else None


def _losses(config: RunConfig, policy: Policy, objective: Objective[MethodSettings], cut: Cut, world: World) -> Losses:
    """The loss of groups that were sampled, as an evaluation has it."""

    def of(groups: Sequence[Group], watcher: Watcher, where: str) -> Mapping[str, Any]:
        given = GroupSet(groups, wants=objective.reads & Policy.SUPPLIES)
        evaluation = Validation(config, policy, objective, given, cut, watcher, world, should_stop=lambda: False)
        return evaluation.line(where) or {}

    return Losses(objective.evaluated, of)


Samplers = tuple[CompletionSampler, CompletionSampler, Callable[[], None]]
"""What samples for training and for evaluations, and what is to be called when the run ends."""


def _own(
    config: RunConfig,
    model: ModelSection,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    *_: Any,
) -> Samplers:
    """The policy itself samples."""
    how, vocabulary = config.rollout, len(tokenizer)
    ends, stops = completion_ends(config, model, tokenizer), stop_texts(config, tokenizer)

    def sampler(num_completions: int, drawing: Drawing) -> Sampler:
        return Sampler(
            policy, num_completions, ends, stops=stops, drawing=drawing, seed=config.seed, batch_tokens=how.batch_tokens
        )

    limits = (how.top_k, how.top_p, how.min_p, vocabulary)
    if how.temperature_eval == 0:
        drawing = Drawing(top_k=1, vocabulary=vocabulary)
    else:
        drawing = Drawing(*limits, how.temperature / how.temperature_eval)
    training = sampler(how.num_generations, Drawing(*limits))
    return training, sampler(how.num_generations_eval, drawing), lambda: None


def _served(
    config: RunConfig,
    model: ModelSection,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    note: Callable[[str], None],
    world: World,
) -> Samplers:
    """A vLLM server samples, which is asked first whether it is well.

    Raises:
        ConfigError, TrainingError: as `VllmClient.check`.
    """
    how = config.rollout
    client = VllmClient(how.vllm_url, how.vllm_timeout, how.vllm_retry_seconds, note)
    base = world.on_main(lambda: client.check(how.vllm_model))
    salt = f"{base} {config.lora.model_dump_json()}"
    served = ServedAdapter(client, policy, folder / SERVED, salt, world)
    ends = completion_ends(config, model, tokenizer)
    model_vocabulary = policy.base.config.get_text_config().vocab_size

    def sampler(num_completions: int, temperature: float, trains: bool) -> VllmSampler:
        limits = (how.top_k, how.top_p, how.min_p) if temperature else (0, 1.0, 0.0)
        asked = DrawSettings(temperature, *limits, ends, tuple(how.stop), len(tokenizer), model_vocabulary)
        return VllmSampler(served, num_completions, asked, seed=config.seed, requests=how.vllm_requests, trains=trains)

    training = sampler(how.num_generations, how.temperature, True)
    evaluating = sampler(how.num_generations_eval, how.temperature_eval, False)
    return training, evaluating, served.close


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


def scores_of(reference: Policy | FrozenReference) -> ScoreGroups:
    """Log-probs under the policy as it was, or under another model that stays in memory."""
    if isinstance(reference, FrozenReference):
        return reference.logps

    def scored(micro_batches: Sequence[Sequence[Group]]) -> list[Tensor]:
        return group_logps(reference, micro_batches)

    return scored
