"""Reference log-probs: the policy before its first step, or another model; the cut into passes changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from scored import ref_columns
from strop.config.run import RunConfig
from strop.config.sections import ModelSection
from strop.errors import ModelError
from strop.policy.build import build_policy
from strop.policy.group_logps import group_logps
from strop.policy.model.tokenizer import load_tokenizer
from strop.policy.other_models import reference_policy
from strop.policy.policy import Policy
from strop.policy.reference_models import SyncedReference
from strop.types import Group

CPU = torch.device("cpu")


@pytest.mark.parametrize("attention", [None, "sdpa"], ids=["shared", "plain"])
@pytest.mark.parametrize("cuts", [(1, 2), (2,), ()], ids=str)
def test_one_tensor_a_group_whatever_the_cut(
    attention: str | None, cuts: tuple[int, ...], build: Callable[..., Policy], groups: list[Group]
) -> None:
    policy = build(lora={"lora_dropout": 0.5}, attn_implementation=attention)
    parts = [groups[a:b] for a, b in pairwise((0, *cuts, len(groups)))]
    results = group_logps(policy, parts)
    assert [len(r) for r in results] == [g.num_scored for g in groups]
    with policy.scoring():
        for group, result in zip(groups, results, strict=True):
            assert not result.requires_grad and result.dtype == torch.float32
            assert result.untyped_storage().nbytes() == 4 * len(result)  # no view of its whole pass
            torch.testing.assert_close(result, policy(policy.collate([group])).logps, rtol=1e-5, atol=1e-5)
    # the tensors are what batches take
    batch = policy.collate(groups, ref_columns(results))
    assert torch.equal(batch.columns.find("ref_logps"), torch.cat(results))


def test_a_synced_reference_moves_only_when_it_is_time(build: Callable[..., Policy], groups: list[Group]) -> None:
    policy = build()
    reference = SyncedReference(policy, every_steps=3, share=0.25)
    before = {name: weight.clone() for name, weight in policy.trainable().items()}
    with policy.scoring():  # margins are zero before the first step, bit for bit
        assert torch.equal(policy(policy.collate(groups)).logps, torch.cat(reference.logps(groups)))
    initial = torch.cat(reference.logps(groups))
    for weight in policy.trainable().values():
        weight.data += torch.randn_like(weight)
    for step in (1, 2):
        reference.after(step)
    assert torch.equal(torch.cat(reference.logps(groups)), initial)
    assert all(torch.equal(reference.weights[name], weight) for name, weight in before.items())
    reference.after(3)
    assert reference.weights.keys() == before.keys()
    for name, weight in policy.trainable().items():
        torch.testing.assert_close(reference.weights[name], 0.25 * weight.detach() + 0.75 * before[name])
    assert not torch.equal(torch.cat(reference.logps(groups)), initial)
    assert not any(x.requires_grad for x in reference.logps(groups))
    SyncedReference(policy, every_steps=1, share=0.5)  # a copy of a policy that has been used


def test_a_synced_reference_copies_no_copies(build: Callable[..., Policy], groups: list[Group]) -> None:
    """What the policy had rounded to 16 bits is of no use to another model."""
    policy = build(training={"bf16": True})
    assert policy.weight_copies._copies
    reference = SyncedReference(policy, every_steps=1, share=0.5)
    reference.logps(groups)
    own = {id(weight) for weight in reference._copy.parameters()}
    assert {key for key, _ in reference._copy.weight_copies._copies} <= own


def test_the_initial_policy_is_the_reference(
    configure: Callable[..., RunConfig], groups: list[Group], tokenizer: PreTrainedTokenizerFast
) -> None:
    for settings in ({"method": "sft"}, {"method": "dpo"}, {"method": "dpo", "use_ref_model": False}):
        config = configure(post_training=settings)
        policy = build_policy(config, config.models[0], CPU)
        with reference_policy(config, config.models[0], policy, tokenizer) as reference:
            assert reference is policy
        results = group_logps(policy, [groups])
        with policy.scoring():  # margins are zero before the first step, bit for bit on the same micro-batches
            assert torch.equal(policy(policy.collate(groups)).logps, torch.cat(results))


@pytest.fixture
def other_dir(model_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Another model with the same vocabulary."""
    folder = tmp_path / "other"
    small = LlamaForCausalLM.config_class.from_pretrained(model_dir, num_hidden_layers=1)
    torch.manual_seed(9)
    LlamaForCausalLM(small).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_model_is_the_reference(
    other_dir: Path, configure: Callable[..., RunConfig], groups: list[Group], tokenizer: PreTrainedTokenizerFast
) -> None:
    config = configure(lora={}, post_training={"method": "dpo", "ref_model_id": str(other_dir)})
    policy = build_policy(config, config.models[0], CPU)
    with reference_policy(config, config.models[0], policy, tokenizer) as reference:
        assert not any(p.requires_grad for p in reference.parameters())
        results = group_logps(reference, [groups])
    assert not list(reference.parameters())
    section = ModelSection(huggingface_id=str(other_dir))
    alone = build_policy(RunConfig(models=[section]), section, CPU)
    torch.testing.assert_close(torch.cat(results), torch.cat(group_logps(alone, [groups])))
    own = torch.cat(group_logps(policy, [groups]))
    assert not torch.allclose(torch.cat(results), own, atol=0.1)


def test_another_vocabulary_is_refused(
    other_dir: Path, model_dir: Path, configure: Callable[..., RunConfig], tokenizer: PreTrainedTokenizerFast
) -> None:
    config = configure(post_training={"method": "dpo", "ref_model_id": str(other_dir)})
    policy = build_policy(config, config.models[0], CPU)

    def refused(said: str) -> None:
        with (
            pytest.raises(ModelError, match=said),
            reference_policy(config, config.models[0], policy, load_tokenizer(config.models[0])),
        ):
            pass

    wide = LlamaForCausalLM.config_class.from_pretrained(other_dir, vocab_size=408)
    LlamaForCausalLM(wide).save_pretrained(other_dir)
    refused("its embedding has 408 rows, the policy's 400")
    changed = load_tokenizer(ModelSection(huggingface_id=str(other_dir)))
    changed.add_tokens(["<new>"])
    changed.save_pretrained(other_dir)
    refused("its tokenizer is not the policy's: 1 entries differ")
    config = configure(post_training={"method": "dpo", "ref_model_id": "./nowhere"})
    refused("there is no such folder")
