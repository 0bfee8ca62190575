"""Tables and a plot from what was measured; no figure is written by hand.

python -m benchmarks.report [--results benchmarks/results] [--table benchmarks/RESULTS.md] [--plot FILE.svg]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from . import grpo, long_run, processes, quantised
from .cases import CASES, SIDES, Case, Target
from .inputs import ROOT
from .measure import IDLE_CORES, RESULTS

Result = Mapping[str, Any]
STEPS, PROCESSES, QUANTISED, REWARDS = "steps.json", "processes.json", "quantised.json", "rewards.json"
"""What the benchmarks of other questions store, beside the folders of machines."""

HEAD = """# Results

Written by `python -m benchmarks.report` from `benchmarks/results/`, which `make bench` fills.

Sides run in turn, in processes of their own, on the same rows in the same order (B and G: bucketed by length), with
the same weights, dtype (D: float32 weights under autocast, as TRL loads them), optimizer and effective batch and no
dropout; models have random weights. Times are medians over rounds and count reference passes; ratios are medians of the
ratios within a round; in brackets the least and the most. Padding: tokens computed, divided by real ones. Sharing:
tokens where every completion brings its prompt, divided by tokens where a prompt stands once. Share: needed FLOPs a
second, divided by the machine's matmul rate (2048 x 2048 x 2048, same dtype, before the round, by the fastest way that
there is). Wall: the whole process, imports and loading included. Peak: of the process; of it training: above what it
held at its first step.

A case is named by method, what trains, dtype, model and lengths of the rows (`benchmarks/cases.py`). Models: `tiny` 8
layers of width 256 and a vocabulary of 32,000, `smol` SmolLM2-135M's shape, `qwen05` Qwen2.5-0.5B's, with its
vocabulary of 151,936. Rows: `uf` 190 tokens of prompt, 280 and 250 of answers in the mean, `long` 1,000, 150 and 150,
`hh` 150, 75 and 70; `sharp-` a model whose logits have a standard deviation of 25; `real-` real rows under a real
tokenizer, which makes the vocabulary 131,072; `group8` a prompt of 300 and eight completions of 200; `whole-process`
eight steps of one pair, from start to end; `peak-` all of a step in one micro-batch, under the vocabulary that is
named. LoRA is of rank 16 on all linear layers of the body. Under `peak-` the head is frozen. One that trains takes, by
the vocabulary's size, its weights, gradient and optimizer state, and keeps logits of twice its gradient's size at most.

Targets: the other side's figure divided by strop's, or strop's own share; met where it is at least the target. A run's
commit is that of what was measured: figures of an older one speak of the code as it was then.
"""


def values(result: Result, side: str, figure: str) -> list[float]:
    """One figure of one side, by round."""
    if figure == "share":
        dtype = "bf16" if result["case"]["bf16"] and side not in ("widened", "fp32") else "fp32"
        return [
            result["needed_flops"] / found["sides"][side]["seconds"] / found["matmul"][dtype]
            for found in result["rounds"]
        ]
    if figure == "padding":
        return [r["sides"][side]["fed_tokens"] / r["sides"][side]["real_tokens"] for r in result["rounds"]]
    return [r["sides"][side][figure] for r in result["rounds"]]


def ratio(result: Result, target: Target) -> float:
    """What the target speaks of, as measured."""
    if target.figure == "share":
        return median(values(result, "strop", "share"))
    pairs = zip(values(result, target.against, target.figure), values(result, "strop", target.figure), strict=True)
    return median(theirs / ours for theirs, ours in pairs)


def table(results: Sequence[Sequence[Result]], others: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """RESULTS.md, line by line. results: by machine, the one with the most rounds first. others: what stands beside
    them, by the file's name."""
    yield HEAD
    yield "| side | what it is |\n|---|---|"
    yield from (f"| {name} | {text} |" for name, text in SIDES.items())
    yield from section(results[0], CASES)
    for of_machine in results[1:]:
        yield from section(of_machine, ())
    if STEPS in others:
        yield from beside(others[STEPS])
    if PROCESSES in others:
        yield "\n## Several processes\n"
        yield from processes.lines(others[PROCESSES])
        yield "\nHow long processes wait for the slowest one: [docs/scaling.md](../docs/scaling.md#who-does-what)."
    if QUANTISED in others:
        yield "\n## A base in 4 bits\n"
        yield from quantised.lines(others[QUANTISED])
    if sampled := [others[name] for name in grpo.FILES.values() if name in others]:
        yield "\n## GRPO beside TRL\n"
        yield from grpo.lines(sampled)
    if REWARDS in others:
        yield "\n## Reward models beside TRL\n"
        yield from reward_models(others[REWARDS])
    if long_run.FILE in others:
        yield "\n## The report of a long run\n"
        yield from long_run.lines(others[long_run.FILE])


def beside(steps: Mapping[str, Any]) -> Iterator[str]:
    """What `benchmarks.step_ratio` has measured."""
    yield f"\n## Steps and starts beside those of commit {steps['against'][:7]}\n"
    yield (
        "`python -m benchmarks.step_ratio`, one thread. Seconds of processor time, the least of the rounds, and their "
        "ratio; beside it the median of the ratios of all pairs that were taken in turn, and its quartiles.\n"
    )
    yield "| case | date | commit | what | pairs | seconds | before | ratio | of pairs |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for result in steps["cases"]:
        for what in ("step", "start"):
            if (found := result.get(what)) is not None:
                low, high = found["quartiles"]
                measured = f"{result['case']} | {result['date']} | {result['commit'][:7]} | {what} | {found['times']}"
                seconds = f"{found['seconds']:.3f} | {found['before']:.3f} | {found['ratio']:.3f}"
                yield f"| {measured} | {seconds} | {found['median']:.3f} ({low:.3f} - {high:.3f}) |"


def reward_models(found: Mapping[str, Any]) -> Iterator[str]:
    """What `benchmarks.rewards` has measured."""
    machine, runs = found["machine"], found["runs"]
    short = f", of those whose lines have at most {found['characters']} characters," if found["characters"] else ""
    yield (
        f"`python -m benchmarks.rewards`, {machine['date']}, {machine['processor']}, trl {machine['trl']}, commit "
        f"{found['commit']}: {found['model']}, all weights, one epoch of {found['pairs']} pairs of {found['rows']}"
        f"{short} in steps of {found['batch']}, {found['val_pairs']} held-out pairs. TRL gets the same first weights, "
        "rows and order; each side evaluates by its own code.\n"
    )
    yield "| side | seed | accuracy | loss | processor s |"
    yield "|---|---|---|---|---|"
    for run in runs:
        side = {"strop": "strop", "trl": "TRL"}[run["side"]]
        yield f"| {side} | {run['seed']} | {run['accuracy']:.4f} | {run['loss']:.4f} | {run['processor']:.0f} |"
    means = {side: fmean(run["accuracy"] for run in runs if run["side"] == side) for side in ("strop", "trl")}
    noise = math.sqrt(means["strop"] * (1 - means["strop"]) / found["val_pairs"])
    yield (
        f"\nMean accuracy: strop {means['strop']:.4f}, TRL {means['trl']:.4f}; the standard error of one, from the "
        f"number of held-out pairs, is {noise:.4f}."
    )


def section(results: Sequence[Result], wanted: Iterable[str]) -> Iterator[str]:
    """One machine. wanted: cases whose targets are listed whether they were measured or not."""
    yield f"\n## {results[0]['machine']['processor']}\n"
    yield from machines(results)
    yield "\n### Targets\n\n| case | figure | against | measured | target | met |\n|---|---|---|---|---|---|"
    measured = {result["case"]["name"]: result for result in results}
    for name in {**dict.fromkeys(wanted), **measured}:
        yield from targets(name, measured.get(name))
    yield "\n### Figures\n"
    columns = "case|side|rows|rounds|seconds per row|by strop's|peak MiB|of it training|wall s|padding|share"
    yield f"| {columns.replace('|', ' | ')} |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for result in results:
        yield from figures(result)
    yield from predictions(results)
    if gaps := [gap for name in wanted if (gap := gap_of(CASES[name], measured.get(name)))]:
        yield "\nNot measured here: " + "; ".join(gaps) + "."
    yield "\nSharing factors: " + ", ".join(f"{r['case']['name']} {r['sharing_factor']:.2f}" for r in results) + "."


def targets(name: str, result: Result | None) -> Iterator[str]:
    """Every target of a case, whether it was measured or not."""
    listed = CASES[name].targets if name in CASES else Case.of(result["case"]).targets if result else ()
    for target in listed:
        found, met = "-", "not measured"
        if result is not None and {"strop", target.against} <= set(result["case"]["sides"]):
            reached = ratio(result, target)
            found, met = f"{reached:.2f}", "yes" if reached >= target.ratio else "no"
        against = "-" if target.figure == "share" else target.against
        yield f"| {name} | {target.figure} | {against} | {found} | {target.ratio:.2f} | {met} |"


def gap_of(case: Case, result: Result | None) -> str:
    """What is missing of a case; empty: nothing."""
    if result is None:
        return case.name
    missing = [side for side in case.sides if side not in result["case"]["sides"]]
    return f"{case.name} against {', '.join(missing)}" if missing else ""


def figures(result: Result) -> Iterator[str]:
    case = Case.of(result["case"])
    for side in case.sides:
        seconds = values(result, side, "seconds")
        own = values(result, "strop", "seconds") if "strop" in case.sides else []
        ratios = [a / b for a, b in zip(seconds, own, strict=True)] if own and side != "strop" else []
        against = f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})" if ratios else "-"
        peak, base, wall, padding, share = (
            median(values(result, side, name)) for name in ("peak", "base_mib", "wall", "padding", "share")
        )
        yield (
            f"| {case.name} | {side} | {case.num_measured} | {len(seconds)} "
            f"| {median(seconds):.3f} ({min(seconds):.3f} - {max(seconds):.3f}) | {against} "
            f"| {peak:.0f} | {peak - base:.0f} | {wall:.1f} | {padding:.2f} | {share:.2f} |"
        )


def predictions(results: Sequence[Result]) -> Iterator[str]:
    """What strop said before it loaded a weight, beside what came."""
    known = [r for r in results if all("predicted" in found for found in r["rounds"])]
    if not known:
        return
    yield "\n### Predicted\n"
    yield "What `--dry-run` said then, less what the imports take, and seconds of a row's step."
    yield "\n| case | MiB | measured | off | seconds | measured | off |\n|---|---|---|---|---|---|---|"
    for result in known:
        case, rounds = Case.of(result["case"]), result["rounds"]
        mine = [found["sides"]["strop"] for found in rounds]
        pairs = (
            (median(f["predicted"]["mib"] for f in rounds), median(m["peak"] - m["start_mib"] for m in mine), ".0f"),
            (
                median(f["predicted"]["seconds"] for f in rounds),
                median(sum(m["steps"][case.warmup :]) / case.num_measured for m in mine),
                ".3f",
            ),
        )
        cells = (f"{told:{form}} | {came:{form}} | {100 * (told / came - 1):+.0f} %" for told, came, form in pairs)
        yield f"| {case.name} | {' | '.join(cells)} |"


def machines(results: Sequence[Result]) -> Iterator[str]:
    """Where and when, and whether the machine was quiet."""
    yield from sorted({describe(result) for result in results})
    looks = [m["machine"]["busy_cores"] for r in results for found in r["rounds"] for m in found["sides"].values()]
    known = [busy for busy in looks if busy is not None]
    busy = sum(b > IDLE_CORES for b in known)
    yield (
        f"\nOf {len(looks)} measurements {busy} began while other processes kept more than {IDLE_CORES} cores busy"
        f"{f' (at most {max(known):.1f})' if busy else ''}."
    )


def describe(result: Result) -> str:
    machine = dict(result["machine"])
    place = f"{machine.pop('processor')}, {machine.pop('cores')} cores, {result['threads']} threads"
    place += ", steps timed by the processor" if result.get("clock") == "processor" else ""
    date = machine.pop("date")
    packages = ", ".join(f"{name} {number}" for name, number in machine.items())
    return f"- {date}: {place}; {packages}; commit {result.get('commit') or 'not noted'}"


def plot(results: Sequence[Result]) -> str:
    """An SVG of one machine: for every case, how many times the seconds of strop the other sides take."""
    bars: list[tuple[str, str, float]] = []
    for result in results:
        case = Case.of(result["case"])
        if any(t.figure == "seconds" for t in case.targets) and "strop" in case.sides:
            bars += [
                (case.name, s, ratio(result, Target("seconds", s, 0.0)))
                for s in ("strop", *(s for s in case.sides if s != "strop"))
            ]
    colours = {
        "strop": "#1b7f5c",
        "alone": "#4f9c80",
        "plain": "#7fb8a4",
        "denormal": "#7fb8a4",
        "widened": "#4f9c80",
        "fp32": "#7fb8a4",
        "D": "#b3b9c4",
        "B": "#8a93a6",
        "G": "#5b6477",
        "P": "#3d4455",
    }
    left, width, step, top = 210, 470, 16, 34
    scale = width / max((b[2] for b in bars), default=1.0)
    body, y, last = [], top, ""
    for name, side, value in bars:
        if name != last:
            y += 8
            body.append(f'<text x="{left - 34}" y="{y + 11}" text-anchor="end">{name}</text>')
            last = name
        body.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end" fill="#666">{side}</text>')
        body.append(f'<rect x="{left}" y="{y + 1}" width="{value * scale:.1f}" height="12" fill="{colours[side]}"/>')
        body.append(f'<text x="{left + value * scale + 5:.1f}" y="{y + 11}">{value:.2f}</text>')
        y += step
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {y + 16}" '
            'font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            '<text x="10" y="20" font-size="13">Seconds a row on a CPU, strop = 1 (TRL: D default, B best shipped '
            "flags, G and P patched)</text>",
            *body,
            "</svg>\n",
        )
    )


def load(folder: Path) -> list[list[Result]]:
    """Stored results by machine, the one with the most rounds of cases that have targets first, in the order of the
    cases."""
    machines: dict[Path, list[Result]] = {}
    for path in sorted(folder.glob("*/*.json")):
        machines.setdefault(path.parent, []).append(json.loads(path.read_text(encoding="utf-8")))
    order = {name: i for i, name in enumerate(CASES)}
    for results in machines.values():
        results.sort(key=lambda result: order.get(result["case"]["name"], len(order)))
    rounds = {name: sum(len(r["rounds"]) for r in found if r["case"]["targets"]) for name, found in machines.items()}
    return [machines[name] for name in sorted(rounds, key=lambda name: rounds[name], reverse=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "RESULTS.md")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "figures" / "speed.svg")
    args = parser.parse_args()
    results = load(args.results)
    if not results:
        raise SystemExit(f"there are no results in {args.results}; `make bench` measures them")
    others = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in (STEPS, PROCESSES, QUANTISED, *grpo.FILES.values(), REWARDS, long_run.FILE)
        if (path := args.results / name).exists()
    }
    written = table(results, others)
    args.table.write_text("\n".join(written) + "\n", encoding="utf-8")
    args.plot.write_text(plot(results[0]), encoding="utf-8")
    print(f"{sum(map(len, results))} cases: {args.table}, {args.plot}")


if __name__ == "__main__":
    main()
