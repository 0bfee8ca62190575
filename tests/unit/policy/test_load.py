"""Every way in which a model folder can be wrong ends in one clear message; nothing is filled in by guesses."""

from __future__ import annotations

import json
import logging
import pickle
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from strop import time_limit
from strop.config.run import RunConfig
from strop.config.sections import ModelSection
from strop.errors import ModelError
from strop.policy.build import build_policy
from strop.policy.model import tokenizer_patterns
from strop.policy.model.deferred_weights import DeferredWeights, TensorSource
from strop.policy.model.folder import inspect_config
from strop.policy.model.load import load_model
from strop.policy.model.shape_check import check_shapes
from strop.policy.model.tokenizer import check_vocabulary, load_tokenizer, read_tokenizer


def load(folder: Path | str, **keys: Any) -> Any:
    return load_model(ModelSection(huggingface_id=str(folder), **keys), dtype=torch.float32)


def refusal(action: Callable[[], object]) -> str:
    """The message, which is short, says where, and comes without a traceback of the libraries in its text."""
    with pytest.raises(ModelError) as caught:
        action()
    message = str(caught.value)
    assert len(message) < 900 and "Traceback" not in message
    assert message.startswith(("model ", "reference "))
    return message


def test_programs_load_a_tokenizer_and_a_model_by_one_short_name(model_dir: Path) -> None:
    from strop.policy import load as parts

    section = ModelSection(huggingface_id=str(model_dir))
    tokenizer, loaded = parts.load_tokenizer(section), parts.load_model(section, dtype=torch.float32)
    assert isinstance(loaded, parts.LoadedModel)
    check_vocabulary(tokenizer, loaded.module, "here")


def test_no_rows_of_a_tensor_that_stays_in_its_file(tmp_path: Path) -> None:
    """What the second process has of a matrix with one row, such as the head of a reward model."""
    save_file({"score.weight": torch.ones(1, 4)}, tmp_path / "model.safetensors")
    waiting = DeferredWeights([tmp_path / "model.safetensors"], "here")
    assert waiting.read(TensorSource("score.weight", torch.float32), 1, 1).shape == (0, 4)
    assert waiting.read(TensorSource("score.weight", torch.float32), 0, 1).tolist() == [[1.0] * 4]


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_come_as_stored(model_dir: Path) -> None:
    stored = load_file(model_dir / "model.safetensors")
    loaded = load(model_dir)
    inside = dict(loaded.module.named_parameters())
    assert inside.keys() == stored.keys()
    assert all(torch.equal(inside[name], stored[name]) for name in stored)
    assert loaded.stored == torch.float32
    assert load_model(ModelSection(huggingface_id=str(model_dir)), dtype=torch.bfloat16).module.dtype == torch.bfloat16


def test_the_stored_dtype_is_read_from_the_weights(model_dir: Path) -> None:
    def to_bf16(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({k: v.bfloat16() for k, v in tensors.items()})

    edit_weights(model_dir, to_bf16)
    assert json.loads((model_dir / "config.json").read_text())["dtype"] == "float32"
    assert load(model_dir).stored == torch.bfloat16


@pytest.mark.parametrize("name", ["./nothing/here", "/nothing/here", "~/nothing", "a/b/c"])
def test_paths_that_do_not_exist(name: str) -> None:
    assert "there is no such folder" in refusal(lambda: load(name))
    assert "there is no such folder" in refusal(lambda: load_tokenizer(ModelSection(huggingface_id=name)))


def test_a_file_is_no_folder(model_dir: Path) -> None:
    assert "is a file" in refusal(lambda: load(model_dir / "config.json"))


@pytest.mark.parametrize("name", ["some/model", "no-such-folder"])
def test_no_hub(name: str) -> None:
    for action in (load, lambda folder: load_tokenizer(ModelSection(huggingface_id=folder))):
        message = refusal(lambda: action(name))  # noqa: B023 (called at once)
        assert f"there is no folder '{name}' here, and the hub could not be asked for it: HF_HUB_OFFLINE" in message
        assert "without a network" in message and "tokenizer" not in message


def test_a_broken_model_is_not_said_of_its_tokenizer(model_dir: Path) -> None:
    section = ModelSection(huggingface_id=str(model_dir))
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    assert "pickle" in refusal(lambda: load_tokenizer(section))
    edit_config(model_dir, num_attention_heads=5)
    assert "config.json does not describe a model" in refusal(lambda: load_tokenizer(section))
    (model_dir / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(lambda: load_tokenizer(section))


def test_a_revision_of_a_folder_is_said_to_be_unread(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="strop"):
        load(model_dir, revision="v2")
    assert "revision v2 is not read" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json cannot be read"),
        ("[1]", "holds no JSON object"),
        ("\xff", "config.json does not describe|cannot be read|names no model_type"),
        ("{}", "names no model_type"),
        ('{"model_type": "lama"}', "unknown.*\n.*'llama'"),
        ('{"model_type": ["llama"]}', "unknown"),
        ('{"model_type": "llama", "hidden_size": "many"}', "does not describe a model.*hidden_size"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "does not describe a model|cannot be loaded"),
        ('{"model_type": "t5"}', "encoder-decoder"),
        ('{"model_type": "clip"}', "not a causal language model"),
        (
            '{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}',
            "without a language modelling",
        ),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}', "quantised"),
    ],
)
def test_broken_configs(text: str, said: str, model_dir: Path) -> None:
    (model_dir / "config.json").write_text(text)
    message = refusal(lambda: load(model_dir))
    assert re.search(said, message), message


@pytest.mark.parametrize("key", ["architectures", "auto_map", "is_encoder_decoder", "vocab_size"])
def test_values_of_the_configuration_that_are_of_no_use(key: str, model_dir: Path) -> None:
    """One message where there is anything to say, and none of Python's own errors."""
    config, told = json.loads((model_dir / "config.json").read_text()), []
    for value in (3, [3], [[]], "x", {"a": 1}, [None], True):
        (model_dir / "config.json").write_text(json.dumps({**config, key: value}))
        with suppress(ModelError):
            load_tokenizer(ModelSection(huggingface_id=str(model_dir)))
            continue
        told.append(value)
    assert told or key == "auto_map"  # which is not read without trust_remote_code


def test_no_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    assert "no config.json" in refusal(lambda: load(model_dir))


def test_an_adapter_is_no_model(model_dir: Path) -> None:
    (model_dir / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    assert "put its base model in huggingface_id" in refusal(lambda: load(model_dir))


class Canary:
    """Unpickling this leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_and_not_opened(name: str, model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    for other in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):  # of the Trainer, and none of the model
        (model_dir / other).write_bytes(b"")
    assert "there are no weights" in refusal(lambda: load(model_dir))
    (model_dir / name).write_bytes(pickle.dumps(Canary(tmp_path / "PWNED")))
    assert "pickles" in refusal(lambda: load(model_dir))
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        ("model-00002-of-00002.safetensors", "is missing"),
        ("../model.safetensors", "no file beside it"),
        ("/etc/passwd", "no file beside it"),
        ("weights.bin", "no file beside it"),
    ],
)
def test_broken_indices(shard: str, said: str, model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": shard}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    assert said in refusal(lambda: load(model_dir))
    (model_dir / "model.safetensors.index.json").write_text("{}")
    assert "no weight_map" in refusal(lambda: load(model_dir))


def test_shards_load(model_dir: Path) -> None:
    whole = load(model_dir).module
    whole.save_pretrained(model_dir, max_shard_size="50KB")
    (model_dir / "model.safetensors").unlink()
    assert len(list(model_dir.glob("model-*.safetensors"))) > 1
    again = load(model_dir).module
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_links_out_of_the_folder(model_dir: Path, tmp_path: Path) -> None:
    outside = tmp_path / "weights"
    (model_dir / "model.safetensors").rename(outside)
    (model_dir / "model.safetensors").symlink_to(outside)
    assert "leads out of the folder" in refusal(lambda: load(model_dir))
    # the hub's cache is made of such links
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    outside.rename(blobs / "1234")
    (model_dir / "model.safetensors").unlink()
    snapshot.parent.mkdir()
    model_dir.rename(snapshot)
    (snapshot / "model.safetensors").symlink_to(blobs / "1234")
    assert load(snapshot).module.num_parameters() > 0


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"1 weights are missing.*layers.1.mlp.up_proj"),
        (lambda t: t.pop("lm_head.weight"), "missing.*lm_head"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(7, 32)}),
            r"another shape.*lm_head.weight: \[7, 32\]\n.*400",
        ),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight holds NaN"),
        (lambda t: t["lm_head.weight"][3].fill_(float("-inf")), "lm_head.weight holds NaN or infinity"),
        (lambda t: t.update({k: v.int() for k, v in t.items()}), "no floating point weights"),
    ],
    ids=["missing", "missing head", "shape", "nan", "inf", "integers"],
)
def test_broken_weights(edit: Callable[[dict[str, torch.Tensor]], None], said: str, model_dir: Path) -> None:
    edit_weights(model_dir, edit)
    message = refusal(lambda: load(model_dir))
    assert re.search(said, message), message


@pytest.mark.parametrize(
    "damage", [lambda b: b[:100], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 99]
)
def test_damaged_files(damage: Callable[[bytes], bytes], model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert "is damaged" in refusal(lambda: load(model_dir))


def test_tensors_that_are_not_of_the_model_are_named(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(model_dir, lambda t: t.update({"extra.weight": torch.zeros(2)}))
    with caplog.at_level(logging.WARNING, "strop"):
        load(model_dir)
    assert "1 tensors in its files are not part of the model" in caplog.text and "extra.weight" in caplog.text


@pytest.mark.parametrize(
    "key", ["_attn_implementation_internal", "attn_implementation", "_experts_implementation", "_kernel"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_kernels_in_configs_are_refused(key: str, nested: bool, model_dir: Path) -> None:
    change = {key: "evil/kernels@main"}
    edit_config(model_dir, **({"text_config": change} if nested else change))
    assert "code to be fetched and run" in refusal(lambda: load(model_dir))


def test_code_in_configs_is_not_used(model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (model_dir / "evil.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\nclass Evil: ...\n")
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit_config(model_dir, auto_map=code, trust_remote_code=True, _attn_implementation_autoset=True, _sliding=3)
    tokenizer = json.loads((model_dir / "tokenizer_config.json").read_text())
    (model_dir / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    with caplog.at_level(logging.WARNING, "strop"):
        loaded = load(model_dir)
        load_tokenizer(ModelSection(huggingface_id=str(model_dir)))
    assert "ignored in config.json, since trust_remote_code is false: auto_map, trust_remote_code" in caplog.text
    assert not hasattr(loaded.config, "auto_map") and loaded.config._sliding == 3
    edit_config(model_dir, model_type="brand_new")
    assert "set models[].trust_remote_code: true" in refusal(lambda: load(model_dir))
    assert not (tmp_path / "PWNED").exists()


def test_attention_of_ones_own_choice(model_dir: Path) -> None:
    assert load(model_dir, attn_implementation="eager").module.config._attn_implementation == "eager"
    assert "kernel on the hub" in refusal(lambda: load(model_dir, attn_implementation="some/kernel"))
    assert "cannot be loaded" in refusal(lambda: load(model_dir, attn_implementation="nonsense"))


def test_capped_attention_is_not_left_to_sdpa(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        num_key_value_heads=1,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma2")
    assert load(tmp_path / "gemma2").module.config._attn_implementation == "eager"
    assert "cannot cap" in refusal(lambda: load(tmp_path / "gemma2", attn_implementation="sdpa"))


def test_dropout_is_off_and_said_and_still_in_the_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(folder)
    with caplog.at_level(logging.INFO, "strop"):
        loaded = load(folder)
    assert "attn_pdrop 0.1" in caplog.text and "resid_pdrop 0.1" in caplog.text
    assert loaded.config.resid_pdrop == 0.1 and loaded.module.config.resid_pdrop == 0
    loaded.module.train()
    ids = torch.arange(20)[None]
    assert torch.equal(loaded.module(ids).logits, loaded.module(ids).logits)


def test_an_encoder_that_poses_as_a_decoder_loads_but_is_no_policy(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "bert"
    BertLMHeadModel(
        BertConfig(
            vocab_size=400,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            initializer_range=0.5,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = RunConfig(models=[{"huggingface_id": str(folder)}])
    assert "sees later tokens" in refusal(lambda: build_policy(config, config.models[0], torch.device("cpu")))


def test_tokenizers(model_dir: Path) -> None:
    section = ModelSection(huggingface_id=str(model_dir))
    tokenizer = load_tokenizer(section)
    assert tokenizer.eos_token == "<|im_end|>"
    module = load(model_dir).module
    check_vocabulary(tokenizer, module, "model tiny")
    tokenizer.add_tokens([f"<new{i}>" for i in range(200)])
    message = refusal(lambda: check_vocabulary(tokenizer, module, "model tiny"))
    assert "without an embedding" in message and "'<new" in message and "below 400" in message


def test_no_end_of_sequence(model_dir: Path) -> None:
    file = model_dir / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token")
    file.write_text(json.dumps(settings))
    section = ModelSection(huggingface_id=str(model_dir))
    assert "no end-of-sequence token" in refusal(lambda: load_tokenizer(section))


@pytest.mark.parametrize("content", [None, "{broken", "{}", '{"model": {"type": "BPE"}}'])
def test_no_tokenizer(content: str | None, model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    if content is None:
        (model_dir / "tokenizer_config.json").unlink()
    else:
        (model_dir / "tokenizer.json").write_text(content)
    section = ModelSection(huggingface_id=str(model_dir))
    assert "tokenizer" in refusal(lambda: load_tokenizer(section))


EXPLODES = "(?i)" + "strasse" * 6000


@pytest.mark.share(1)
@pytest.mark.skipif(not time_limit.CAN_FORK, reason="nothing is tried where processes cannot be copied")
@pytest.mark.parametrize("key", ["Regex", "\\u0052egex"])
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_a_pattern_that_is_compiled_for_ever_is_refused(
    key: str, part: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_patterns, "SECONDS", 0.2)
    split = {"type": "Split", "pattern": {"Regex": EXPLODES}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": EXPLODES}, "content": ""}
    file = model_dir / "tokenizer.json"
    content = json.loads(file.read_text())
    content[part] = {"type": "Sequence", part.replace("_", "") + "s": [replace if part == "normalizer" else split]}
    file.write_text(json.dumps(content).replace('"Regex"', f'"{key}"'))
    started = time.monotonic()
    said = refusal(lambda: load_tokenizer(ModelSection(huggingface_id=str(model_dir))))
    assert "tokenizer.json" in said and "seconds of processor time to be compiled" in said
    assert time.monotonic() - started < 60


def test_the_patterns_of_common_tokenizers_are_compiled_at_once(model_dir: Path) -> None:
    common = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": common}, "behavior": "Isolated", "invert": False}
    file = model_dir / "tokenizer.json"
    content = json.loads(file.read_text())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    file.write_text(json.dumps(content))
    assert load_tokenizer(ModelSection(huggingface_id=str(model_dir)))("hello").input_ids


def test_infinities_are_read_as_transformers_writes_them(tmp_path: Path, tokenizer: Any) -> None:
    """In a model's configuration, and again in that of the model that comes of it."""
    sizes = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "n_groups": 1}
    heads = {"num_heads": 4, "head_dim": 8, "chunk_size": 8, "eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 0}
    config = CONFIG_MAPPING["mamba2"](**sizes, **heads, time_step_limit=(0.0, float("inf")))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    read = inspect_config(ModelSection(huggingface_id=str(tmp_path))).config
    assert read["time_step_limit"] == [0.0, float("inf")]
    assert list(load(tmp_path).config.time_step_limit) == [0.0, float("inf")]
    edit_config(tmp_path, other={"__float__": "Infinity", "more": 1}, third={"__float__": 3})
    read = inspect_config(ModelSection(huggingface_id=str(tmp_path))).config
    assert read["other"] == {"__float__": "Infinity", "more": 1} and read["third"] == {"__float__": 3}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma", "gpt_neox", "phi3"])
@pytest.mark.parametrize(
    "named", ["TokenizersBackend", "PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", None]
)
def test_the_tokenizer_is_the_one_that_transformers_chooses(kind: str, named: str | None, model_dir: Path) -> None:
    """It is chosen by names of the configuration, without building it."""
    file = model_dir / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": named}))
    config = {"model_type": kind, "vocab_size": 10_000, "tokenizer_class": "PreTrainedTokenizerFast"}
    (model_dir / "config.json").write_text(json.dumps(config))
    expected = AutoTokenizer.from_pretrained(model_dir)
    found = read_tokenizer(ModelSection(huggingface_id=str(model_dir)))
    assert type(found) is type(expected) and found.get_vocab() == expected.get_vocab()
    assert found("the fox jumps").input_ids == expected("the fox jumps").input_ids


@pytest.mark.share(2)
@pytest.mark.parametrize(
    "larger",
    [
        {"hidden_size": 8192},
        {"intermediate_size": 1_000_000},
        {"vocab_size": 10_000_000},
        {"num_hidden_layers": 400, "intermediate_size": 20_000},
        {"num_hidden_layers": 40},
    ],
    ids=str,
)
def test_a_configuration_larger_than_the_weights_is_refused_before_any_is_made(
    larger: dict[str, Any], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: Any, **__: Any) -> None:
        pytest.fail("weights are made")

    edit_config(model_dir, **larger)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", made)
    assert "another shape" in (said := refusal(lambda: load(model_dir))) or "describes a model of" in said
    assert refusal(lambda: check_shapes(ModelSection(huggingface_id=str(model_dir)))) == said


def test_a_configuration_that_fits_the_weights_is_taken(model_dir: Path) -> None:
    section = ModelSection(huggingface_id=str(model_dir))
    check_shapes(section)
    edit_weights(model_dir, lambda tensors: tensors.update(more=torch.ones(100_000)))
    check_shapes(section)
    edit_config(model_dir, tie_word_embeddings=True)
    edit_weights(model_dir, lambda tensors: [tensors.pop(name) for name in ("lm_head.weight", "more")].clear())
    check_shapes(section)
