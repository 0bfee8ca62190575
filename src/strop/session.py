"""One model of a configuration with everything that belongs to its run. Floor 6.

Each part is built once, when it is first asked for, from the parts above it:

    prepared   tokenizer, groups, objective, recipe; no weights are loaded
    settled    precision, micro-batch size and recomputation that fit the device; no weights are loaded
    policy     the model, ready to train
    as_built   `settled` again, for the row layout that the policy really uses
    source     the groups of every step, with the reference's log-probs

`strop train`, `strop reference` and `--dry-run` each go down this list as far as they need.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from strop.cachedir import cache_folder
from strop.config import RunConfig
from strop.config.sections import ModelSection
from strop.data.load import LoadedData
from strop.data.mismatch import Mismatched
from strop.data.prompt_groups import PromptGroups
from strop.engine.checkpoint import Checkpoint
from strop.engine.loop import Cuts
from strop.engine.offline_source import OfflineSource
from strop.engine.progress import Progress
from strop.engine.reference_logps import scored
from strop.engine.step_source import Cut, GroupSet, StepSource
from strop.estimate import (
    fitted,
    group_cost,
    longest_line,
    planned_precision,
    planned_rows,
    predicted_time,
    prediction,
    with_precision,
)
from strop.machine import Machine, machine_of
from strop.manifest import BASE
from strop.modelrows import ModelRows
from strop.objectives.base import MISMATCHED
from strop.plan.dealing import BY_TOKENS, GroupCost
from strop.plan.micro_batch_size import default_budget
from strop.plan.row_tokens import RowTokens, packed_tokens, padded_tokens
from strop.policy.build import build_policy
from strop.policy.kernels import product_rates
from strop.policy.model.folder import inspect_model, source_of
from strop.policy.model.from_config import CannotBuildError
from strop.policy.model.model_hashes import configuration_hash, files_hash
from strop.policy.other_models import attach_teacher, reference_policy, teacher_section
from strop.policy.policy import Policy
from strop.policy.precision import Precision, resolve_precision
from strop.policy.reference_models import FrozenReference, SyncedReference
from strop.policy.reference_store import ReferenceStore
from strop.prepared import Prepared, prepare, with_budget
from strop.rollout.build import rollout_source, scores_of
from strop.rollout.rollout_source import RolloutSource
from strop.run_description import describe
from strop.world import World

log = logging.getLogger("strop")

Splits = tuple[GroupSet, GroupSet | None]
"""Training and validation groups."""


@dataclass(frozen=True)
class Settled:
    """A run in which everything is decided and no weight is loaded.

    prepared: its configuration now says how large micro-batches are and which layers are recomputed. tokens: how many
    tokens groups take in the row layout of the run.
    """

    prepared: Prepared
    machine: Machine
    precision: Precision
    tokens: RowTokens

    def describe(self) -> Iterator[str]:
        """Lines of text: what the run will be."""
        return describe(self.prepared, self.tokens)

    def prediction(self) -> list[str]:
        """Lines of text: the memory that the run will take."""
        return list(prediction(self.prepared, self.machine, self.precision, self.tokens))

    def longest(self) -> list[str]:
        """Lines of text: the longest group that fits."""
        return longest_line(self.prepared, self.machine, self.precision, self.tokens)

    def time(self) -> list[str]:
        """Lines of text: the time that the run will take. On a CPU, layers are timed, for up to half a minute."""
        return predicted_time(self.prepared, self.machine, self.precision, self.tokens)


class Session:
    """The work on one model, as a `with` block: inside, a CPU computes matrix products in the way chosen for the run.

    Args:
        world: this process and its device. None: nothing will be loaded, only planned for `machine`.
        machine: what the run must fit. Default: the machine of the world's device.
        num_processes: how many will train together. Default: those of the world.
        resumed: the checkpoint that the run continues from.
        read: tokenizer and data, if they have been read already.
        backward: whether there will be backward passes, which need memory for activations.
    """

    def __init__(
        self,
        config: RunConfig,
        model: ModelSection,
        world: World | None,
        *,
        machine: Machine | None = None,
        num_processes: int | None = None,
        resumed: Checkpoint | None = None,
        read: tuple[ModelRows, LoadedData] | None = None,
        backward: bool = True,
    ) -> None:
        assert world is not None or machine is not None
        self._config, self.model, self._world, self._machine = config, model, world, machine
        self._num_processes = num_processes or (world.size if world is not None else 1)
        self._resumed, self._read, self._backward = resumed, read, backward
        self._decided: Prepared | None = None  # of the last `Settled` that was made
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @property
    def world(self) -> World:
        assert self._world is not None, "a session without a world loads nothing"
        return self._world

    @property
    def config(self) -> RunConfig:
        """The configuration with everything that has been decided so far."""
        return (self._decided or self.prepared).config

    # -- before any weight is loaded ---------------------------------------------------------------------------------

    @cached_property
    def machine(self) -> Machine:
        """What this process has of it."""
        if self._machine is not None:
            return self._machine
        return machine_of(self.world.device).shared_by(self.world.local_size)

    @cached_property
    def prepared(self) -> Prepared:
        found = prepare(self._config, self.model, self._resumed, self._read, self._num_processes)
        if found.data.chat_template is not None:
            found.tokenizer.chat_template = found.data.chat_template  # goes into final/, for whoever generates
        return found

    @cached_property
    def _open(self) -> tuple[Prepared, Precision]:
        """The run with its precision decided; the size of micro-batches is still open."""
        found = self._precision(self.prepared.config)
        tokens = planned_rows(self.model)
        prepared = with_precision(self.prepared, self.machine, found, tokens, self._resumed)
        prepared = self._agreed(prepared)
        precision = self._precision(prepared.config)
        if self._world is not None:
            self._exit.enter_context(_one_way(precision, self._world, self._resumed))
        if not self._backward:
            without = {"training.gradient_checkpointing": False}
            prepared = replace(prepared, config=prepared.config.with_values(without, "nothing is trained"))
        return prepared, precision

    @cached_property
    def settled(self) -> Settled:
        """The run as planned from the configuration alone: prompts are shared if the architecture allows it."""
        return self._fitted(*self._open, planned_rows(self.model))

    def _precision(self, config: RunConfig) -> Precision:
        if self._world is None:
            return planned_precision(config, self.machine)
        return resolve_precision(config.training, self._world.device)

    def _fitted(self, prepared: Prepared, precision: Precision, tokens: RowTokens) -> Settled:
        if self._backward:
            prepared = fitted(prepared, self.machine, precision, tokens)
        else:
            prepared = with_budget(prepared, tokens, self.machine.kind)
        self._decided = self._agreed(prepared)
        return Settled(self._decided, self.machine, precision, tokens)

    def _agreed(self, prepared: Prepared) -> Prepared:
        """With the configuration of the main process: each measured its own device, and all must cut steps alike."""
        if self._world is None:
            return prepared
        return replace(prepared, config=self._world.on_main(lambda: prepared.config))

    # -- the model ---------------------------------------------------------------------------------------------------

    @cached_property
    def policy(self) -> Policy:
        settled = self.settled.prepared
        parts = (settled.config, self.model, self.world.device)
        policy = build_policy(*parts, tokenizer=settled.tokenizer, hashed=self._is_hashed, world=self.world)
        attach_teacher(settled.config, self.model, policy, settled.tokenizer)
        return policy

    @property
    def _is_hashed(self) -> bool:
        """Whether to hash the weights that the run begins with. Without a reference, full training needs no hash: all
        that is left of the first weights is in the checkpoint."""
        return self._config.adapts(self.model) or self.prepared.objective.needs_reference

    @cached_property
    def as_built(self) -> Settled:
        """`settled`, or, if the policy turned out not to share prompts, new micro-batches for plain rows. Which layers
        are recomputed stays as it is, because the policy has been built with it."""
        if self.policy.share_prefix or self.settled.tokens is not packed_tokens:
            return self.settled
        built = self.settled.prepared.config
        prepared, precision = self._open
        share = {"training.gradient_checkpointing": built.training.gradient_checkpointing}
        prepared = replace(prepared, config=prepared.config.with_values(share, built.origins))
        return self._fitted(prepared, precision, padded_tokens)

    @cached_property
    def made_from(self) -> dict[str, str]:
        """Hashes of what the run begins with, under the names used in checkpoints."""
        configuration = configuration_hash(self.policy.loaded_config)
        found = {"data": self.prepared.data.report.fingerprint, "configuration": configuration}
        if self.policy.teacher is not None:
            found["teacher"] = self.policy.teacher.model.weights_hash
        return found | {"weights": self.policy.weights_hash} if self._is_hashed else found

    @cached_property
    def base_files(self) -> dict[str, str]:
        """What `final/` says of the files of an adapter's base, so that it is used on no other; {} in full training."""
        if not self._config.adapts(self.model):
            return {}
        return {BASE: files_hash(inspect_model(self.model).weights)}

    @property
    def teacher_is_student(self) -> bool:
        """Whether the teacher is the model that is trained, as it is before the first step."""
        teacher = self.policy.teacher
        if teacher is None:
            return False
        if self._is_hashed:
            return teacher.model.weights_hash == self.policy.weights_hash
        section = teacher_section(self._config, self.model)
        return section is not None and source_of(section.huggingface_id) == source_of(self.model.huggingface_id)

    # -- groups and their reference ----------------------------------------------------------------------------------

    @cached_property
    def cuts(self) -> Cuts:
        """How training and validation groups are first cut into micro-batches."""
        training, data, tokens = self.as_built.prepared.config.training, self.prepared.data, self.as_built.tokens
        assert training.micro_batch_tokens is not None
        cut = Cut(training.micro_batch_tokens, tokens, self._group_cost)
        if not data.eval:
            return Cuts(cut, cut)
        budget = default_budget(data.eval, training.per_device_eval_batch_size, tokens, self.world.device.type)
        return Cuts(cut, replace(cut, budget_tokens=budget))

    @property
    def _group_cost(self) -> GroupCost:
        """By tokens alone, if nothing is known of the architecture. One process has nothing to deal."""
        if self.world.size == 1:
            return BY_TOKENS
        try:
            return group_cost(self.as_built.prepared.shape(), self.config)
        except CannotBuildError:
            return BY_TOKENS

    def groups(self) -> Splits:
        """Training and validation groups, without reference log-probs. If the objective asks for mismatched
        completions (those of other prompts), they are attached."""
        data, objective = self.prepared.data, self.prepared.objective
        train, validation = GroupSet(data.train, wants=objective.reads & Policy.SUPPLIES), None
        if data.eval:
            validation = replace(train, groups=data.eval)
        if MISMATCHED in objective.also:
            train = self._with_mismatched(train, self.prepared.plan.num_epochs)
            validation = validation and self._with_mismatched(validation, 1)
        return train, validation

    def _with_mismatched(self, groups: GroupSet, num_epochs: int) -> GroupSet:
        """The groups, and with them their prompts paired with completions of other prompts, for each epoch."""
        limit, seed = self.config.training.max_seq_length, self.config.seed
        others = Mismatched(groups.groups, num_epochs=num_epochs, seed=seed, max_tokens=limit)
        return replace(groups, also={MISMATCHED: replace(groups, groups=others, wants=frozenset())})

    def reference(self) -> AbstractContextManager[Policy]:
        """The model to score the reference with: the policy itself, or another one that is loaded for the block."""
        return reference_policy(self.config, self.model, self.policy, self.prepared.tokenizer)

    def score(self, reference: Policy, progress: Progress, folder: Path | None) -> Splits:
        """Scores the groups with a reference that does not change during the run.

        Args:
            folder: the run folder, in which the log-probs are kept. None: they are scored for later runs, and failing
                to store them is an error.

        Returns:
            Training and validation groups with all reference log-probs that the run will need.
        """
        plan, training, ahead = self.prepared.plan, self.config.training, folder is None
        store = None
        # what is stored is checked by passes of rank 0, which a sharded reference cannot make alone
        if training.reference_store and self.world.is_main and reference.strategy.repeats:
            store = ReferenceStore.of(reference, reference.weights_hash, must_keep=ahead)
        folder = folder if folder is not None and folder.is_dir() else cache_folder("references", must_keep=ahead)
        train, validation = self.groups()
        # The cut decides the last bits of the log-probs. The budget of training steps depends on the memory that is
        # free today, so it would make a store of little use to other runs.
        tokens, device = self.as_built.tokens, self.world.device.type
        own_cut = Cut(default_budget(train.groups, training.per_device_train_batch_size, tokens, device), tokens)
        visits = plan.all_visits() if train.also else None
        world = self.world
        train = scored(reference, store, train, own_cut, progress, folder, world, plan.all_groups(), visits)
        # cut as the evaluation will cut them
        return train, validation and scored(reference, store, validation, self.cuts.evaluation, progress, folder, world)

    def source(self, splits: Splits, folder: Path) -> StepSource:
        """The groups of every step.

        Args:
            folder: of the run, where what is sampled is written down.
            splits: what `score` returns; or what `groups` returns, if the objective needs no reference or has one that
                follows the policy.
        """
        if self.config.rollout.enabled:
            return self._rollouts(folder)
        sync = self.prepared.objective.ref_sync
        following = None if sync is None else SyncedReference(self.policy, sync.every_steps, sync.share)
        return OfflineSource(self.prepared.plan, *splits, following)

    @cached_property
    def kept_reference(self) -> Policy | FrozenReference | None:
        """The reference of a run that samples, which scores in every step: another model, or the policy as it is now;
        None where the objective reads none."""
        if not self.prepared.objective.needs_reference:
            return None
        found = self._exit.enter_context(self.reference())
        return FrozenReference(self.policy) if found is self.policy else found

    def _rollouts(self, folder: Path) -> RolloutSource:
        """Groups that the policy samples."""
        prepared, reference = self.prepared, self.kept_reference
        train, held_out = prepared.data.train, prepared.data.eval
        assert isinstance(train, PromptGroups)
        source = rollout_source(
            self.config,
            self.model,
            prepared.plan,
            train,
            held_out if isinstance(held_out, PromptGroups) else None,
            self.policy,
            prepared.objective,
            prepared.tokenizer,
            self.cuts.training,
            folder,
            log.warning,
            self.world,
            reference=None if reference is None else scores_of(reference),
        )
        self._exit.callback(source.close)
        source.rewind(self._resumed.step if self._resumed else 0)
        return source


def reference_made_from(reference: Policy) -> dict[str, str]:
    """Hashes of a reference that is another model, under the names used in checkpoints."""
    configuration = configuration_hash(reference.loaded_config)
    return {"reference": reference.weights_hash, "reference_configuration": configuration}


def _one_way(precision: Precision, world: World, resumed: Checkpoint | None) -> AbstractContextManager[None]:
    """A block in which a CPU computes matrix products in one fixed way: that of the resumed run, if there is one, and
    the same in all processes."""
    if world.device.type != "cpu":
        return nullcontext()
    before = resumed.state.get("products") if resumed else None
    return product_rates.taking(world.on_main(lambda: product_rates.ways_of_run(precision.compute, before)))
