"""New tokens: rows that begin as the mean, train alone beside adapters, and are in what is saved."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.tiny import tiny_config
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from conftest import WITH_ENDS, build_tokenizer
from strop.config.run import RunConfig
from strop.config.sections import ModelSection
from strop.errors import ConfigError, ModelError
from strop.export.merge import merge
from strop.policy.build import build_policy
from strop.policy.model.from_config import shape_of
from strop.policy.model.tokenizer import load_tokenizer, read_tokenizer
from strop.policy.policy import Policy
from strop.types import Completion, Group, Origin

MakePolicy = Callable[..., Policy]
# plain peft 0.21 on transformers 5.23, as users load the result
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NEW = ("<think>", "</think>", "<|im_end|>")
"""The third is a token of the tiny tokenizer already."""
SIZE = len(build_tokenizer())
IDS = (SIZE, SIZE + 1)
KINDS: dict[str, dict[str, Any]] = {
    "untied": {"model_type": "llama"},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "scaled": {"model_type": "gemma3_text", "tie_word_embeddings": True, "head_dim": 8, "num_hidden_layers": 2},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "tie_word_embeddings": True,
    },
    "padded": {"model_type": "llama", "vocab_size": SIZE + 48},
}


@pytest.fixture
def base(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Callable[..., Path]:
    """base(kind) -> folder of a tiny model of that kind, with the tokenizer."""

    def make(kind: str, **changes: Any) -> Path:
        folder, settings = tmp_path / f"base-{kind}", {**WITH_ENDS, "vocab_size": SIZE, **KINDS[kind], **changes}
        if kind == "gpt2":
            settings = {k: v for k, v in settings.items() if k not in ("hidden_size", "num_key_value_heads")}
        torch.manual_seed(0)
        config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    return make


def groups_with_new_tokens() -> list[Group]:
    random = torch.Generator().manual_seed(1)

    def draw(count: int) -> array[int]:
        ids = torch.randint(4, SIZE, (count,), generator=random)
        ids[1::3] = SIZE + torch.arange(len(ids[1::3])) % 2
        return array("q", ids.tolist())

    return [Group(draw(7), tuple(Completion(draw(n), b"\1" * n) for n in (5, 4)), Origin("rows", i)) for i in range(3)]


def train(policy: Policy, groups: list[Group]) -> None:
    """A step by their gradients, so that no trained row is what it began with."""
    (-policy(policy.collate(groups)).logps.mean()).backward()
    with torch.no_grad():
        for weight in policy.trainable().values():
            assert weight.grad is not None
            weight -= 0.3 * weight.grad / weight.grad.norm().clamp_min(1e-9)


def logps(model: nn.Module, groups: list[Group]) -> Tensor:
    """Plain transformers, a row at a time."""
    parts = []
    with torch.no_grad():
        for group in groups:
            for c in group.completions:
                rows = model(input_ids=torch.tensor([[*group.prompt_ids, *c.ids]])).logits[0].log_softmax(-1)
                parts += [rows[len(group.prompt_ids) + j - 1, t] for j, t in enumerate(c.ids)]
    return torch.stack(parts)


def policy_of(folder: Path, lora: dict[str, Any] | None = None, **model: Any) -> Policy:
    data: dict[str, Any] = {"models": [{"huggingface_id": str(folder), "add_tokens": NEW, **model}]}
    if lora is not None:
        data["lora"] = {"lora_dropout": 0.0, "target_modules": "all-linear", **lora}
    config = RunConfig(**data, post_training={"method": "sft"}, training={"max_seq_length": 64})
    return build_policy(config, config.models[0], torch.device("cpu"))


def scores(policy: Policy, groups: list[Group]) -> Tensor:
    with policy.scoring():
        return policy(policy.collate(groups)).logps


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("untied", {}),
        ("scaled", {}),
        ("tied", None),
        pytest.param("tied", {}, marks=NIGHTLY),
        pytest.param("gpt2", {}, marks=NIGHTLY),
        pytest.param("padded", {}, marks=NIGHTLY),
        pytest.param("untied", None, marks=NIGHTLY),
        pytest.param("gpt2", None, marks=NIGHTLY),
        pytest.param("padded", None, marks=NIGHTLY),
    ],
)
def test_plain_libraries_load_what_was_trained(
    kind: str, lora: dict[str, Any] | None, base: Callable[..., Path], tmp_path: Path
) -> None:
    folder, groups = base(kind), groups_with_new_tokens()
    policy = policy_of(folder, lora)
    began = {n: t.detach().clone() for n, t in policy.base.state_dict().items()}
    before = scores(policy, groups)
    train(policy, groups)
    trained = scores(policy, groups)
    assert not torch.allclose(before, trained, atol=1e-3)
    final = tmp_path / "final"
    policy.save_pretrained(final, read_tokenizer(ModelSection(huggingface_id=str(folder), add_tokens=NEW)))
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.convert_tokens_to_ids(list(NEW)) == [*IDS, 3]
    kept = tokenizer.decode(tokenizer("<think>so</think>")["input_ids"], skip_special_tokens=True)
    assert kept == "<think>so</think>"
    cls = AutoModelForCausalLM if lora is None else AutoPeftModelForCausalLM
    again = cls.from_pretrained(final, dtype=torch.float32).eval()
    torch.testing.assert_close(logps(again, groups), trained, rtol=1e-4, atol=1e-4)
    if lora is None:
        return
    assert isinstance(again, PeftModel)
    # of embedding and head, the new rows alone have changed
    for name, weight in policy.base.state_dict().items():
        assert torch.equal(weight, began[name]) or ".lora_" in name or name.endswith("trainable_tokens_delta.default")
    rows = [weight for name, weight in policy.trainable().items() if "trainable_tokens" in name]
    assert [tuple(weight.shape) for weight in rows] == [(2, 32)] * (2 if kind in ("untied", "padded") else 1)
    assert policy.saved_bytes < 70_000


@pytest.mark.parametrize("kind", ["untied", "scaled", "padded"])
def test_new_rows_begin_as_the_mean(kind: str, base: Callable[..., Path]) -> None:
    folder = base(kind)
    policy, plain = policy_of(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ours, theirs in zip(
        (policy.base.get_input_embeddings(), policy.base.get_output_embeddings()),
        (plain.get_input_embeddings(), plain.get_output_embeddings()),
        strict=True,
    ):
        torch.testing.assert_close(ours.weight[:SIZE], theirs.weight[:SIZE], rtol=0, atol=0)
        torch.testing.assert_close(
            ours.weight[SIZE : SIZE + 2], theirs.weight[:SIZE].mean(0, keepdim=True).expand(2, -1)
        )
    text = policy.loaded_config.get_text_config()
    assert text.vocab_size == SIZE + (48 if kind == "padded" else 2)
    assert policy.base.config.get_text_config().vocab_size == text.vocab_size


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("tied", {}),
        ("untied", {"modules_to_save": ["embed_tokens"]}),
        pytest.param("untied", {}, marks=NIGHTLY),
        pytest.param("padded", {"use_dora": True}, marks=NIGHTLY),
        pytest.param("gpt2", {}, marks=NIGHTLY),
        pytest.param("tied", {"modules_to_save": ["embed_tokens"]}, marks=NIGHTLY),
    ],
)
def test_an_adapter_with_new_rows_merges_and_goes_on(
    kind: str, lora: dict[str, Any], base: Callable[..., Path], tmp_path: Path
) -> None:
    folder, groups = base(kind), groups_with_new_tokens()
    policy = policy_of(folder, lora)
    train(policy, groups)
    trained = scores(policy, groups)
    final, merged = tmp_path / "final", tmp_path / "merged"
    policy.save_pretrained(final, read_tokenizer(ModelSection(huggingface_id=str(folder), add_tokens=NEW)))
    merge(str(final), merged)
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    torch.testing.assert_close(logps(whole, groups), trained, rtol=1e-4, atol=1e-4)
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    assert tied == (kind in ("tied", "gpt2"))
    assert AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids("</think>") == IDS[1]
    again = policy_of(folder, {}, adapter=str(final), add_tokens=None)
    torch.testing.assert_close(scores(again, groups), trained, rtol=1e-4, atol=1e-4)
    assert again.trainable().keys() == policy.trainable().keys()


def test_bases_in_4_bits_get_rows_too(base: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra bnb")
    folder, groups = base("untied", hidden_size=64, intermediate_size=64), groups_with_new_tokens()
    policy = policy_of(folder, {}, quant="4bit")
    train(policy, groups)
    assert scores(policy, groups).isfinite().all()
    assert {tuple(w.shape) for n, w in policy.trainable().items() if "trainable_tokens" in n} == {(2, 64)}


def test_tokens_that_exist_are_told(base: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    section = ModelSection(huggingface_id=str(base("untied")), add_tokens=NEW)
    with caplog.at_level(logging.INFO, "strop"):
        tokenizer = load_tokenizer(section)
    assert "already tokens, which stay as they are: <|im_end|> (3)" in caplog.text
    assert f"2 new tokens: <think> ({SIZE}), </think> ({SIZE + 1})" in caplog.text
    assert tokenizer("a<think>b")["input_ids"].count(SIZE) == 1
    assert len(tokenizer) == SIZE + 2


def test_where_every_token_exists_nothing_is_added(base: Callable[..., Path]) -> None:
    policy = policy_of(base("untied"), {}, add_tokens=["<|im_end|>"])
    assert not any("trainable_tokens" in name for name in policy.trainable())
    assert policy.base.get_input_embeddings().weight.shape[0] == SIZE


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"add_tokens": ["<a>", "<a>"]}, "names <a> twice"),
        ({"add_tokens": ["<a>", " "]}, "holds an empty token"),
        ({"add_tokens": ["<a>"], "adapter": "there"}, "has its own tokens"),
    ],
)
def test_what_cannot_be_is_refused(model: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ModelSection(huggingface_id="here", **model)


def test_a_head_with_biases_is_refused_with_adapters(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "phi"
    torch.manual_seed(0)
    settings = {**WITH_ENDS, "vocab_size": SIZE, "num_key_value_heads": 4}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["phi"](**settings)).save_pretrained(folder)
    for file in base("untied").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="its head has biases"):
        policy_of(folder, {})
    policy, groups = policy_of(folder), groups_with_new_tokens()
    train(policy, groups)
    policy.save_pretrained(tmp_path / "final", load_tokenizer(ModelSection(huggingface_id=str(folder), add_tokens=NEW)))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
    torch.testing.assert_close(logps(plain, groups), scores(policy, groups), rtol=1e-4, atol=1e-4)


def test_layers_with_tables_of_their_own_are_refused(tmp_path: Path, base: Callable[..., Path]) -> None:
    folder = tmp_path / "gemma3n"
    config = tiny_config("gemma3n_text")
    config.vocab_size = SIZE
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in base("untied").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="a table of tokens for every layer"):
        policy_of(folder)


@pytest.mark.parametrize("kind", ["untied", "tied", "padded"])
def test_the_estimate_counts_new_rows(kind: str, base: Callable[..., Path]) -> None:
    folder = base(kind)
    config = RunConfig(
        models=[{"huggingface_id": str(folder), "add_tokens": NEW[:2]}], lora={}, post_training={"method": "sft"}
    )
    shape, policy = (
        shape_of(config.lora, config.models[0]),
        policy_of(folder, {"target_modules": "auto"}, add_tokens=NEW[:2]),
    )
    # it does not read the tokenizer, so it does not know of rows that the vocabulary was padded with
    assert shape.vocabulary == policy.base.get_input_embeddings().weight.shape[0] + (2 if kind == "padded" else 0)
    assert shape.adapters == sum(w.numel() for w in policy.trainable().values())
