"""The tables of a page: evaluations, data, time and memory, settings, environment, what runs differ in. Floor 2."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strop.readable import duration, is_number
from strop.report.charts import number
from strop.report.diagnose import Examined
from strop.report.escaping import excerpt
from strop.report.facts import Facts, wilson
from strop.report.findings import Numbers, Thresholds
from strop.report.run_record import RunRecord

SHOWN_EVALUATIONS = 40
NAMED = (
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy, with its 95 % interval"),
    ("rewards/margins", "reward margin"),
    ("rewards/chosen", "reward, chosen"),
    ("rewards/rejected", "reward, rejected"),
    ("logps_per_token/chosen", "chosen, nats per token"),
    ("logps_per_token/rejected", "rejected, nats per token"),
    ("nll", "nats per token"),
    ("num_groups", "rows"),
)


@dataclass(frozen=True)
class Table:
    """folded: behind a line that opens it. numeric: all cells but the first of a row are numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    folded: bool = False
    numeric: bool = False


def evaluations(runs: Sequence[RunRecord], labels: Sequence[str]) -> list[Table]:
    """Every evaluation of a run, or the first and the last of each of several."""
    rows, names = [], [(n, w) for n, w in NAMED if any(n in run.eval for run in runs)]
    for run, label in zip(runs, labels, strict=True):
        count = len(run.eval)
        places = list(range(count))
        if len(runs) > 1:
            places = sorted({0, count - 1}) if count else []
        elif count > SHOWN_EVALUATIONS:
            places = [round(i * (count - 1) / (SHOWN_EVALUATIONS - 1)) for i in range(SHOWN_EVALUATIONS)]
        for place in places:
            lead = (excerpt(label, 200),) if len(runs) > 1 else ()
            cells = (_evaluated(run, name, place) for name, _ in names)
            rows.append((*lead, f"{run.eval.step[place]:,.0f}", *cells))
    if not rows:
        return []
    header = (*(("run",) if len(runs) > 1 else ()), "step", *(words for _, words in names))
    note = (
        "Before the first step, rewards are 0 where there is a reference: policy and reference are the same model, so "
        "no pair is won or lost."
    )
    return [Table("Evaluation", header, tuple(rows), note, numeric=True)]


def _evaluated(run: RunRecord, name: str, place: int) -> str:
    column = run.eval.columns.get(name)
    if column is None or column[place] != column[place]:
        return "not finite" if name == "loss" else ""
    value = float(column[place])
    groups = run.eval.columns.get("num_groups")
    if name == "rewards/accuracies" and run.eval.step[place] == 0 and Facts(run, Thresholds()).starts_at_reference:
        return "all ties"
    if name == "rewards/accuracies" and groups is not None and groups[place] > 0:
        low, high = wilson(min(max(value, 0.0), 1.0), float(groups[place]))
        return f"{value:.3f} ({low:.3f} to {high:.3f})"
    return number(value)


def summary(examined: Examined) -> list[Table]:
    """A run in few words: the verdict, what was found, the evaluations."""
    run, diagnosis = examined.run, examined.diagnosis
    found = [
        (str(f.severity), f.claim, f.id, _numbers(f.numbers), "; ".join(r.words for r in f.remedies))
        for f in diagnosis.raised
    ]
    tables = [Table("Verdict", ("verdict",), ((diagnosis.verdict,),))]
    if found:
        tables.append(Table("Findings", ("severity", "finding", "id", "numbers", "worth trying"), tuple(found)))
    return [*tables, *evaluations([run], [run.path.name])]


def _numbers(found: Numbers) -> str:
    """In one cell."""
    return ", ".join(f"{name} {number(v) if isinstance(v, int | float) else v}" for name, v in found.items())


def tables_of(run: RunRecord) -> list[Table]:
    """What is said of one run."""
    found = [_data(run), _cost(run), _given(run), _environment(run)]
    return [t for t in found if t is not None]


COUNTS = (
    ("rows_read", "rows read"),
    ("kept", "kept"),
    ("not_used", "not used"),
    ("completions_cut", "completions cut"),
    ("prompts_cut", "prompts cut"),
    ("without_end_token", "without an end token after the cut"),
)
FOUND = (
    ("duplicates", "duplicates"),
    ("contradictions", "contradictions"),
    ("leaked_prompts", "prompts that are trained on as well"),
    ("leaked_rows", "rows that are trained on as well"),
    ("double_bos", "two BOS tokens"),
    ("missing_eos", "no end token"),
    ("desirable", "desirable"),
    ("undesirable", "undesirable"),
)


def _data(run: RunRecord) -> Table | None:
    """What became of the rows, split by split."""
    splits = {n: s for n, s in _mapping(run.data.get("splits")).items() if isinstance(s, dict)}
    if not splits:
        return None
    names = sorted(splits, key=lambda n: n != "train")[:4]
    rows = [("from", *(excerpt(splits[n].get("source", ""), 300) for n in names))]
    rows += [(words, *(_count(splits[n].get(key)) for n in names)) for key, words in COUNTS]
    for kind in ("refused", "dropped"):
        reasons = dict.fromkeys(reason for n in names for reason in _mapping(splits[n].get(kind)))
        rows += [
            (f"{kind}: {excerpt(reason, 200)}", *(_count(_mapping(splits[n].get(kind)).get(reason)) for n in names))
            for reason in list(reasons)[:12]
        ]
    rows += [(words, *(_count(_mapping(splits[n].get("findings")).get(key)) for n in names)) for key, words in FOUND]
    for part in ("prompt", "completion", "total"):
        cells = []
        for n in names:
            found = _mapping(_mapping(splits[n].get("lengths")).get(part))
            cells.append(" / ".join(_count(found.get(p)) for p in ("p50", "p90", "p99", "max")) if found else "")
        rows.append((f"tokens of a {part}: median / 90 % / 99 % / most", *cells))
    rows.append(("trained tokens", *(_count(_mapping(splits[n].get("tokens")).get("trained")) for n in names)))
    rows = [row for row in rows if any(cell not in ("", "0") for cell in row[1:])]
    return Table("Data", ("", *(excerpt(n, 60) for n in names)), tuple(rows))


def _count(value: Any) -> str:
    if not is_number(value):
        return ""
    return f"{value:,}" if isinstance(value, int) and abs(value) < 10**18 else number(float(value))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _cost(run: RunRecord) -> Table | None:
    """Time and memory, beside what was predicted."""
    predicted = _mapping(run.plan.get("prediction"))
    seconds, memory = run.train.series("seconds")[1], run.train.series("peak_memory_gib")[1]
    tokens = run.train.series("tokens")[1]
    rows: list[tuple[str, str, str]] = []
    if len(memory):
        said = _size(predicted.get("peak_memory_bytes"))
        rows.append(
            ("most memory", f"{memory.max():.2f} GiB", "no prediction" if said is None else f"{said / 2**30:.2f} GiB")
        )
    if len(seconds) and 0 <= seconds[-1] < 1e12:
        said = _size(predicted.get("seconds"))
        rows.append(
            (
                "time of the steps",
                duration(float(seconds[-1])),
                "no prediction" if said is None else duration(said) + _without_sampling(run),
            )
        )
        if len(tokens) and seconds[-1] > 0:
            rows.append(("tokens per second", f"{tokens[-1] / seconds[-1]:,.0f}", ""))
    evaluated = run.eval.total("seconds")
    if len(run.eval):
        rows.append((f"{len(run.eval)} evaluations", duration(max(evaluated, 0.0)), ""))
    if not rows:
        return None
    note = (
        "A prediction of the time on a CPU is made by strop train --dry-run."
        if _size(predicted.get("seconds")) is None
        else ""
    )
    return Table("Time and memory", ("", "measured", "predicted"), tuple(rows), note)


def _without_sampling(run: RunRecord) -> str:
    """What a prediction of the time leaves out of what was measured."""
    return " without sampling and rewards" if run.value("rollout.enabled", False) is True else ""


def _size(value: Any) -> float | None:
    """A number that can be a size or a time."""
    return float(value) if is_number(value) and 0 <= value < 1e18 else None


def _given(run: RunRecord) -> Table | None:
    """The settings that somebody chose."""
    rows = [(excerpt(k, 120), _value(s.value), excerpt(s.origin, 300)) for k, s in run.settings.items() if s.is_given]
    if not rows:
        return None
    note = f"The other {len(run.settings) - len(rows)} keys have their defaults; config.yaml has them all."
    return Table(
        "Settings that differ from their defaults, and where each came from",
        ("key", "value", "from"),
        tuple(rows),
        note,
    )


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return excerpt(text, 300)


def _environment(run: RunRecord) -> Table | None:
    if not run.environment:
        return None
    return Table("Environment", ("", ""), tuple(_flat(run.environment)), folded=True)


def _flat(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in list(found.items())[:60]:
        if isinstance(value, dict):
            yield excerpt(key, 100), excerpt(", ".join(f"{k} {_value(v)}" for k, v in list(value.items())[:40]), 1500)
        elif key == "command" and isinstance(value, list):
            yield "command", excerpt(" ".join(map(str, value[:200])), 1500)
        else:
            yield excerpt(key, 100), _value(value)


def differences(runs: Sequence[RunRecord], labels: Sequence[str]) -> list[Table]:
    """What several runs have not in common: settings, data, results."""
    names = tuple(excerpt(label, 200) for label in labels)
    settings = dict.fromkeys(key for run in runs for key in run.settings)
    rows = _unlike((excerpt(key, 120), [_setting(run, key) for run in runs]) for key in settings if key not in PLACES)
    data = _unlike(_data_of(runs))
    results = [
        (words, *(_end(run, name) for run in runs)) for name, words in NAMED if any(name in run.eval for run in runs)
    ]
    results += [("steps", *(f"{run.last_step:,}" for run in runs))]
    tables = [("Results (last evaluation)", results), ("Settings that differ", rows), ("Data that differs", data)]
    return [Table(title, ("", *names), tuple(found), "" if found else "none") for title, found in tables if found]


PLACES = ("training.output_dir", "models.name")


def _setting(run: RunRecord, key: str) -> str:
    return _value(run.settings[key].value) if key in run.settings else "(not there)"


def _unlike(rows: Any) -> list[tuple[str, ...]]:
    return [(key, *cells) for key, cells in rows if len(set(cells)) > 1]


def _data_of(runs: Sequence[RunRecord]) -> Iterator[tuple[str, list[str]]]:
    yield "fingerprint", [excerpt(str(run.data.get("fingerprint", "unknown"))[:12]) for run in runs]
    for split in ("train", "eval"):
        for key, words in (("source", "from"), *COUNTS):
            cells = [_mapping(_mapping(run.data.get("splits")).get(split)).get(key, "") for run in runs]
            yield f"{split}: {words}", [_value(cell) if isinstance(cell, str) else _count(cell) for cell in cells]


def _end(run: RunRecord, name: str) -> str:
    return _evaluated(run, name, len(run.eval) - 1) if len(run.eval) else ""
