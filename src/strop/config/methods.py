"""`post_training`: one settings class a method, which its objective takes. Floor 1, no torch.

A setting that the chosen method or loss does not read is an error, never ignored. Null and a setting's neutral value
(the one that changes nothing, in `NEUTRAL`) pass, so that a block written for one method can be switched to another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from strop.config.section import Problem, Section, SectionError
from strop.types import RowShape

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
}
"""The value of each setting that says nothing about methods which do not read it."""


def is_neutral(name: str, value: Any) -> bool:
    """Whether this value of a setting says nothing: null, or the one in `NEUTRAL`."""
    neutral = NEUTRAL.get(name)
    return value is None or (value == neutral and isinstance(value, bool) == isinstance(neutral, bool))


class Readers(NamedTuple):
    """Who reads a setting that not every variant of its method reads: `setting` must have one of `values`, or any
    value but null where these are not listed."""

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


class MethodSettings(Section):
    """What the settings of all methods have in common."""

    LEARNING_RATE: ClassVar[float] = 5e-7
    """The default of `training.learning_rate` under this method."""

    OBJECTIVE: ClassVar[str]
    """`module:class` of the objective that takes these settings, below `strop.objectives`."""

    ROWS: ClassVar[RowShape] = "pair"
    """What the method needs of the data."""

    READ_BY: ClassVar[Mapping[str, Readers]] = {}
    """Settings that some variants of the method do not read, and which do."""

    method: str

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


class SftSettings(MethodSettings):
    """Supervised fine-tuning: maximise the log-likelihood of the completions."""

    LEARNING_RATE: ClassVar[float] = 2e-5
    OBJECTIVE: ClassVar[str] = "sft:Sft"
    ROWS: ClassVar[RowShape] = "single"

    method: Literal["sft"] = "sft"
    """Supervised fine-tuning."""
    loss_reduction: Literal["tokens", "sequences"] = "tokens"
    """`tokens`: mean over the step's trained tokens. `sequences`: mean over sequences of each one's token mean."""


class ReferenceSettings(MethodSettings):
    """What methods that hold the policy to a reference have in common."""

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


LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "kto_pair",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]
"""The losses of method dpo; `strop.objectives.dpo` has their formulas."""


def _losses(*but: str) -> Readers:
    return Readers("loss_type", tuple(name for name in get_args(LossType) if name not in but))


class DpoSettings(ReferenceSettings):
    """Direct preference optimisation (arXiv 2305.18290) and its loss variants on pairs."""

    OBJECTIVE: ClassVar[str] = "dpo:Dpo"
    READ_BY: ClassVar[Mapping[str, Readers]] = {
        "label_smoothing": Readers("loss_type", ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")),
        "ipo_norm": Readers("loss_type", ("ipo",)),
        "bco_delta": Readers("loss_type", ("bco_pair",)),
        "discopop_tau": Readers("loss_type", ("discopop",)),
        # of the other losses the partition function does not cancel
        "f_divergence": Readers(
            "loss_type", ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm")
        ),
        "f_alpha": Readers("f_divergence", ("alpha",)),
        # these are divided by the length
        "ld_alpha": _losses("ipo", "sigmoid_norm"),
        # these compare sorted pairs, whose weights would belong to others
        "wpo_weighting": _losses("aot", "aot_unpaired"),
        "ref_mixup_alpha": Readers("ref_sync_steps"),
    }

    method: Literal["dpo"] = "dpo"
    """Direct preference optimisation."""
    loss_type: LossType = "sigmoid"
    """The loss on the pair; `strop methods dpo` has the formulas."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the labels taken to be flipped, in [0, 0.5). Read by `sigmoid` (conservative DPO), `robust`, `aot`,
    `aot_unpaired` and `exo_pair`, which needs it above 0."""
    ipo_norm: Literal["mean", "sum"] = "mean"
    """Read by `ipo`: log-ratios per token (`mean`, as TRL) or per completion (`sum`, as the paper)."""
    bco_delta: Literal["mean", "zero"] = "mean"
    """Read by `bco_pair`: the rewards' shift is their mean over the step, or 0 (as TRL)."""
    discopop_tau: float = Field(default=0.05, gt=0)
    """Read by `discopop`: temperature of the mixture of its two losses."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """The divergence from the reference (arXiv 2309.16240); other than `reverse_kl` for losses on the difference of
    the two sides: `sigmoid`, `hinge`, `ipo`, `robust`, `exo_pair`, `discopop`, `sigmoid_norm`."""
    f_alpha: float = Field(default=0.5, ge=0, le=1)
    """Read by f_divergence `alpha`: 0 is forward_kl, 1 is reverse_kl (1 minus the alpha of the paper)."""
    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """Weight of the tokens of the longer completion beyond the length of the shorter one (arXiv 2409.06411); 1: off.
    Not for the losses per token, `ipo` and `sigmoid_norm`."""
    wpo_weighting: bool = False
    """Weight each pair's loss by how likely the policy itself is to write its completions (WPO, arXiv 2406.11827)."""
    ref_sync_steps: int | None = Field(default=None, ge=1)
    """Every so many steps the reference moves towards the policy (TR-DPO, arXiv 2404.09656), which keeps a second model
    in memory and scores it in every step; null: the reference stays as it is. Full training only."""
    ref_mixup_alpha: float = Field(default=0.6, gt=0, le=1)
    """Read with ref_sync_steps: how far the reference moves, 1: all the way."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen completions' negative log-likelihood per token, added to the loss (arXiv 2404.19733)."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.ref_sync_steps and self.ref_model_id is not None:
            yield Problem(
                ("ref_sync_steps", "ref_model_id"),
                f"ref_sync_steps is {self.ref_sync_steps}, and ref_model_id names another model, which cannot be mixed "
                "with the policy",
                fix="remove one of them",
            )
        if self.loss_type == "exo_pair" and self.label_smoothing == 0:
            yield Problem(
                ("label_smoothing", "loss_type"),
                "label_smoothing is 0, and loss_type exo_pair takes its logarithm",
                "a number above 0 and below 0.5",
                "set label_smoothing: 0.001, as the paper does",
            )


class IpoSettings(ReferenceSettings):
    """Identity preference optimisation (arXiv 2310.12036): a regression of the margin to 1 / (2 beta)."""

    OBJECTIVE: ClassVar[str] = "ipo:Ipo"

    method: Literal["ipo"] = "ipo"
    """Identity preference optimisation."""
    ipo_norm: Literal["mean", "sum"] = "mean"
    """Log-ratios per token (`mean`, as TRL) or per completion (`sum`, as the paper)."""


class KtoSettings(ReferenceSettings):
    """Kahneman-Tversky optimisation (arXiv 2402.01306): completions that are desirable or not, without pairs."""

    OBJECTIVE: ClassVar[str] = "kto:Kto"
    ROWS: ClassVar[RowShape] = "labelled"

    method: Literal["kto"] = "kto"
    """Kahneman-Tversky optimisation."""
    kto_loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`kto`: against the divergence from the reference, estimated over the step. `apo_zero_unpaired` (arXiv
    2408.06266): against 0, which spares that estimate."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the desirable completions' loss; keep weight times number alike on both sides."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the undesirable completions' loss."""


class OrpoSettings(MethodSettings):
    """Odds ratio preference optimisation (arXiv 2403.07691): likelihood and preference at once, without a reference."""

    OBJECTIVE: ClassVar[str] = "orpo:Orpo"

    method: Literal["orpo"] = "orpo"
    """Odds ratio preference optimisation."""
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio beside the negative log-likelihood (lambda in the paper)."""
    orpo_nll: Literal["completion", "full"] = "completion"
    """Whose likelihood: of the chosen completion, or of prompt and chosen completion (`full`, as TRL)."""


class SimpoSettings(MethodSettings):
    """Simple preference optimisation (arXiv 2405.14734): a margin per token, without a reference."""

    OBJECTIVE: ClassVar[str] = "simpo:Simpo"

    method: Literal["simpo"] = "simpo"
    """Simple preference optimisation."""
    simpo_beta: float = Field(default=2.0, gt=0)
    """Scale of the margin per token; about 2, twenty times the beta of dpo."""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """The margin per token to reach; the gamma of the paper is simpo_beta times this one."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen completions' negative log-likelihood per token, added to the loss."""


class CpoSettings(MethodSettings):
    """Contrastive preference optimisation (arXiv 2401.08417): DPO with a uniform reference, and likelihood."""

    OBJECTIVE: ClassVar[str] = "cpo:Cpo"

    method: Literal["cpo"] = "cpo"
    """Contrastive preference optimisation."""
    beta: float = Field(default=0.1, gt=0)
    """Scale of the difference of the two completions' log-probs."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the labels taken to be flipped, in [0, 0.5)."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """Weight of the chosen completions' negative log-likelihood per token; 0: none."""


PostTraining = Annotated[
    SftSettings | DpoSettings | IpoSettings | KtoSettings | OrpoSettings | SimpoSettings | CpoSettings,
    Field(discriminator="method"),
]
METHODS: Mapping[str, type[MethodSettings]] = {
    settings.model_fields["method"].default: settings for settings in get_args(get_args(PostTraining)[0])
}
"""Every method by its name."""
