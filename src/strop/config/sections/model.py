"""The `models` list of the configuration. Floor 1, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from strop.config.base_section import ListOf, Problem, Section


def _last_part(data: dict[str, Any]) -> str:
    parts = re.split(r"[/\\]", str(data.get("huggingface_id", "")).rstrip("/\\"))
    return parts[-2] if len(parts) > 1 and re.fullmatch(r"consolidated\.\d+\.pth", parts[-1]) else parts[-1]


class ModelSection(Section):
    """One model to train."""

    huggingface_id: str = Field(min_length=1, json_schema_extra={"x-type": "a hub id or a folder"})
    """Hub id, or a folder with the model and its tokenizer; also one with `consolidated.00.pth`, `params.json` and the
    tokenizer, or that file, which is converted once, into the cache."""
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
    add_tokens: ListOf[str] | None = None
    """New tokens, such as `<think>`: the tokenizer gets them, and the embedding and the head a row each, which begins
    as the mean of the others. With `lora`, these rows train beside the adapters; without, all rows do."""
    attn_implementation: str | None = None
    """Null: shared-prefix attention where the architecture allows it. A name that transformers knows (`sdpa`,
    `eager`, ...): that attention, on plain padded rows."""

    quant: Literal["4bit", "8bit", "none"] = "none"
    """Quantise the linear layers of the frozen base as it is loaded, by bitsandbytes (the extra `bnb`); adapters train
    on top (QLoRA, arXiv 2305.14314). A model that transformers has saved in 4 or 8 bits of bitsandbytes is recognised
    as one, and takes `none`."""
    bnb_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 numbers that 4 bits stand for: of a normal distribution, or floating point."""
    bnb_double_quant: bool = True
    """Quantise the scales of 4 bits, too: 4.1 bits per weight instead of 4.5."""
    bnb_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What layers in 4 bits multiply in; auto: what the run computes in (bf16, fp16)."""

    def problems(self) -> Iterator[Problem]:
        yield from self._token_problems()
        for key in ("bnb_quant_type", "bnb_double_quant", "bnb_compute_dtype"):
            value = getattr(self, key)
            if self.quant != "4bit" and value != type(self).model_fields[key].default:
                yield Problem(
                    (key, "quant"),
                    f"{key} is {value}, which is read with quant: 4bit alone; quant is {self.quant}",
                    fix=f"set quant: 4bit, or remove {key}",
                )
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

    def _token_problems(self) -> Iterator[Problem]:
        tokens = self.add_tokens or ()
        if any(not token.strip() for token in tokens):
            yield Problem(("add_tokens",), "add_tokens holds an empty token", "texts such as <think>", "remove it")
        if twice := sorted({token for token in tokens if tokens.count(token) > 1}):
            yield Problem(("add_tokens",), f"add_tokens names {', '.join(twice)} twice", fix="name each token once")
        if tokens and self.adapter is not None:
            yield Problem(
                ("add_tokens", "adapter"),
                "add_tokens: an adapter that is continued has its own tokens, and peft cannot add rows to them",
                fix="leave add_tokens out if the adapter was trained with them; else merge it (strop merge), and train "
                "the merged model",
            )
