"""An evaluation as text, and as JSON. Floor 8."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from strop.evaluate.intervals import LEVEL, Numbers, interval, resampled
from strop.evaluate.scoring import Evaluation

SEED = 0


def as_json(found: Evaluation) -> dict[str, Any]:
    """rows, reference, level, models: each with `metrics`, name -> value, interval (low, high) and, but for the first
    model, difference to the first, and its interval."""
    by_row = {(i, name): metric for i, model in enumerate(found.models) for name, metric in model.by_row.items()}
    drawn: dict[tuple[int, str], Numbers] = {}
    for size in {len(metric[0].sums) for metric in by_row.values()}:  # tasks have rows of their own
        same = {key: metric for key, metric in by_row.items() if len(metric[0].sums) == size}
        drawn |= dict(zip(same, resampled(list(same.values()), SEED), strict=True))
    first = found.models[0].numbers
    models = []
    for i, model in enumerate(found.models):
        metrics = {}
        for name, number in model.numbers.items():
            entry: dict[str, Any] = {"value": number}
            if (i, name) in drawn:
                entry["interval"] = _pair(drawn[i, name])
            if i > 0 and name in first:
                entry["difference"] = number - first[name]
                if (i, name) in drawn and (0, name) in drawn:
                    entry["difference_interval"] = _pair(drawn[i, name] - drawn[0, name])
            metrics[name] = entry
        models.append({"model": model.name, "metrics": metrics})
    return {"rows": found.num_rows, "reference": found.reference, "level": LEVEL, "models": models}


def in_words(shown: Mapping[str, Any]) -> Iterator[str]:
    """A line for each number of each model. shown: as `as_json` gives it."""
    against = f", against {shown['reference']}" if shown["reference"] else ""
    yield f"{shown['rows']} rows{against}; in brackets where a number lies with a probability of {shown['level']:.0%}"
    models = shown["models"]
    for name in models[0]["metrics"]:
        yield f"\n{name}"
        for model in models:
            entry = model["metrics"].get(name)
            if entry is None:
                continue
            text = f"  {entry['value']:>12.6g} {_brackets(entry.get('interval')):<24} {model['model']}"
            if "difference" in entry:
                text += f"  ({entry['difference']:+.4g} {_brackets(entry.get('difference_interval'))} to the first)"
            yield text


def _pair(drawn: Numbers) -> list[float] | None:
    found = interval(drawn)
    return None if found is None else [found.low, found.high]


def _brackets(pair: list[float] | None) -> str:
    """The two ends, with so many digits that they differ in three of them at least."""
    if pair is None:
        return ""
    width = abs(pair[1] - pair[0])
    digits = 4
    if width:
        digits = min(max(4, 3 + math.floor(math.log10(max(map(abs, pair)) / width))), 9)
    return f"[{pair[0]:.{digits}g}, {pair[1]:.{digits}g}]"
