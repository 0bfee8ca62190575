"""What is known of a run before any weight is loaded. Floor 4.

In: the configuration and one of its models. Out: a `Prepared` run: tokenizer, groups, objective and plan, and the
configuration with the values that depend on the data filled in. A run continues from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from strop.allocator import give_back_freed_memory
from strop.batch import PROMPT_LOGPS
from strop.config import RunConfig, advice, of_model
from strop.config.guidance import is_default
from strop.config.methods import MethodSettings
from strop.config.sections import LoraSection, ModelSection
from strop.data.load import LoadedData
from strop.data.problems import imbalance
from strop.data.prompt_groups import PromptGroups
from strop.data.store.group_numbers import check_groups, sampled_at
from strop.data.store.table import Groups
from strop.engine.checkpoint import Checkpoint
from strop.engine.metrics import SCORE, WIN_RATE, held_out_metrics, no_such_metric
from strop.engine.optim import require_optimizer
from strop.errors import ConfigError, DataError
from strop.lengths import Sized
from strop.modelrows import ModelRows
from strop.objectives.base import MISMATCHED, Objective, build_objective
from strop.plan.cutting import cut
from strop.plan.micro_batch_size import CPU_TOKENS, batch_budget, default_budget
from strop.plan.order import Plan
from strop.plan.packing import filled_rows
from strop.plan.row_tokens import RowTokens
from strop.plan.work import EpochWork
from strop.policy.model.adapter_settings import adapters_of
from strop.policy.model.from_config import CannotBuildError, Shape, num_weights, shape_of
from strop.policy.other_models import check_others, teacher_section
from strop.rewards.calls import check_rewards


@dataclass(frozen=True)
class Prepared:
    """A run before any weight is loaded. config: with the values that depend on the data, but for the size of
    micro-batches (`with_budget`). num_processes: how many train together, each on a device or a share of the CPU."""

    config: RunConfig
    model: ModelSection
    tokenizer: PreTrainedTokenizerBase
    data: LoadedData
    objective: Objective[MethodSettings]
    plan: Plan
    num_processes: int = 1
    _known: _Known = field(default_factory=lambda: _Known(), compare=False, repr=False)

    @property
    def scored_ahead(self) -> bool:
        """Whether log-probs of the reference are scored before the first step."""
        return scored_ahead(self.config, self.objective)

    @property
    def budget(self) -> int:
        """Tokens per micro-batch; only once `with_budget` has decided them."""
        tokens = self.config.training.micro_batch_tokens
        assert tokens is not None
        return tokens

    def shape(self) -> Shape:
        """The model in numbers, built without weights.

        Raises:
            CannotBuildError: the architecture needs more than its configuration.
            ModelError: the adapters do not fit the model.
        """
        return self._known.shape(self)

    def first_step(self, tokens: RowTokens) -> list[list[Sized]]:
        """The lengths of the groups in each micro-batch of the first step. tokens: those that groups take."""
        lengths = self.data.train.lengths
        return [[lengths[i] for i in part] for part in cut(lengths, self.plan.groups(1), self.budget, tokens)]

    def whole_epoch(self, tokens: RowTokens) -> EpochWork:
        """Counts over the micro-batches of the first epoch."""
        return self._known.work(self, tokens)

    def work(self, tokens: RowTokens) -> EpochWork:
        """Counts over the micro-batches of the first epoch, or of the run if it is shorter."""
        return self.whole_epoch(tokens).of_steps(self.plan.num_steps)

    def advice(self) -> list[str]:
        """Warnings about the configuration, given these rows and the model's size, if that is known."""
        settings = self.config.post_training
        notes: list[str] = []
        if (weights := settings.label_weights) is not None:
            note = imbalance(self.data.num_labels, weights[True], weights[False])
            notes += [note] if note is not None else []
        if (
            "old_logps" in settings.NUMBERS
            and not self.config.rollout.enabled
            and not self.data.train.counts("old_logps").any()
        ):
            notes += [
                "the rows have no old_logps: every ratio is 1, and what another policy sampled is trained as if this "
                "one had"
            ]
        try:
            size = self._known.num_weights(self)
        except CannotBuildError:
            size = None
        return [*advice(self.config, size), *notes]


class _Known:
    """Keeps what the estimate, the description and the check of the disk all ask for: the model's shape, and the counts
    of the last epoch that was cut."""

    def __init__(self) -> None:
        self._shape_key: tuple[LoraSection, ModelSection, ModelSection | None, bool] | None = None
        self._shape: Shape | None = None
        self._key: tuple[Plan, int, RowTokens] | None = None
        self._epoch: EpochWork | None = None

    def shape(self, prepared: Prepared) -> Shape:
        config, model = prepared.config, prepared.model
        teacher, reward_model = teacher_section(config, model), config.post_training.REWARD_MODEL
        key = (config.lora, model, teacher, reward_model)
        if self._shape is None or self._shape_key != key:
            shape = shape_of(config.lora, model, reward_model=reward_model)
            self._shape = shape if teacher is None else replace(shape, teacher=num_weights(teacher))
            self._shape_key = key
        return self._shape

    def num_weights(self, prepared: Prepared) -> int:
        """Of the model, tied ones once; known for more architectures than the shape is."""
        try:
            shape = self.shape(prepared)
        except CannotBuildError:
            return num_weights(prepared.model, reward_model=prepared.config.post_training.REWARD_MODEL)
        return shape.matrix + shape.others

    def work(self, prepared: Prepared, tokens: RowTokens) -> EpochWork:
        key = (prepared.plan, prepared.budget, tokens)
        if self._epoch is None or self._key != key:
            prompts = PROMPT_LOGPS in prepared.objective.reads
            lengths = prepared.data.train.lengths
            self._key, self._epoch = key, EpochWork.of(prepared.plan, lengths, key[1], tokens, prompts=prompts)
        return self._epoch


def prepare(
    config: RunConfig,
    model: ModelSection,
    checkpoint: Checkpoint | None = None,
    read: tuple[ModelRows, LoadedData] | None = None,
    num_processes: int = 1,
) -> Prepared:
    """Reads the tokenizer and the data, and decides what depends on them. Loads no weights.

    Args:
        checkpoint: what the run continues from; the values that belong to its recipe are kept.
        read: tokenizer and rows, if they have been read already.
        num_processes: how many will train together.

    Raises:
        StropError: the rows, the tokenizer or the configuration cannot be used.
    """
    config = of_model(config, model)
    objective = build_objective(config.post_training)
    require_optimizer(config.training)
    adapters_of(config.lora, model)  # refuses an adapter that cannot be continued as the configuration says
    _check_draws_ahead(config, num_processes)
    day = checkpoint.state["recipe"].get("dataset.date") if checkpoint is not None else None
    rows = ModelRows.of(config, model, kept_day=day) if read is None else read[0]
    config, tokenizer = rows.config, rows.tokenizer
    check_others(config, model, tokenizer)
    data = rows.load() if read is None else read[1]
    give_back_freed_memory(len(data.train))
    if MISMATCHED in objective.also:
        _check_mismatched(data)
    if config.rollout.enabled:
        data = _to_sample(config, data, objective)
    else:
        for groups in (data.train, data.eval):
            check_groups(groups, objective.reads, objective.settings.compares)
        config = _with_temperature(config, data)
    if data.eval:
        _check_metric(config, objective)
    else:
        config = _without_validation(config)
    config = _with_size_of_steps(config, checkpoint, num_processes)
    return Prepared(config, model, tokenizer, data, objective, _plan(config, data), num_processes)


def _with_temperature(config: RunConfig, data: LoadedData) -> RunConfig:
    """With the temperature that the training rows were sampled at, where they say it.

    Raises:
        DataError: it is none. ConfigError: another one was given, or the validation rows have another one.
    """
    key = "rollout.temperature"
    for split, groups in (("training", data.train), ("validation", data.eval)):
        said, at = sampled_at(groups), config.rollout.temperature
        if said is None or said == at:
            continue
        if said <= 0:
            raise DataError(
                f"sampling_temperature is {said:g} in every {split} row",
                expected="a number above 0: the likeliest token each time has no log-probs to compare with",
                fix="leave the column out if the log-probs are those at temperature 1",
            )
        if split == "validation" or not is_default(config.origins[key]):
            raise ConfigError(
                f"the {split} rows were sampled at temperature {said:g} (sampling_temperature)",
                where=f"{key}: {at:g} ({config.origins[key]})",
                expected="the temperature of all rows, at which their log-probs are",
                fix=f"remove {key}, or set it to {said:g}"
                if split == "training"
                else "give validation rows of that temperature",
            )
        config = config.with_values({key: said}, "sampling_temperature of the rows")
    return config


def _check_draws_ahead(config: RunConfig, num_processes: int) -> None:
    """Refuses to draw for later steps beside the training of several processes."""
    if config.rollout.staleness and num_processes > 1:
        raise ConfigError(
            f"rollout.staleness is {config.rollout.staleness}, and {num_processes} processes train",
            where="rollout.staleness",
            expected="one process, whose requests run beside its training",
            fix="train with one process, or set staleness: 0",
        )


def _with_size_of_steps(config: RunConfig, checkpoint: Checkpoint | None, num_processes: int) -> RunConfig:
    """With `groups_per_step` decided: by the run that is continued, else from the batch size."""
    training = config.training
    if checkpoint is not None:  # a recipe has the second key only if the cut decides the masks of dropout
        recipe = checkpoint.state["recipe"]
        keys = ("training.groups_per_step", "training.micro_batch_tokens")
        kept = {key: recipe[key] for key in keys if key in recipe and getattr(training, key.partition(".")[2]) is None}
        config = config.with_values(kept, "the resumed run")
    if config.training.groups_per_step is not None:
        return config
    groups_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * num_processes
    origin = "batch size x accumulation steps x devices"
    return config.with_values({"training.groups_per_step": groups_per_step}, origin)


def _plan(config: RunConfig, data: LoadedData) -> Plan:
    training, rollout = config.training, config.rollout
    assert training.groups_per_step is not None
    filled = filled_rows(data.train, training.max_seq_length, config.seed) if training.packing else None
    rounds = (rollout.steps_per_generation, rollout.num_iterations) if rollout.enabled else (1, 1)
    length = (training.num_epochs, training.max_steps)
    return Plan.of(len(data.train), training.groups_per_step, *length, config.seed, filled, *rounds)


def scored_ahead(config: RunConfig, objective: Objective[MethodSettings]) -> bool:
    """Whether the log-probs of the reference are scored before the first step: there is one that does not change, and
    the completions are known."""
    return objective.needs_reference and objective.ref_sync is None and not config.rollout.enabled


def with_budget(prepared: Prepared, tokens: RowTokens, device_type: str) -> Prepared:
    """With `micro_batch_tokens` decided from the device and the longest group (under packing, a filled row), unless the
    configuration gives it."""
    training = prepared.config.training
    if training.micro_batch_tokens is not None:
        return prepared
    batch = training.per_device_train_batch_size
    if training.packing:
        budget, longest = batch_budget(batch, training.max_seq_length, device_type), "max_seq_length"
    else:
        budget, longest = default_budget(prepared.data.train, batch, tokens, device_type), "the longest group"
    origin = f"{CPU_TOKENS} on a CPU, or {longest}" if device_type == "cpu" else f"batch size x {longest}"
    return replace(prepared, config=prepared.config.with_values({"training.micro_batch_tokens": budget}, origin))


def _check_metric(config: RunConfig, objective: Objective[MethodSettings]) -> None:
    """Refuses a wrong `metric_for_best_model` now, not at the first evaluation."""
    options = config.finetuning
    decides = options.load_best_model_at_end or options.early_stopping_patience is not None
    name = options.metric_for_best_model.removeprefix("eval_")
    evaluated = objective.evaluated
    if config.rollout.enabled:
        evaluated = held_out_metrics(config.reward_names, has_entropy=config.rollout.sampler == "policy")
    if config.rollout.enabled and objective.has_loss_on_samples:
        evaluated += objective.evaluated
    if options.score_samples is not None:
        evaluated = [*evaluated, SCORE, WIN_RATE]
    if decides and name not in evaluated:
        raise no_such_metric(name, evaluated)


def _without_validation(config: RunConfig) -> RunConfig:
    """The configuration of a run that cannot be evaluated.

    Raises:
        ConfigError: a setting that needs evaluations was given.
    """
    neutral = {"finetuning.load_best_model_at_end": False, "finetuning.early_stopping_patience": None}
    for key, value, _ in config.leaves():
        if key in neutral and value != neutral[key] and not is_default(config.origins[key]):
            raise ConfigError(
                "there are no validation rows to evaluate the model by",
                where=f"{key}: {value} ({config.origins[key]})",
                expected="dataset.val_file, a validation file in splits_dir, or dataset.validation_split above 0",
                fix="give validation rows, or drop this key",
            )
    return config.with_values(neutral, "no validation rows")


def _to_sample(config: RunConfig, data: LoadedData, objective: Objective[MethodSettings]) -> LoadedData:
    """The rows as prompts, with the lengths that the groups of training can have at most. Rewards that cannot be called
    with them are refused now, not when the first completions are there."""
    training, rollout = config.training, config.rollout
    limits = (training.max_seq_length, training.max_completion_length)
    train = PromptGroups(data.train, 2 if objective.rows == "pair" else rollout.num_generations, *limits)
    held_out = data.eval
    if isinstance(held_out, Groups):
        held_out = PromptGroups(held_out, rollout.num_generations_eval, *limits)
    if config.rewards:
        columns = set(train.common_columns())
        if isinstance(held_out, PromptGroups):
            columns &= set(held_out.common_columns())
        rewards = [(reward.name, reward.settings) for reward in config.rewards]
        check_rewards(rewards, sorted(columns), rollout.reward_timeout)
    return replace(data, train=train, eval=held_out)


def _check_mismatched(data: LoadedData) -> None:
    for name, groups in (("training", data.train), ("validation", data.eval)):
        if len(groups) == 1:
            raise DataError(
                f"there is one {name} row, {groups[0].origin}, and no other one to take a completion from",
                expected="at least two: the method compares with completions of other rows",
                fix="give more rows, or set dataset.validation_split: 0 if there is to be no evaluation",
            )
