"""Every method and loss on the policy's log-probs with its settings: what tests of the contract of objectives run over.

Reward models and distillation are not among them: their scores are rewards, and divergences from a teacher. They have
tests of their own (`tests/smoke/test_reward_models.py`, `test_distillation.py`, `test_on_policy_distillation.py`).
"""

from __future__ import annotations

from typing import Any, get_args

from strop.config.grpo_settings import Advantage, Aggregation, Algorithm, Correction, Gate
from strop.config.methods import (
    CpoSettings,
    DpoSettings,
    GrpoSettings,
    IpoSettings,
    KtoSettings,
    LossType,
    MethodSettings,
    OrpoSettings,
    SftSettings,
    SimpoSettings,
)

NEEDED: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 1e-3}}
"""Settings that a loss does not go without."""


def dpo(loss_type: str = "sigmoid", **settings: Any) -> DpoSettings:
    return DpoSettings(loss_type=loss_type, **{**NEEDED.get(loss_type, {}), **settings})  # type: ignore[arg-type]


def grpo(algorithm: str = "grpo", **settings: Any) -> GrpoSettings:
    found = GrpoSettings(algorithm=algorithm, **settings)  # type: ignore[arg-type]
    needed = {"normalizer_length": 16} if found.aggregation == "constant" else {}
    return GrpoSettings(algorithm=algorithm, **{**needed, **settings})  # type: ignore[arg-type]


OPTIONS: dict[str, tuple[Any, ...]] = {
    "label_smoothing": (0.2,),
    "ipo_norm": ("sum",),
    "bco_delta": ("zero",),
    "discopop_tau": (0.5,),
    "f_divergence": ("forward_kl", "js", "alpha"),
    "ld_alpha": (0.5,),
    "wpo_weighting": (True,),
    "sft_weight": (0.3,),
}
"""Values of every option of dpo that changes its formula."""


def reads(loss_type: str, option: str) -> bool:
    return option not in DpoSettings.READ_BY or loss_type in DpoSettings.READ_BY[option].values


GROUP_SETTINGS: list[GrpoSettings] = [
    *(grpo(algorithm) for algorithm in get_args(Algorithm)),
    *(grpo(algorithm, beta=0.1) for algorithm in get_args(Algorithm)),
    *(grpo(advantage=advantage) for advantage in get_args(Advantage)),
    *(grpo(aggregation=aggregation, beta=0.04) for aggregation in get_args(Aggregation)),
    *(grpo(gate=gate) for gate in get_args(Gate)),
    *(grpo(gate=gate, importance_sampling_level="sequence") for gate in ("cispo", "sapo", "none")),
    *(grpo(kl_estimator=k, beta=0.2) for k in ("k1", "k2", "k3+")),
    *(grpo(kl_estimator=k, beta=0.2, use_bias_correction_kl=False) for k in ("k2", "k3", "k3+")),
    *(grpo(sampler_correction=c, sampler_correction_max=1.2) for c in get_args(Correction)[1:]),
    *(grpo(sampler_correction=f"{c}_mask", sampler_correction_min=0.9) for c in ("token", "sequence", "geometric")),
    grpo("dapo", delta=1.5, epsilon=0.1, advantage="reinforce++_baseline", beta=0.1, kl_in="reward"),
    *(grpo(aggregation=a, beta=0.04, mask_truncated_completions=True) for a in get_args(Aggregation)),
    grpo("gspo", entropy_coef=0.3),
    grpo("dr_grpo", beta=0.1, entropy_coef=0.05, mask_truncated_completions=True),
]
"""Every algorithm, and every value of each axis."""

SETTINGS: list[MethodSettings] = [
    SftSettings(),
    SftSettings(loss_reduction="sequences"),
    *(dpo(loss) for loss in get_args(LossType)),
    *(
        dpo(loss, **{option: value})
        for loss in get_args(LossType)
        for option, values in OPTIONS.items()
        if reads(loss, option)
        for value in values
    ),
    *(dpo(f_divergence="alpha", f_alpha=alpha) for alpha in (0.0, 1.0)),
    dpo(wpo_weighting=True, ld_alpha=0.5, sft_weight=0.3, beta=0.4),
    dpo(f_divergence="js", ld_alpha=0.2, sft_weight=1.0, label_smoothing=0.1, beta=0.4),
    IpoSettings(),
    IpoSettings(ipo_norm="sum", beta=0.3),
    KtoSettings(),
    KtoSettings(beta=0.5, desirable_weight=1.3, undesirable_weight=0.4),
    KtoSettings(kto_loss="apo_zero_unpaired", desirable_weight=2.0),
    OrpoSettings(),
    OrpoSettings(beta=1.5),
    OrpoSettings(orpo_nll="full", beta=0.7),
    SimpoSettings(),
    SimpoSettings(sft_weight=0.5, simpo_gamma=0.0),
    CpoSettings(),
    CpoSettings(label_smoothing=0.2, cpo_alpha=0.0),
    *(grpo(algorithm, beta=0.1) for algorithm in get_args(Algorithm)),
    grpo("dapo", advantage="batch", sampler_correction="sequence_mask", aggregation="prompt"),
    grpo(entropy_coef=0.1),
]


def name(settings: MethodSettings) -> str:
    """A short id: the method and what is not its default."""
    given = {k: getattr(settings, k) for k in type(settings).model_fields if k in settings.model_fields_set}
    changed = [f"{k}={v}" for k, v in given.items() if v != type(settings).model_fields[k].default]
    return "-".join([settings.method, *changed])
