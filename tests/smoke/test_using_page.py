"""What docs/using-your-model.md shows works after full training, too. After LoRA, test_pages.py runs all of it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.nightly
def test_the_page_generates(runs: Any, place: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    place(runs(max_steps=1).path)
    Path("prompts.jsonl").write_text('{"prompt": "hello"}\n{"messages": [{"role": "user", "content": "yes"}]}\n')
    for command in re.findall(r"^strop (generate .* .*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert main(shlex.split(command)) == 0
    assert [set(json.loads(line)) for line in Path("answers.jsonl").read_text().splitlines()] == 2 * [
        {"prompt", "sample", *(f"{who}{what}" for who in ("", "base_") for what in ("completion", "tokens", "finish"))}
    ]
    text = PAGE.read_text(encoding="utf-8")
    pairs = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in ("hello", "no")]
    Path("rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (command,) = re.findall(r"^strop (eval .* --data .*)$", text, flags=re.MULTILINE)
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
