"""What strop says of a case before it loads a weight: peak memory and seconds per row.

python -m benchmarks.predict FOLDER CASE_AS_JSON
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from .cases import Case
from .sides import strop_config


def predict(folder: Path, case: Case) -> dict[str, float | dict[str, float] | None]:
    """MiB above what the imports take, by part and in all; seconds per row of the measured steps, no reference."""
    import torch

    from strop.config import resolve
    from strop.estimate import estimate, fitted, planned_precision
    from strop.machine import machine_of
    from strop.plan.row_tokens import packed_tokens
    from strop.prepared import prepare

    with tempfile.TemporaryDirectory() as out:
        os.environ["STROP_CACHE"] = out
        config = resolve(strop_config(folder, case, Path(out)))
        machine = machine_of(torch.device("cpu"))
        precision = planned_precision(config, machine)
        prepared = fitted(prepare(config, config.models[0]), machine, precision, packed_tokens)
        found = estimate(prepared, machine, precision, packed_tokens, timed=True)
    parts = {name: size / 2**20 for name, size in found.parts.items()}
    parts["process"] -= machine.held / 2**20
    return {
        "mib": sum(parts.values()),
        "parts": parts,
        "seconds": None if found.steps is None else sum(found.steps[case.warmup :]) / case.num_measured,
    }


if __name__ == "__main__":
    print(json.dumps(predict(Path(sys.argv[1]), Case.of(json.loads(sys.argv[2])))))
