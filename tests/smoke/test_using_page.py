"""What docs/using-your-model.md shows works with what a run leaves."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from strop.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "using-your-model.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Puts a run where the page has it."""
    monkeypatch.chdir(tmp_path)

    def put(run: Path) -> None:
        Path("outputs").mkdir()
        Path("outputs/NAME").symlink_to(run)

    return put


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_the_page_generates(
    adapted: bool, runs: Any, place: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    place(runs(max_steps=1, **({"r": 4} if adapted else {})).path)
    Path("prompts.jsonl").write_text('{"prompt": "hello"}\n{"messages": [{"role": "user", "content": "yes"}]}\n')
    for command in re.findall(r"^strop (generate .* .*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert main(shlex.split(command)) == 0
    assert [set(json.loads(line)) for line in Path("answers.jsonl").read_text().splitlines()] == 2 * [
        {"prompt", "sample", *(f"{who}{what}" for who in ("", "base_") for what in ("completion", "tokens", "finish"))}
    ]
    text = PAGE.read_text(encoding="utf-8")
    pairs = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in ("hello", "no")]
    Path("rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (command,) = re.findall(r"^strop (eval .*)$", text, flags=re.MULTILINE)
    assert main(shlex.split(command)) == 0
    assert json.loads(Path("numbers.json").read_text())["rows"] == 2
    capsys.readouterr()
    code = blocks()[0]
    assert "generate" in code
    exec(code, scope := {})
    printed = capsys.readouterr().out
    assert (
        printed
        == scope["tokenizer"].decode(
            scope["answer"][0, scope["inputs"]["input_ids"].shape[1] :], skip_special_tokens=True
        )
        + "\n"
    )
    ends = json.loads(Path("outputs/NAME/final/generation_config.json").read_text())["eos_token_id"]
    exec(blocks()[1], scope)  # the same, with the generation settings that the run has left
    assert scope["settings"].eos_token_id == ends and scope["answer"].shape[1] > scope["inputs"]["input_ids"].shape[1]


def test_the_page_merges(runs: Any, place: Callable[[Path], None], tmp_path: Path) -> None:
    """The merged model answers as the adapted one, and has no adapter left."""
    run = runs(max_steps=2, r=4)
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copytree(run.path / "final", folder / "final")
    place(folder)
    (command,) = re.findall(r"^strop (merge .*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert main(shlex.split(command)) == 0
    merged = load_file("outputs/NAME/merged/model.safetensors")
    for command in re.findall(r"^strop (convert .*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert main(shlex.split(command)) == 0
    again = load_file("outputs/NAME/again/model.safetensors")
    assert again.keys() == merged.keys() and all(torch.equal(again[name], merged[name]) for name in merged)
    assert not any("lora" in name for name in merged)
    from transformers import AutoModelForCausalLM

    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(f"outputs/NAME/{name}", dtype=torch.float32)(ids).logits
            for name in ("final", "merged")
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(str(runs.files["model"]), dtype=torch.float32)
    assert any(not torch.equal(merged[name], value) for name, value in base.state_dict().items() if name in merged)
