"""The policy as the engine uses it: scoring, precision, what is saved, what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    dynamic_module_utils,
)

from scored import ref_columns
from strop.batch import GroupSpan, pack, pad
from strop.config import load_config
from strop.config.run import RunConfig
from strop.errors import ConfigError, ModelError
from strop.policy import policy as policy_module
from strop.policy.build import build_policy
from strop.policy.kernels import attention, logprobs
from strop.policy.kernels.fused import FusedMlp
from strop.policy.kernels.tiled_attention import Tile, cut_tiles
from strop.policy.model.model_hashes import weights_hash
from strop.policy.policy import Policy
from strop.types import Group

MakePolicy = Callable[..., Policy]


def rewrite(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    """The tiny model again, with another configuration; `...` takes a key away."""
    torch.manual_seed(0)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not ...}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.pop("model_type")](**config))
    model.to(dtype).save_pretrained(folder)


def test_full_training_trains_everything_in_float32(model_dir: Path, build: MakePolicy, groups: list[Group]) -> None:
    rewrite(model_dir, torch.bfloat16)
    policy = build(training={"bf16": True})
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.trainable().keys() == load_file(model_dir / "model.safetensors").keys()
    policy(policy.collate(groups)).logps.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.trainable().values())


@pytest.mark.parametrize("lora", [None, {"r": 4, "modules_to_save": ["embed_tokens"]}], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_trains_is_known_by_name_whatever_becomes_of_its_memory(
    lora: dict[str, Any] | None,
    tied: bool,
    model_dir: Path,
    build: MakePolicy,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rewrite(model_dir, tie_word_embeddings=tied)
    policy = build(lora=lora)
    before = {name: weight.clone() for name, weight in policy.trainable().items()}
    made: dict[int, nn.Parameter] = {}
    for module in policy.model.modules():  # as what shards a model does; tied weights stay tied
        for name, weight in list(module.named_parameters(recurse=False)):
            made.setdefault(id(weight), nn.Parameter(weight.detach() + 1, weight.requires_grad))
            setattr(module, name, made[id(weight)])
    after = policy.trainable()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight + 1) for name, weight in before.items())
    policy.save_pretrained(tmp_path / "final", tokenizer)
    (file,) = (tmp_path / "final").glob("*.safetensors")
    saved = load_file(file)
    assert all(torch.equal(saved[name], weight) for name, weight in after.items())


def test_a_policy_has_the_hash_of_what_was_loaded(configure: Callable[..., RunConfig]) -> None:
    for lora in (None, {}):
        config = configure(lora=lora)
        policy = build_policy(config, config.models[0], torch.device("cpu"), hashed=True)
        assert policy.weights_hash == weights_hash(policy.model)
        with torch.no_grad():
            for weight in policy.trainable().values():
                weight += 1
        assert policy.weights_hash != weights_hash(policy.model)


@pytest.mark.share(3)
@pytest.mark.parametrize("training", [{}, {"bf16": True}, {"bf16": True, "fp32_logits": True}, {"fp16": True}], ids=str)
@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
def test_low_precision_stays_near_float32(
    training: dict[str, bool], lora: dict[str, Any] | None, build: MakePolicy, groups: list[Group]
) -> None:
    exact = build()
    policy = build(training=training, lora=lora)
    with exact.scoring(), policy.scoring():
        logps, want = policy(pack(groups)).logps, exact(pack(groups)).logps
    assert logps.dtype == torch.float32
    tolerance = 0.1 if training else 1e-6
    torch.testing.assert_close(logps, want, rtol=0, atol=tolerance)
    if training:
        assert not torch.equal(logps, want)


@pytest.mark.parametrize(
    ("bf16", "fp16", "said"),
    [(0.3, 0.1, "bfloat16 is slower than float32"), (0.9, 0.1, "bfloat16 is slower"), (2.0, 2.0, "")],
)
def test_a_processor_that_is_slower_in_16_bits_is_told(
    bf16: float, fp16: float, said: str, build: MakePolicy, pretend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(bf16=bf16, fp16=fp16)
    caplog.set_level(logging.WARNING, "strop")
    build()
    assert not caplog.records
    build(training={"bf16": True})
    assert said in caplog.text and bool(caplog.records) is bool(said)
    caplog.clear()
    build(training={"fp16": True})
    assert ("products of float16 are computed in float32" in caplog.text) is (fp16 < 1)


def test_a_pass_that_fails_leaves_nothing_behind(build: MakePolicy, groups: list[Group]) -> None:
    """Queries of the second layer are taken, its keys not yet: a graph of all that came before would live on."""
    policy = build()
    projections = policy.base.model.layers[1].self_attn
    keys = projections.k_proj

    def fail(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    forward, vars(keys)["forward"] = vars(keys)["forward"], fail
    with pytest.raises(torch.OutOfMemoryError):
        policy(pack(groups))
    shared = vars(projections.q_proj)["forward"].shared
    assert shared._input is None and not shared._outputs
    vars(keys)["forward"] = forward
    assert torch.isfinite(policy(pack(groups)).logps).all()


def test_fp32_logits(build: MakePolicy, groups: list[Group], monkeypatch: pytest.MonkeyPatch, pretend: Any) -> None:
    """The head computes in float32; the body's bfloat16 stays."""
    pretend(bf16=2.0)  # else the head would do so anyway
    exact = build()
    errors = []
    for fp32_logits in (False, True):
        policy = build(training={"bf16": True, "fp32_logits": fp32_logits})
        # the same hidden states for all three, so that only the head differs
        monkeypatch.setattr(policy, "hidden_states", exact.hidden_states)
        monkeypatch.setattr(type(policy.precision), "autocast", lambda self, device: torch.no_grad())
        with policy.scoring(), exact.scoring():
            errors.append(float((policy(pack(groups)).logps - exact(pack(groups)).logps).abs().max()))
    assert errors[0] > 1e-4 and errors[1] == 0


def test_gradients_meet_in_float32(build: MakePolicy, groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's last token is gathered once a completion; its gradients must not be added up in 16 bits."""
    seen = []

    def watched(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(hidden.dtype)
        return logprobs.token_logps(hidden, *args, **kwargs)

    policy = build(lora={}, training={"bf16": True})
    monkeypatch.setattr(policy_module, "token_logps", watched)
    policy(policy.collate(groups))
    assert seen == [torch.float32]


def test_scoring_is_free_of_dropout_and_gradients_and_leaves_no_trace(build: MakePolicy, groups: list[Group]) -> None:
    policy = build(lora={"lora_dropout": 0.5})
    for name, weight in policy.trainable().items():
        if "lora_B" in name:
            nn.init.constant_(weight, 0.1)
    batch = policy.collate(groups)
    flags = {n: p.requires_grad for n, p in policy.named_parameters()}
    assert not torch.equal(policy(batch).logps, policy(batch).logps)
    with pytest.raises(ZeroDivisionError), policy.scoring():
        first, second = policy(batch).logps, policy(batch).logps
        assert torch.equal(first, second) and not first.requires_grad
        assert all(m.training for m in policy.modules())
        raise ZeroDivisionError
    assert not torch.equal(policy(batch).logps, policy(batch).logps)
    assert policy(batch).logps.requires_grad and all(m.training for m in policy.modules())
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == flags


def test_collate_follows_the_rows(build: MakePolicy, groups: list[Group], caplog: pytest.LogCaptureFixture) -> None:
    refs = [-torch.rand(g.num_scored) for g in groups]
    shared = build().collate(groups, ref_columns(refs))
    assert shared.layout is not None and "ref_logps" in shared.columns.names
    with caplog.at_level(logging.INFO, "strop"):
        policy = build(attn_implementation="eager")
    assert "prompts are not shared: attn_implementation is eager" in caplog.text
    plain = policy.collate(groups, ref_columns(refs))
    assert plain.attention_mask is not None and plain.layout is None
    with policy.scoring():
        torch.testing.assert_close(policy(plain).logps, build()(shared).logps, rtol=1e-5, atol=1e-5)
    assert "plain, padded; attention eager" in "\n".join(policy.describe())
    assert "shared by its completions" in "\n".join(build(lora={}).describe())


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.share(5)
@pytest.mark.parametrize(
    ("stored", "training", "saved"),
    [
        (torch.float32, {}, torch.float32),
        (torch.float32, {"bf16": True}, torch.float32),
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.bfloat16, {"save_dtype": "float32"}, torch.float32),
        (torch.float32, {"bf16": True, "save_dtype": "float16"}, torch.float16),
        (torch.bfloat16, {"bf16": True}, torch.bfloat16),
        (torch.bfloat16, {"fp16": True}, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_full_model_loads_with_transformers(
    stored: torch.dtype,
    training: dict[str, bool],
    saved: torch.dtype,
    tied: bool,
    model_dir: Path,
    tmp_path: Path,
    build: MakePolicy,
    groups: list[Group],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rewrite(model_dir, stored, tie_word_embeddings=tied, attention_dropout=0.25)
    GenerationConfig(temperature=0.7, top_p=0.9, do_sample=True, eos_token_id=[3, 1]).save_pretrained(model_dir)
    policy = build(training=training)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    final = tmp_path / "final"
    policy.save_pretrained(final, tokenizer)

    tensors = load_file(final / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {saved}
    assert tensors.keys() == load_file(model_dir / "model.safetensors").keys()
    assert ("lm_head.weight" in tensors) != tied
    again = AutoModelForCausalLM.from_pretrained(final, dtype="auto")
    for name, weight in again.named_parameters():
        assert torch.equal(weight, policy.trainable()[name].to(saved)), name
    assert again.dtype == saved and again.generation_config.temperature == 0.7
    assert again.generation_config.eos_token_id == [3, 1]
    before, after = (json.loads((d / "config.json").read_text()) for d in (model_dir, final))
    before["dtype"] = str(saved).removeprefix("torch.")
    assert after == before
    read = AutoTokenizer.from_pretrained(final)
    assert read.get_vocab() == tokenizer.get_vocab() and read.chat_template == tokenizer.chat_template
    # saving takes nothing away from the policy: it goes on
    policy(policy.collate(groups)).logps.sum().backward()
    assert policy.base.config.use_cache is False and policy.base.config.attention_dropout == 0


def test_a_weight_too_large_for_float16_is_not_lost(
    model_dir: Path,
    build: MakePolicy,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rewrite(model_dir, torch.float16)
    policy = build()
    with torch.no_grad():
        policy.trainable()["lm_head.weight"][0, 0] = 1e6
    policy.save_pretrained(tmp_path / "final", tokenizer)
    assert load_file(tmp_path / "final" / "model.safetensors")["lm_head.weight"][0, 0] == 1e6
    assert "saved in float32, since the weights of lm_head.weight are too large" in caplog.text


def test_saving_twice_gives_the_same_bytes(
    build: MakePolicy, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for lora in (None, {}):
        policy = build(lora=lora)
        for name in ("one", "two"):
            policy.save_pretrained(tmp_path / name, tokenizer)
        for file in (tmp_path / "one").iterdir():
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


# --- what is refused or changed at load -----------------------------------------------------------------------------


def test_shared_rows_that_differ_become_plain_rows(
    build: MakePolicy, groups: list[Group], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def leaky(layout: tuple[GroupSpan, ...], *how: Any) -> tuple[Tile, ...]:
        return cut_tiles((GroupSpan(0, layout[-1].stop, (0,)),), *how)  # everyone sees what stands before

    monkeypatch.setattr(attention, "cut_tiles", leaky)
    with caplog.at_level(logging.INFO, "strop"):
        policy = build()
    assert not policy.share_prefix
    assert "shared rows gave other log-probs than plain rows" in caplog.text


def test_learned_positions_have_an_end(model_dir: Path, configure: Callable[..., RunConfig]) -> None:
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=40)
    GPT2LMHeadModel(config).save_pretrained(model_dir)
    short = {"max_seq_length": 40, "max_prompt_length": 20}
    run = configure(training=short)
    assert build_policy(run, run.models[0], torch.device("cpu")).share_prefix
    run = configure(training={**short, "max_seq_length": 41})
    with pytest.raises(ConfigError, match="the model has 40 positions"):
        build_policy(run, run.models[0], torch.device("cpu"))


def test_rotary_positions_beyond_the_models_are_said(build: MakePolicy, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "strop"):
        build(training={"max_seq_length": 1000})
    assert "max_seq_length 1000 exceeds the 512 positions" in caplog.text


LONGROPE = {
    "model_type": "phi3",
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 12,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "long_factor": [4.0, 3.0, 2.0, 5.0],
        "short_factor": [1.0, 1.1, 1.0, 1.2],
        "original_max_position_embeddings": 12,
    },
}


def test_a_row_does_not_change_the_rotary_embedding_of_another(
    model_dir: Path, build: MakePolicy, groups: list[Group], caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(model_dir, **LONGROPE)
    with caplog.at_level(logging.INFO, "strop"):
        policy = build(training={"max_seq_length": 64, "max_prompt_length": 32})
    assert "its rotary embedding (longrope) depends on the longest row" in caplog.text
    with policy.scoring():
        together = policy(pad(groups)).logps  # rows of 3 to 16 tokens, on both sides of the 12
        alone = torch.cat([policy(pad([g])).logps for g in groups])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    rows = [(g, c) for g in groups for c in g.completions]
    own = []
    for group, completion in rows:
        logps = model(input_ids=torch.tensor([[*group.prompt_ids, *completion.ids[:-1]]])).logits[0].log_softmax(-1)
        own += [logps[len(group.prompt_ids) - 1 + j, t] for j, t in enumerate(completion.ids)]
    torch.testing.assert_close(together, torch.stack(own).detach(), rtol=1e-4, atol=1e-4)


def test_dynamic_rotary_scaling_has_a_limit(model_dir: Path, build: MakePolicy) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    rewrite(model_dir, max_position_embeddings=32, rope_parameters=dynamic)
    with pytest.raises(ConfigError, match="dynamic rotary scaling"):
        build(training={"max_seq_length": 33, "max_prompt_length": 16})
    assert not build(training={"max_seq_length": 32, "max_prompt_length": 16}).share_prefix


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("bloom", {"n_layer": 1, "n_head": 2}, "the attention of the architecture bloom cannot be replaced"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of the kind conv"),
        ("diffllama", {}, "sharing is not tested with the architecture diffllama"),
        ("falcon", {"alibi": False, "head_dim": ...}, "the attention of the architecture falcon cannot"),
    ],
)
def test_other_architectures_train_on_plain_rows(
    kind: str,
    changes: dict[str, Any],
    reason: str,
    model_dir: Path,
    build: MakePolicy,
    groups: list[Group],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rewrite(model_dir, model_type=kind, **changes)
    with caplog.at_level(logging.INFO, "strop"):
        policy = build()
    assert reason in caplog.text and not policy.share_prefix
    with policy.scoring():
        together = policy(policy.collate(groups)).logps
        alone = torch.cat([policy(policy.collate([g])).logps for g in groups])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_the_auxiliary_loss_of_a_router_is_said_to_be_off(
    model_dir: Path, build: MakePolicy, groups: list[Group], caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(model_dir, model_type="mixtral", num_local_experts=4, output_router_logits=True)
    with caplog.at_level(logging.WARNING, "strop"):
        policy = build()
    assert "auxiliary loss for the router" in caplog.text
    policy(policy.collate(groups)).logps.sum().backward()


def test_layers_that_fusing_would_change_keep_their_own_forward(
    build: MakePolicy, groups: list[Group], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if a layer by itself did not show it: the model's log-probs are taken before anything is fused."""
    want = build()
    forward = FusedMlp.__call__
    monkeypatch.setattr("strop.policy.kernels.fused.agrees", lambda *_: True)
    monkeypatch.setattr(FusedMlp, "__call__", lambda self, x: 3 * forward(self, x))
    with caplog.at_level(logging.WARNING, "strop"):
        policy = build()
    assert "than in their own, which they keep" in caplog.text and policy.share_prefix
    assert not any("forward" in vars(module) for module in policy.modules())
    monkeypatch.undo()
    with policy.scoring(), want.scoring():
        torch.testing.assert_close(policy(pack(groups)).logps, want(pack(groups)).logps, rtol=1e-5, atol=1e-5)


def test_a_model_with_nan_weights_is_not_probed(model_dir: Path, build: MakePolicy) -> None:
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][:] = 3e38  # finite, and infinite as soon as it is used
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError):
        build()


CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
class HouseConfig(LlamaConfig):
    model_type = "house_llama"
class HouseForCausalLM(LlamaForCausalLM):
    config_class = HouseConfig
    def __init__(self, config):
        super().__init__(config)
        self.own_dropout = nn.Dropout(0.5)  # in no configuration
        self.model.norm.register_forward_hook(lambda module, args, out: self.own_dropout(out))
"""


def test_code_that_comes_with_a_model_runs_when_trusted(
    model_dir: Path,
    tmp_path: Path,
    build: MakePolicy,
    groups: list[Group],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    want = build()
    (model_dir / "house.py").write_text(CODE)
    config = json.loads((model_dir / "config.json").read_text())
    code = {"AutoConfig": "house.HouseConfig", "AutoModelForCausalLM": "house.HouseForCausalLM"}
    (model_dir / "config.json").write_text(json.dumps(config | {"model_type": "house_llama", "auto_map": code}))
    with pytest.raises(ModelError, match="trust_remote_code"):
        build()
    policy = build(trust_remote_code=True)
    assert not policy.share_prefix  # nobody has tested that architecture
    torch.testing.assert_close(policy(pad(groups)).logps, want(pad(groups)).logps)
    policy.save_pretrained(tmp_path / "final", tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", trust_remote_code=True)
    assert type(again).__name__ == "HouseForCausalLM"


def test_the_real_base_model(shared: Path, groups: list[Group]) -> None:
    folder = shared / "models" / "base-12m"
    config = RunConfig(models=[{"huggingface_id": str(folder)}], lora={"r": 4}, training={"bf16": True})
    policy = build_policy(config, config.models[0], torch.device("cpu"))
    assert policy.share_prefix
    with policy.scoring():
        shared_logps, plain = policy(pack(groups)).logps, policy(pad(groups)).logps
    torch.testing.assert_close(shared_logps, plain, rtol=0, atol=0.2)


def test_what_reads_images_stays_beside_a_model_that_was_trained_in_full(
    model_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Servers do not load a model of several senses without it."""
    text = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=399)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model_dir)
    (model_dir / "preprocessor_config.json").write_text('{"image_size": 28}')
    keys = {"models": [{"huggingface_id": str(model_dir)}], "lora.enabled": False, "training.max_seq_length": 64}
    run = load_config(overrides=keys)
    policy = build_policy(run, run.models[0], torch.device("cpu"))
    policy.save_pretrained(tmp_path / "final", tokenizer)
    assert (tmp_path / "final/preprocessor_config.json").read_text() == '{"image_size": 28}'
