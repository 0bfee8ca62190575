"""Help, documentation and JSON Schema say what the classes say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from strop.config.manual import json_schema, key_help, markdown
from strop.config.methods import METHODS
from strop.config.schema import KEYS, SECTIONS, key_at

ROOT = Path(__file__).resolve().parents[3]


def test_every_key_has_a_meaning_and_stands_in_all_three() -> None:
    page, text, schema = markdown(), key_help(80), json.loads(json_schema())
    described = {
        (section, key)
        for section, part in {**schema["$defs"], "": schema}.items()
        for key, value in part.get("properties", {}).items()
        if value.get("description")
    }
    names = {key for _, key in described}
    for key in KEYS:
        assert key.description, key.dotted
        assert f"| `{key.name}` | {key.expected} |" in page
        assert f"--{key.name.replace('_', '-')}  " in text or f"--{key.dotted.replace('.N.', '.0.')}  " in text
        assert key.name in names


def test_the_help_fits_the_terminal_where_it_can() -> None:
    lines = [line for line in key_help(80).splitlines() if line.startswith("      ")]
    assert lines
    assert max(map(len, lines)) <= 80


def test_the_schema_knows_unions_and_refuses_unknown_keys() -> None:
    schema = json.loads(json_schema())
    assert schema["required"] == ["models"]
    assert list(schema["properties"])[:2] == ["preset", "seed"]
    union = schema["properties"]["post_training"]
    assert {part["$ref"].rpartition("/")[2] for part in union["oneOf"]} == {s.__name__ for s in METHODS.values()}
    assert schema["$defs"]["DpoSettings"]["required"] == ["method"]
    assert "required" not in schema["$defs"]["SftSettings"]

    def objects(node: Any) -> list[dict[str, Any]]:
        found = [node] if isinstance(node, dict) and "properties" in node else []
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        return found + [part for child in children for part in objects(child)]

    assert all(part["additionalProperties"] is False for part in objects(schema))


def test_the_files_in_the_repository_are_up_to_date() -> None:
    """Mend: make docs."""
    files = runpy.run_path(str(ROOT / "docs" / "generate.py"))["generated"]()
    for path, text in files:
        assert path.read_text(encoding="utf-8") == text, path.name


def test_a_setting_that_means_different_things_says_so_by_method() -> None:
    meaning = SECTIONS["post_training"]["beta"].description
    assert meaning.startswith("dpo, ipo, kto: ") and "orpo: " in meaning and "cpo: " in meaning
    own = key_at(("post_training", "beta"), "orpo")
    assert own is not None and own.description in meaning and ": " not in own.description
