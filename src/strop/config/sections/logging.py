"""The `logging` section of the configuration. Floor 1, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from strop.config.base_section import ListOf, Problem, Section


class LoggingSection(Section):
    """What is written down besides metrics.jsonl."""

    report_to: ListOf[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = ()
    """Trackers; all but tensorboard need the extra of their name. Each one's own variables (WANDB_MODE,
    MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...) say where its server is: docs/trackers.md."""
    run_name: str | None = Field(default=None, json_schema_extra={"x-default": "the name of the model"})
    """What trackers call the run."""
    wandb_project: str | None = Field(default=None, json_schema_extra={"x-default": "$WANDB_PROJECT, else strop"})
    """The project of W&B."""
    mlflow_experiment: str | None = Field(
        default=None, json_schema_extra={"x-default": "$MLFLOW_EXPERIMENT_NAME, else strop"}
    )
    """The experiment of MLflow."""
    trackio_project: str | None = Field(default=None, json_schema_extra={"x-default": "strop"})
    """The project of Trackio."""
    logging_dir: str = "./logs"
    """Folder of trackers and margins; relative to the run folder."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much the terminal says."""
    margins: bool = True
    """Write every step's margins to {logging_dir}/margins (methods with a margin)."""

    def problems(self) -> Iterator[Problem]:
        if re.match(r"(\./+)*(final|checkpoint-[^/]*|[^/]+\.(yaml|json|jsonl|html))(/|$)", self.logging_dir):
            yield Problem(
                ("logging_dir",),
                f"logging_dir is {self.logging_dir!r}, a name that the run folder has for something else",
                "another name, such as ./logs",
            )
