"""Rows are tokenised in one place, which knows where the model's generation stops."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from strop.config import load_config
from strop.modelrows import ModelRows

SRC = Path(__file__).resolve().parents[2] / "src" / "strop"
OPEN_ENDED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Turns end with the next turn's header, as GLM's do."""


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_rows_end_where_generation_stops(file: str, model_dir: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a fox"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (model_dir / "chat_template.jinja").write_text(OPEN_ENDED)
    (model_dir / "generation_config.json").unlink()
    settings = {"models": [{"huggingface_id": str(model_dir)}], "dataset.train_file": str(tmp_path / "rows.jsonl")}
    config = load_config(overrides={**settings, "dataset.validation_split": 0.0})

    def last() -> list[str]:
        rows = ModelRows.of(config, config.models[0])
        first, (group,) = rows.first(), rows.load().train
        assert first is not None and first.group == group
        ids = list(group.completions[0].ids[-1:])
        return list(rows.tokenizer.convert_ids_to_tokens(ids))

    content: dict[str, Any] = json.loads((model_dir / file).read_text()) if (model_dir / file).exists() else {}
    tokenizer = ModelRows.of(config, config.models[0]).tokenizer
    assert last() == [tokenizer.eos_token]
    header = tokenizer.convert_tokens_to_ids("<|im_start|>")
    (model_dir / file).write_text(json.dumps({**content, "eos_token_id": [tokenizer.eos_token_id, header]}))
    assert last() == ["<|im_start|>"]


def test_nobody_else_tokenises_rows_for_a_model() -> None:
    used = {"load_data": set[str](), "first_row": set[str]()}
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in used:
                used[node.func.id].add(path.name)
    assert used == {name: {"modelrows.py"} for name in used}
