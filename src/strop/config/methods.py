"""`post_training`: one settings class a method, which its objective takes. Floor 1, no torch.

A setting that the chosen method or loss does not read is an error, never ignored. Null and a setting's neutral value
(the one that changes nothing, in `NEUTRAL`) pass, so that a block written for one method can be switched to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from strop.config.section import Section

NEUTRAL: Mapping[str, Any] = {
    "label_smoothing": 0.0,
    "loss_type": "sigmoid",
    "ipo_norm": "mean",
    "use_ref_model": True,
    "loss_reduction": "tokens",
}
"""The value of each setting that says nothing about methods which do not read it."""


class MethodSettings(Section):
    """What the settings of all methods have in common."""

    LEARNING_RATE: ClassVar[float]
    """The default of `training.learning_rate` under this method."""

    OBJECTIVE: ClassVar[str]
    """`module:class` of the objective that takes these settings, below `strop.objectives`."""

    def unread(self) -> Mapping[str, str]:
        """Settings that stand in this class but not for this variant of the method: name -> who reads it."""
        return {}

    @model_validator(mode="after")
    def _no_dead_setting(self) -> Self:
        for name, readers in self.unread().items():
            value = getattr(self, name)
            if name in self.model_fields_set and value is not None and value != NEUTRAL.get(name):
                raise ValueError(f"{name}: {value!r} is not read here; it is read by {readers}; remove it")
        return self


class SftSettings(MethodSettings):
    """Supervised fine-tuning: maximise the log-likelihood of the completions."""

    LEARNING_RATE: ClassVar[float] = 2e-5
    OBJECTIVE: ClassVar[str] = "sft:Sft"

    method: Literal["sft"] = "sft"
    """Supervised fine-tuning."""
    loss_reduction: Literal["tokens", "sequences"] = "tokens"
    """`tokens`: mean over the step's trained tokens. `sequences`: mean over sequences of each one's token mean."""


class DpoSettings(MethodSettings):
    """Direct preference optimisation (arXiv 2305.18290) and its loss variants."""

    LEARNING_RATE: ClassVar[float] = 5e-7
    OBJECTIVE: ClassVar[str] = "dpo:Dpo"
    SMOOTHED: ClassVar[frozenset[str]] = frozenset({"sigmoid"})

    method: Literal["dpo"] = "dpo"
    """Direct preference optimisation."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference; higher stays closer."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "kto_pair"] = "sigmoid"
    """The loss on the margin; see the documentation of dpo."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the labels taken to be flipped (conservative DPO), in [0, 0.5). Read by `sigmoid`."""
    ipo_norm: Literal["mean", "sum"] = "mean"
    """Read by `ipo`: log-ratios per token (`mean`, as TRL) or per completion (`sum`, as the paper)."""
    use_ref_model: bool = True
    """true or false, the reference is the model as it is when training starts; its log-probs are taken before the
    first step and no second model stays in memory. false only forbids naming another one in `ref_model_id`."""
    ref_model_id: str | None = None
    """Hub id or folder of another model to be the reference; it must share the policy's vocabulary."""

    def unread(self) -> Mapping[str, str]:
        dead = {}
        if self.loss_type not in self.SMOOTHED:
            dead["label_smoothing"] = "loss_type sigmoid"
        if self.loss_type != "ipo":
            dead["ipo_norm"] = "loss_type ipo"
        return dead

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.ref_model_id is not None and not self.use_ref_model:
            raise ValueError(
                "ref_model_id names a reference model while use_ref_model is false; "
                "set use_ref_model: true or drop ref_model_id"
            )
        return self


PostTraining = Annotated[SftSettings | DpoSettings, Field(discriminator="method")]
METHODS: Mapping[str, type[MethodSettings]] = {"sft": SftSettings, "dpo": DpoSettings}


def admit(block: Mapping[str, Any]) -> dict[str, Any]:
    """The `post_training` block as its method's class wants it: settings of other methods that are null or neutral
    are dropped, the method is filled in.

    Raises:
        ValueError: a setting of another method has a value; the message says who reads it.
    """
    method = block.get("method", "sft")
    settings = METHODS.get(method) if isinstance(method, str) else None
    if settings is None:
        return dict(block)  # the union says which methods there are
    admitted: dict[str, Any] = {"method": method}
    for name, value in block.items():
        if name in settings.model_fields:
            if value is not None or settings.model_fields[name].default is None:
                admitted[name] = value
            continue
        readers = [m for m, s in METHODS.items() if name in s.model_fields]
        if readers and (value is None or value == NEUTRAL.get(name)):
            continue
        if readers:
            read = ", ".join(f for f in settings.model_fields if f != "method")
            raise ValueError(
                f"{name}: {value!r} is not read by method {method} (it is read by {', '.join(readers)}); "
                f"{method} reads {read}"
            )
        admitted[name] = value  # unknown everywhere: refused with the nearest name
    return admitted
