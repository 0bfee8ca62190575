"""`strop reference`: scores the reference before any run, so that runs find its log-probs in the store. Floor 7."""

from __future__ import annotations

import logging

from strop.config import RunConfig, resolve
from strop.config.sections import ModelSection
from strop.device import start_world
from strop.each_model import for_each_model
from strop.engine.progress import Progress
from strop.errors import ConfigError
from strop.export.converted_bases import with_converted
from strop.objectives.base import build_objective
from strop.preflight import select_models
from strop.prepared import scored_ahead
from strop.session import Session
from strop.world import World

log = logging.getLogger("strop")


def fill_references(config: RunConfig, *, model_index: int | None = None) -> None:
    """Scores the reference of each model of `config` on its rows and keeps the log-probs for later runs.

    Raises:
        StropError: the method needs no reference, the store is off, or whatever would stop a run before its first step.
    """
    config = resolve(config)
    objective = build_objective(config.post_training)
    if not scored_ahead(config, objective) or not config.training.reference_store:
        raise ConfigError(
            "there is nothing to score ahead",
            where=f"post_training.method: {config.post_training.method}",
            expected="a method with a reference that does not change, no rollout, and training.reference_store: true",
        )
    select_models(config, model_index)
    config = with_converted(config, model_index)
    models = select_models(config, model_index)
    with start_world(config.gpu) as world:
        for_each_model(models, config, world, lambda model: _fill_reference(config, model, world))


def _fill_reference(config: RunConfig, model: ModelSection, world: World) -> None:
    with (
        Progress.of_run(config, world) as progress,
        Session(config, model, world, backward=False) as session,
        session.reference() as reference,
    ):
        session.score(reference, progress, folder=None)
    log.info("%s: the reference's log-probs are in the store", model.name)
