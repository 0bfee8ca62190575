"""TRL 1.16's loss code of GRPO and GMPO on the same log-probs, rewards and advantages: the same losses and gradients.

Its code runs on a stand-in for its trainer, in one micro-batch; `docs/methods/parity.md` lists what agrees.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from scored import make_scores
from strop.batch import Scores
from strop.columns import Columns
from strop.config.methods import GrpoSettings
from strop.engine.step import step_loss
from strop.objectives.base import build_objective
from variants import grpo, name

trl = pytest.importorskip("trl", reason="TRL is the oracle of these tests; install the extra `dev`")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and its dependencies warn of their own future

LENGTHS = (3, 5, 7, 2, 4, 4, 1, 6)
SIZES = (4, 4)


def group_scores(settings: GrpoSettings) -> Scores:
    draw = torch.Generator().manual_seed(0)
    num = sum(LENGTHS)
    logps = -2 * torch.rand(num, generator=draw) - 0.5
    old, ref = (logps + 0.4 * torch.randn(num, generator=draw) for _ in range(2))
    sampler = old + 0.2 * torch.randn(num, generator=draw)
    per_token = {"old_logps": old, "ref_logps": ref, "sampler_logps": sampler}
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.25, 1.0, 1.0, 0.0])
    columns = Columns(per_token=per_token, per_completion={"rewards": rewards})
    scores = make_scores(logps.requires_grad_(), LENGTHS, SIZES, columns)
    derived = build_objective(settings).derive(scores.structure, columns)
    return make_scores(scores.logps, LENGTHS, SIZES, columns.beside(derived))


class Accelerator:
    device, num_processes, sync_gradients = torch.device("cpu"), 1, True

    def gather(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


def trl_loss(s: GrpoSettings, scores: Scores, loss_type: str) -> Tensor:
    """loss_type: TRL's."""

    def padded(per_token: Tensor) -> Tensor:
        return pad_sequence(list(torch.split(per_token, list(LENGTHS))), batch_first=True)

    mask = padded(torch.ones(sum(LENGTHS)))
    logps = padded(scores.logps)
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=s.delta,
            use_bias_correction_kl=s.use_bias_correction_kl,
            sapo_temperature_pos=s.sapo_temperature_pos,
            sapo_temperature_neg=s.sapo_temperature_neg,
            steps_per_generation=1,
        ),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=s.importance_sampling_level,
        beta=s.beta,
        loss_type=loss_type,
        epsilon_low=s.epsilon,
        # the bound itself, not its distance from 1
        epsilon_high=1 + s.epsilon_high if loss_type == "cispo" and s.epsilon_high else s.epsilon_high,
        max_completion_length=s.normalizer_length,
        current_gradient_accumulation_steps=1,
        use_vllm=s.sampler_correction != "none",
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps.detach()), None),
    )
    advantages = torch.stack([part[0] for part in torch.split(scores["advantages"], list(LENGTHS))]).float()
    inputs: dict[str, Any] = {
        "prompt_ids": torch.ones(len(LENGTHS), 1),
        "prompt_mask": torch.ones(len(LENGTHS), 1),
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": padded(scores["old_logps"]),
        "ref_per_token_logps": padded(scores["ref_logps"]),
        "num_items_in_batch": mask.sum(),
    }
    if s.sampler_correction != "none":
        v = padded((scores["old_logps"] - scores["sampler_logps"]).exp())
        if s.sampler_correction == "token_truncate":
            v = v.clamp(max=s.sampler_correction_max)
        else:
            v = torch.where(v > s.sampler_correction_max, 0.0, v)
        inputs["importance_sampling_ratio"] = v
    if s.gate == "gmpo":
        from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer as Trainer
    else:
        from trl import GRPOTrainer as Trainer
    return Trainer._compute_loss(stand_in, stand_in.model, inputs)


CASES = [
    (grpo(), "grpo"),
    (grpo(beta=0.1), "grpo"),
    (grpo(beta=0.1, use_bias_correction_kl=False), "grpo"),
    (grpo(delta=1.3), "grpo"),
    (grpo("dr_grpo", beta=0.1), "dr_grpo"),
    (grpo("dapo"), "dapo"),
    (grpo("dapo", beta=0.1), "dapo"),
    (grpo("bnpo"), "bnpo"),
    (grpo("gspo"), "grpo"),
    (grpo("gspo", epsilon=0.1, epsilon_high=0.1, beta=0.1), "grpo"),
    (grpo("cispo"), "cispo"),
    (grpo("cispo", epsilon_high=0.2), "cispo"),
    (grpo("sapo"), "sapo"),
    (grpo("gmpo"), "gmpo"),
    (grpo("gmpo", beta=0.1, use_bias_correction_kl=False), "gmpo"),
    (grpo(aggregation="sequence_sum", importance_sampling_level="sequence"), "luspo"),
    (grpo(sampler_correction="token_truncate", sampler_correction_max=1.1), "grpo"),
    (grpo(sampler_correction="token_mask", sampler_correction_max=1.1), "grpo"),
]


@pytest.mark.parametrize(("settings", "loss_type"), CASES, ids=lambda x: x if isinstance(x, str) else name(x))
def test_loss_and_gradient_are_those_of_trl(settings: GrpoSettings, loss_type: str) -> None:
    scores, objective = group_scores(settings), build_objective(settings)
    counts = {term: unit(scores.structure) for term, unit in objective.units.items()}
    own = step_loss(objective, scores, counts)
    theirs = trl_loss(settings, scores, loss_type)
    assert float(own.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5, abs=1e-7)
    a, b = (torch.autograd.grad(loss, scores.logps)[0] for loss in (own, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
