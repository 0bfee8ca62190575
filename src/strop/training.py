"""`strop train`: trains every model of a configuration. Floor 8.

For each model: open the run folder, build the session, check a resume, run the loop, write the final model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch

from strop import durable, garbage_collection
from strop.config import RunConfig, load_config, of_model, resolve, to_yaml
from strop.config.sections import ModelSection
from strop.device import start_world
from strop.disk_estimate import check_space
from strop.distributed import is_restarted
from strop.each_model import for_each_model
from strop.engine import checkpoint, checkpoint_writer, final_model
from strop.engine.agreement import check_alike, start_facts
from strop.engine.checkpoint import Checkpoint
from strop.engine.device_memory import device_facts
from strop.engine.ending import Ending, RunResult
from strop.engine.environment import write_environment
from strop.engine.loop import Loop
from strop.engine.outputs import RunOutputs
from strop.engine.progress import Progress, StopSignal
from strop.engine.recipe import check_made_from, check_recipe, recipe_of
from strop.engine.step_source import StepSource
from strop.engine.train_state import TrainState
from strop.errors import ConfigError, Interrupted, PeerError, StoppedByFinding, StropError, TrainingError
from strop.estimate import LEFT_OUT
from strop.export.converted_bases import with_converted
from strop.generate.while_training import Asked, prompts_of, samples_of
from strop.heartbeat import ENDING
from strop.modelcard import model_card
from strop.policy.kernels import product_rates
from strop.policy.model.end_tokens import trained_ends
from strop.policy.policy import Policy
from strop.policy.reference_models import FrozenReference
from strop.preflight import check, run_folder, select_models
from strop.push import push_finished
from strop.report_files import report, write_plan
from strop.resuming import already_finished, best_checkpoint, look_for_best, look_in, mirror
from strop.rollout.rollout_source import RolloutSource
from strop.rundir import RunDir
from strop.runfiles import FAILURE, FORECAST, RESULT
from strop.session import Session, Splits, reference_made_from
from strop.significance import change_of_rows
from strop.trackers.fan_out import Trackers
from strop.trackers.open_trackers import open_trackers
from strop.trackers.tracker import Ended
from strop.world import World

log = logging.getLogger("strop")


@garbage_collection.rare()
def train(
    config: RunConfig | str | PathLike[str],
    *,
    model_index: int | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    allow_changes: bool = False,
) -> list[RunResult]:
    """Trains the models of `config`, one after the other.

    Args:
        config: a configuration, or the path of a YAML file with one.
        model_index: train only the model at this position, from 0.
        resume: "auto" continues from the newest complete checkpoint of the run folder, or starts if there is none; a
            path continues from that checkpoint. Default: `finetuning.resume_from_checkpoint`.
        overwrite: delete the run that is in the run folder.
        allow_changes: resume although data, or settings that change the result, differ from those of the run.

    Raises:
        StropError: something that the user can fix. With several models, it is raised after all have been tried.
        Interrupted: a signal stopped the run; a checkpoint has been written.
    """
    config = resolve(config if isinstance(config, RunConfig) else load_config(config))
    select_models(config, model_index)
    config = with_converted(config, model_index)
    models = select_models(config, model_index)
    if len(models) > 1 and (resume or config.finetuning.resume_from_checkpoint or "auto") != "auto":
        raise ConfigError(
            f"{len(models)} models cannot resume from one checkpoint",
            where=f"--resume {resume or config.finetuning.resume_from_checkpoint}",
            expected="auto, which finds the checkpoint of each model",
            fix="choose the model of this checkpoint with --model-index",
        )
    results: list[RunResult] = []
    with start_world(config.gpu) as world:
        with world.together():
            check_alike(world, start_facts(config))
            check(config, model_index=model_index, resume=resume)  # all models, before the first trains
        asked = _Asked(resume, overwrite, allow_changes)
        if world.any(is_restarted()):  # on the machine of the process that failed; the others hear of it here
            asked = asked.again(config)
        for_each_model(models, config, world, lambda model: results.append(_train_model(config, model, world, asked)))
    return results


class _Asked(NamedTuple):
    """What to do about a run that stands in the run folder; see `train`."""

    resume: str | None
    overwrite: bool
    allow_changes: bool

    def again(self, config: RunConfig) -> _Asked:
        """What a restarted attempt does: it goes on with what the attempts before it left. One that was to begin at a
        named checkpoint begins there again: what else is in the folder may be of another course."""
        named = None if self.overwrite else config.finetuning.resume_from_checkpoint
        resume = self.resume or named or "auto"
        log.info("restarted by torchrun: going on as with --resume %s", resume)
        return self._replace(resume=resume, overwrite=False)


def _train_model(config: RunConfig, model: ModelSection, world: World, asked: _Asked) -> RunResult:
    config = of_model(config, model)
    resume = asked.resume or (None if asked.overwrite else config.finetuning.resume_from_checkpoint)
    with (
        _open(config, model, world, asked.overwrite, resume) as run,
        Progress.of_run(config, world) as progress,
    ):
        done, saved, extended = world.on_main(lambda: look_in(config, run, resume))
        with Session(config, model, world, resumed=done or saved) as session:
            prompts = _build(session, None if done else run, saved.step if saved else 0)
            session.policy.strategy.check_folder(run.path)
            check_alike(world, session.made_from)
            if done:
                return already_finished(done, session, run)
            if saved:
                check_recipe(saved, session.config, session.made_from, asked.allow_changes, extended=extended)
            _tell(model, session.as_built.describe())
            return _Run(session, prompts, run, progress, saved, asked.allow_changes).whole()


def _open(config: RunConfig, model: ModelSection, world: World, overwrite: bool, resume: str | None) -> RunDir:
    """The run folder, entered by rank 0; the others only know its parts."""
    folder, logging_dir = run_folder(config, model), config.logging.logging_dir
    if not world.is_main:
        return RunDir(folder, logging_dir=logging_dir)
    return RunDir.open(folder, resume=resume is not None, overwrite=overwrite, logging_dir=logging_dir)


def _build(session: Session, run: RunDir | None, steps_done: int) -> Sequence[Asked]:
    """Builds the parts of the session in order, and logs what is known at each point before the next, slower one.
    Returns the prompts of the samples that it will take.

    run: where the run will write; None if nothing will be trained.
    """
    model = session.model
    session.world.doing("reading the rows")
    _tell(model, session.prepared.data.report.lines())
    for note in session.prepared.advice():
        log.warning("%s: %s", model.name, note)
    _tell(model, session.settled.prediction())  # before anything large is loaded
    log.debug("%s: %s", model.name, LEFT_OUT)
    if run is not None and session.world.is_main:
        found, freed = session.settled, run.replaced_bytes()
        for note in check_space(found.prepared, found.precision, run.path, steps_done=steps_done, freed=freed):
            log.warning("%s: %s", model.name, note)
    prompts = prompts_of(session) if run is not None else ()
    session.world.doing("loading the model")
    _tell(model, session.policy.describe())
    if session.as_built is not session.settled:
        _tell(model, session.as_built.prediction())
    return prompts


def _tell(model: ModelSection, lines: Iterable[str]) -> None:
    for line in lines:
        log.info("%s: %s", model.name, line)


class _Run:
    """Trains one model into its run folder, from the first step or from the checkpoint `saved`.

    made_from: hashes of everything that the result depends on. Those of a reference are added once it is scored.
    base: what tells the base of an adapter from others.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Asked],
        run: RunDir,
        progress: Progress,
        saved: Checkpoint | None,
        allow_changes: bool,
    ) -> None:
        self.session, self.prompts, self.run, self.progress = session, prompts, run, progress
        self.saved, self.allow_changes = saved, allow_changes
        self.made_from, self.base = session.made_from, session.base_files
        self.processes = session.world.gather(device_facts(session.world.device))
        self.resumed_at = saved.step if saved else 0

    def whole(self) -> RunResult:
        """Scores the reference, trains, and writes the final model."""
        session, name = self.session, self.session.model.name
        source = session.source(self._splits(), self.run.path)
        if not self.saved and session.world.is_main:
            self._write_records()  # from here on the folder holds a run; what failed before can be started anew
        trackers = self._open_trackers()
        outputs = self._outputs(trackers, source.num_steps)
        ended: Ended = "failed"
        try:
            with StopSignal(outputs.note) as stop:
                state, step = self._steps(source, outputs, stop)
            result = self._finished(source.num_steps, state, step, trackers)
            ended = "finished"
            return result
        except Interrupted as stopped:
            ended = "stopped"
            by_finding = self._by_finding(stopped, outputs)
            why = stop.name if by_finding is None else f"finetuning.stop_on ({by_finding.finding})"
            log.info("%s: stopped by %s after step %d of %d", name, why, stopped.step, source.num_steps)
            raise by_finding or stopped from None
        except (TrainingError, PeerError) as error:
            if session.world.is_main:
                session.world.doing(ENDING)
                self._note_failure({"error": error.found, "where": error.where, "fix": error.fix})
                report(session, self.run, trackers)
            raise
        finally:
            if session.world.is_main:
                session.world.doing(ENDING)
            trackers.close(ended)

    def _steps(self, source: StepSource, outputs: RunOutputs, stop: StopSignal) -> tuple[TrainState, int]:
        """Trains. Returns the state after the last step, and the step whose weights the policy holds."""
        session = self.session
        devices = [session.world.device] if session.world.device.type == "cuda" else []
        try:
            # training seeds torch's generators; afterwards they continue where the caller left them
            with torch.random.fork_rng(devices):
                parts = (session.policy, session.prepared.objective, source, session.cuts, outputs, session.world)
                self._forecast(source, stop)
                samples = samples_of(session, self.prompts, outputs, self.run.samples)
                asked = lambda: stop.requested or outputs.stopped_on is not None  # noqa: E731
                loop = Loop(session.config, *parts, should_stop=asked, samples=samples)
                return self._train(loop, outputs)
        finally:
            outputs.close()

    def _finished(self, num_steps: int, state: TrainState, step: int, trackers: Trackers) -> RunResult:
        """Writes the final model of a run whose last step is done. step: the one whose weights the policy holds."""
        session = self.session
        weights, world = session.policy.strategy.trained, session.world
        checkpoint_writer.refuse_nonfinite(f"no final model after step {state.step}", weights, world)

        session.world.doing("writing the final model")
        if not world.is_main:
            session.policy.help_to_save()

        def finish() -> Ending:
            records = self.run.metrics.read()
            change = change_of_rows(self.run.logs, 0, step, len(session.prepared.data.eval or ()) or None)
            parts = (session.config, state)
            ending = Ending.of(*parts, num_steps=num_steps, final_step=step, records=records, change=change)
            self._finish(ending, trackers)
            return ending

        return RunResult(session.model.name, self.run.path, world.on_main(finish))

    def _forecast(self, source: StepSource, stop: StopSignal) -> None:
        """Forecasts how many groups will have no signal, before the first step of a run that is not resumed."""
        probe = source.probe if isinstance(source, RolloutSource) else None
        if probe is None or self.saved:
            return
        world, rollout = self.session.world, self.session.config.rollout
        world.doing("sampling for the forecast")
        task = self.progress.task("forecast", len(probe.numbers))
        try:
            found = probe.run(lambda n: task.step(n=n), lambda: world.any(stop.requested))
        finally:
            task.close()
        if found is not None and world.is_main:
            self.run.write_json(FORECAST, found.as_dict())
            _tell(self.session.model, found.lines(draws_others=rollout.dynamic_sampling))

    def _by_finding(self, stopped: Interrupted, outputs: RunOutputs) -> StoppedByFinding | None:
        """Whether a finding stopped the run, which is told by the report and remembered in the run folder."""

        def look() -> tuple[str, str] | None:
            finding = outputs.stopped_on
            if finding is None:
                return None
            self._note_failure({"stopped_on": finding.id, "claim": finding.claim, "step": stopped.step})
            report(self.session, self.run, outputs.trackers)
            return finding.id, finding.claim

        found = self.session.world.on_main(look)
        return None if found is None else StoppedByFinding(stopped.step, stopped.checkpoint, *found)

    def _note_failure(self, what: Mapping[str, object]) -> None:
        """Writes failure.json. Where the disk does not take it, what ended the run is still what is told."""
        try:
            self.run.write_json(FAILURE, what)
        except StropError as error:
            log.warning("%s: %s", self.session.model.name, error)

    def _splits(self) -> Splits:
        """The groups, with reference log-probs if the objective needs a reference that does not change."""
        session = self.session
        if session.config.rollout.enabled:
            self._note_reference(session.kept_reference)
        if not session.prepared.scored_ahead:
            return session.groups()
        session.world.doing("scoring the reference")
        with session.reference() as reference:
            self._note_reference(reference)
            return session.score(reference, self.progress, self.run.path)

    def _note_reference(self, reference: Policy | FrozenReference | None) -> None:
        """Adds the hashes of a reference that is another model, and compares them with those of the checkpoint."""
        if not isinstance(reference, Policy) or reference is self.session.policy:
            return
        others = reference_made_from(reference)
        self.made_from = self.made_from | others
        if self.saved:
            check_made_from(self.saved, others, self.allow_changes)

    def _open_trackers(self) -> Trackers:
        session = self.session
        if not session.world.is_main:
            return Trackers({})
        resumed_at = self.resumed_at if self.saved else None
        return open_trackers(session.config, self.run, name=session.model.name, resumed_at=resumed_at)

    def _outputs(self, trackers: Trackers, num_steps: int) -> RunOutputs:
        parts = (self.session.config, self.run, trackers, self.progress, self.session.world)
        return RunOutputs(*parts, made_from=self.made_from, num_steps=num_steps, resumed_at=self.resumed_at)

    def _train(self, loop: Loop, outputs: RunOutputs) -> tuple[TrainState, int]:
        """Returns the state after the last step, and the step whose weights the policy holds: the last or the best."""
        is_main = self.session.world.is_main
        if self.saved:
            loop.restore(self.saved)
            look_for_best(loop, self.run, self.saved)
            if is_main:
                checkpoint.retire_newer(self.run.path, self.saved.step)
                self._write_records()  # only now: the checkpoint has been found to fit
        evaluated = loop.state.evaluated_step == self.resumed_at
        outputs.rewind(self.resumed_at if self.saved else -1, evaluated=evaluated)
        state = loop.run()
        best = partial(best_checkpoint, self.run, self.saved)
        on_main = self.session.world.on_main
        return state, loop.load_best(lambda step: on_main(lambda: checkpoint.open_checkpoint(best(step))))

    def _finish(self, ending: Ending, trackers: Trackers) -> None:
        """Writes the final model, and logs how the run ended."""
        session, run, step = self.session, self.run, ending.final_step
        prepared, policy, name = session.prepared, session.policy, session.model.name
        run.write_json(RESULT, ending.as_dict())
        writes = not policy.is_reward_model
        ends = trained_ends(prepared.data.train, prepared.tokenizer) if writes else None
        save = partial(policy.save_pretrained, tokenizer=prepared.tokenizer, ends=ends)
        recipe = recipe_of(session.config)
        card = model_card(session.config, session.model, ending, prepared.data.report.as_dict(), writes=writes)

        def write(folder: Path) -> None:
            save(folder)
            (folder / "README.md").write_text(card, encoding="utf-8")

        made_from = self.made_from | self.base
        about = {"step": step, "num_steps": ending.num_steps}
        final_model.export(run, write, needed=policy.saved_bytes, **about, recipe=recipe, made_from=made_from)
        mirror(session.config, run)
        _tell(session.model, ending.lines())
        if warning := ending.warning():
            log.warning("%s: %s", name, warning)
        report(session, run, trackers)
        push_finished(session.config, session.model, run.path)
        log.info("%s: the model of step %d is in %s", name, step, run.final)

    def _write_records(self) -> None:
        """Writes what is known of a run before its first step: configuration, environment, data report."""
        config, data = self.session.config, self.session.prepared.data
        self.run.write_text("config.yaml", to_yaml(config))
        products = product_rates.record()
        write_environment(self.run, self.saved, seed=config.seed, products=products, processes=self.processes)
        write_plan(self.session, self.run)
        durable.remove(self.run.path / FAILURE)  # of the process that this one continues
        self.run.write_json("data.json", data.report.as_dict())
        if data.rejected:
            self.run.write_lines("rejected.jsonl", data.rejected)
