"""An evaluation as text, and as JSON. Floor 8."""

from __future__ import annotations

from collections.abc import Iterator

from strop.evaluate.intervals import LEVEL, Interval, difference, interval
from strop.evaluate.scoring import Evaluation

SEED = 0


def as_json(found: Evaluation) -> dict[str, object]:
    """rows, reference, models: each with `metrics`, name -> value, interval (low, high) and, but for the first model,
    difference to the first, and its interval."""
    first = found.models[0]
    models = []
    for model in found.models:
        metrics = {}
        for name, number in model.numbers.items():
            entry: dict[str, object] = {"value": number}
            if name in model.by_row:
                entry["interval"] = _pair(interval(model.by_row[name], SEED))
            if model is not first and name in first.numbers:
                entry["difference"] = number - first.numbers[name]
                if name in model.by_row and name in first.by_row:
                    entry["difference_interval"] = _pair(difference(first.by_row[name], model.by_row[name], SEED))
            metrics[name] = entry
        models.append({"model": model.name, "metrics": metrics})
    return {"rows": found.num_rows, "reference": found.reference, "level": LEVEL, "models": models}


def in_words(found: Evaluation) -> Iterator[str]:
    """A line for each number of each model."""
    shown = as_json(found)
    against = f", against {found.reference}" if found.reference else ""
    yield f"{found.num_rows} rows{against}; in brackets where a number lies with a probability of {LEVEL:.0%}"
    models = shown["models"]
    assert isinstance(models, list)
    for name in found.models[0].numbers:
        yield f"\n{name}"
        for model in models:
            entry = model["metrics"].get(name)
            if entry is None:
                continue
            text = f"  {entry['value']:>12.6g} {_brackets(entry.get('interval')):<24} {model['model']}"
            if "difference" in entry:
                text += f"  ({entry['difference']:+.4g} {_brackets(entry.get('difference_interval'))} to the first)"
            yield text


def _pair(found: Interval | None) -> list[float] | None:
    return None if found is None else [found.low, found.high]


def _brackets(pair: list[float] | None) -> str:
    return "" if pair is None else f"[{pair[0]:.4g}, {pair[1]:.4g}]"
