"""The `models` list of the configuration. Floor 1, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from strop.config.section import Problem, Section


def _last_part(data: dict[str, Any]) -> str:
    return re.split(r"[/\\]", str(data.get("huggingface_id", "")).rstrip("/\\"))[-1]


class ModelSection(Section):
    """One model to train."""

    huggingface_id: str = Field(min_length=1, json_schema_extra={"x-type": "a hub id or a folder"})
    """Hub id, or a folder with the model and its tokenizer."""
    name: str = Field(
        default_factory=_last_part,
        pattern=r"^[^/\\\x00-\x1f\x7f]+$",
        json_schema_extra={"x-default": "the last part of huggingface_id", "x-type": "a folder name, without slashes"},
    )
    """Name of the run's folder under `training.output_dir`; default: the last part of `huggingface_id`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read it."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    adapter: str | None = None
    """Hub id or folder of a LoRA adapter to continue from; the model with it is also the reference."""
    attn_implementation: str | None = None
    """Null: shared-prefix attention where the architecture allows it. A name that transformers knows (`sdpa`,
    `eager`, ...): that attention, on plain padded rows."""

    def problems(self) -> Iterator[Problem]:
        if (
            self.name in ("", ".", "..")
            or len(self.name.encode(errors="replace")) > 200
            or re.search(r"[/\\\x00-\x1f\x7f]", self.name)
        ):
            yield Problem(
                ("name", "huggingface_id"),
                f"name {self.name[:60]!r} cannot be the name of a folder",
                "a folder name of at most 200 bytes, without slashes and control characters",
                "give the model a `name:`",
            )
