"""Every method and loss with its settings: what tests of the contract of all objectives run over."""

from __future__ import annotations

from typing import Any, get_args

from strop.config.methods import (
    CpoSettings,
    DpoSettings,
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
]


def name(settings: MethodSettings) -> str:
    """A short id: the method and what is not its default."""
    given = {k: getattr(settings, k) for k in type(settings).model_fields if k != "method"}
    changed = [f"{k}={v}" for k, v in given.items() if v != type(settings).model_fields[k].default]
    return "-".join([settings.method, *changed])
