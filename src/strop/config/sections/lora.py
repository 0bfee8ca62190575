"""The `lora` section of the configuration: low-rank adapters. Floor 1, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from strop.config.section import ListOf, Problem, Section


class LoraSection(Section):
    """Low-rank adapters (arXiv 2106.09685). The section's presence switches them on."""

    enabled: bool = Field(default=True, json_schema_extra={"x-default": "true if the section is given, else false"})
    """Train adapters instead of all weights; true when a `lora` section is given, else false."""
    r: int = Field(default=16, gt=0, le=65_536)
    """Rank."""
    lora_alpha: float = Field(
        default_factory=lambda data: 2.0 * data.get("r", 16), gt=0, json_schema_extra={"x-default": "2 r"}
    )
    """Scale: the adapter's output is multiplied by lora_alpha / r. Default 2 r."""
    target_parameters: ListOf[str] | None = None
    """Weights of fused experts that get adapters too, by exact name, such as `experts.gate_up_proj`. They take neither
    dropout nor use_dora nor biases."""
    lora_dropout: float = Field(
        default_factory=lambda data: 0.0 if data.get("target_parameters") else 0.05,
        ge=0,
        lt=1,
        json_schema_extra={"x-default": "0.05, or 0 with target_parameters"},
    )
    """Dropout probability on the adapter's input. Default 0.05, or 0 with target_parameters."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too."""
    target_modules: ListOf[str] | str = Field(
        default="auto", json_schema_extra={"x-type": "auto, all-linear, or a list of module names"}
    )
    """Module names; `auto`: the attention projections of the model's family; `all-linear`: every linear layer but the
    head."""
    modules_to_save: ListOf[str] | None = None
    """Modules that are trained in full and saved with the adapter."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """Kind of model; strop tunes causal language models."""
    loraplus_lr_ratio: float | None = Field(default=None, gt=0, le=1000)
    """LoRA+ (arXiv 2402.12354): the second matrix of each adapter (B, which begins at 0) learns so many times as fast
    as the first; null: as fast. The paper takes 16."""
    use_rslora: bool = False
    """Rank-stabilised scale lora_alpha / sqrt(r) (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353)."""

    def problems(self) -> Iterator[Problem]:
        named = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        if both := sorted(set(named) & set(self.modules_to_save or ())):
            yield Problem(
                ("modules_to_save", "target_modules"),
                f"{', '.join(both)} stands in target_modules and in modules_to_save: adapted, and trained in full",
                fix="name each module in one of the two",
            )
        refused = {"lora_dropout": 0.0, "use_dora": False, "bias": "none"}
        for key, needed in refused.items() if self.target_parameters else ():
            if (value := getattr(self, key)) != needed:
                yield Problem(
                    (key, "target_parameters"),
                    f"{key} is {value}, which adapters of experts do not take",
                    fix=f"leave {key} out, or target_parameters",
                )
