"""The wiring, and the only one: a configuration becomes objects, the objects become a run. Floor 6.

config -> device, run folder -> tokenizer, groups, plan -> policy -> reference log-probs -> loop -> final model
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch

from strop.batch import NOTHING
from strop.config import RunConfig, load_config, of_model, resolve, to_yaml
from strop.config.sections import ModelSection
from strop.data.mismatch import Mismatched
from strop.data.plan import RowTokens, default_budget, packed_tokens, padded_tokens
from strop.distributed import pick_device
from strop.engine import checkpoint, final
from strop.engine.checkpoint import Checkpoint
from strop.engine.ending import Ending, RunResult, ending_of
from strop.engine.environment import write_environment
from strop.engine.loop import Loop
from strop.engine.memory import explaining_memory
from strop.engine.outputs import RunOutputs
from strop.engine.progress import Progress, StopSignal
from strop.engine.recipe import check_finished, check_given, check_made_from, check_recipe, extends, recipe_of
from strop.engine.rows import Rows, scored
from strop.engine.trackers import open_trackers
from strop.errors import CheckpointError, ConfigError, Interrupted, StropError, TrainingError
from strop.estimate import LEFT_OUT, fitted, planned_rows, prediction, with_precision
from strop.machine import machine_of
from strop.objectives.base import build_objective
from strop.policy import rates
from strop.policy.generation import trained_ends
from strop.policy.policy import Policy, build_policy
from strop.policy.precision import Precision, resolve_precision
from strop.policy.reference import SyncedReference, reference_policy
from strop.policy.store import ReferenceStore, configuration_hash, weights_hash
from strop.preflight import check, run_folder, select_models
from strop.prepared import Prepared, prepare, with_budget
from strop.rundir import RESULT, TO_BE_REPLACED, RunDir

log = logging.getLogger("strop")

Splits = tuple[Rows, Rows | None]
"""Training and validation rows."""


def train(
    config: RunConfig | str | PathLike[str],
    *,
    model_index: int | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    allow_changes: bool = False,
) -> list[RunResult]:
    """Train the models of `config`, one after the other.

    Args:
        config: a configuration, or the path of a YAML file with one.
        model_index: train only this one, from 0.
        resume: "auto" goes on from the newest complete checkpoint of the run folder (or starts, where there is none);
            a path goes on from that checkpoint. Default: `finetuning.resume_from_checkpoint`.
        overwrite: delete the run that stands in the run folder.
        allow_changes: resume although settings or data that change the result are not those of the run.

    Raises:
        StropError: something that the user can mend. With several models, every model is tried first.
        Interrupted: stopped by a signal after a checkpoint.
    """
    config = resolve(config if isinstance(config, RunConfig) else load_config(config))
    models = select_models(config, model_index)
    if len(models) > 1 and (resume or config.finetuning.resume_from_checkpoint or "auto") != "auto":
        raise ConfigError(
            f"one checkpoint cannot be gone on from by {len(models)} models",
            where=f"--resume {resume or config.finetuning.resume_from_checkpoint}",
            expected="auto, which finds each model's own",
            fix="choose the model of this checkpoint with --model-index",
        )
    check(config, model_index=model_index, resume=resume)  # all of them, before the first trains
    results: list[RunResult] = []
    _for_each(models, config, lambda m: results.append(_train_model(config, m, resume, overwrite, allow_changes)))
    return results


def _for_each(models: Sequence[ModelSection], config: RunConfig, work: Callable[[ModelSection], None]) -> None:
    """All of them, also after one that fails."""
    failures: list[tuple[str, StropError]] = []
    for model in models:
        try:
            with explaining_memory(config, model.name or model.huggingface_id):
                work(model)
        except StropError as error:
            if len(models) == 1:
                raise
            log.error("%s failed: %s", model.name, error)
            failures.append((model.name, error))
    if failures:
        raise TrainingError(
            f"{len(failures)} of {len(models)} models failed: "
            + "; ".join(
                f"{name}: {error.where + ': ' if error.where else ''}{error.found}" for name, error in failures
            ),
            fix="the messages above say what to do for each",
        )


def fill_references(config: RunConfig, *, model_index: int | None = None) -> None:
    """Score the reference of each model of `config` on its rows and keep the log-probs for runs to come.

    Raises:
        StropError: the method needs none, they are not kept, or what would stop the run before its first step.
    """
    config = resolve(config)
    objective = build_objective(config.post_training)
    if not objective.needs_reference or objective.ref_sync is not None or not config.training.reference_store:
        raise ConfigError(
            "there is nothing to score ahead",
            where=f"post_training.method: {config.post_training.method}",
            expected="a method with a reference that stays as it is, and training.reference_store: true",
        )
    _for_each(select_models(config, model_index), config, lambda model: _fill_reference(config, model))


def _one_way(
    precision: Precision, device: torch.device, saved: Checkpoint | None = None
) -> AbstractContextManager[None]:
    """Inside, products on a CPU go one way, that of the run that is gone on from."""
    if device.type != "cpu":
        return nullcontext()
    return rates.taking(rates.ways_of_run(precision.compute, saved.state.get("products") if saved else None))


def _fill_reference(config: RunConfig, model: ModelSection) -> None:
    device = _device(config)
    prepared = prepare(config, model)
    found = resolve_precision(prepared.config.training, device)
    prepared = with_precision(prepared, machine_of(device), found, planned_rows(model))
    nothing_kept = {"training.gradient_checkpointing": False}  # scoring has no backward pass
    prepared = replace(prepared, config=prepared.config.with_values(nothing_kept, "strop reference"))
    with (
        _one_way(resolve_precision(prepared.config.training, device), device),
        Progress(quiet=config.logging.log_level in ("warning", "error")) as progress,
    ):
        policy = build_policy(prepared.config, model, device, tokenizer=prepared.tokenizer)
        tokens = packed_tokens if policy.share_prefix else padded_tokens
        prepared = with_budget(prepared, tokens, device.type)
        rows = _rows(prepared, tokens, device)
        with reference_policy(prepared.config, model, policy, prepared.tokenizer) as reference:
            score_reference(prepared, reference, weights_hash(reference.model), rows, progress, must_keep=True)
    log.info("%s: the reference's log-probs are in the store", model.name)


def _train_model(
    config: RunConfig, model: ModelSection, resume: str | None, overwrite: bool, allow_changes: bool
) -> RunResult:
    device = _device(config)
    config = of_model(config, model)
    resume = resume or (None if overwrite else config.finetuning.resume_from_checkpoint)
    folder = run_folder(config, model)
    logging_dir = config.logging.logging_dir
    with (
        RunDir.open(folder, resume=resume is not None, overwrite=overwrite, logging_dir=logging_dir) as run,
        Progress(quiet=config.logging.log_level in ("warning", "error")) as progress,
        ExitStack() as stack,
    ):
        done = final.finished(run) if resume else None
        longer = done is not None and resume == "auto" and extends(done, config)
        if longer:  # the old model stays until the new one is there
            done = None
        if done:  # what can be seen at once; the rest below, as for a run that is not finished
            check_given(done, config, str(resume))
        saved = None if done else _checkpoint_to_resume(run, resume)
        if config.training.mount_dir:
            run.mirror_target(config.training.mount_dir)  # now, not after hours
        prepared = prepare(config, model, done or saved)
        _tell(model, prepared.data.report.lines())
        for note in prepared.advice():
            log.warning("%s: %s", model.name, note)
        if prepared.data.chat_template is not None:
            prepared.tokenizer.chat_template = prepared.data.chat_template  # goes into final/, for whoever generates
        machine, tokens = machine_of(device), planned_rows(model)
        found = resolve_precision(prepared.config.training, device)
        prepared = with_precision(prepared, machine, found, tokens, done or saved)
        precision = resolve_precision(prepared.config.training, device)
        stack.enter_context(_one_way(precision, device, saved))
        settled = fitted(prepared, machine, precision, tokens)
        _tell(model, prediction(settled, machine, precision, tokens))  # before anything large is loaded
        log.debug("%s: %s", model.name, LEFT_OUT)
        policy = build_policy(settled.config, model, device, tokenizer=prepared.tokenizer)
        _tell(model, policy.describe())
        if not policy.share_prefix and tokens is packed_tokens:  # the probe refused what the configuration promised
            # micro-batches are chosen anew; layers are checkpointed as they are in the policy, which is built
            share = {"training.gradient_checkpointing": settled.config.training.gradient_checkpointing}
            tokens, decided = padded_tokens, prepared.config.with_values(share, settled.config.origins)
            settled = fitted(replace(prepared, config=decided), machine, precision, tokens)
            _tell(model, prediction(settled, machine, precision, tokens))
        made_from = {"data": prepared.data.report.fingerprint, "configuration": configuration_hash(policy)}
        if policy.has_adapters or prepared.objective.needs_reference:  # else a checkpoint has all that is left of them
            made_from["weights"] = weights_hash(policy.model)
        if done:
            return _already_finished(done, settled, policy, run, made_from)
        if saved:
            check_recipe(saved, settled.config, made_from, allow_changes, longer=longer)
        _tell(model, settled.describe(tokens))
        return _run(settled, policy, tokens, run, progress, saved, made_from, allow_changes)


def _tell(model: ModelSection, lines: Iterable[str]) -> None:
    for line in lines:
        log.info("%s: %s", model.name, line)


def _run(
    prepared: Prepared,
    policy: Policy,
    tokens: RowTokens,
    run: RunDir,
    progress: Progress,
    saved: Checkpoint | None,
    made_from: dict[str, str],
    allow_changes: bool,
) -> RunResult:
    config, plan = prepared.config, prepared.plan
    train, validation = _rows(prepared, tokens, policy.device)
    synced = _synced_reference(prepared, policy)
    if synced is not None:
        train, validation = _live(train, synced), validation and _live(validation, synced)
    elif prepared.objective.needs_reference:
        with reference_policy(config, prepared.model, policy, prepared.tokenizer) as reference:
            weights = made_from["weights"]
            if reference is not policy:
                others = _reference_made_from(reference)
                made_from, weights = made_from | others, others["reference"]
                if saved:
                    check_made_from(saved, others, allow_changes)
            train, validation = score_reference(prepared, reference, weights, (train, validation), progress)
    resumed_at = saved.step if saved else 0
    if not saved:
        _write_records(prepared, run)  # from here on the folder holds a run; what failed before can be started anew
    trackers = open_trackers(
        config.logging.report_to, run.logs, resumed_at=resumed_at if saved else None, config=to_yaml(config)
    )
    parts = (config, run, trackers, progress)
    outputs = RunOutputs(*parts, made_from=made_from, num_steps=plan.num_steps, resumed_at=resumed_at)
    try:
        devices = [policy.device] if policy.device.type == "cuda" else []
        # dropout's draws are seeded; the caller's go on
        with StopSignal(progress.note) as stop, torch.random.fork_rng(devices):
            run_of = (config, policy, prepared.objective, plan, train, validation, outputs)
            loop = Loop(*run_of, should_stop=lambda: stop.requested, reference=synced)
            if saved:
                loop.restore(saved)
                _look_for_best(loop, run, saved)
                checkpoint.retire_newer(run.path, saved.step)
                _write_records(prepared, run, saved)  # this run's, now that it is known to fit
            outputs.cut(resumed_at if saved else -1, evaluated=loop.state.evaluated_step == resumed_at)
            state = loop.run()
            step = loop.load_best(lambda best: checkpoint.open_checkpoint(_best(run, saved, best)))
    except Interrupted as stopped:
        log.info("%s: stopped by %s after step %d of %d", prepared.model.name, stop.name, stopped.step, plan.num_steps)
        raise
    finally:
        outputs.close()
    checkpoint.refuse_nonfinite(f"no final model after step {state.step}", policy.trainable())
    ending = Ending.of(config, state, num_steps=plan.num_steps, final_step=step, records=run.metrics.read())
    return _finish(prepared, policy, run, ending, made_from)


def _finish(prepared: Prepared, policy: Policy, run: RunDir, ending: Ending, made_from: dict[str, str]) -> RunResult:
    """Leave the final model, and say how the run ended."""
    name, step, recipe = prepared.model.name, ending.final_step, recipe_of(prepared.config)
    run.write_json(RESULT, ending.as_dict())
    ends = trained_ends(prepared.data.train, prepared.tokenizer)
    save = partial(policy.save_pretrained, tokenizer=prepared.tokenizer, ends=ends)
    final.export(run, save, needed=policy.saved_bytes, step=step, recipe=recipe, made_from=made_from)
    _mirror(prepared.config, run)
    _tell(prepared.model, ending.lines())
    if warning := ending.warning():
        log.warning("%s: %s", name, warning)
    log.info("%s: the model of step %d is in %s", name, step, run.final)
    return RunResult(name, run.path, ending)


def _reference_made_from(reference: Policy) -> dict[str, str]:
    """Hashes of another model that is the reference, by the names that checkpoints have."""
    return {"reference": weights_hash(reference.model), "reference_configuration": configuration_hash(reference)}


def _already_finished(
    done: Checkpoint, prepared: Prepared, policy: Policy, run: RunDir, made_from: dict[str, str]
) -> RunResult:
    """The result of a run that is finished, where it is this one."""
    if "reference" in done.identity:
        with reference_policy(prepared.config, prepared.model, policy, prepared.tokenizer) as reference:
            made_from = made_from | _reference_made_from(reference)
    check_finished(done, prepared.config, made_from)
    log.info("%s is finished: its model is in %s; nothing is trained", prepared.model.name, run.final)
    _mirror(prepared.config, run)
    return RunResult(prepared.model.name, run.path, ending_of(run.path))


def _checkpoint_to_resume(run: RunDir, resume: str | None) -> Checkpoint | None:
    if resume is None:
        return None
    named = None if resume == "auto" else Path(resume).expanduser()
    if run.replaces and (named is None or named.absolute().is_relative_to(run.path)):
        if named is not None:
            raise CheckpointError(
                "the run here was to be overwritten; it is not gone on from",
                where=f"--resume {named}",
                fix=f"give --resume alone, or --overwrite; to keep the earlier run, remove {run.path / TO_BE_REPLACED}",
            )
        return None
    found = checkpoint.newest(run.path) if named is None else checkpoint.open_checkpoint(named)
    if found is None and run.is_finished:
        raise CheckpointError(
            "the run is finished, its final model is damaged or to be trained further, and no checkpoint is left",
            where=str(run.final),
            fix="train anew with --overwrite or in another training.output_dir",
        )
    log.info("going on from %s", found.path) if found else log.info("no checkpoint in %s: starting", run.path)
    return found


def _best(run: RunDir, saved: Checkpoint | None, step: int) -> Path:
    """Where the checkpoint of the best evaluation is, which may be from before the resume, from another folder."""
    return (saved.path.parent if saved and step <= saved.step else run.path) / f"checkpoint-{step}"


def _look_for_best(loop: Loop, run: RunDir, saved: Checkpoint) -> None:
    """Say it now, not after the training, where the best model so far is gone."""
    best = loop.state.best_step
    if best is not None and loop.config.finetuning.load_best_model_at_end and not _best(run, saved, best).is_dir():
        log.warning("the best model so far, %s, is gone: a later one will be final", _best(run, saved, best))
        loop.state.best_step = None


def _mirror(config: RunConfig, run: RunDir) -> None:
    if config.training.mount_dir:
        log.info("mirrored to %s", run.mirror(config.training.mount_dir))


def _device(config: RunConfig) -> torch.device:
    """The device of a run, from now on the current one."""
    device, notes = pick_device(config.gpu)
    for note in notes:
        log.warning(note)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # libraries that are not told a device take the current one
        torch.cuda.reset_peak_memory_stats(device)  # of a model trained before
    return device


def _write_records(prepared: Prepared, run: RunDir, saved: Checkpoint | None = None) -> None:
    run.write_text("config.yaml", to_yaml(prepared.config))
    write_environment(run, saved, seed=prepared.config.seed, products=rates.record())
    run.write_json("data.json", prepared.data.report.as_dict())
    if prepared.data.rejected:
        run.write_lines("rejected.jsonl", prepared.data.rejected)


def _synced_reference(prepared: Prepared, policy: Policy) -> SyncedReference | None:
    sync = prepared.objective.ref_sync
    return None if sync is None else SyncedReference(policy, sync.every_steps, sync.share)


def _rows(prepared: Prepared, tokens: RowTokens, device: torch.device) -> Splits:
    """Training and validation rows, with their prompts' mismatched completions where the objective wants them."""
    training, data, objective = prepared.config.training, prepared.data, prepared.objective
    assert training.micro_batch_tokens is not None
    train, validation = Rows(data.train, training.micro_batch_tokens, tokens, extras=objective.extras), None
    if data.eval:
        budget = default_budget(data.eval, training.per_device_eval_batch_size, tokens, device.type)
        validation = replace(train, groups=data.eval, budget_tokens=budget)
    if objective.needs_mismatched:
        train = _with_mismatched(train, prepared.config, prepared.plan.num_epochs)
        validation = validation and _with_mismatched(validation, prepared.config, 1)
    return train, validation


def score_reference(
    prepared: Prepared, reference: Policy, weights: str, rows: Splits, progress: Progress, *, must_keep: bool = False
) -> Splits:
    """The rows with the log-probs of a reference that stays as it is, all that the run will want.

    weights: the reference's `weights_hash`. must_keep: what cannot be stored is an error.
    """
    train, validation = rows
    plan, keeps = prepared.plan, prepared.config.training.reference_store
    store = ReferenceStore.of(reference, weights, must_keep=must_keep) if keeps else None
    visits = plan.all_visits() if train.mismatched else None
    train = scored(reference, store, train, progress, plan.all_groups(), visits)
    # cut as the evaluation will cut them, so that the first one finds margins of exactly 0
    return train, validation and scored(reference, store, validation, progress)


def _with_mismatched(rows: Rows, config: RunConfig, num_epochs: int) -> Rows:
    """The rows, and their prompts with completions of others for so many epochs."""
    limit = config.training.max_seq_length
    others = Mismatched(rows.groups, num_epochs=num_epochs, seed=config.seed, max_tokens=limit)
    return replace(rows, mismatched=replace(rows, groups=others, extras=NOTHING))


def _live(rows: Rows, reference: SyncedReference) -> Rows:
    return replace(rows, ref_logps=lambda part: reference.logps([rows.groups[i] for i in part]))
