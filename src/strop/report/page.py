"""The page: one file of HTML, from what was read and found. Floor 2.

In: runs with their diagnoses. Out: text. Everything foreign (rows, names, settings, messages) goes through the escaping
of jinja2, with what cannot be seen made visible; the same run gives the same bytes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from strop.readable import duration
from strop.report.charts import number
from strop.report.curves import READING, charts_of, heat_maps
from strop.report.diagnose import Examined
from strop.report.escaping import Ours, excerpt, visible
from strop.report.findings import THRESHOLDS, Finding, Severity, Thresholds
from strop.report.run_record import RunRecord
from strop.report.samples import Sample
from strop.report.tables import Table, differences, evaluations, tables_of

WORDS: Mapping[Severity, tuple[str, str]] = {
    Severity.FAIL: ("✗", "wrong"),
    Severity.WARN: ("!", "worth a look"),
    Severity.NOTE: ("•", "note"),
    Severity.OK: ("✓", "passed"),
    Severity.UNCHECKED: ("?", "not checked"),
}
MOST_CHARACTERS = 600
"""Of each text of a pair that are shown."""
MOST_PAIRS = 10
ALIKE = 0.6
"""Sides of a pair that have this share of their words in common are shown with what tells them apart."""


def page(examined: Sequence[Examined], *, reload: int = 0) -> str:
    """The page of one run, or of several side by side.

    Args:
        reload: after how many seconds a browser loads it again; 0: never.
    """
    template, css = _template()
    return template.render(**_context(examined), css=Ours(css), reload=reload)


@cache
def _template() -> tuple[Template, str]:
    """The template and the style sheet of every page; compiling the template takes as long as filling it."""
    environment = Environment(
        loader=PackageLoader("strop.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["percent"] = lambda text: quote(text, safe="")
    css = environment.loader.get_source(environment, "page.css")[0]  # type: ignore[union-attr]
    return environment.get_template("page.html"), css


def _context(examined: Sequence[Examined]) -> dict[str, Any]:
    runs = [e.run for e in examined]
    labels = labels_of(runs)
    charts = charts_of(examined, labels)
    by_key = {c.key: c for c in charts}
    parts = [_of_run(e, label, by_key if len(runs) == 1 else {}) for e, label in zip(examined, labels, strict=True)]
    embedded = {f["chart"].key for part in parts for f in part["findings"] if f["figure"]}
    names = excerpt(", ".join(labels), 400)
    return {
        "title": f"{excerpt(names, 200)}: strop report",
        "heading": f"strop report: {names}"
        if len(runs) > 1
        else f"strop report: {names} ({excerpt(runs[0].method, 40) or 'method unknown'})",
        "summary": "; ".join(map(_summary, runs)),
        "runs": parts,
        "differences": differences(runs, labels) if len(runs) > 1 else [],
        "charts": [c for c in charts if c.key not in embedded],
        "embedded": bool(embedded),
        "evaluations": evaluations(runs, labels),
        "heats": (heats := heat_maps(runs, labels)),
        "reading": [
            (c.title, READING[key]) for c in (*charts, *heats[:1]) if (key := c.key.partition("-")[0]) in READING
        ],
    }


def labels_of(runs: Sequence[RunRecord]) -> list[str]:
    """The name of each run, with as much of its path as tells it from the others."""
    for depth in range(1, 4):
        labels = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(labels)) == len(labels):
            return labels
    return [str(run.path) for run in runs]


def _summary(run: RunRecord) -> str:
    seconds = run.train.series("seconds")[1]
    parts = [
        excerpt(run.value("models.huggingface_id", "model unknown"), 200),
        "adapters" if run.value("lora.enabled", False) else "all weights",
        f"{run.last_step:,} steps",
        *([duration(float(seconds[-1]))] if len(seconds) and 0 <= seconds[-1] < 1e10 else []),
        excerpt(run.result.get("reason") or _stopped(run) or ("finished" if run.is_finished else "not finished"), 300),
    ]
    return " · ".join(parts)


def _stopped(run: RunRecord) -> str:
    """How a run was stopped by a finding; empty where it was not."""
    finding, step = run.failure.get("stopped_on"), run.failure.get("step")
    return f"stopped after step {step} by finetuning.stop_on: {finding}" if isinstance(finding, str) else ""


def _of_run(examined: Examined, label: str, charts: Mapping[str, Any]) -> dict[str, Any]:
    run, diagnosis = examined.run, examined.diagnosis
    raised = diagnosis.raised
    counts = [(s, len(diagnosis.of(s))) for s in Severity]
    return {
        "label": label,
        "verdict": diagnosis.verdict,
        "worst": str(raised[0].severity) if raised else "ok",
        "counts": [
            {"severity": str(s), "mark": WORDS[s][0], "words": WORDS[s][1], "number": n} for s, n in counts if n
        ],
        "findings": list(_findings(raised, run, charts, examined.thresholds)),
        "passed": diagnosis.of(Severity.OK),
        "unchecked": diagnosis.of(Severity.UNCHECKED),
        "gaps": run.gaps,
        "worst_pairs": list(_pairs(run, "worst")),
        "best_pairs": list(_pairs(run, "best")),
        "pairs_note": excerpt(run.pairs.get("note", ""), 600),
        "samples": [_sample(sample) for sample in run.samples],
        "tables": tables_of(run),
    }


def _findings(
    findings: Sequence[Finding], run: RunRecord, charts: Mapping[str, Any], thresholds: Thresholds
) -> Iterator[dict[str, Any]]:
    """A chart stands in the first finding that is about it; the others link to it."""
    drawn: set[str] = set()
    for f in findings:
        beside = f.chart in charts and f.chart not in drawn and f.severity is not Severity.NOTE
        drawn |= {f.chart} if beside else set()
        yield {**_finding(f, run, charts, thresholds), "figure": beside}


def _finding(f: Finding, run: RunRecord, charts: Mapping[str, Any], thresholds: Thresholds) -> dict[str, Any]:
    mark, words = WORDS[f.severity]
    before = {key: setting.value for key, setting in run.settings.items()}
    rows = [
        (name, number(thresholds[name]), THRESHOLDS[name].meaning,
         "given for this report" if name in thresholds.replaced else THRESHOLDS[name].source)
        for name in f.thresholds
    ]  # fmt: skip
    return {
        "id": f.id,
        "severity": str(f.severity),
        "mark": mark,
        "words": words,
        "evidence": str(f.evidence),
        "claim": f.claim,
        "numbers": [
            {"name": name, "value": number(value) if isinstance(value, int | float) else value}
            for name, value in f.numbers.items()
        ],
        "chart": charts.get(f.chart),
        "harmless_if": f.harmless_if,
        "remedies": [
            {"words": r.words, "shown": r.shown(before), "command": r.command(run.path, number)}
            for number, r in enumerate(f.remedies, start=1)
        ],
        "section": f.section,
        "pairs": bool(run.pairs.get("worst")) and any(r.reads == "pairs" for r in f.remedies),
        "samples": bool(run.samples) and any(r.reads == "samples" for r in f.remedies),
        "thresholds": Table("Thresholds", ("name", "value", "of what", "who says so"), tuple(rows)) if rows else None,
    }


def _pairs(run: RunRecord, which: str) -> Iterator[dict[str, Any]]:
    """The pairs of pairs.json, as far as they are what it should hold."""
    found = run.pairs.get(which)
    for pair in found[:MOST_PAIRS] if isinstance(found, list) else ():
        if not isinstance(pair, dict):
            continue
        margin = pair.get("margin")
        texts = {name: pair.get(name) for name in ("prompt", "chosen", "rejected")}
        shown = {name: excerpt(text[:MOST_CHARACTERS]) for name, text in texts.items() if isinstance(text, str)}
        pieces = _told_apart(shown.get("chosen", ""), shown.get("rejected", ""))
        step = pair.get("step")
        yield {
            "margin": number(float(margin)) if isinstance(margin, int | float) else "unknown",
            "source": excerpt(pair.get("source", ""), 300),
            "about": f", as of step {step}" if isinstance(step, int) else "",
            "parts": [
                {"name": name, "pieces": pieces.get(name, [(text, False)]), "more": _more(pair, name, text)}
                for name, text in shown.items()
            ],
        }


def _told_apart(chosen: str, rejected: str) -> dict[str, list[tuple[str, bool]]]:
    """Both sides in pieces, each with whether it stands in this side alone; empty where they have little in common,
    since nearly all of it would be marked."""
    words = {side: re.findall(r"\s*\S+|\s+$", text) for side, text in (("chosen", chosen), ("rejected", rejected))}
    matcher = difflib.SequenceMatcher(None, words["chosen"], words["rejected"], autojunk=False)
    if matcher.ratio() < ALIKE:
        return {}
    found: dict[str, list[tuple[str, bool]]] = {"chosen": [], "rejected": []}
    for what, first, last, start, stop in matcher.get_opcodes():
        for side, begin, end in (("chosen", first, last), ("rejected", start, stop)):
            if begin < end:
                found[side].append(("".join(words[side][begin:end]), what != "equal"))
    return found


def _sample(sample: Sample) -> dict[str, Any]:
    """A prompt with its answers, the first and the last."""
    answers = dict.fromkeys((sample.first, sample.last))
    return {
        "where": excerpt(sample.where, 300),
        "prompt": excerpt(sample.prompt, MOST_CHARACTERS),
        "answers": [
            {
                "name": "before training" if answer.step == 0 else f"after step {answer.step:,}",
                "text": excerpt(answer.text, MOST_CHARACTERS),
                "score": "" if answer.score is None else number(answer.score),
                "ended": answer.ended is not False,
            }
            for answer in answers
        ],
    }


def _more(pair: Mapping[str, Any], name: str, text: str) -> int:
    cut = pair.get(f"{name}_characters")
    whole = cut if isinstance(cut, int) and cut > len(text) else len(text)
    return max(0, whole - MOST_CHARACTERS)
