"""The models of a configuration, one after the other. Floor 4.

A model that fails does not stop the others: its error is logged at once, and in the end one error names all failures.
Only where the connection to the other processes broke, there is nobody left to train the next ones with.

Only one model is in memory at a time. What belongs to a model refers to each other in circles, which stay until Python
searches for garbage, and an error keeps what stood in the functions that it went through. So of an error only its words
are kept, and garbage is searched for after each model.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence

import torch

from strop.config import RunConfig
from strop.config.sections import ModelSection
from strop.engine.out_of_memory import explaining_memory
from strop.errors import LostError, StropError, TrainingError
from strop.world import World

log = logging.getLogger("strop")


def for_each_model(
    models: Sequence[ModelSection], config: RunConfig, world: World, work: Callable[[ModelSection], None]
) -> None:
    """Does `work` for every model, also after one that fails. A model that fails in one process fails in all.

    Raises:
        StropError: that of the model, where there is only one.
        LostError: the connection to the other processes broke.
        TrainingError: names those that failed, where there are several.
    """
    failures: list[str] = []
    for model in models:
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)  # of a model trained before
        try:
            with world.together(), explaining_memory(config, model.name or model.huggingface_id):
                work(model)
        except StropError as error:
            if len(models) == 1 or isinstance(error, LostError):
                raise
            log.error("%s failed: %s", model.name, str(error))
            failures.append(f"{model.name}: {error.where + ': ' if error.where else ''}{error.found}")
        gc.collect()
    if failures:
        raise TrainingError(
            f"{len(failures)} of {len(models)} models failed: {'; '.join(failures)}",
            fix="the messages above say what to do for each",
        )
