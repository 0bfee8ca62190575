"""Adapters train what they should and nothing else, load again with plain peft, and go on where they stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.tiny import tiny_config
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from strop.batch import pack
from strop.config.run import RunConfig
from strop.config.sections import LoraSection, ModelSection
from strop.errors import ModelError
from strop.policy.build import build_policy
from strop.policy.model.adapter_settings import adapters_of
from strop.policy.model.adapter_targets import linear_layers, resolve_targets, selected
from strop.policy.model.tokenizer import load_tokenizer
from strop.policy.policy import Policy
from strop.types import Group

MakePolicy = Callable[..., Policy]
# plain peft 0.21 on transformers 5.23, as users load the result
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}


def adapted(policy: Policy) -> set[str]:
    return {n.split(".lora_A")[0].rpartition(".")[2] for n in policy.trainable() if ".lora_A" in n}


def train_a_little(policy: Policy, groups: list[Group]) -> None:
    """Random steps, so that no trained weight is what it was drawn as."""
    policy(policy.collate(groups)).logps.sum().backward()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)


def logps_of(model: nn.Module, groups: list[Group]) -> Tensor:
    """Plain transformers, a row at a time."""
    parts = []
    with torch.no_grad():
        for group in groups:
            for c in group.completions:
                logps = model(input_ids=torch.tensor([[*group.prompt_ids, *c.ids]])).logits[0].log_softmax(-1)
                parts += [logps[len(group.prompt_ids) + j - 1, t] for j, t in enumerate(c.ids)]
    return torch.stack(parts)


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("lora", "others"),
    [
        ({}, ""),
        ({"use_rslora": True, "r": 4}, ""),
        ({"use_dora": True}, ""),
        ({"target_modules": "all-linear", "lora_dropout": 0.0}, ""),
        ({"target_modules": ["q_proj", "down_proj"]}, ""),
        ({"target_modules": ["layers.1.mlp.up_proj"]}, ""),
        ({"target_modules": r".*layers\.0\..*_proj"}, ""),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"modules_to_save": ["embed_tokens", "norm"]}, "embed_tokens.weight norm.weight"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "q_proj.base_layer.bias"),
    ],
    ids=str,
)
def test_trains_the_adapter_alone_and_loads_with_peft(
    lora: dict[str, Any], others: str, build: MakePolicy, model_dir: Path, groups: list[Group], tmp_path: Path
) -> None:
    if "bias" in lora:  # a model with biases
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(
            CONFIG_MAPPING["llama"](**json.loads((model_dir / "config.json").read_text()) | {"attention_bias": True})
        ).save_pretrained(model_dir)
    policy = build(lora=lora)
    frozen = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    names = set(policy.trainable())
    assert all("lora_" in n or any(n.endswith(o) for o in others.split()) for n in names)
    assert all(any(n.endswith(o) for n in names) for o in others.split())
    train_a_little(policy, groups)
    assert all(p.grad is not None for p in policy.trainable().values())
    assert all(p.grad is None and torch.equal(p, frozen[n]) for n, p in policy.named_parameters() if n in frozen)

    policy.save_pretrained(tmp_path / "final", tokenizer=load_tokenizer_of(model_dir))
    saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert saved.keys() == names
    assert all(torch.equal(saved[n], p) for n, p in policy.trainable().items())
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    with policy.scoring():
        torch.testing.assert_close(policy(policy.collate(groups)).logps, logps_of(again, groups), rtol=1e-4, atol=1e-4)


def load_tokenizer_of(folder: Path) -> Any:
    return load_tokenizer(ModelSection(huggingface_id=str(folder)))


def test_the_saved_config_names_the_base(build: MakePolicy, model_dir: Path, tmp_path: Path) -> None:
    policy = build(lora={"r": 4}, revision="main")
    policy.save_pretrained(tmp_path / "final", load_tokenizer_of(model_dir))
    config = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_dir)
    assert (config["r"], config["lora_alpha"], config["task_type"], config["revision"]) == (4, 8, "CAUSAL_LM", "main")
    assert not list((tmp_path / "final").glob("*.bin"))
    assert (tmp_path / "final" / "chat_template.jinja").exists()


def test_weights_that_train_are_float32_on_a_low_base(build: MakePolicy, groups: list[Group]) -> None:
    policy = build(lora={"modules_to_save": ["lm_head"]}, training={"bf16": True})
    kinds = {p.requires_grad: p.dtype for p in policy.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    policy(policy.collate(groups)).logps.sum().backward()
    assert {p.grad.dtype for p in policy.trainable().values() if p.grad is not None} == {torch.float32}


def test_new_adapters_change_nothing_and_are_drawn_from_the_seed(
    configure: Callable[..., RunConfig], groups: list[Group]
) -> None:
    drawn = []
    for seed, disturbance in ((1, 0), (1, 5), (2, 0)):
        config = configure(lora={}).model_copy(update={"seed": seed})
        torch.manual_seed(disturbance)
        state = torch.get_rng_state()
        policy = build_policy(config, config.models[0], torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), state)
        with policy.scoring():
            with_adapter = policy(pack(groups)).logps
            with policy.model.disable_adapter():  # type: ignore[operator, union-attr]
                assert torch.equal(policy(pack(groups)).logps, with_adapter)
        drawn.append(torch.cat([p.flatten() for n, p in policy.trainable().items() if "lora_A" in n]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("llama", QKVO),
        ("qwen3", QKVO),
        ("gemma2", QKVO),
        ("olmo2", QKVO),
        ("gpt2", {"c_attn"}),
        ("gpt_neox", {"query_key_value"}),
        ("bloom", {"query_key_value"}),
        ("falcon", {"query_key_value"}),
        ("phi", {"q_proj", "k_proj", "v_proj", "dense"}),
        ("phi3", {"qkv_proj", "o_proj"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("gptj", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("codegen", {"qkv_proj", "out_proj", "fc_in", "fc_out"}),
    ],
)
def test_auto_targets_by_family(kind: str, want: set[str]) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    if kind in ("gptj", "codegen"):
        sizes |= {"rotary_dim": 4, "n_embd": 16, "n_head": 4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, pad_token_id=0))
    assert set(resolve_targets(model, "auto", "here")) == want
    everything = set(resolve_targets(model, "all-linear", "here"))
    assert want <= everything and not {"lm_head", "embed_out"} & everything
    assert everything == {n.rpartition(".")[2] for n in linear_layers(model)}


class Namesakes(nn.Module):
    """A head whose name ends as a layer's does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"out": nn.Linear(2, 2), "up": nn.Linear(2, 2)})])
        self.out = nn.Linear(2, 2)

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def test_the_head_is_not_adapted_by_its_name() -> None:
    assert resolve_targets(Namesakes(), "all-linear", "here") == ("layers.0.out", "layers.0.up")


def test_layers_that_lie_the_other_way_round(
    model_dir: Path, build: MakePolicy, groups: list[Group], tmp_path: Path
) -> None:
    """gpt2's Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2, n_positions=512, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(model_dir)
    policy = build(lora={})
    assert adapted(policy) == {"c_attn"}
    train_a_little(policy, groups)
    policy.save_pretrained(tmp_path / "final", load_tokenizer_of(model_dir))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    with policy.scoring():
        torch.testing.assert_close(policy(policy.collate(groups)).logps, logps_of(again, groups), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (
            {"target_modules": ["q_proj", "vproj"]},
            r"no linear layer is called 'vproj'\n.*down_proj.*\n.*did you mean v_proj",
        ),
        ({"target_modules": "qq_proj"}, "no linear layer is called 'qq_proj'"),
        ({"target_modules": "(unclosed"}, "no linear layer is called"),
        ({"target_modules": ["lm_head"]}, "is the head.*\n.*lora.modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "no linear layer is called 'embed_tokens'"),
        ({"modules_to_save": ["head"]}, "lora.modules_to_save: no module is called 'head'\n.*lm_head"),
    ],
    ids=str,
)
def test_names_that_do_not_fit(lora: dict[str, Any], said: str, build: MakePolicy) -> None:
    with pytest.raises(ModelError, match=said):
        build(lora=lora)


@pytest.fixture
def tied_dir(model_dir: Path) -> Path:
    torch.manual_seed(0)
    config = json.loads((model_dir / "config.json").read_text()) | {"tie_word_embeddings": True}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**config)).save_pretrained(model_dir)
    return model_dir


def test_tied_embeddings_stay_tied(tied_dir: Path, build: MakePolicy, groups: list[Group], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="shares its weights with the embedding"):
        build(lora={"modules_to_save": ["lm_head"]})
    policy = build(lora={"modules_to_save": ["embed_tokens"]})
    train_a_little(policy, groups)
    policy.save_pretrained(tmp_path / "final", load_tokenizer_of(tied_dir))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    with policy.scoring():
        torch.testing.assert_close(policy(policy.collate(groups)).logps, logps_of(again, groups), rtol=1e-4, atol=1e-4)


# --- continuing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter_dir(build: MakePolicy, model_dir: Path, groups: list[Group], tmp_path: Path) -> Path:
    policy = build(lora={"r": 4, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]})
    train_a_little(policy, groups)
    policy.save_pretrained(tmp_path / "adapter", load_tokenizer_of(model_dir))
    return tmp_path / "adapter"


@pytest.mark.share(2)
@pytest.mark.parametrize("lora", [None, {}, {"r": 4, "lora_dropout": 0.3}, {"target_modules": ["up_proj", "q_proj"]}])
def test_goes_on_from_an_adapter(
    lora: dict[str, Any] | None,
    adapter_dir: Path,
    build: MakePolicy,
    model_dir: Path,
    groups: list[Group],
    tmp_path: Path,
) -> None:
    policy = build(lora=lora, adapter=str(adapter_dir))
    saved = load_file(adapter_dir / "adapter_model.safetensors")
    assert {n: p.dtype for n, p in policy.trainable().items()} == dict.fromkeys(saved, torch.float32)
    assert all(torch.equal(p, saved[n]) for n, p in policy.trainable().items())
    assert adapted(policy) == {"q_proj", "up_proj"}
    dropouts = {m.p for m in policy.modules() if isinstance(m, nn.Dropout)}
    assert dropouts == {(lora or {}).get("lora_dropout", 0.05)}
    again = AutoPeftModelForCausalLM.from_pretrained(adapter_dir).eval()
    with policy.scoring():
        torch.testing.assert_close(policy(policy.collate(groups)).logps, logps_of(again, groups), rtol=1e-4, atol=1e-4)
    policy.save_pretrained(tmp_path / "next", load_tokenizer_of(model_dir))
    assert load_file(tmp_path / "next" / "adapter_model.safetensors").keys() == saved.keys()


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"r": 8}, "r: 8 here, 4 in the adapter"),
        ({"r": 4, "lora_alpha": 5}, "lora_alpha: 5.0 here, 8 in the adapter"),
        ({"use_dora": True, "bias": "all"}, "bias: all here, none in the adapter; use_dora: True here"),
        ({"target_modules": ["v_proj"]}, "target_modules: v_proj here, q_proj, up_proj in the adapter"),
        ({"modules_to_save": ["norm"]}, "modules_to_save: norm here, lm_head in the adapter"),
    ],
    ids=str,
)
def test_settings_that_are_not_the_adapters(
    lora: dict[str, Any], said: str, adapter_dir: Path, build: MakePolicy
) -> None:
    with pytest.raises(ModelError, match=said):
        build(lora=lora, adapter=str(adapter_dir))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: edit(d, peft_type="IA3"), "of the kind IA3"),
        (lambda d: edit(d, init_lora_weights="pissa"), "init_lora_weights: pissa, which cannot be continued"),
        (lambda d: edit(d, trainable_token_indices=[1]), "trainable_tokens_delta. is missing"),
        (lambda d: edit(d, r=8), "does not fit"),
        (lambda d: edit(d, r="many"), "does not fit|adapter_config.json"),
        (lambda d: edit(d, target_modules=["nothing"]), "does not fit"),
        (lambda d: edit(d, target_modules=["q_proj"]), "have no place in the model"),
        (lambda d: edit(d, target_modules=["q_proj", "up_proj", "k_proj"]), "weights are missing"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
        (lambda d: (d / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), "a pickle"),
        (lambda d: edit_weights(d, lambda t: t.pop(Q)), "1 of its weights are missing"),
        (lambda d: edit_weights(d, lambda t: t.update({Q: torch.zeros(9, 9)})), "does not fit"),
        (lambda d: edit_weights(d, lambda t: t[Q].fill_(float("nan"))), "lora_A.weight.*not finite"),
    ],
)
def test_broken_adapters(damage: Callable[[Path], object], said: str, adapter_dir: Path, build: MakePolicy) -> None:
    damage(adapter_dir)
    with pytest.raises(ModelError, match=said):
        build(adapter=str(adapter_dir))


@pytest.mark.share(1)
@pytest.mark.parametrize("key", ["target_modules", "modules_to_save", "layers_pattern", "r", "bias"])
def test_values_that_are_of_no_use_are_refused(key: str, adapter_dir: Path, build: MakePolicy) -> None:
    for value in (5, 1.5, [[]], [None], [{}], ["q_proj", 0], {"a": None}, "\ud800", 10**30):
        edit(adapter_dir, **{key: value})
        with pytest.raises(ModelError):
            build(adapter=str(adapter_dir))


@pytest.mark.share(2)
@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern"]
)
def test_what_is_no_name_is_refused_before_a_model_is_there(key: str, adapter_dir: Path) -> None:
    model = ModelSection(name="m", huggingface_id="m", adapter=str(adapter_dir))
    for value in (["q_proj", 0], [None], [["q_proj"]], 5, {"q_proj": 1}, True):
        edit(adapter_dir, **{key: value})
        with pytest.raises(ModelError, match=f"{key} is "):
            adapters_of(LoraSection(), model)


def test_what_peft_says_of_an_adapters_settings_is_not_for_the_terminal(adapter_dir: Path, build: MakePolicy) -> None:
    edit(adapter_dir, loftq_config={"loftq_bits": 4})
    build(adapter=str(adapter_dir))  # a warning would be an error here


def test_an_adapter_that_is_not_there(build: MakePolicy) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        build(adapter="./nowhere")


def test_another_base_is_said(adapter_dir: Path, build: MakePolicy, caplog: pytest.LogCaptureFixture) -> None:
    edit(adapter_dir, base_model_name_or_path="someone/else")
    with caplog.at_level(logging.WARNING, "strop"):
        build(adapter=str(adapter_dir))
    assert "it was made on someone/else" in caplog.text


def test_an_adapter_on_the_head_is_refused(build: MakePolicy, model_dir: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(target_modules=["lm_head"]))
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path / "on-head", save_embedding_layers=False)
    with pytest.raises(ModelError, match="adapts the head"):
        build(adapter=str(tmp_path / "on-head"))


def test_a_router_is_no_linear_layer() -> None:
    """Some are linear layers by their class, and give scores and choices."""
    tiny = {"hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 30}
    config = CONFIG_MAPPING["llama4_text"](**tiny, **heads, num_local_experts=2, pad_token_id=0)
    names = {name.rpartition(".")[2] for name in linear_layers(AutoModelForCausalLM.from_config(config))}
    assert names >= QKVO and "router" not in names


# --- what is adapted ------------------------------------------------------------------------------------------------


@pytest.mark.share(1)
@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", r"model\.layers\.1\.mlp\..*_proj"])
def test_a_regular_expression_is_saved_as_one(
    pattern: str, build: MakePolicy, model_dir: Path, groups: list[Group], tmp_path: Path
) -> None:
    """In a list it would be a name, and match nothing. New, and continued."""
    tokenizer, policy = load_tokenizer_of(model_dir), build(lora={"target_modules": pattern})
    for name in ("new", "continued"):
        train_a_little(policy, groups)
        policy.save_pretrained(tmp_path / name, tokenizer)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"] == pattern
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with policy.scoring():
            torch.testing.assert_close(
                policy(policy.collate(groups)).logps, logps_of(again, groups), rtol=1e-4, atol=1e-4
            )
        policy = build(adapter=str(tmp_path / name))


def test_an_expression_that_finds_more_than_layers_names_layers(build: MakePolicy) -> None:
    """The head and an activation."""
    policy = build(lora={"target_modules": r"lm_head|model\.layers\.1\.mlp\..*"})
    assert adapted(policy) == {"gate_proj", "up_proj", "down_proj"}


def tiny_gemma3() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32, "num_key_value_heads": 1, "head_dim": 8}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    with torch.device("meta"):
        config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("wanted", ["auto", "all-linear", ("q_proj", "v_proj"), r".*\.q_proj", ("self_attn.q_proj",)])
def test_only_what_text_flows_through_is_adapted(wanted: Any) -> None:
    """Never a vision tower or its projector, whatever the layers are called there."""
    module = tiny_gemma3()
    targets = resolve_targets(module, wanted, "here")
    found = selected(targets, [n for n, m in module.named_modules() if isinstance(m, nn.Linear)])
    assert found and all(name.startswith("model.language_model.") for name in found)
    for tower in (("mlp.fc1",), "fc2", r".*vision_tower.*"):
        with pytest.raises(ModelError, match=r"no text flows through .*vision_tower"):
            resolve_targets(module, tower, "here")


def test_towers_inside_of_a_text_model_are_not_adapted() -> None:
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(tiny_config("git"))
    towers = [name for name in linear_layers(module) if "image_encoder" in name or "visual_projection" in name]
    for wanted in ("auto", "all-linear"):
        found = selected(resolve_targets(module, wanted, "here"), linear_layers(module))
        assert found and not set(found) & set(towers)
    with pytest.raises(ModelError, match=r"no text flows through .*image_encoder"):
        resolve_targets(module, ("q_proj",), "here")


@pytest.mark.parametrize("kind", ["deepseek_v3", "minicpm3", "glm_moe_dsa", "youtu"])
def test_latent_attention_is_adapted_by_its_projections(kind: str) -> None:
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(tiny_config(kind))
    found = selected(resolve_targets(module, "auto", "here"), linear_layers(module))
    last_parts = {name.rpartition(".")[2] for name in found}
    assert last_parts == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


def test_a_router_is_adapted_only_by_its_name() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = CONFIG_MAPPING["qwen3_moe"](num_experts=4)
            self.gate, self.up = nn.Linear(8, 4), nn.Linear(8, 6)
            self.router = nn.ModuleDict({"layer": nn.Linear(8, 8)})
            self.mlp = nn.ModuleDict({"gate": nn.Linear(8, 6)})  # of a feed-forward layer

        def get_output_embeddings(self) -> nn.Module | None:
            return None

    assert selected(resolve_targets(Mixture(), "all-linear", "here"), linear_layers(Mixture())) == ["up", "mlp.gate"]
    assert set(resolve_targets(Mixture(), ("gate", "layer"), "here")) == {"gate", "layer"}


def test_how_much_adapters_reach_is_said(build: MakePolicy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "strop")
    build(lora={})
    assert "adapters on 8 of 14 linear layers, 40.0 % of their weights" in caplog.text
    assert "without adapters: mlp.gate_proj (20.0 %), mlp.up_proj (20.0 %), mlp.down_proj (20.0 %)" in caplog.text
    caplog.clear()
    build(lora={"target_modules": "all-linear"})
    assert "adapters on 14 of 14 linear layers, 100.0 %" in caplog.text and "without adapters" not in caplog.text


@pytest.mark.share(1)
@pytest.mark.parametrize("training", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("modules", [[], "auto"])
def test_fused_experts_are_adapted_by_name(
    modules: Any,
    training: dict[str, Any],
    model_dir: Path,
    build: MakePolicy,
    groups: list[Group],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    config = json.loads((model_dir / "config.json").read_text()) | {"num_local_experts": 4, "num_experts_per_tok": 2}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](**config)).save_pretrained(model_dir)
    caplog.set_level(logging.INFO, "strop")
    names = ["mlp.experts.gate_up_proj", "experts.down_proj"]
    policy = build(lora={"r": 4, "target_modules": modules, "target_parameters": names}, training=training)
    assert f"adapters on {4 + 8 * bool(modules)} of 12 linear layers" in caplog.text
    assert any(".experts." in name for name in policy.trainable())
    for name in ("new", "continued"):
        train_a_little(policy, groups)
        assert all(p.grad is not None for p in policy.trainable().values())
        policy.save_pretrained(tmp_path / name, load_tokenizer_of(model_dir))
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with policy.scoring():
            tolerance = 0.2 if training else 1e-4
            got, want = policy(policy.collate(groups)).logps, logps_of(again, groups)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        policy = build(adapter=str(tmp_path / name), training=training)
    with pytest.raises(ModelError, match=r"no fused experts are called 'gate_up'\n.*experts.down_proj"):
        build(lora={"target_parameters": ["gate_up"]})


def test_names_that_peft_takes_for_experts_are_not_used() -> None:
    """On some mixtures it takes gate_proj for a name of the fused experts; shared experts have layers of that name."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20, "num_experts": 4}
    with torch.device("meta"):
        config = CONFIG_MAPPING["qwen3_next"](**sizes, layer_types=["full_attention"])
        model = AutoModelForCausalLM.from_config(config)
    assert any(name.endswith("shared_expert.gate_proj") for name in linear_layers(model))
    assert set(resolve_targets(model, "all-linear", "here")) == {*QKVO, "shared_expert_gate"}
    for wanted in (("q_proj", "up_proj"), r".*\.down_proj"):
        with pytest.raises(ModelError, match=r"for a name of its fused experts(.|\n)*lora.target_parameters"):
            resolve_targets(model, wanted, "here")


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_layers_that_peft_refuses_are_left_out(kind: str) -> None:
    """Kernels of Mamba read their weights past an adapter."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 20, "pad_token_id": 0}
    for wanted in ("auto", "all-linear"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
        targets = resolve_targets(model, wanted, "here")
        assert set(targets) == {"dt_proj", "in_proj", "x_proj"}
        get_peft_model(model, LoraConfig(target_modules=list(targets), task_type="CAUSAL_LM"))
