"""`post_training`: one settings class a method, which its objective takes. Floor 1, no torch.

A setting that the chosen method or loss does not read is an error, never ignored. Null and a setting's neutral value
(the one that changes nothing, in `NEUTRAL`) pass, so that a block written for one method can be switched to another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from strop.config.section import Problem, Section, SectionError

NEUTRAL: Mapping[str, Any] = {
    "label_smoothing": 0.0,
    "loss_type": "sigmoid",
    "ipo_norm": "mean",
    "use_ref_model": True,
    "loss_reduction": "tokens",
}
"""The value of each setting that says nothing about methods which do not read it."""


def is_neutral(name: str, value: Any) -> bool:
    """Whether this value of a setting says nothing: null, or the one in `NEUTRAL`."""
    neutral = NEUTRAL.get(name)
    return value is None or (value == neutral and isinstance(value, bool) == isinstance(neutral, bool))


class MethodSettings(Section):
    """What the settings of all methods have in common."""

    LEARNING_RATE: ClassVar[float]
    """The default of `training.learning_rate` under this method."""

    OBJECTIVE: ClassVar[str]
    """`module:class` of the objective that takes these settings, below `strop.objectives`."""

    def unread(self) -> Mapping[str, str]:
        """Settings that stand in this class but not for this variant of the method: name -> who reads it."""
        return {}

    def problems(self) -> Iterator[Problem]:
        for name, readers in self.unread().items():
            value = getattr(self, name)
            if name in self.model_fields_set and not is_neutral(name, value):
                yield Problem(
                    (name,),
                    f"{name} is {value!r}, but it is read by {readers} only",
                    fix=f"remove {name}, or choose {readers}",
                )

    @model_validator(mode="before")
    @classmethod
    def _of_this_method(cls, data: Any) -> Any:
        """Drops settings of other methods that are null or neutral, and refuses the others."""
        if not isinstance(data, Mapping):
            return data
        admitted, problems = {}, []
        for name, value in data.items():
            readers = [method for method, settings in METHODS.items() if name in settings.model_fields]
            if name in cls.model_fields or not readers:
                admitted[name] = value  # unknown everywhere: refused with the nearest name
            elif not is_neutral(name, value):
                method = cls.model_fields["method"].default
                problems.append(
                    Problem(
                        (name,),
                        f"{name} is {value!r}, but method {method} does not read it",
                        f"the settings of {method}: {', '.join(n for n in cls.model_fields if n != 'method')}",
                        f"remove {name}, or set method: {' or '.join(readers)}",
                    )
                )
        if problems:
            raise SectionError(problems)
        return admitted


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

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.ref_model_id is not None and not self.use_ref_model:
            yield Problem(
                ("ref_model_id", "use_ref_model"),
                f"ref_model_id names the reference model {self.ref_model_id!r} while use_ref_model is false",
                fix="set use_ref_model: true, or remove ref_model_id",
            )


PostTraining = Annotated[SftSettings | DpoSettings, Field(discriminator="method")]
METHODS: Mapping[str, type[MethodSettings]] = {"sft": SftSettings, "dpo": DpoSettings}
