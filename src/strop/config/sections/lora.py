"""The `lora` section of the configuration: low-rank adapters. Floor 1, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from strop.config.base_section import ListOf, Problem, Section


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
    """LoRA+ (arXiv 2402.12354): the second matrix of each adapter (B, which begins at 0) learns this many times as fast
    as the first; null: as fast. The paper takes 16."""
    init_lora_weights: bool | str = Field(
        default=True, json_schema_extra={"x-type": "true, gaussian, pissa, pissa_niter_N, or olora"}
    )
    """How adapters begin. true: they add nothing (B is 0); gaussian: the same with another A. pissa (arXiv 2404.02948):
    with the largest singular values of each weight, which the base loses; pissa_niter_N: the same, approximated by N
    rounds, in a fraction of the time. olora (arXiv 2406.01775): with a part of its QR decomposition. The model computes
    what its base does until the first step; the saved adapter loads on the base as it is and has twice the rank r, for
    pissa and olora."""
    use_rslora: bool = False
    """Rank-stabilised scale lora_alpha / sqrt(r) (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353)."""

    @property
    def moves_base(self) -> bool:
        """Whether adapters begin with a part of the base's weights, which the base loses."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian"

    def problems(self) -> Iterator[Problem]:
        yield from self._init_problems()
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

    def _init_problems(self) -> Iterator[Problem]:
        init = self.init_lora_weights
        if init is not True and not re.fullmatch(r"gaussian|pissa|olora|pissa_niter_[1-9]\d?", str(init)):
            yield Problem(
                ("init_lora_weights",),
                f"init_lora_weights is {str(init)[:60]}",
                "true, gaussian, pissa, pissa_niter_4 (or another number of rounds), olora",
            )
            return
        for key, reason in _BESIDE_BASE.items() if self.moves_base else ():
            if getattr(self, key):
                yield Problem(
                    (key, "init_lora_weights"),
                    f"init_lora_weights: {init} moves a part of the base's weights into the adapter, and {reason}",
                    fix=f"leave {key} or init_lora_weights out",
                )


_BESIDE_BASE = {
    "use_dora": "use_dora: true normalises by the base's weights as they were",
    "target_parameters": "weights of fused experts (target_parameters) begin with 0 alone",
}
"""Settings that do not go together with an initialisation that changes the base, and why."""
