"""A run folder as a record: what it says, and what in it could not be read. Floor 2.

Everything in the folder may be missing, half-written, of an older version or written by others: what cannot be read is
left out and listed in `RunRecord.gaps`. Numbers come from metrics.jsonl and the margins log; the rest is small JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strop.config.guidance import is_default
from strop.config.sections.rollout import reward_names
from strop.config.yamlfile import parse
from strop.errors import ConfigError, first_line
from strop.log_arrays import read_floats
from strop.readable import is_number
from strop.report.json_lines import Column, Lines, read_lines
from strop.report.samples import Sample, read_samples
from strop.runfiles import FAILURE, FORECAST, MARGINS_LOG, PAIRS, PLAN, RECORDS, RESULT, margins_array

MOST_BYTES = 1 << 24
"""A file that is read whole may have at most this many; strop writes no larger one."""
MOST_ARRAYS = 2000
"""At most the margins of this many steps are read; of longer runs, those of evenly spaced steps."""
MARGIN_FIELDS = ("global_step", "epoch", "step")
SIDES = ("chosen", "rejected")
NUMBERS = (
    *("step", "loss", "loss/preference", "loss/nll", "nll", "learning_rate", "grad_norm", "clipped"),
    *("update_ratio", "changed_fraction", "tokens", "tokens_per_second", "seconds", "peak_memory_gib"),
    *("num_groups", "num_zero_signal_groups", "num_skipped_steps", "kl", "kl_unclamped"),
    *("rewards/margins", "rewards/accuracies", "lengths/completion"),
    *("reward", "reward_low", "reward_high", "frac_reward_zero_std", "entropy", "clip_ratio/region_mean"),
    *("completions/clipped_ratio", "completions/mean_length", "completions/mean_length_better"),
    *("completions/mean_length_worse", "rewards/length_correlation"),
    *("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"),
    *(f"{name}/{side}" for name in ("rewards", "logps_per_token", "lengths") for side in SIDES),
)
"""What charts and checks read of a line of metrics.jsonl, beside the numbers of each reward."""


@dataclass(frozen=True)
class Setting:
    """A key of the resolved configuration. origin: where its value was given; empty, or `default: ...`: nobody gave
    it; `auto_precision: ...`: the program chose it."""

    value: Any
    origin: str = ""

    @property
    def is_given(self) -> bool:
        """Whether a person or a preset chose it."""
        return bool(self.origin) and not is_default(self.origin) and not self.origin.startswith("auto_precision: ")


@dataclass(frozen=True)
class Table:
    """Lines of metrics.jsonl of one split. step: [n]. columns: name -> [n], NaN where a line has none."""

    step: Column
    columns: Mapping[str, Column]

    def __len__(self) -> int:
        return len(self.step)

    def __contains__(self, name: str) -> bool:
        return name in self.columns and bool(np.isfinite(self.columns[name]).any())

    def series(self, name: str) -> tuple[Column, Column]:
        """(steps, values) of the lines that have a finite value."""
        values = self.columns.get(name)
        if values is None:
            return np.zeros(0), np.zeros(0)
        kept = np.isfinite(values)
        return self.step[kept], values[kept].astype(np.float64)

    def total(self, name: str) -> float:
        return float(self.series(name)[1].sum())


@dataclass(frozen=True)
class Margins:
    """The margins of single steps. steps: [n]. values: one array of [groups] for each."""

    steps: tuple[int, ...]
    values: tuple[NDArray[np.float32], ...]


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind. Mappings are empty, and tables have no line, where there is nothing to read.

    logs: the folder of its logs. samples: what the model answered before and after. gaps: sentences about what is
    missing or damaged.
    """

    path: Path
    settings: Mapping[str, Setting]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    result: Mapping[str, Any]
    plan: Mapping[str, Any]
    pairs: Mapping[str, Any]
    failure: Mapping[str, Any]
    train: Table
    eval: Table
    margins: Margins
    is_finished: bool
    logs: Path = Path()
    samples: tuple[Sample, ...] = ()
    forecast: Mapping[str, Any] = field(default_factory=dict)
    gaps: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return self.path.name

    def value(self, key: str, default: Any = None) -> Any:
        """A setting's value; `default` where the run does not say."""
        found = self.settings.get(key)
        return default if found is None or found.value is None else found.value

    def number(self, key: str) -> float | None:
        """A setting's value where it is a number."""
        found = self.value(key)
        return float(found) if is_number(found) else None

    @property
    def method(self) -> str:
        return str(self.value("post_training.method", ""))

    @cached_property
    def rewards(self) -> Mapping[str, float]:
        """What each of the rewards counts in the sum, by its name in metrics."""
        return _rewards(self.settings)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of what charts and checks read of a line of metrics.jsonl of this run."""
        return _numbers(self.rewards)

    @cached_property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        ends = [float(t.step[-1]) for t in (self.train, self.eval) if len(t)]
        return int(max(ends, default=0))


def read_run(path: Path | str) -> RunRecord:
    """A run folder.

    Raises:
        ConfigError: it is no folder, or nothing in it is of a run.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(
            "there is no such folder" if not folder.exists() else "it is a file",
            where=str(folder),
            expected="the folder of a run: training.output_dir/NAME",
            fix=_nearby(folder),
        )
    if not any((folder / name).is_file() for name in RECORDS):
        raise ConfigError(
            "nothing in this folder is of a run",
            where=str(folder),
            expected="config.yaml, metrics.jsonl and what else a run writes",
            fix=_nearby(folder) or "give the folder of one run: training.output_dir/NAME",
        )
    gaps: list[str] = []
    parts = {
        name: _json(folder / f"{name}.json", gaps)
        for name in ("environment", "data", "plan", "pairs", "failure", "forecast")
    }
    settings = _settings(folder / "config.yaml", gaps)
    lines = _lines(folder / "metrics.jsonl", _numbers(_rewards(settings)), gaps, text="split")
    train, evaluated = _split(lines, "train"), _split(lines, "eval")
    finished = (folder / "final").is_dir()
    if not finished:
        gaps.append("there is no final/: the run goes on, or it was stopped")
    result = _json(folder / RESULT, gaps if finished else [])
    logs = _logs(folder, settings)
    margins = _margins(logs, gaps)
    return RunRecord(folder, settings, **parts, result=result, train=train, eval=evaluated, margins=margins,
                     is_finished=finished, logs=logs, samples=samples_of(folder, gaps), gaps=tuple(gaps))  # fmt: skip


def samples_of(folder: Path, gaps: list[str]) -> tuple[Sample, ...]:
    """What the model has answered so far."""
    try:
        return read_samples(folder)
    except OSError as error:
        gaps.append(f"samples.jsonl cannot be read: {first_line(error)}")
        return ()


def _nearby(folder: Path) -> str:
    """Folders of runs under this one."""
    if not folder.is_dir():
        return ""
    found = sorted({p.parent for name in ("config.yaml", "metrics.jsonl") for p in folder.glob(f"*/{name}")})
    return "the runs here: " + ", ".join(map(str, found[:5])) if found else ""


def _read(path: Path, gaps: list[str]) -> str | None:
    try:
        if path.stat().st_size > MOST_BYTES:
            gaps.append(f"{path.name} is larger than {MOST_BYTES >> 20} MiB and was not read")
            return None
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        gaps.append(f"{path.name} cannot be read: {first_line(error)}")
        return None


OPTIONAL = (PLAN, PAIRS, FAILURE, FORECAST)
"""Files that some versions, methods and endings do not leave, so their absence is no gap."""


def _json(path: Path, gaps: list[str]) -> Mapping[str, Any]:
    if path.name in OPTIONAL and not path.exists():
        return {}
    text = _read(path, gaps)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        gaps.append(f"{path.name} is no JSON: {first_line(error)}")
        return {}
    if not isinstance(found, dict):
        gaps.append(f"{path.name} holds no object")
        return {}
    return found


def _settings(path: Path, gaps: list[str]) -> Mapping[str, Setting]:
    """Every key of the resolved configuration, dotted, with where it came from: that stands in a comment."""
    text = _read(path, gaps)
    if text is None:
        return {}
    try:
        return _settings_in(text)
    except (ConfigError, RecursionError) as error:
        gaps.append(f"config.yaml is not readable: {first_line(error)}")
        return {}


@lru_cache(maxsize=8)  # a run reads its own at its first line and at its end
def _settings_in(text: str) -> Mapping[str, Setting]:
    found, origins = parse(text.encode(), "config.yaml").data, dict(_origins(text))
    return {key: Setting(value, origins.get(key, "")) for key, value in _leaves(found)}


def _leaves(found: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in found.items():
        name = f"{prefix}{key}"
        if not prefix and isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        elif not prefix and key == "models" and isinstance(value, list):
            for model in value[:1]:
                if isinstance(model, dict):
                    yield from _leaves(model, "models.")
        else:
            yield name, value


def _origins(text: str) -> Iterator[tuple[str, str]]:
    """(key, origin) of each line that has one: config.yaml has one key per line, its origin after two spaces and #."""
    section = ""
    for line in text.splitlines():
        if not line.startswith((" ", "#")) and line.rstrip().endswith(":"):
            section = line.rstrip()[:-1] + "."
            continue
        body, mark, origin = line.rpartition("  # ")
        if not mark or body.count('"') % 2 - body.count('\\"') % 2:
            continue
        key = body.strip().removeprefix("- ").partition(":")[0]
        yield (f"{section}{key}" if line.startswith(" ") else key), origin.strip()


def _rewards(settings: Mapping[str, Setting]) -> Mapping[str, float]:
    """Weights by name; nothing where one of the rewards is not as a configuration has it."""
    found = settings["rewards"].value if "rewards" in settings else None
    entries = found if isinstance(found, list) else []
    if not all(isinstance(e, dict) and isinstance(e.get("name"), str) and is_number(e.get("weight")) for e in entries):
        return {}
    return dict(zip(reward_names([e["name"] for e in entries]), (float(e["weight"]) for e in entries), strict=True))


def _numbers(rewards: Iterable[str]) -> tuple[str, ...]:
    """`NUMBERS`, and those of each of these rewards."""
    of_rewards = [f"rewards/{name}/{kind}" for name in rewards for kind in ("mean", "std")]
    return tuple(dict.fromkeys((*NUMBERS, *of_rewards)))


def _lines(path: Path, numbers: Sequence[str], gaps: list[str], *, text: str | None = None) -> Lines:
    empty = Lines({}, np.zeros(0, np.int32), (), 0)
    if not path.is_file():
        gaps.append(f"{path.name} is missing")
        return empty
    try:
        found = read_lines(path, numbers, text=text)
    except OSError as error:
        gaps.append(f"{path.name} cannot be read: {first_line(error)}")
        return empty
    if found.num_damaged:
        gaps.append(f"{path.name}: {found.num_damaged:,} damaged lines are left out")
    return found


def _split(lines: Lines, name: str) -> Table:
    """The lines of one split in the order of their steps."""
    step = lines.columns.get("step", np.full(len(lines), np.nan))
    kept = lines.where(name) & np.isfinite(step) & (step >= 0) & (step < 1e15)
    order = np.flatnonzero(kept)
    order = order[np.argsort(step[order], kind="stable")]
    columns = {key: values[order] for key, values in lines.columns.items() if key != "step"}
    return Table(step[order].astype(np.float64), {k: v for k, v in columns.items() if np.isfinite(v).any()})


def _logs(folder: Path, settings: Mapping[str, Setting]) -> Path:
    """Where the logs of the run are."""
    given = settings.get("logging.logging_dir")
    named = (
        Path(str(given.value)) if given and isinstance(given.value, str) and "\0" not in given.value else Path("logs")
    )
    logs = folder / named.expanduser()
    inside = (logs / folder.name / "margins").is_dir()
    return logs / folder.name if inside else logs


def _margins(logs: Path, gaps: list[str]) -> Margins:
    """The arrays of evenly spaced steps. The names are taken from the log, in the form that strop gives them."""
    log = logs / "margins" / MARGINS_LOG
    if not log.is_file():
        return Margins((), ())
    lines = _lines(log, MARGIN_FIELDS, gaps)
    columns = [lines.columns.get(name, np.zeros(0)) for name in ("global_step", "epoch", "step")]
    if not all(len(c) for c in columns):
        return Margins((), ())
    places = np.flatnonzero(np.isfinite(np.stack(columns)).all(axis=0))
    if len(places) > MOST_ARRAYS:
        places = places[np.linspace(0, len(places) - 1, MOST_ARRAYS).astype(int)]
    steps, arrays, lost = [], [], 0
    for place in places.tolist():
        at, epoch, step = (int(c[place]) for c in columns)
        values = _array(log.parent / margins_array(epoch, step))
        if values is None:
            lost += 1
            continue
        steps.append(at)
        arrays.append(values)
    if lost:
        gaps.append(f"margins: the arrays of {lost:,} steps cannot be read")
    return Margins(tuple(steps), tuple(arrays))


def _array(path: Path) -> NDArray[np.float32] | None:
    """[groups] finite margins of a step; None where the file is no such array."""
    found = read_floats(path)
    return None if found is None else found[np.isfinite(found)].astype(np.float32)
