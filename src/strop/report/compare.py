"""The first step at which two runs part, and what differs first. Floor 2, no torch.

In: two run folders with ledgers. Out: a `Parting`. In a step, what comes earlier explains what comes later: other rows
give another loss, other weights give another gradient. So the first field that differs, in this order, is the one to
explain, and it is explained by a setting that decides it where one differs, else by the data, the weights, or how the
computer rounds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.readable import is_number
from strop.report.escaping import excerpt
from strop.report.ledgers import WORDS, Line, differing, ledger_path, line_of, read_ledger
from strop.report.run_record import RunRecord, read_run

ROUNDING = 1e-3
"""Numbers that differ by at most this share of themselves are taken for the same computation, rounded otherwise."""
PARTS = frozenset({"rows", "weights", "loss", "terms", "grad_norm", "skipped", "learning_rate", "scored_tokens"})
"""Fields that say that two runs are not the same any more. How a step was cut explains a difference, and is none."""
ROWS_KEYS = ("dataset.", "models.huggingface_id", "models.revision", "training.max_", "training.packing", "seed",
             "training.groups_per_step", "training.per_device_train_batch_size",
             "training.gradient_accumulation_steps", "post_training.method", "rollout.", "rewards")  # fmt: skip
START_KEYS = ("models.", "lora.", "seed", "training.bf16", "training.fp16")
LOSS_KEYS = ("post_training.", "models.", "lora.", "training.bf16", "training.fp16", "seed")
UPDATE_KEYS = ("training.", "lora.")
DECIDE: Mapping[str, tuple[str, ...]] = {
    "rows": ROWS_KEYS,
    "scored_tokens": ROWS_KEYS,
    "learning_rate": ("training.",),
    "loss": LOSS_KEYS,
    "terms": LOSS_KEYS,
    "grad_norm": LOSS_KEYS,
    "skipped": LOSS_KEYS,
}
"""Keys of the configuration that decide a field."""
CHANGES_NOTHING = (
    *("training.output_dir", "training.mount_dir", "training.logging_steps", "training.save_", "training.eval_"),
    *("training.reference_store", "models.name", "logging.", "finetuning.resume_from_checkpoint"),
    "training.per_device_eval_batch_size",
)
"""Keys that decide no step."""
CUT_KEYS = (
    *("training.micro_batch_tokens", "training.per_device_train_batch_size", "training.gradient_accumulation_steps"),
    "training.gradient_checkpointing",
)
"""Keys that say how a step is cut and computed, which changes the last digits only."""
FILES = ("dataset.train_file", "dataset.val_file", "dataset.splits_dir")
"""Keys that say where rows are, and not what they are: the same rows may lie in two places."""
HARDWARE = ("processor", "devices", "num_cpus", "platform")
ROUNDS = ("num_threads", "world_size", "packages", "python", "cuda", "products")


@dataclass(frozen=True)
class Parting:
    """Where two runs part.

    step: the first step that differs; None: they are the same, as far as both go. kind: what differs first: settings,
    data order, rows, weights, rounding, hardware, or unknown. field: of the ledger. words: a sentence about it.
    settings, environment: all differences of these, whether they explain it or not. num_steps: how many each run has.
    """

    step: int | None
    kind: str
    field: str
    words: str
    settings: tuple[str, ...]
    environment: tuple[str, ...]
    num_steps: tuple[int, int]


@dataclass(frozen=True)
class _Both:
    """Two runs, and the lines of the step at which they part, with those of the step before."""

    runs: tuple[RunRecord, RunRecord]
    lines: tuple[Line, Line]
    is_first: bool

    def settings(self, prefixes: Iterable[str] = ("",), without: Collection[str] = ()) -> list[str]:
        """Settings that differ, of the keys that begin so."""
        one, two = (run.settings for run in self.runs)
        keys = [key for key in dict.fromkeys([*one, *two]) if not key.startswith(CHANGES_NOTHING)]
        return [
            f"{key}: {_shown(one, key)} and {_shown(two, key)}"
            for key in keys
            if key.startswith(tuple(prefixes)) and key not in without and _value(one, key) != _value(two, key)
        ]

    def environment(self, names: Iterable[str]) -> list[str]:
        one, two = (_environment_at(run, line) for run, line in zip(self.runs, self.lines, strict=True))
        return [line for name in names for line in _unlike(name, one.get(name), two.get(name))]


def compare(first: Path, second: Path) -> Parting:
    """Find where two runs part.

    Raises:
        ConfigError: one of the folders is no run with a ledger.
    """
    folders = (first, second)
    found, num_steps = _first_difference(*folders)
    runs = (read_run(first), read_run(second))
    if found is None:
        both = _Both(runs, ({}, {}), is_first=False)
        words = f"Both runs are the same in all {min(num_steps):,} steps that both have"
        return Parting(None, "same", "", words, tuple(both.settings()), tuple(_environment(both)), num_steps)
    lines, is_first = found
    both = _Both(runs, lines, is_first)
    field = next(name for name in differing(*lines) if name in PARTS)
    kind, words = _explained(both, field, folders)
    step = max(int(line["step"]) for line in lines)
    return Parting(step, kind, field, words, tuple(both.settings()), tuple(_environment(both)), num_steps)


def _first_difference(first: Path, second: Path) -> tuple[tuple[tuple[Line, Line], bool] | None, tuple[int, int]]:
    """(the lines of the first step that differs and whether it is the first of all, the steps that each run has)."""
    found: tuple[tuple[Line, Line], bool] | None = None
    is_first = True
    counts = (_num_lines(ledger_path(first)), _num_lines(ledger_path(second)))
    with ledger_path(first).open("rb") as one, ledger_path(second).open("rb") as two:
        left, right = one.readline(), two.readline()
        while left and right:
            if left != right:
                lines = line_of(left), line_of(right)
                behind = _behind(*lines)
                if behind is None:
                    assert lines[0] is not None and lines[1] is not None
                    if PARTS & set(differing(lines[0], lines[1])):
                        found = (lines[0], lines[1]), is_first
                        break
                elif behind:
                    right = two.readline()
                    continue
                else:
                    left = one.readline()
                    continue
            is_first = False
            left, right = one.readline(), two.readline()
    return found, counts


def _behind(one: Line | None, two: Line | None) -> int | None:
    """Which of two lines to leave behind, 0 or 1, since it is damaged or of an earlier step; None: neither."""
    if one is None or two is None:
        return int(one is not None)
    if one["step"] == two["step"]:
        return None
    return int(two["step"] < one["step"])


def _num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _explained(both: _Both, field: str, folders: tuple[Path, Path]) -> tuple[str, str]:
    """(what kind of difference comes first, a sentence)."""
    what = WORDS[field].capitalize()
    if field == "weights":
        return _of_weights(both)
    if field == "rows":
        return _of_rows(both, folders)
    if settings := both.settings(DECIDE[field], CUT_KEYS):
        return "settings", f"{what}: {_two(both, field)}; settings that decide it differ: {'; '.join(settings)}"
    if field in ("loss", "terms", "grad_norm") and _is_close(both.lines, field):
        return _of_rounding(both, field)
    return "unknown", f"{what}: {_two(both, field)}, with the same rows and weights; no setting explains it"


def _of_weights(both: _Both) -> tuple[str, str]:
    if both.is_first:
        if settings := both.settings(START_KEYS):
            return "settings", f"The weights before the first step differ, by settings: {'; '.join(settings)}"
        return "weights", (
            "The weights before the first step differ, with the same settings: the files of the model or adapter are "
            "others, or one of the runs continues another one"
        )
    step = int(both.lines[0]["step"])
    if settings := both.settings(UPDATE_KEYS, CUT_KEYS):
        return "settings", (
            f"The update of step {step - 1} differs, with the same loss and gradient norm, by settings: "
            f"{'; '.join(settings)}"
        )
    return _of_rounding(both, "weights")


def _of_rows(both: _Both, folders: tuple[Path, Path]) -> tuple[str, str]:
    sizes = [len(line.get("rows", ())) for line in both.lines]
    settings, files = both.settings(ROWS_KEYS, FILES), "".join(f"; {line}" for line in both.settings(FILES))
    if sizes[0] != sizes[1]:
        words = f"The steps have {sizes[0]} and {sizes[1]} rows"
        return ("settings", f"{words}: {'; '.join(settings)}") if settings else ("rows", words)
    one, two = (_rows_of_epoch(folder) for folder in folders)
    if one == two:
        words = "The same rows come in another order"
        return ("settings", f"{words}: {'; '.join(settings)}") if settings else (
            "data order", f"{words}: the rows of the files are in another order{files}")  # fmt: skip
    changed = [place for place, pair in enumerate(zip(*(line["rows"] for line in both.lines), strict=True))
               if pair[0] != pair[1]]  # fmt: skip
    words = (
        f"{len(changed)} of the {sizes[0]} rows of the step differ; in the first epoch {len(one - two):,} rows are "
        f"only in the first run and {len(two - one):,} only in the second, such as {next(iter(sorted(one ^ two)))}"
    )
    return ("settings", f"{words}: {'; '.join(settings)}") if settings else ("rows", words + files)


def _rows_of_epoch(folder: Path) -> set[str]:
    """The hashes of the rows of the first epoch that the ledger has."""
    found: set[str] = set()
    epoch = None
    for line in read_ledger(folder):
        epoch = line.get("epoch") if epoch is None else epoch
        if line.get("epoch") != epoch:
            break
        found.update(map(str, line.get("rows", ())))
    return found


def _of_rounding(both: _Both, field: str) -> tuple[str, str]:
    """Why numbers that are nearly the same differ: how the step was cut, or what it was computed on."""
    what = WORDS[field].capitalize()
    numbers = "" if field == "weights" else f" ({_two(both, field)})"
    if hardware := both.environment(HARDWARE):
        return "hardware", f"{what}{numbers}: the same but for rounding, on other hardware: {'; '.join(hardware)}"
    if software := both.environment(ROUNDS):
        return "rounding", f"{what}{numbers}: the same but for rounding, computed otherwise: {'; '.join(software)}"
    if both.lines[0].get("cut") != both.lines[1].get("cut"):
        cuts = " and ".join(str(len(line.get("cut", ()))) for line in both.lines)
        return "rounding", f"{what}{numbers}: the same but for rounding; the step was cut into {cuts} micro-batches"
    if settings := both.settings(CUT_KEYS):
        return "rounding", f"{what}{numbers}: the same but for rounding, computed otherwise: {'; '.join(settings)}"
    return "rounding", f"{what}{numbers}: the same but for rounding, and nothing known explains it"


def _is_close(lines: tuple[Line, Line], field: str) -> bool:
    pairs = [(line.get(field), other.get(field)) for line, other in (lines,)]
    if field == "terms":
        one, two = (line.get("terms") or {} for line in lines)
        pairs = [(one.get(name), two.get(name)) for name in {*one, *two}]
    return all(is_number(a) and is_number(b) and abs(a - b) <= ROUNDING * max(abs(a), abs(b), 1e-6) for a, b in pairs)


def _two(both: _Both, field: str) -> str:
    return " and ".join(excerpt(line.get(field), 80) for line in both.lines)


def _environment(both: _Both) -> Iterator[str]:
    yield from both.environment((*HARDWARE, *ROUNDS))


def _environment_at(run: RunRecord, line: Line) -> Mapping[str, Any]:
    """The environment of the launch, or of the last resume before the step of this line."""
    found: Mapping[str, Any] = run.environment
    resumes = run.environment.get("resumes")
    for resume in resumes if isinstance(resumes, list) else ():
        after = resume.get("after_step") if isinstance(resume, dict) else None
        if is_number(after) and after < line.get("step", 0):
            found = resume
    return found


def _value(settings: Mapping[str, Any], key: str) -> Any:
    found = settings.get(key)
    return None if found is None else found.value


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return excerpt(_value(settings, key), 80) if key in settings else "(not there)"


def _unlike(name: str, one: Any, two: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        yield from (line for key in sorted({*one, *two}) for line in _unlike(str(key), one.get(key), two.get(key)))
    elif one != two:
        yield f"{name} {excerpt(one, 120)} and {excerpt(two, 120)}"
