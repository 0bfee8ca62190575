"""Charts as inline SVG: lines with a band, and heat maps. Floor 2.

In: numbers. Out: a `Chart`: its picture as markup, and the same numbers as a table and as CSV. A picture is readable
without a script, in print, in light and dark (colours are CSS variables), and by a screen reader. Its size does not
depend on the length of the run: a series is drawn as the median and the range of at most `BUCKETS` stretches of equal
length, so that no spike is lost.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from strop.readable import plain
from strop.report.escaping import Ours, escape
from strop.report.json_lines import Column

BUCKETS = 240
"""Points of all series of a chart together are at most twice as many."""
WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 66, 96, 12, 30
ROWS = 24
"""Of a table beside a chart."""
HEAT_COLUMNS, HEAT_ROWS = 60, 24
MOST_LINES = 6


class Bucket(NamedTuple):
    """A stretch of steps: its last step, and the lowest, the median and the highest value in it."""

    step: float
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Series:
    """A line. steps, values: [n], finite. dots: points of their own, such as evaluations, each with its interval if
    `spread` has one: [n] half-widths."""

    name: str
    steps: Column
    values: Column
    dots: bool = False
    spread: Column | None = None


@dataclass(frozen=True)
class Region:
    """Steps that a finding is about."""

    first: float
    last: float
    words: str


@dataclass(frozen=True)
class Chart:
    """key: its id on the page. title: what it shows. picture: the SVG. header, rows: the table. csv: all of it."""

    key: str
    title: str
    note: str
    picture: Ours
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    csv: str


@dataclass(frozen=True)
class Frame:
    """From values to places in the picture."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, step: float) -> float:
        return LEFT + (step - self.low_x) / ((self.high_x - self.low_x) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low_y) / ((self.high_y - self.low_y) or 1) * (HEIGHT - TOP - BOTTOM)


@dataclass
class LineChart:
    """What a chart of lines is made from. level: (value, words) of horizontal lines, such as ln 2."""

    key: str
    title: str
    series: Sequence[Series]
    note: str = ""
    levels: Sequence[tuple[float, str]] = ()
    regions: Sequence[Region] = field(default_factory=list)

    def draw(self) -> Chart | None:
        """None where there is nothing to draw."""
        there = [s for s in self.series if len(s.steps)]
        series = there[:MOST_LINES]
        if not series:
            return None
        if len(there) > len(series):
            self.note = f"{self.note} The first {len(series)} of {len(there)} lines are drawn.".strip()
        most = max(2, 2 * BUCKETS // len(series)) if len(series) > 2 else BUCKETS
        drawn = [(s, buckets(s.steps, s.values, most)) for s in series]
        frame = _frame([b for _, points in drawn for b in points], [v for v, _ in self.levels])
        lines, words_of_levels = _levels(self.levels, frame)
        parts = [*_regions(self.regions, frame), *_axes(frame), *lines]
        ends: list[tuple[float, int, str]] = []
        for place, (s, points) in enumerate(drawn, start=1):
            parts += _dots(s, frame, place) if s.dots else _line(points, frame, place)
            ends.append((frame.y(points[-1].median), place, s.name))
        parts += [*words_of_levels, *_labels(ends)]  # words last, so that no line crosses them
        words = "; ".join(f"{s.name} from {number(p[0].median)} to {number(p[-1].median)}" for s, p in drawn)
        note = f"{words[:1].upper()}{words[1:]}. {self.note}".strip()
        return Chart(self.key, self.title, note, _svg(self.key, self.title, words, parts), *_table(drawn))


def number(value: float) -> str:
    """A number of a chart or a table."""
    if not math.isfinite(value):
        return "not finite"
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}"
    return plain(value, 4)


def buckets(steps: Column, values: Column, most: int) -> list[Bucket]:
    """At most `most` stretches of equal numbers of points, in order; each point alone where there are few."""
    if len(steps) <= most:
        return [Bucket(float(s), float(v), float(v), float(v)) for s, v in zip(steps, values, strict=True)]
    edges = np.linspace(0, len(steps), most + 1).astype(int)
    found = []
    for start, stop in itertools.pairwise(edges):
        part = values[start:stop]
        found.append(Bucket(float(steps[stop - 1]), float(part.min()), float(np.median(part)), float(part.max())))
    return found


def _frame(points: Iterable[Bucket], levels: Sequence[float]) -> Frame:
    found = list(points)
    low, high = min(b.low for b in found), max(b.high for b in found)
    for level in levels:  # drawn where it is near
        if low - (high - low) <= level <= high + (high - low):
            low, high = min(low, level), max(high, level)
    if low == high == 0:
        high = 1.0
    elif low == high:
        low, high = low - abs(low) * 0.05, high + abs(high) * 0.05
    pad = 0.04 * (high - low)
    return Frame(min(b.step for b in found), max(b.step for b in found), low - pad, high + pad)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers inside of a range."""
    width = high - low
    if not math.isfinite(width) or width <= 0:
        return [low]
    size = 10 ** math.floor(math.log10(width / about))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if width / (size * m) <= about)
    first = math.ceil(low / step)
    return [k * step for k in range(first, first + 2 * about + 2) if low <= k * step <= high]


def _axes(frame: Frame) -> list[str]:
    parts = []
    for value in ticks(frame.low_y, frame.high_y):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
    for value in ticks(frame.low_x, frame.high_x):
        parts.append(
            f'<text class="tick" x="{frame.x(value):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{_steps(value)}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    return parts


def _tick(value: float) -> str:
    """A round number, in little room: 0.25, 5e-4."""
    if value and not 0.01 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return plain(value, 4)


def _steps(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"


def _levels(levels: Sequence[tuple[float, str]], frame: Frame) -> tuple[list[str], list[str]]:
    """Horizontal lines, and their words."""
    lines, texts = [], []
    for value, words in levels:
        if frame.low_y <= value <= frame.high_y:
            y = frame.y(value)
            lines.append(f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            texts.append(f'<text class="level" x="{LEFT + 5}" y="{y - 5:.1f}">{escape(words)}</text>')
    return lines, texts


def _regions(regions: Sequence[Region], frame: Frame) -> list[str]:
    parts = []
    for region in regions:
        a, b = (min(max(frame.x(v), LEFT), WIDTH - RIGHT) for v in (region.first, region.last))
        title = f"<title>{escape(region.words)}</title>"
        parts.append(
            f'<rect class="region" x="{a:.1f}" y="{TOP}" width="{max(b - a, 3):.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"{title}</rect>"
        )
    return parts


def _line(points: Sequence[Bucket], frame: Frame, number_: int) -> list[str]:
    parts = []
    if any(b.low < b.high for b in points):
        there = " ".join(f"{frame.x(b.step):.1f},{frame.y(b.high):.1f}" for b in points)
        back = " ".join(f"{frame.x(b.step):.1f},{frame.y(b.low):.1f}" for b in reversed(points))
        parts.append(f'<polygon class="band c{number_}" points="{there} {back}"/>')
    if len(points) == 1:
        (b,) = points
        return [
            *parts,
            f'<circle class="dot c{number_}" cx="{frame.x(b.step):.1f}" cy="{frame.y(b.median):.1f}" r="4"/>',
        ]
    line = " ".join(f"{frame.x(b.step):.1f},{frame.y(b.median):.1f}" for b in points)
    return [*parts, f'<polyline class="line c{number_}" points="{line}"/>']


def _dots(s: Series, frame: Frame, number_: int) -> list[str]:
    """Evaluations: a point each, joined, with their intervals; of many, the medians of stretches."""
    points = buckets(s.steps, s.values, 60)
    parts = []
    if len(points) > 1:
        line = " ".join(f"{frame.x(b.step):.1f},{frame.y(b.median):.1f}" for b in points)
        parts.append(f'<polyline class="line c{number_}" points="{line}"/>')
    if s.spread is not None and len(points) == len(s.steps):
        for b, half in zip(points, s.spread.tolist(), strict=True):
            y0, y1 = (min(max(frame.y(b.median + sign * half), TOP), HEIGHT - BOTTOM) for sign in (1, -1))
            parts.append(f'<path class="bar c{number_}" d="M{frame.x(b.step):.1f} {y0:.1f}V{y1:.1f}"/>')
    for b in points:
        title = f"<title>{escape(s.name)}, step {_steps(b.step)}: {number(b.median)}</title>"
        parts.append(
            f'<circle class="dot c{number_}" cx="{frame.x(b.step):.1f}" cy="{frame.y(b.median):.1f}" r="4">'
            f"{title}</circle>"
        )
    return parts


def _labels(ends: Sequence[tuple[float, int, str]]) -> list[str]:
    """The name of each line at its end, none over another."""
    parts, taken = [], -math.inf
    for y, number_, name in sorted(ends):
        y = max(y, taken + 17)
        taken = y
        shown = name if len(name) <= 14 else name[:13] + "…"
        fit = f' textLength="{RIGHT - 8}" lengthAdjust="spacingAndGlyphs"' if len(shown) > 8 else ""  # on a phone, too
        parts.append(
            f'<text class="name c{number_}" x="{WIDTH - RIGHT + 6}" y="{y + 4:.1f}"{fit}>{escape(shown)}</text>'
        )
    overflow = taken + 4 - (HEIGHT - 2)
    if overflow > 0:
        return [f'<g transform="translate(0 {-overflow:.1f})">', *parts, "</g>"]
    return parts


def _svg(key: str, title: str, words: str, parts: Iterable[str]) -> Ours:
    head = (
        f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-labelledby="{key}-title {key}-words">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-words">{escape(words)}</desc>'
    )
    return Ours(head + "".join(parts) + "</svg>")


Row = tuple[str, ...]


def _table(drawn: Sequence[tuple[Series, Sequence[Bucket]]]) -> tuple[Row, tuple[Row, ...], str]:
    """Header, rows and CSV: the values of all series at the same steps, where they have some."""
    names = [s.name for s, _ in drawn]
    steps: dict[float, list[str]] = {}
    for place, (_, points) in enumerate(drawn):
        for b in points:
            steps.setdefault(b.step, [""] * len(names))[place] = number(b.median)
    rows = [(f"{step:g}" if step < 1e6 else f"{step:.0f}", *cells) for step, cells in sorted(steps.items())]
    return _numbers(("step", *names), rows)


def _numbers(header: Row, rows: Sequence[Row]) -> tuple[Row, tuple[Row, ...], str]:
    """Header, as many rows as a page shows, evenly spaced, and CSV of all of them, for programs: without thousands
    separators, and with an apostrophe before a name that a spreadsheet would take for a formula."""
    names = ["'" + name if name[:1] in ("=", "+", "@", "\t", "\r") else name for name in header]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([names, *([cell.replace(",", "") for cell in row] for row in rows)])
    places = range(len(rows)) if len(rows) <= ROWS else np.linspace(0, len(rows) - 1, ROWS).astype(int).tolist()
    return header, tuple(rows[i] for i in places), text.getvalue()


def heat_map(key: str, title: str, note: str, steps: Sequence[int], values: Sequence[np.ndarray]) -> Chart | None:
    """How the values of each step are distributed: steps from left to right, values from below, darker: more of the
    stretch's values. The outermost 1 % on both sides is drawn at the edges."""
    kept = [(s, v) for s, v in zip(steps, values, strict=True) if len(v)]
    if not kept:
        return None
    every = np.concatenate([v for _, v in kept]).astype(np.float64)
    low, high = (float(q) for q in np.quantile(every, (0.01, 0.99)))
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = low - 1, high + 1
    columns = min(HEAT_COLUMNS, len(kept))
    edges = np.linspace(0, len(kept), columns + 1).astype(int)
    frame = Frame(float(kept[0][0]), float(kept[-1][0]), low, high)
    width, height = (WIDTH - LEFT - RIGHT) / columns, (HEIGHT - TOP - BOTTOM) / HEAT_ROWS
    parts, drawn = [], []
    for place, (start, stop) in enumerate(itertools.pairwise(edges)):
        part = np.clip(np.concatenate([v for _, v in kept[start:stop]]).astype(np.float64), low, high)
        counts = np.histogram(part, HEAT_ROWS, (low, high))[0]
        x = LEFT + place * width
        for row in np.flatnonzero(counts).tolist():
            y = HEIGHT - BOTTOM - (row + 1) * height
            share = min(1.0, 0.12 + 1.6 * counts[row] / len(part))
            parts.append(
                f'<rect class="heat" x="{x:.1f}" y="{y:.1f}" width="{width + 0.4:.1f}" height="{height + 0.4:.1f}" '
                f'opacity="{share:.2f}"/>'
            )
        middle, above = float(np.median(part)), float((part > 0).mean())
        drawn.append((kept[stop - 1][0], middle, above))
    parts += _axes(frame)
    if low < 0 < high:
        parts.append(f'<path class="level" d="M{LEFT} {frame.y(0):.1f}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="name" x="{WIDTH - RIGHT + 6}" y="{frame.y(drawn[-1][1]) + 4:.1f}">median</text>')
    words = f"median from {number(drawn[0][1])} to {number(drawn[-1][1])}, {drawn[-1][2]:.0%} above 0 at the end"
    header = ("step", "median", "above 0")
    rows = [(str(step), number(middle), f"{above:.1%}") for step, middle, above in drawn]
    return Chart(key, title, note, _svg(key, title, words, parts), *_numbers(header, rows))
