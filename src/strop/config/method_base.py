"""What the settings of all methods have in common: which are read, which are refused. Floor 1, no torch.

A setting that the chosen method or loss does not read is an error, never ignored. Null and a setting's neutral value
(the one that changes nothing, in `NEUTRAL`) pass, so that a block written for one method can be switched to another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field, model_validator

from strop.config.base_section import Problem, Section, SectionError
from strop.types import NUMBERS, RowShape

if TYPE_CHECKING:
    from strop.config.run import RunConfig

NEUTRAL: Mapping[str, Any] = {
    "label_smoothing": 0.0,
    "loss_type": "sigmoid",
    "ipo_norm": "mean",
    "f_divergence": "reverse_kl",
    "sft_weight": 0.0,
    "ld_alpha": 1.0,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "wpo_weighting": False,
    "orpo_nll": "completion",
    "use_ref_model": True,
    "loss_reduction": "tokens",
    "online": False,
}
"""The value of each setting that says nothing about methods which do not read it."""


def is_neutral(name: str, value: Any) -> bool:
    """Whether this value of a setting says nothing: null, or the one in `NEUTRAL`."""
    neutral = NEUTRAL.get(name)
    return value is None or (value == neutral and isinstance(value, bool) == isinstance(neutral, bool))


class Readers(NamedTuple):
    """Which variants of a method read a setting: those whose `setting` has one of `values`; where no values are listed,
    those in which it is not null."""

    setting: str
    values: tuple[str, ...] = ()

    def include(self, settings: MethodSettings) -> bool:
        value = getattr(settings, self.setting)
        return value in self.values if self.values else value is not None

    def __str__(self) -> str:
        return f"{self.setting} {either(self.values)}" if self.values else self.setting


def either(names: Sequence[str]) -> str:
    """`a, b or c`."""
    *front, last = names
    return f"{', '.join(front)} or {last}" if front else last


class Choice(NamedTuple):
    """A setting of a method whose value makes a demand on the data or on other sections. without: the value of the same
    setting that makes none."""

    setting: str
    value: str
    without: str


class MethodSettings(Section):
    """What the settings of all methods have in common."""

    LEARNING_RATE: ClassVar[float] = 5e-7
    """The default of `training.learning_rate` under this method."""

    OBJECTIVE: ClassVar[str]
    """`module:class` of the objective that takes these settings, below `strop.objectives`."""

    REWARD_MODEL: ClassVar[bool] = False
    """Whether it trains a model that gives a completion one number, not one that writes."""

    ROWS: ClassVar[RowShape] = "pair"
    """What the method needs of the data."""

    PACKS: ClassVar[bool] = False
    """Whether `training.packing` is for it."""

    SAMPLES: ClassVar[bool] = False
    """Whether it, or a variant of it, can train on completions that the policy samples (a rollout section)."""

    SAMPLES_WITH: ClassVar[str] = ""
    """`setting: value` of the variants that can, where not all do."""

    REWARDED: ClassVar[bool] = True
    """Whether completions that the policy samples have to be rewarded."""

    NUMBERS: ClassVar[tuple[str, ...]] = ()
    """Columns of numbers (`strop.types.NUMBERS`) that it takes from rows that have them. Its objective says whether it
    can do without one."""

    READ_BY: ClassVar[Mapping[str, Readers]] = {}
    """Settings that some variants of the method do not read, and which do."""

    method: str

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if unknown := [name for name in cls.NUMBERS if name not in NUMBERS]:
            raise TypeError(
                f"{cls.__name__}.NUMBERS names {', '.join(unknown)}: say in OF_COMPLETIONS, OF_TOKENS or OF_GROUPS of "
                "strop/types.py what a row has of it"
            )

    @property
    def compares(self) -> Choice | None:
        """The setting that makes a group need at least two completions, because they are compared with each other;
        None: one is enough."""
        return None

    @property
    def samples(self) -> bool:
        """Whether this variant can train on completions that the policy samples."""
        return self.SAMPLES

    @property
    def only_samples(self) -> Choice | None:
        """The setting with which it can train only on completions that the policy samples; None: it can train on those
        of rows, too."""
        return None

    @property
    def label_weights(self) -> Mapping[bool, float] | None:
        """Weight of the loss of desirable (True) and undesirable completions, for a method whose rows have labels."""
        return None

    def problems_in(self, config: RunConfig) -> Iterator[Problem]:
        """What of the other sections this method cannot be combined with. Keys are those of the whole configuration."""
        yield from ()

    def advice(self, config: RunConfig) -> Iterator[str]:
        """Warnings about values of this section that are allowed and likely to disappoint."""
        yield from ()

    def unread(self) -> Mapping[str, Readers]:
        """Settings that stand in this class but not for this variant of the method, and who reads them."""
        return {name: readers for name, readers in self.READ_BY.items() if not readers.include(self)}

    def problems(self) -> Iterator[Problem]:
        unread = self.unread()
        read = ", ".join(name for name in type(self).model_fields if name not in unread and name != "method")
        for name, readers in unread.items():
            value = getattr(self, name)
            is_default = value == type(self).model_fields[name].default
            if name in self.model_fields_set and not is_default and not is_neutral(name, value):
                given = getattr(self, readers.setting)
                variant = f"{readers.setting} {'null' if given is None else given}"
                yield Problem(
                    (name,),
                    f"{name} is {value!r}, but {variant} does not read it",
                    f"the settings of {self.method} with {variant}: {read}",
                    f"remove {name}, or choose {readers}",
                )

    @model_validator(mode="before")
    @classmethod
    def _of_this_method(cls, data: Any) -> Any:
        """Drops settings of other methods that are null or neutral, and refuses the others."""
        if not isinstance(data, Mapping):
            return data
        from strop.config.methods import METHODS

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
                        f"write method: {value}"
                        if name == "loss_type" and isinstance(value, str) and value in METHODS
                        else f"remove {name}, or set method: {either(readers)}",
                    )
                )
        if problems:
            raise SectionError(problems)
        return admitted


class ReferenceSettings(MethodSettings):
    """What methods that hold the policy to a reference have in common."""

    USUAL_BETA: ClassVar[tuple[float, float]] = (0.01, 1.0)
    """Between these nobody is warned of `beta`."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference; higher stays closer."""
    use_ref_model: bool = True
    """true or false, the reference is the model as it is when training starts; its log-probs are taken before the
    first step and no second model stays in memory. false only forbids naming another one in `ref_model_id`."""
    ref_model_id: str | None = None
    """Hub id or folder of another model to be the reference; it must share the policy's vocabulary."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.ref_model_id is not None and not self.use_ref_model:
            yield Problem(
                ("ref_model_id", "use_ref_model"),
                f"ref_model_id names the reference model {self.ref_model_id!r} while use_ref_model is false",
                fix="set use_ref_model: true, or remove ref_model_id",
            )

    def advice(self, config: RunConfig) -> Iterator[str]:
        low, high = self.USUAL_BETA
        if not low <= self.beta <= high:
            effect = "leaves the policy almost free of" if self.beta < low else "holds the policy to"
            yield (
                f"post_training.beta {self.beta:g} lies outside {low:g} to {high:g}: it {effect} the reference; 0.1 to "
                "0.3 is a usual start"
            )
        if not self.use_ref_model and config.lora.enabled:
            yield (
                "post_training.use_ref_model false changes nothing under LoRA: the reference is the model without its "
                "new adapter, and takes no memory of its own"
            )
