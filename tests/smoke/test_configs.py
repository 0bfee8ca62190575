"""What is shipped works as it stands: configurations under every preset, the published guides. The commands that pages
and configurations show are run by test_pages.py."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shown import ROOT, SMALL, blocks, commands
from strop import cli

CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
PRESETS = ("cpu", "gpu-bf16", "gpu-fp16", "memory-efficient")
OF_EACH_KIND = ("dpo", "grpo", "sft")
"""Files with pairs, groups and single answers. The suite joins each with every preset and times the processor for
them; nightly tests do so for all files."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: Any, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Path:
    """A model, rows of both shapes, and split files."""
    folder: Path = tmp_path_factory.mktemp("ground")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    single = [{"prompt": f"question {i}", "completion": "yes " * (1 + i % 3)} for i in range(24)]
    pairs = [{"prompt": f"question {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no maybe"} for i in range(24)]
    splits = folder / "data" / "splits"
    splits.mkdir(parents=True)
    groups = [
        {"prompt": f"question {i}", "completions": ["yes", "no", "maybe"], "rewards": [1, 0, 0]} for i in range(24)
    ]
    for rows, name in ((single, ""), (pairs, ".dpo"), (groups, ".groups")):
        for split in ("train", "val"):
            (splits / f"{split}{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that were reached; none of them does anything."""
    import strop.cli.train
    import strop.dryrun
    import strop.preflight
    import strop.training

    monkeypatch.setattr(strop.preflight, "check", lambda *_, **__: None)  # pages name files that are not there
    monkeypatch.setattr(strop.cli.train, "run_in_processes", lambda *_: None)
    names: list[str] = []
    for module, name in ((strop.training, "train"), (strop.dryrun, "dry_run")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: names.append(name))
    return names


def with_local_files(text: str) -> str:
    """A configuration with the models and data sets of the hub replaced."""
    method = re.search(r"^  method: (\w+)", text, flags=re.MULTILINE)
    names = {"sft": "train.jsonl", "distill": "train.jsonl", "grpo": "train.groups.jsonl"}
    rows = names.get(method[1] if method else "", "train.dpo.jsonl")
    text = re.sub(r"^(  validation_split: )[\d.]+", r"\g<1>0.5", text, flags=re.MULTILINE)  # kto compares two rows
    text = re.sub(r"^( *(?:- )?(?:huggingface_id|teacher_model_id): )\S+", r"\1model", text, flags=re.MULTILINE)
    return re.sub(r"^(dataset:\n(?: .*\n)*?  name: )\S+", rf"\1data/splits/{rows}", text, flags=re.MULTILINE)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# ---- configurations


def together() -> Iterator[Any]:
    """Configurations, presets and whether the processor is timed: once for each file is enough."""
    for path in CONFIGS:
        often = path.stem in OF_EACH_KIND
        yield pytest.param(path, None, often, id=path.stem)
        nightly = () if often else (pytest.mark.nightly,)
        yield from (pytest.param(path, p, False, id=f"{path.stem}-{p}", marks=nightly) for p in PRESETS)
        if not often:
            yield pytest.param(path, None, True, id=f"{path.stem}-timed", marks=pytest.mark.nightly)


@pytest.mark.share(8)
@pytest.mark.parametrize(("path", "preset", "timed"), list(together()))
def test_a_shipped_configuration_dry_runs_and_touches_nothing(
    path: Path, preset: str | None, timed: bool, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = with_local_files(path.read_text(encoding="utf-8"))
    assert "trl-lib/" not in re.sub("#.*", "", text) and "data/splits" in text
    Path("local.yaml").write_text(text, encoding="utf-8")
    before = tree(here)
    how = ["--preset", preset] if preset else []
    assert cli.main(["train", "--config", "local.yaml", "--dry-run", *how, *([] if timed else ["--no-time"])]) == 0
    shown = capsys.readouterr().out
    assert "nothing was trained" in shown
    assert "«" in shown  # an example with its trained tokens marked
    assert tree(here) == before


@pytest.fixture
def guide(shared: Path, here: Path) -> Path:
    """The published configuration guide, its blocks as one file."""
    (page,) = (shared / "seeds").glob("001_*.txt")
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    path = here / "guide.yaml"
    path.write_text("\n".join(blocks), encoding="utf-8")
    return path


def test_the_published_guide_dry_runs_and_trains(guide: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "train --config guide.yaml --model model --dataset.name data/splits/train.dpo.jsonl --subset null"
    before = tree(here)
    assert cli.main(shlex.split(f"{line} --dry-run")) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert tree(here) == before
    assert cli.main(shlex.split(f"{line} {SMALL} --warmup-steps 0")) == 0
    run = here / "outputs" / "model-name"
    assert (run / "final" / "adapter_model.safetensors").is_file()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


# ---- scripts/train.py


def script(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """`python scripts/train.py ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", *shlex.split(line)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path("scripts/train.py", run_name="__main__")
    assert isinstance(done.value.code, int)
    return done.value.code


def test_the_commands_of_the_published_guides_are_understood(
    shared: Path, here: Path, reached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say `uv run scripts/train.py` or `uv run src/train.py`; what follows is the same command line."""
    num_train, num_dry = 0, 0
    for page in sorted((shared / "seeds").glob("00[01]_*.txt")):
        shown = blocks(page.read_text(encoding="utf-8"))
        for command in (line for block in shown for line in commands(block, ("", "sh", "bash"))):
            _, found, rest = command.partition("/train.py ")
            if found:
                assert script(rest, monkeypatch) == 0, command
                num_dry += "--dry-run" in rest
                num_train += "--dry-run" not in rest
    assert num_train >= 8 and num_dry >= 1
    assert (reached.count("train"), reached.count("dry_run")) == (num_train, num_dry)


SCRIPT = (
    "--preset cpu --config configs/sft.yaml --splits-dir ./data/splits --output-dir ./results",
    "--preset gpu-fp16 --bf16 --config configs/sft.yaml --splits-dir ./data/splits --output-dir ./results",
    "--config configs/dpo.yaml --splits-dir ./data/splits --output-dir ./results",
    "--config configs/dpo.yaml --output-dir ./results --dpo-train-file data/splits/train.dpo.jsonl "
    "--dpo-val-file data/splits/val.dpo.jsonl --auto-precision",
)


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("line", "gains"),
    [
        *((SCRIPT[0], True), (SCRIPT[1], False), (SCRIPT[2], True), (SCRIPT[3], False), (SCRIPT[3], True)),
        # where nobody asks for it, the processor has no say in the other direction either
        *(
            pytest.param(line, gains, marks=pytest.mark.nightly)
            for line, gains in zip(SCRIPT, (False, True, False), strict=False)
        ),
    ],
)
def test_the_script_trains(
    line: str, gains: bool, here: Path, monkeypatch: pytest.MonkeyPatch, pretend: Callable[..., None]
) -> None:
    pretend(bf16=2.0 if gains else 0.3)
    assert script(f"{line} --model model --models.0.name m {SMALL}", monkeypatch) == 0
    assert Path("results/m/final/adapter_model.safetensors").is_file()
    expected = "--bf16" in line or ("--auto-precision" in line and gains)
    assert ("bf16: true" in Path("results/m/config.yaml").read_text()) is expected
