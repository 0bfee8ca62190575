"""The loss code of TRL 1.16 on the same log-probs: the same losses and gradients, where the definitions agree.

TRL's own loss code runs on a stand-in for its trainer, with a model whose log-probs are given; `docs/methods/parity.md`
lists what agrees and what deviates, and why.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from scored import make_scores, ref_columns
from strop.batch import Scores
from strop.columns import Columns
from strop.config.methods import (
    CpoSettings,
    DpoSettings,
    IpoSettings,
    KtoSettings,
    MethodSettings,
    OrpoSettings,
    SimpoSettings,
)
from strop.engine.step import step_loss
from strop.objectives.base import build_objective
from strop.objectives.pairs import chosen_tokens, means
from variants import dpo, name

trl = pytest.importorskip("trl", reason="TRL is the oracle of these tests; install the extra `dev`")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and its dependencies warn of their own future

LENGTHS = [(3, 5), (7, 2), (4, 4), (1, 6), (5, 1), (2, 9)]
TOLERANCE = 1e-5


def pair_scores() -> Scores:
    generator = torch.Generator().manual_seed(0)
    lengths = [n for pair in LENGTHS for n in pair]
    logps, refs = (-3 * torch.rand(sum(lengths), generator=generator) for _ in range(2))
    columns = Columns(per_token={"ref_logps": refs, "collisions": -torch.rand(sum(lengths), generator=generator)})
    return make_scores(logps.requires_grad_(), lengths, [2] * len(LENGTHS), columns)


def labelled_scores() -> Scores:
    """Every completion is a row of its own, two of three desirable; others for z0, likelier under the policy."""
    scores = pair_scores()
    lengths, sizes = scores.structure.tokens_per_completion, [1] * scores.structure.num_completions
    apart = make_scores(scores.logps.detach() / 2, lengths, sizes, ref_columns([scores["ref_logps"]]))
    columns = scores.columns.beside(Columns(per_group={"labels": torch.arange(len(sizes)) % 3 != 0}))
    return make_scores(scores.logps, lengths, sizes, columns, also={"mismatched": apart})


class Accelerator:
    """One process, as TRL's metrics see it."""

    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather


def padded(per_token: Tensor, scores: Scores) -> Tensor:
    """TRL's rows: all chosen ones, then all rejected ones, zeros at the right."""
    parts = list(per_token.split(scores.lengths.int().tolist()))
    return pad_sequence(parts[0::2] + parts[1::2], batch_first=True)


def dpo_loss(s: Any, scores: Scores) -> Tensor:
    mask = padded(torch.ones_like(scores.logps.detach()), scores)
    logps = padded(scores.logps, scores)
    ref_logps = padded(scores["ref_logps"], scores)
    collisions = padded(scores["collisions"], scores)

    def answers(per_token: Tensor) -> SimpleNamespace:
        aside = torch.zeros_like(per_token)
        return SimpleNamespace(
            log_probs=per_token, entropy=aside, mean_logits=aside, is_top1=aside.bool(), log_sum_sq_probs=collisions
        )

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=getattr(s, "discopop_tau", None)),
        ref_model=lambda **_: answers(ref_logps),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        ld_alpha=None if getattr(s, "ld_alpha", 1.0) == 1 else s.ld_alpha,
        beta=s.beta,
        f_divergence_type={"js": "js_divergence", "alpha": "alpha_divergence"}.get(
            f := getattr(s, "f_divergence", "reverse_kl"), f
        ),
        f_alpha_divergence_coef=getattr(s, "f_alpha", 1.0),
        loss_types=[getattr(s, "loss_type", "ipo")] + (["sft"] if getattr(s, "sft_weight", 0) else []),
        loss_weights=[1.0] + ([s.sft_weight] if getattr(s, "sft_weight", 0) else []),
        label_smoothing=getattr(s, "label_smoothing", 0.0),
        use_weighting=getattr(s, "wpo_weighting", False),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    # a column of prompt in front, which TRL's shift takes away
    column = torch.zeros(len(mask), 1)
    inputs = {
        "input_ids": torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.int64),
        "attention_mask": torch.ones(len(mask), mask.shape[1] + 1, dtype=torch.int64),
        "completion_mask": torch.cat([column, mask], 1).long(),
    }

    class Model(torch.nn.Module):
        is_gradient_checkpointing = False

        def forward(self, **_: Any) -> SimpleNamespace:
            return answers(logps)

    trainer.model = Model()
    loss: Tensor = trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    return loss


def cpo_loss(s: Any, scores: Scores) -> Tensor:
    from trl.experimental.cpo import CPOTrainer

    simpo = s.method == "simpo"
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        alpha=0.0,
        beta=s.simpo_beta if simpo else s.beta,
        loss_type="simpo" if simpo else "sigmoid",
        simpo_gamma=s.simpo_beta * s.simpo_gamma if simpo else None,
        label_smoothing=getattr(s, "label_smoothing", 0.0),
    )
    sums = scores.sums(scores.logps)
    c, r = means(scores) if simpo else (sums[0::2], sums[1::2])
    losses, *_ = CPOTrainer.cpo_loss(trainer, c, r)
    # cross_entropy_loss of its concatenated_forward: the mean over the chosen tokens of the batch
    nll = -sums[0::2].sum() / chosen_tokens(scores.structure)
    return losses.mean() + (s.sft_weight if simpo else s.cpo_alpha) * nll


def orpo_loss(s: Any, scores: Scores) -> Tensor:
    from trl.experimental.orpo import ORPOTrainer

    losses, *_ = ORPOTrainer.odds_ratio_loss(SimpleNamespace(accelerator=Accelerator(), beta=s.beta), *means(scores))
    # deviation: TRL's likelihood is over prompt and completion; here of the completion
    return -scores.sums(scores.logps)[0::2].sum() / chosen_tokens(scores.structure) - losses.mean()


def kto_loss(s: Any, scores: Scores) -> Tensor:
    def answers(per_token: Tensor, at: Scores) -> SimpleNamespace:
        rows = pad_sequence(list(per_token.split(at.lengths.int().tolist())), batch_first=True)
        aside = torch.zeros_like(rows)
        return SimpleNamespace(log_probs=rows, entropy=aside, mean_logits=aside)

    policy, apart = answers(scores.logps, scores), scores.also["mismatched"]

    def rows_of(at: Scores, prefix: str) -> dict[str, Tensor]:
        mask = pad_sequence([torch.ones(int(n)) for n in at.lengths], batch_first=True)
        mask = torch.cat([torch.zeros(len(mask), 1), mask], 1).long()
        return {f"{prefix}input_ids": mask, f"{prefix}attention_mask": mask, f"{prefix}completion_mask": mask}

    class Model(torch.nn.Module):
        def forward(self, **_: Any) -> SimpleNamespace:
            return policy if torch.is_grad_enabled() else answers(apart.logps, apart)

    batch = {**rows_of(scores, ""), **rows_of(apart, "KL_"), "label": scores["labels"]}
    batch["ref_logps"], batch["ref_KL_logps"] = scores.sums(scores["ref_logps"]), apart.sums(apart["ref_logps"])
    model = Model()
    trainer = SimpleNamespace(
        model=model,
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=s.kto_loss == "kto",
        loss_type=s.kto_loss,
        beta=s.beta,
        desirable_weight=s.desirable_weight,
        undesirable_weight=s.undesirable_weight,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda *inputs: trl.KTOTrainer._compute_kl_logps(trainer, *inputs)
    loss: Tensor = trl.KTOTrainer._compute_loss(trainer, model, batch, False)
    return loss


THEIRS = {"kto": kto_loss, "dpo": dpo_loss, "ipo": dpo_loss, "cpo": cpo_loss, "simpo": cpo_loss, "orpo": orpo_loss}

AGREEING: list[MethodSettings] = [
    *(
        dpo(loss)
        for loss in (
            *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "sppo_hard", "apo_zero", "apo_down"),
            *("discopop", "sigmoid_norm", "aot", "aot_unpaired"),
        )
    ),
    *(dpo(loss, label_smoothing=0.2) for loss in ("robust", "exo_pair", "aot", "aot_unpaired")),
    dpo("bco_pair", bco_delta="zero"),
    dpo("hinge", beta=0.5),
    *(dpo(f_divergence=f, **more) for f, more in (("forward_kl", {}), ("js", {}), ("alpha", {"f_alpha": 0.3}))),
    *(dpo(loss, f_divergence="js") for loss in ("hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm")),
    *(dpo(loss, ld_alpha=0.5) for loss in ("sigmoid", "nca_pair", "aot")),
    dpo(sft_weight=0.3),
    *(dpo(loss, wpo_weighting=True) for loss in ("sigmoid", "exo_pair", "nca_pair")),
    IpoSettings(beta=0.3),
    KtoSettings(),
    KtoSettings(beta=0.5, desirable_weight=1.3, undesirable_weight=0.4),
    KtoSettings(kto_loss="apo_zero_unpaired"),
    OrpoSettings(),
    SimpoSettings(),
    SimpoSettings(simpo_beta=10.0, simpo_gamma=0.3, sft_weight=0.2),
    CpoSettings(),
    CpoSettings(label_smoothing=0.1, cpo_alpha=0.3),
]


def both(settings: MethodSettings) -> tuple[tuple[float, Tensor], tuple[float, Tensor]]:
    """Loss and gradient with respect to every log-prob: ours, TRL's."""
    objective = build_objective(settings)
    scores = labelled_scores() if objective.rows == "labelled" else pair_scores()
    ours = step_loss(objective, scores, {t: unit(scores.structure) for t, unit in objective.units.items()})
    theirs = THEIRS[settings.method](settings, scores)
    return (
        (float(ours.detach()), torch.autograd.grad(ours, scores.logps)[0]),
        (float(theirs.detach()), torch.autograd.grad(theirs, scores.logps)[0]),
    )


@pytest.mark.parametrize("settings", AGREEING, ids=name)
def test_loss_and_gradient_are_those_of_trl(settings: MethodSettings) -> None:
    (ours, gradient), (theirs, their_gradient) = both(settings)
    assert ours == pytest.approx(theirs, rel=TOLERANCE)
    assert (gradient - their_gradient).norm() <= TOLERANCE * their_gradient.norm() > 0


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (dpo(label_smoothing=0.2), "TRL does not read label_smoothing under sigmoid"),
        (dpo("bco_pair"), "TRL's delta is 0"),
        (dpo("ipo", ipo_norm="sum"), "TRL normalises by length"),
    ],
    ids=lambda x: name(x) if isinstance(x, MethodSettings) else "",
)
def test_named_deviations_are_still_there(settings: DpoSettings, what: str) -> None:
    (ours, _), (theirs, _) = both(settings)
    assert ours != pytest.approx(theirs, rel=1e-3), f"no longer a deviation: {what}"


def test_discopop_where_trl_overflows() -> None:
    scores = pair_scores()
    far = replace(scores, logps=(scores.logps.detach() - 900.0).requires_grad_())
    theirs = dpo_loss(dpo("discopop", beta=1.0), far)
    objective = build_objective(dpo("discopop", beta=1.0))
    assert not torch.isfinite(theirs)
    assert torch.isfinite(objective.terms(far)["preference"])
