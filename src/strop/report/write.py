"""`report.html` and `findings.json`, written whole: what was there stays if the new one fails. Floor 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strop.disk import unusable
from strop.durable import to_json, write_file
from strop.redact import redact
from strop.report.diagnose import Examined, diagnose
from strop.report.findings import Thresholds
from strop.report.page import labels_of, page
from strop.report.run_record import read_run
from strop.runfiles import FINDINGS, RECORDS, REPORT


def examine(folders: Sequence[Path | str], replaced: Mapping[str, float] | None = None) -> list[Examined]:
    """Read and diagnose runs. replaced: thresholds by name.

    Raises:
        ConfigError: a folder is not that of a run, or there is no such threshold.
    """
    thresholds = Thresholds(replaced)
    runs = [read_run(folder) for folder in folders]
    return [Examined(run, diagnose(run, thresholds), thresholds) for run in runs]


def state_of(folder: Path) -> tuple[object, ...]:
    """What changes whenever a file of the run does that a report reads."""
    found = []
    for name in sorted((*RECORDS, "final")):
        try:
            now = (folder / name).stat()
        except OSError:
            continue
        found.append((name, now.st_mtime_ns, now.st_size))
    return tuple(found)


def findings(examined: Sequence[Examined]) -> dict[str, Any]:
    """What findings.json holds."""
    runs = [
        {
            "run": label,
            "verdict": e.diagnosis.verdict,
            "findings": [f.as_dict(e.run.path) for f in e.diagnosis.findings],
            "gaps": list(e.run.gaps),
        }
        for e, label in zip(examined, labels_of([e.run for e in examined]), strict=True)
    ]
    return runs[0] if len(runs) == 1 else {"runs": runs}


def write(examined: Sequence[Examined], folder: Path, key: str = "--output") -> tuple[Path, Path]:
    """Both files, in this folder. key: the setting that decides where it is.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    text = page(examined).encode("utf-8", "backslashreplace")  # all of it, before anything is replaced
    listed = redact(to_json(findings(examined), indent=2) + "\n").encode("utf-8", "backslashreplace")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / REPORT, text)
        write_file(folder / FINDINGS, listed)
    except OSError as error:
        raise unusable(folder, error, key) from error
    return folder / REPORT, folder / FINDINGS
