"""The surroundings that the suite is run in: processors, locale, time zone, no /dev/shm, a folder with an odd name.

    python tests/pretend.py [NAME ...] [-- PYTEST ARGUMENTS]

runs the suite once in each of those that are named, or in all, and ends with one line for each. Names joined by `+` are
one run in all of them together: `bf16+locale`. Within a run, `pytest --pretend NAME` puts the processor in place, and
tests/inherited does so in processes that tests start; what a process must be started with is done here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from strop.machine import Processor

if TYPE_CHECKING:
    import torch

    from strop.policy.kernels.product_rates import Rates

ROOT = Path(__file__).resolve().parents[1]
ODD_NAME = "ein Ordner mit Ümläuten, 100 % 'so'"
EMPTY_SHM = 'mount -t tmpfs -o ro,size=4k none /dev/shm && exec "$@"'


@dataclass(frozen=True)
class Multiplies:
    """How fast a pretended processor multiplies, one thread of MKL's float32 being 1. bf16, fp16: by torch itself;
    emulated: about 0.1. onednn: float32 by oneDNN. Batches of small products go as fast as large ones."""

    bf16: float
    fp16: float
    onednn: float

    def rates(self, dtype: torch.dtype) -> Rates:
        """What `strop.policy.kernels.product_rates.measured` answers there."""
        import torch

        if dtype == torch.float32:
            onednn = {"onednn": self.onednn} if torch.backends.mkldnn.is_available() else {}
            return {"linear": {"own": 1.0, **onednn}}
        own, float32 = self.bf16 if dtype == torch.bfloat16 else self.fp16, max(1.0, self.onednn)
        both = {"own": own, "widened": 0.8 * float32}
        return {"linear": both, "batched": both, "float32": {"own": float32}}


@dataclass(frozen=True)
class Surroundings:
    """processor: what `strop.machine.processor` answers, and multiplies: how fast it does; None: this computer's own.
    threads: of torch. before: what the command of the tests is handed to. moved: the tests run in a copy of the project
    in an oddly named folder. syncs: whether `os.fsync` waits for the disk."""

    processor: Processor | None
    multiplies: Multiplies | None
    threads: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    before: Sequence[str] = ()
    moved: bool = False
    syncs: bool = False


PLAIN = Processor(cores=2, name="pretended")
EMULATES = Multiplies(bf16=0.3, fp16=0.1, onednn=0.9)
PRETENDED: Mapping[str, Surroundings] = {
    "plain": Surroundings(PLAIN, EMULATES),
    "bf16": Surroundings(PLAIN, Multiplies(bf16=2.0, fp16=0.1, onednn=0.9)),
    "slow-bf16": Surroundings(PLAIN, Multiplies(bf16=0.6, fp16=0.1, onednn=0.9)),
    "onednn": Surroundings(PLAIN, Multiplies(bf16=0.3, fp16=0.1, onednn=2.0)),
    "onednn-bf16": Surroundings(PLAIN, Multiplies(bf16=4.0, fp16=4.0, onednn=2.0)),
    "cores-1": Surroundings(Processor(1, "pretended"), EMULATES, environment={"OMP_NUM_THREADS": "1"}),
    "cores-8": Surroundings(
        Processor(8, "pretended"),
        EMULATES,
        threads=8,
        environment={"OMP_NUM_THREADS": "8", "OMP_WAIT_POLICY": "PASSIVE"},  # there are fewer: who waits must not spin
    ),
    "real": Surroundings(None, None, syncs=True),
    "locale": Surroundings(
        PLAIN,
        EMULATES,
        environment={"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONWARNDEFAULTENCODING": "1"},
    ),
    "timezone": Surroundings(PLAIN, EMULATES, environment={"TZ": "NPT-5:45"}),
    "no-shm": Surroundings(
        PLAIN, EMULATES, before=("unshare", "--map-root-user", "--mount", "sh", "-c", EMPTY_SHM, "sh")
    ),
    "odd-path": Surroundings(PLAIN, EMULATES, moved=True),
}
"""By name. `plain` is what `make test` sees: 16 bits are emulated, float32 is MKL's. With `slow-bf16` there are
instructions for bfloat16 that are slower than float32's; with `onednn` large float32 matrices are multiplied by oneDNN.
`real` is the computer as it is. Elsewhere no file is synced, since no test cuts the power, and a run would wait for the
disk some forty times. Under `locale`, text that strop reads or writes without naming an encoding, which is
the locale's then, is an error."""

RUNS = (
    "real",
    "bf16+cores-1+locale+timezone+no-shm+odd-path",
    "slow-bf16",
    "onednn",
    "onednn-bf16+cores-8",
)
"""What the suite is run in where no name is given: each of the above once, `plain` excepted, in as few runs as there
are processors. Where a run of several fails, its names one by one say which it was."""


def surroundings(names: str) -> Surroundings:
    """What is pretended under one name, or under several joined by `+`. An error where two of them say different things
    of the same."""
    plain = chosen = PRETENDED["plain"]
    said: dict[str, str] = {}
    for name in names.split("+"):
        if name not in PRETENDED:
            raise ValueError(f"not known: {name}; one of {', '.join(PRETENDED)}, or several joined by +")
        for each in (entry.name for entry in fields(Surroundings)):
            value = getattr(PRETENDED[name], each)
            if value == getattr(plain, each):
                continue
            if each == "environment":
                value = {**chosen.environment, **value}
            elif each in said:
                raise ValueError(f"{said[each]} and {name} cannot be pretended together: both say {each}")
            said[each] = name
            chosen = replace(chosen, **{each: value})
    return chosen


def not_synced(fd: int) -> None:
    """Stands for `os.fsync`: an error for what is no open file, and no waiting for the disk."""
    os.fstat(fd)


def put_into(module: ModuleType, chosen: Surroundings) -> None:
    """The pretended processor in place of this computer's, in `strop.machine` or `kernels.product_rates`."""
    if module.__name__ == "strop.machine" and chosen.processor is not None:
        module.processor = lambda: chosen.processor  # type: ignore[attr-defined]
    if module.__name__ == "strop.policy.kernels.product_rates" and chosen.multiplies is not None:
        module.measured = chosen.multiplies.rates  # type: ignore[attr-defined]


def main(arguments: Sequence[str]) -> int:
    """Runs the tests in each of the surroundings; 0 where all passed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    names, options = arguments[:end], arguments[end + 1 :]
    try:
        chosen = {name: surroundings(name) for name in names or RUNS}
    except ValueError as unknown:
        print(unknown, file=sys.stderr)  # noqa: T201
        return 2
    codes = {name: _run(name, each, options) for name, each in chosen.items()}
    for name, code in codes.items():
        print(f"{name:45} {'passed' if code == 0 else f'failed (exit code {code})'}")  # noqa: T201
    return int(any(codes.values()))


def _run(name: str, chosen: Surroundings, options: Sequence[str]) -> int:
    """The exit code of pytest."""
    print(f"== {name}", flush=True)  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        root = _copied(Path(folder, ODD_NAME)) if chosen.moved else ROOT
        paths = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **chosen.environment, "PYTHONPATH": os.pathsep.join(paths)}
        command = [*chosen.before, sys.executable, "-m", "pytest", "--pretend", name, *options]
        if chosen.moved:
            command.append(f"--basetemp={Path(folder, ODD_NAME, 'temporary')}")
        return subprocess.run(command, cwd=root, env=environment, check=False).returncode


def _copied(folder: Path) -> Path:
    """A copy of what git lists of the project, in a folder with an odd name, with the shared data beside it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in map(os.fsdecode, filter(None, listed.split(b"\0"))):
        if (ROOT / name).is_file():
            (folder / "strop" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "strop" / name)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return folder / "strop"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
