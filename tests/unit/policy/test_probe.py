"""What the probe finds out about a model: what it does to its logits, how much rounding moves it, whether rows may be
shared."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM, LlamaModel

from conftest import TINY
from processes import in_processes
from strop.batch import GroupSpan
from strop.config import RunConfig
from strop.config.sections import GpuSection, ModelSection
from strop.device import start_world
from strop.errors import ModelError
from strop.policy import build as building
from strop.policy.kernels import attention
from strop.policy.kernels.tiled_attention import Tile, cut_tiles
from strop.policy.model.load import LoadedModel
from strop.policy.model.logit_transform import LogitTransform, logit_transform
from strop.policy.policy import Policy
from strop.policy.precision import Precision
from strop.policy.probe import inference_mode
from strop.types import Group

SIZES = {**TINY, "pad_token_id": 0}
MODELS = (ModelSection(huggingface_id="tiny"),)
Change = Callable[[Tensor], Tensor]


class Changed(LlamaForCausalLM):
    """A model whose own code does something to its logits, or to the head's input."""

    def __init__(self, config: LlamaConfig, change: Change, before: float) -> None:
        super().__init__(config)
        self.change, self.before = change, before

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        out = self.model(input_ids=input_ids, **others)
        out.logits = self.change(self.lm_head(out.last_hidden_state * self.before))
        return out


def as_it_is(z: Tensor) -> Tensor:
    return z


def policy_of(
    precision: Precision,
    change: Change = as_it_is,
    before: float = 1.0,
    adapted: bool = False,
    place: building.Place | None = None,
    **sizes: Any,
) -> Policy:
    torch.manual_seed(0)
    model = Changed(LlamaConfig(**SIZES | sizes), change, before)
    model.to(precision.compute if adapted else precision.master)
    loaded = LoadedModel(model, precision.master, copy.deepcopy(model.config))
    return building.assemble(model, loaded, precision, MODELS[0], fp32_logits=False, place=place)


def soft_cap(cap: float, scale: float = 1.0) -> Change:
    return lambda z: cap * torch.tanh(scale * z / cap)


PRECISIONS = [Precision(torch.float32), Precision(torch.bfloat16)]


@pytest.mark.share(10)
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: str(p.compute))
@pytest.mark.parametrize("adapted", [False, True], ids=["float32 weights", "16-bit weights"])
@pytest.mark.parametrize(
    ("change", "before", "scale", "cap"),
    [
        (as_it_is, 1.0, 1.0, None),
        (soft_cap(30.0), 1.0, 1.0, 30.0),
        (soft_cap(2.0), 1.0, 1.0, 2.0),
        (soft_cap(15.0, 0.25), 1.0, 0.25, 15.0),
        (lambda z: z * 0.97, 1.0, 0.97, None),
        (lambda z: z / 16, 1.0, 1 / 16, None),
        (as_it_is, 0.125, 0.125, None),
        (soft_cap(20.0), 0.25, 0.25, 20.0),
    ],
    ids=["as it is", "cap", "low cap", "scaled cap", "factor", "sixteenth", "eighth before", "cap, scaled before"],
)
def test_what_a_model_does_to_its_logits_is_measured(
    change: Change, before: float, scale: float, cap: float | None, precision: Precision, adapted: bool
) -> None:
    """Under no name that the configuration has, and too little for log-probs in bfloat16 to show it."""
    found = policy_of(precision, change, before, adapted).transform
    assert found.scale == pytest.approx(scale, rel=4e-3)
    assert found.softcap is None if cap is None else found.softcap == pytest.approx(cap, rel=1e-2)


def _shares_where_rank_1_refuses() -> tuple[bool, str | None]:
    with start_world(GpuSection()) as world:
        building.probe = lambda policy, own: "rounding of this machine" if world.rank == 1 else None
        policy = policy_of(Precision(torch.float32), place=building.strategy_of(RunConfig(models=MODELS), world))
        return policy.share_prefix, policy.plain_reason


def test_no_process_shares_prompts_where_the_probe_of_one_refuses() -> None:
    """Else one would plan its micro-batches anew, together with the others, who do not."""
    assert in_processes(2, _shares_where_rank_1_refuses) == [(False, "rounding of this machine")] * 2


class Noisy(torch.nn.Module):
    """A part of a model that draws at random in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


def test_a_model_that_is_another_one_in_training_is_refused() -> None:
    with pytest.raises(ModelError, match="different log-probs in training and in inference"):
        policy_of(Precision(torch.float32), Noisy())


def test_adapters_that_gradients_do_not_reach_are_refused(
    model_dir: Path, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(lora={})
    inner = LlamaModel.forward

    def cut(self: Any, *args: Any, **others: Any) -> Any:
        out = inner(self, *args, **others)
        out.last_hidden_state = out.last_hidden_state.detach()
        return out

    monkeypatch.setattr(LlamaModel, "forward", cut)
    with pytest.raises(ModelError, match="reaches any weight that trains"):
        build(lora={})


def test_every_part_is_in_its_own_mode_again_after_inference() -> None:
    model = torch.nn.Sequential(Noisy(), Noisy().eval())
    with pytest.raises(ZeroDivisionError), inference_mode(model):
        assert not any(part.training for part in model.modules())
        raise ZeroDivisionError
    assert [part.training for part in model] == [True, False] and model.training


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: str(p.compute))
@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.masked_fill(torch.arange(400) >= 390, -1e9),
        torch.relu,
        lambda z: z + 0.05 * z.sin(),
        lambda z: z.log_softmax(-1),
        lambda z: z.clamp(-20, 20),
    ],
    ids=["mask", "relu", "sin", "log-softmax", "clamp"],
)
def test_what_is_neither_a_factor_nor_a_cap_is_refused(change: Change, precision: Precision) -> None:
    with pytest.raises(ModelError, match=r"something other than one factor or soft cap|not those of a linear head"):
        policy_of(precision, change)


@pytest.mark.parametrize(
    ("kind", "keys", "want"),
    [
        ("llama", {}, LogitTransform()),
        ("gemma2", {"final_logit_softcapping": 20.0}, LogitTransform(1.0, 20.0)),
        ("recurrent_gemma", {"logits_soft_cap": 12.0}, LogitTransform(1.0, 12.0)),
        ("xlstm", {"output_logit_soft_cap": 9.0}, LogitTransform(1.0, 9.0)),
        ("cohere", {"logit_scale": 0.5}, LogitTransform(0.5)),
        ("granite", {"logits_scaling": 4.0}, LogitTransform(0.25)),
    ],
)
def test_names_in_configurations(kind: str, keys: dict[str, Any], want: LogitTransform) -> None:
    assert logit_transform(CONFIG_MAPPING[kind](**keys)) == want


@pytest.mark.share(2)
@pytest.mark.parametrize(
    "sizes",
    [
        {"initializer_range": 0.6},
        {"num_hidden_layers": 24, "initializer_range": 0.2},
        {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5},
    ],
    ids=["wide", "deep", "small"],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_that_rounding_moves_far_still_shares_prompts(sizes: dict[str, Any], adapted: bool) -> None:
    for precision in PRECISIONS:
        assert policy_of(precision, adapted=adapted, **sizes).share_prefix


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: str(p.compute))
def test_rows_that_leak_are_found_in_every_precision(
    precision: Precision, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def leaky(layout: tuple[GroupSpan, ...], *how: Any) -> tuple[Tile, ...]:
        return cut_tiles((GroupSpan(0, layout[-1].stop, (0,)),), *how)  # everyone sees what stands before

    monkeypatch.setattr(attention, "cut_tiles", leaky)
    with caplog.at_level(logging.WARNING, "strop"):
        policy = policy_of(precision)
    assert not policy.share_prefix
    assert "each is computed again for every completion" in caplog.text
    assert ("in float32 (bf16: false" in caplog.text) is precision.is_low


def test_a_capped_model_trains_as_its_own_code_scores(groups: list[Group]) -> None:
    policy = policy_of(Precision(torch.float32), soft_cap(3.0))
    with policy.scoring():
        got = policy(policy.collate(groups)).logps
        policy.base.set_attn_implementation(policy.plain_attention)
        want = []
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor([[*group.prompt_ids, *completion.ids]])
                logps = policy.base(input_ids=ids).logits.log_softmax(-1)[0]
                first = len(group.prompt_ids) - 1
                want += [logps[first + j, token] for j, token in enumerate(completion.ids)]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-3, atol=1e-3)
