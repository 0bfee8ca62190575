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


SETTINGS: list[MethodSettings] = [
    SftSettings(),
    SftSettings(loss_reduction="sequences"),
    *(dpo(name) for name in get_args(LossType)),
    *(dpo(name, label_smoothing=0.2) for name in ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")),
    dpo("ipo", ipo_norm="sum"),
    dpo("bco_pair", bco_delta="zero"),
    dpo("discopop", discopop_tau=0.5),
    *(dpo("sigmoid", f_divergence=f) for f in ("forward_kl", "js", "alpha")),
    *(dpo(name, f_divergence="js") for name in ("hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm")),
    dpo("sigmoid", f_divergence="alpha", f_alpha=0.0),
    dpo("sigmoid", f_divergence="alpha", f_alpha=1.0),
    *(dpo(name, ld_alpha=0.5) for name in get_args(LossType) if name not in ("ipo", "sigmoid_norm")),
    *(dpo(name, sft_weight=0.3) for name in ("sigmoid", "kto_pair", "aot", "ipo")),
    *(dpo(name, wpo_weighting=True) for name in ("sigmoid", "kto_pair", "bco_pair", "ipo")),
    dpo("sigmoid", wpo_weighting=True, ld_alpha=0.5, sft_weight=0.3, beta=0.4),
    dpo("sigmoid", f_divergence="js", ld_alpha=0.2, sft_weight=1.0, label_smoothing=0.1, beta=0.4),
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
