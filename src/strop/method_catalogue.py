"""What each method is, in words: formula, settings, data, metrics. Floor 6.

In: a method's name. Out: text for the terminal, or markdown for its page of the documentation. All of it is read off
the settings class and the objective, so that it cannot say anything else than the code does.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping

from strop.config.methods import METHODS, MethodSettings
from strop.config.schema import Key, setting
from strop.objectives.base import Objective, objective_class
from strop.objectives.pairs import PairObjective
from strop.types import RowShape

ROWS: Mapping[RowShape, str] = {
    "single": "One completion per row: messages, or prompt and completion.",
    "pair": "Pairs: prompt, chosen and rejected, or two conversations with a common beginning.",
    "labelled": "Labelled completions: prompt, completion and label (true: desirable). Or pairs; each becomes two.",
    "group": "Groups: prompt, completions (a list) and rewards (a list, one per completion); old_logps and "
    "sampler_logps, per trained token, and sampling_temperature where they are known. Or tokens: prompt_ids, "
    "completion_ids, rewards.",
}
REFERENCE = {
    True: "The reference's log-probs are scored before the first step; no second model stays in memory.",
    False: "There is no reference, and none is loaded.",
}


def explanation(method: str, width: int) -> str:
    """A method for the terminal."""
    settings, objective = METHODS[method], objective_class(METHODS[method])

    def paragraph(text: str, indent: int = 2) -> str:
        return textwrap.fill(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)

    parts = [_formula(objective), "", "Settings:"]
    for key in _settings(settings):
        parts.append(f"  {key.name}  ({key.expected}; default {key.default})")
        parts.append(paragraph(key.description, 6))
    parts += ["", "Data:", *map(paragraph, _needs(settings)), "", "Metrics:"]
    parts += [f"  {name}\n{paragraph(meaning, 6)}" for name, meaning in _metrics(objective)]
    return "\n".join(parts) + "\n"


def markdown(method: str) -> str:
    """The same for the method's page."""
    settings, objective = METHODS[method], objective_class(METHODS[method])
    rows = [f"| `{k.name}` | {k.expected} | {k.default} | {k.description} |" for k in _settings(settings)]
    metrics = [f"| `{name}` | {meaning} |" for name, meaning in _metrics(objective)]
    parts = [
        ["## Formula", "", "```text", _formula(objective), "```"],
        ["## Settings", "", "| key | value | default | meaning |", "|---|---|---|---|", *rows],
        ["## Data", "", " ".join(_needs(settings)) + " [All shapes](../data.md)."],
        ["## Metrics", "", "| name | how to read it |", "|---|---|", *metrics],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _formula(objective: type[Objective[MethodSettings]]) -> str:
    """The docstring of the objective's module: the formula, its paper, and where it differs."""
    return (sys.modules[objective.__module__].__doc__ or "").strip()


def _settings(settings: type[MethodSettings]) -> Iterator[Key]:
    method = settings.model_fields["method"].default
    return (setting(name, method) for name in settings.model_fields if name != "method")


def _metrics(objective: type[Objective[MethodSettings]]) -> Iterator[tuple[str, str]]:
    yield "loss", "what is minimised; see the formula"
    if issubclass(objective, PairObjective):
        yield "loss/preference, loss/nll", "the two parts of the loss, where it has a likelihood term"
    yield from objective.METRICS.items()


def _needs(settings: type[MethodSettings]) -> list[str]:
    objective = objective_class(settings)
    follows = objective.ref_sync is not Objective.ref_sync
    synced = ["With `ref_sync_steps`, a second model stays in memory and is scored in every step."] if follows else []
    return [ROWS[settings.ROWS], REFERENCE[objective(settings()).needs_reference], *synced]
