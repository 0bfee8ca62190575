"""The `logging` section of the configuration. Floor 1, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from strop.config.section import ListOf, Problem, Section


class LoggingSection(Section):
    """What is written down besides metrics.jsonl."""

    report_to: ListOf[Literal["tensorboard"]] = ()
    """Trackers."""
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
