"""`post_training`: one settings class per method, which its objective takes. Floor 1, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import Field

from strop.config.base_section import Problem
from strop.config.grpo_settings import GrpoSettings as GrpoSettings
from strop.config.method_base import NEUTRAL as NEUTRAL
from strop.config.method_base import Choice
from strop.config.method_base import MethodSettings as MethodSettings
from strop.config.method_base import Readers as Readers
from strop.config.method_base import ReferenceSettings as ReferenceSettings
from strop.config.method_base import either as either
from strop.config.method_base import is_neutral as is_neutral
from strop.types import RowShape

if TYPE_CHECKING:
    from strop.config.run import RunConfig


class SftSettings(MethodSettings):
    """Supervised fine-tuning: maximise the log-likelihood of the completions."""

    LEARNING_RATE: ClassVar[float] = 2e-5
    OBJECTIVE: ClassVar[str] = "sft:Sft"
    ROWS: ClassVar[RowShape] = "single"
    PACKS: ClassVar[bool] = True

    method: Literal["sft"] = "sft"
    """Supervised fine-tuning."""
    loss_reduction: Literal["tokens", "sequences"] = "tokens"
    """`tokens`: mean over the step's trained tokens. `sequences`: mean over sequences of each one's token mean."""


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
    SAMPLES: ClassVar[bool] = True
    SAMPLES_WITH: ClassVar[str] = "online: true"
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
    """Read by `bco_pair`: what is subtracted from the rewards: their mean over the step, or 0 (as TRL)."""
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
    """Every this many steps the reference moves towards the policy (TR-DPO, arXiv 2404.09656). This keeps a second
    model in memory, which scores every step; null: the reference stays as it is. Full training only."""
    ref_mixup_alpha: float = Field(default=0.6, gt=0, le=1)
    """Read with ref_sync_steps: how far the reference moves; 1: all the way."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen completions' negative log-likelihood per token, added to the loss (arXiv 2404.19733)."""
    online: bool = False
    """Train on pairs that the policy samples itself: of the completions of each prompt, the one with the highest reward
    against the one with the lowest. Needs the sections rollout and rewards."""

    @property
    def compares(self) -> Choice | None:
        return self.only_samples

    @property
    def samples(self) -> bool:
        return self.online

    @property
    def only_samples(self) -> Choice | None:
        return Choice("online", "true", "false") if self.online else None

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.online and self.ref_sync_steps:
            yield Problem(
                ("online", "ref_sync_steps"),
                "online pairs are scored under a reference that stays as it is, and ref_sync_steps is "
                f"{self.ref_sync_steps}",
                "one of the two",
                "remove ref_sync_steps, or online",
            )
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

    def problems_in(self, config: RunConfig) -> Iterator[Problem]:
        if not self.ref_sync_steps:
            return
        if config.gpu.fsdp:
            yield Problem(
                ("post_training.ref_sync_steps", "gpu.fsdp"),
                "post_training.ref_sync_steps keeps a second whole model, and gpu.fsdp is true",
                "one of the two",
                "leave gpu.fsdp or ref_sync_steps out",
            )
        adapters = ["lora.enabled: true"] if config.lora.enabled else []
        adapters += [f"models.{i}.adapter" for i, model in enumerate(config.models) if model.adapter is not None]
        if adapters:
            yield Problem(
                ("post_training.ref_sync_steps",),
                f"post_training.ref_sync_steps mixes whole models, and {adapters[0]} trains adapters",
                "full training",
                "remove ref_sync_steps, or train in full (lora.enabled: false, no adapter)",
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
    """`kto`: compare rewards with the divergence from the reference, estimated over the step. `apo_zero_unpaired`
    (arXiv 2408.06266): compare them with 0, which saves that estimate."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the desirable completions' loss; keep weight times number of rows about equal on both sides."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the undesirable completions' loss."""

    @property
    def label_weights(self) -> Mapping[bool, float]:
        return {True: self.desirable_weight, False: self.undesirable_weight}


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

    def advice(self, config: RunConfig) -> Iterator[str]:
        if self.simpo_beta < 1:
            yield (
                f"post_training.simpo_beta {self.simpo_beta:g} is low: it scales a margin per token, and 2 to 10 is "
                "usual; the beta of dpo scales one per completion"
            )


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


class RewardSettings(MethodSettings):
    """Reward models on pairs (Bradley and Terry, 1952): a number for every completion, higher for the chosen one."""

    LEARNING_RATE: ClassVar[float] = 1e-5
    OBJECTIVE: ClassVar[str] = "reward:Reward"
    REWARD_MODEL: ClassVar[bool] = True
    NUMBERS: ClassVar[tuple[str, ...]] = ("margin",)

    method: Literal["reward"] = "reward"
    """Reward models on pairs."""
    center_rewards_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the square of the sum of a pair's two rewards, which holds rewards around 0 (arXiv 2312.09244);
    0: none."""


class DistillSettings(MethodSettings):
    """Distillation (arXiv 2306.13649): a smaller or cheaper model learns a teacher's distribution of every token."""

    LEARNING_RATE: ClassVar[float] = 1e-5
    OBJECTIVE: ClassVar[str] = "distill:Distill"
    ROWS: ClassVar[RowShape] = "single"
    SAMPLES: ClassVar[bool] = True
    REWARDED: ClassVar[bool] = False
    READ_BY: ClassVar[Mapping[str, Readers]] = {
        "beta": Readers("distill_loss", ("divergence",)),
        "temperature": Readers("distill_loss", ("divergence",)),
    }

    method: Literal["distill"] = "distill"
    """Distillation from a teacher."""
    teacher_model_id: str | None = Field(default=None, json_schema_extra={"x-type": "a hub id or a folder"})
    """Hub id or folder of the teacher, which has the same vocabulary."""
    distill_loss: Literal["divergence", "policy_gradient"] = "divergence"
    """`divergence`: of both distributions over the whole vocabulary. `policy_gradient`: of the tokens that the policy
    sampled alone, each weighed by how much likelier the teacher finds it; needs a rollout section."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Between the forward divergence from the teacher (0) and the reverse one (1)."""
    temperature: float = Field(default=1.0, gt=0)
    """Both models' logits are divided by it before they are compared; with rollout, by rollout.temperature as well."""

    @property
    def only_samples(self) -> Choice | None:
        on_policy = self.distill_loss == "policy_gradient"
        return Choice("distill_loss", self.distill_loss, "divergence") if on_policy else None

    def problems_in(self, config: RunConfig) -> Iterator[Problem]:
        if config.rollout.dynamic_sampling:
            yield Problem(
                ("rollout.dynamic_sampling", "post_training.method"),
                "rollout.dynamic_sampling leaves out prompts by their rewards, and method distill trains on none",
                "false",
                "remove dynamic_sampling",
            )


PostTraining = Annotated[
    SftSettings
    | DpoSettings
    | IpoSettings
    | KtoSettings
    | OrpoSettings
    | SimpoSettings
    | CpoSettings
    | GrpoSettings
    | RewardSettings
    | DistillSettings,
    Field(discriminator="method"),
]
METHODS: Mapping[str, type[MethodSettings]] = {
    settings.model_fields["method"].default: settings for settings in get_args(get_args(PostTraining)[0])
}
"""Every method by its name."""
SAMPLING: Mapping[str, type[MethodSettings]] = {
    name: settings for name, settings in METHODS.items() if settings.SAMPLES
}
"""Those that can train on completions that the policy samples, or a variant of which can."""
