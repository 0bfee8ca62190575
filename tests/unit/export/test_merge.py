"""An adapter merged into its base: the same answers in plain transformers, and a refusal where they are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import TINY
from strop.cli import main
from strop.config import load_config
from strop.errors import CheckpointError, ModelError, SaveError
from strop.export import merge, merged_weights, proof, shards
from strop.export.convert import to_consolidated
from strop.machine import Machine
from strop.manifest import BASE, seal
from strop.policy.build import build_policy
from strop.policy.model.configuration import quiet
from strop.policy.model.load import load_model
from strop.policy.model.model_hashes import files_hash, have_other_numbers

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def make(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Callable[..., tuple[Path, Path]]:
    """A base and an adapter that changes what it answers, as folders."""

    def build(model: PreTrainedModel, shard: str = "50GB", **lora: Any) -> tuple[Path, Path]:
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        model.save_pretrained(base, max_shard_size=shard)
        make_tokenizer().save_pretrained(base)
        torch.manual_seed(1)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **lora}
        with quiet():
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            changed = get_peft_model(plain, LoraConfig(**settings))
        for name, weight in changed.named_parameters():
            if weight.requires_grad:
                fresh = torch.randn_like(weight)
                weight.data = fresh * 0.2 if "lora_" in name and "magnitude" not in name else weight + 0.1 * fresh
        with quiet():
            changed.save_pretrained(adapter)
        return base, adapter

    return build


def same_answers(base: Path, adapter: Path, merged: Path, tolerance: float) -> None:
    """By plain transformers and peft, in float32."""
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with_it = PeftModel.from_pretrained(plain, str(adapter)).eval()
        one = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        ours, theirs = one(ids).logits, with_it(ids).logits
        with quiet(), with_it.disable_adapter():
            before = with_it(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
    assert (before - theirs).abs().max() > 10 * tolerance  # the adapter does something


def texts_equal(found: proof.Proof) -> int:
    """Of how many prompts both models go on with the same tokens."""
    (line,) = (line for line in found.lines if line.what.startswith("greedy texts"))
    return int(line.what.removeprefix("greedy texts: ").split()[0])


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "head": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}


@pytest.mark.share(3)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_merged_model_is_the_adapters(
    variant: str, dtype: torch.dtype, make: Any, make_model: Any, tmp_path: Path
) -> None:
    base, adapter = make(make_model(dtype=dtype), **VARIANTS[variant])
    found = merge.merge(str(adapter), tmp_path / "merged")
    assert not found.failed and found.moved > 0
    assert texts_equal(found) == len(proof.PROMPTS) or dtype == torch.bfloat16
    same_answers(base, adapter, tmp_path / "merged", 1e-5 if dtype == torch.float32 else 3e-2)
    stored = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    before = load_file(base / "model.safetensors")
    assert stored.keys() == before.keys()
    if "saved" not in variant:
        assert torch.equal(stored["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        ({}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    ],
    ids=["layers", "head", "embedding", "saved"],
)
def test_a_tied_head_stays_tied_unless_the_adapter_parts_it(
    lora: dict[str, Any], parts: bool, make: Any, make_model: Any, tmp_path: Path
) -> None:
    base, adapter = make(make_model(tie_word_embeddings=True), **lora)
    found = merge.merge(str(adapter), tmp_path / "merged")
    assert not found.failed and texts_equal(found) == len(proof.PROMPTS)
    same_answers(base, adapter, tmp_path / "merged", 1e-5)
    assert ("lm_head.weight" in load_file(tmp_path / "merged/model.safetensors")) == parts
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is not parts


@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    ],
    ids=["embedding", "tokens", "saved"],
)
def test_files_that_hold_a_tied_head_beside_the_embedding(
    lora: dict[str, Any], parts: bool, make: Any, make_model: Any, tmp_path: Path
) -> None:
    """Both change, and neither takes the place of another tensor."""
    base, adapter = make(make_model(tie_word_embeddings=True), **lora)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert not merge.merge(str(adapter), tmp_path / "merged").failed
    same_answers(base, adapter, tmp_path / "merged", 1e-5)
    after = load_file(tmp_path / "merged/model.safetensors")
    assert after.keys() == weights.keys()
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"]) is not parts
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is not parts


def test_what_a_tokenizer_and_a_processor_consist_of_is_copied(make: Any, make_model: Any, tmp_path: Path) -> None:
    base, adapter = make(make_model(), target_modules=["q_proj"])
    small = ("additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "spiece.model")
    (base / "additional_chat_templates").mkdir()
    for name in small:
        (base / name).write_text("{}")
    merge.merge(str(adapter), tmp_path / "merged")
    assert all((tmp_path / "merged" / name).is_file() for name in small)
    assert small[0] in json.loads((tmp_path / "merged/MANIFEST.json").read_text())["files"]


FAMILIES = {
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1)),
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=8)), {"bias": "all"}),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4)),
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


@pytest.mark.share(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, make: Any, tmp_path: Path) -> None:
    """Layers that are stored transposed, biases that are trained, experts that are stacked on loading."""
    torch.manual_seed(0)
    build, lora = FAMILIES[family]
    base, adapter = make(build(), **lora)
    assert not merge.merge(str(adapter), tmp_path / "merged").failed
    same_answers(base, adapter, tmp_path / "merged", 1e-5)
    assert load_file(tmp_path / "merged/model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_biases_of_the_model_and_of_what_is_saved_whole(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, lora = FAMILIES["gpt2"]
    base, adapter = make(build(), **lora, modules_to_save=["ln_f"], bias="all")
    assert not merge.merge(str(adapter), tmp_path / "merged").failed
    same_answers(base, adapter, tmp_path / "merged", 1e-5)


def test_shards_stay_as_they_were(make: Any, make_model: Any, tmp_path: Path) -> None:
    base, adapter = make(make_model(), shard="60KB", target_modules=["q_proj"])
    merge.merge(str(adapter), tmp_path / "merged")
    names = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(names) > 2 and names == sorted(p.name for p in (tmp_path / "merged").glob("*.safetensors"))
    assert (
        json.loads((base / shards.INDEX).read_text())["weight_map"]
        == (json.loads((tmp_path / "merged" / shards.INDEX).read_text())["weight_map"])
    )
    same_answers(base, adapter, tmp_path / "merged", 1e-5)
    for name in names:
        before, after = load_file(base / name), load_file(tmp_path / "merged" / name)
        assert before.keys() == after.keys()
        assert all(("q_proj" in key) != torch.equal(before[key], after[key]) for key in before)


@pytest.mark.share(1)
@pytest.mark.parametrize("how", ["left out", "doubled", "transposed head"])
def test_a_wrong_merge_is_refused_and_nothing_is_left(
    how: str, make: Any, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = make(make_model(dtype=torch.bfloat16), target_modules=["q_proj", "down_proj"])
    right = merged_weights.merged_weights

    def wrong(*args: Any) -> dict[str, torch.Tensor]:
        weights = right(*args)
        name = "model.layers.1.self_attn.q_proj.weight"
        if how == "left out":
            del weights[name]
        elif how == "doubled":
            weights[name] = weights[name] * 1.5
        else:
            weights["lm_head.weight"] = torch.zeros(400, 32)
        return weights

    monkeypatch.setattr(merge, "merged_weights", wrong)
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    with pytest.raises(ModelError, match="is not the model with its adapter"):
        merge.merge(str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))
    assert before == {p.name: p.read_bytes() for p in adapter.iterdir()}


def test_a_text_may_part_only_where_two_tokens_are_equally_likely() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.9], [0.0, 1.0, 3.0]])
    ours = proof.Answers([[1, 2]], [logits])
    near = proof.Answers([[2, 2]], [logits + 0.01])
    (_, texts) = proof.compare_answers(ours, near, [logits + 0.03])
    assert texts.holds and texts.found == pytest.approx(0.1)
    far = proof.Answers([[1, 1]], [logits + 0.01])
    (_, texts) = proof.compare_answers(ours, far, [logits + 0.03])
    assert not texts.holds and texts.found == pytest.approx(2.0)


def test_a_layer_of_zeros_has_no_rounding() -> None:
    merged = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    torch.nn.init.zeros_(merged[0].weight)
    rows = torch.ones(4, 3)
    (line,) = proof.compare_layers(merged, {"0": (rows, torch.zeros(4, 2))}, torch.float32)
    assert line.holds and line.found == 0
    (line,) = proof.compare_layers(merged, {"0": (rows, torch.full((4, 2), 1e-30))}, torch.float32)
    assert not line.holds and line.note == "1 do not"


def test_a_layer_that_is_not_a_number_does_not_hold_and_is_the_worst() -> None:
    merged = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2, bias=False))
    rows = torch.ones(4, 3)
    wrong = rows @ merged[1].weight.detach().T + 1
    products = {"0": (rows, torch.full((4, 2), torch.nan)), "1": (rows, wrong)}
    (line,) = proof.compare_layers(merged, products, torch.float32)
    assert not line.holds and line.note == "2 do not" and line.what.endswith("the worst: 0")


@pytest.mark.nightly
def test_a_model_that_does_not_fit_into_memory_in_float32(
    make: Any, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = make(make_model(dtype=torch.bfloat16))
    monkeypatch.setattr(shards, "machine_of", lambda device: Machine("cpu", 100_000, None))
    seen = []
    monkeypatch.setattr(
        merge, "load_model", lambda m, dtype, **more: seen.append(dtype) or load_model(m, dtype=dtype, **more)
    )
    assert not merge.merge(str(adapter), tmp_path / "merged").failed
    assert seen == [torch.bfloat16] * 2
    same_answers(base, adapter, tmp_path / "merged", 3e-2)


def test_in_another_dtype(make: Any, make_model: Any, tmp_path: Path) -> None:
    _, adapter = make(make_model(dtype=torch.bfloat16))
    exact = merge.merge(str(adapter), tmp_path / "merged", dtype=torch.float32)
    assert exact.rounded < 1e-4 * exact.moved
    assert load_file(tmp_path / "merged/model.safetensors")["lm_head.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float32"


# ---- what cannot be merged


def test_an_adapter_of_another_base_is_refused(make: Any, make_model: Any, tmp_path: Path) -> None:
    _, adapter = make(make_model())
    other = tmp_path / "other"
    make_model(hidden_size=64).save_pretrained(other)
    (tmp_path / "base/tokenizer.json").rename(other / "tokenizer.json")
    (tmp_path / "base/tokenizer_config.json").rename(other / "tokenizer_config.json")
    with pytest.raises(ModelError, match=r"does not fit the model: .*size mismatch for .*lora_") as found:
        merge.merge(str(adapter), tmp_path / "merged", base=str(other))
    assert "that it was made on" in found.value.expected and not (tmp_path / "merged").exists()


def test_a_base_of_another_name_is_told(
    make: Any, make_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, adapter = make(make_model())
    merge.merge(str(adapter), tmp_path / "merged")
    assert "it was made on" not in caplog.text
    base.rename(tmp_path / "other")
    merge.merge(str(adapter), tmp_path / "again", base=str(tmp_path / "other"))
    assert f"it was made on {base}; it is used on {tmp_path / 'other'}" in caplog.text


def test_a_base_of_the_same_shapes_with_other_numbers_is_refused_where_it_is_known(
    make: Any, make_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, adapter = make(make_model())
    seal(adapter, 1, {BASE: files_hash(base.glob("*.safetensors"))})  # as a run does
    other = tmp_path / "other"
    shutil.copytree(base, other)
    merge.merge(str(adapter), tmp_path / "merged", base=str(other))
    assert "it was made on" not in caplog.text  # it is the base, whatever it is called
    weights = load_file(base / "model.safetensors")
    changed = weights | {"model.norm.weight": weights["model.norm.weight"] + 1e-3}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    for again in (
        lambda: merge.merge(str(adapter), tmp_path / "again", base=str(other)),
        lambda: build_policy(
            config := load_config(overrides={"models": [{"huggingface_id": str(other), "adapter": str(adapter)}]}),
            config.models[0],
            torch.device("cpu"),
        ),
    ):
        with pytest.raises(ModelError, match=r"another model than .*/other, one with the same tensors") as found:
            again()
        assert str(base) in str(found.value.expected)
    assert not (tmp_path / "again").exists()
    save_file({n: t.bfloat16() for n, t in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    merge.merge(str(adapter), tmp_path / "again", base=str(other))  # the same in another dtype: nothing is known
    assert "it was made on" in caplog.text


def test_the_hash_of_files_is_of_the_tensors_and_not_of_their_files(make_model: Any, tmp_path: Path) -> None:
    one, many, other = (tmp_path / name for name in ("one", "many", "other"))
    make_model().save_pretrained(one)
    make_model().save_pretrained(many, max_shard_size="60KB")
    make_model(1).save_pretrained(other)
    hashes = [files_hash(sorted(folder.glob("*.safetensors"), reverse=True)) for folder in (one, many, other)]
    assert len(list(many.glob("*.safetensors"))) > 1 and hashes[0] == hashes[1]
    assert have_other_numbers(hashes[0], hashes[2]) and not have_other_numbers(hashes[0], hashes[1])
    make_model(hidden_size=64).save_pretrained(other)
    assert not have_other_numbers(hashes[0], files_hash(other.glob("*.safetensors")))


@pytest.mark.parametrize(
    ("files", "words"),
    [(("config.yaml",), "the run has no final/ yet"), (("MANIFEST.json", "state.json"), "it is a checkpoint")],
)
def test_what_is_no_model_yet_is_told_by_each_command(
    files: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", str(tmp_path / "out")
    run.mkdir()
    for name in files:
        (run / name).write_text("{}")
    for words_of in (
        ("generate", "{}", "hi"),
        ("merge", "{}", "--output-dir", out),
        ("convert", "{}", "--to", "consolidated", "--output-dir", out),
    ):
        assert main([word.format(run) for word in words_of]) == 1
        assert words in capsys.readouterr().err, words_of
    assert not Path(out).exists()


def test_the_base_may_be_a_consolidated_folder(
    make: Any, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    base, adapter = make(make_model(), target_modules=["q_proj"])
    to_consolidated(str(base), tmp_path / "one")
    merge.merge(str(adapter), tmp_path / "merged", base=str(tmp_path / "one"))
    same_answers(base, adapter, tmp_path / "merged", 1e-5)


@pytest.mark.share(6)
@pytest.mark.parametrize(
    "what",
    [
        *("whole model", "no adapter", "base gone", "truncated", "other kind", "another rank", "unknown tensor"),
        *(
            "missing shard of the base",
            "truncated base",
            "no alpha",
            "missing tensor",
            "integers",
            "integers in the base",
        ),
    ],
)
def test_bad_adapters(what: str, make: Any, make_model: Any, tmp_path: Path) -> None:
    base, adapter = make(make_model(), shard="60KB")
    config = adapter / "adapter_config.json"
    source, words = adapter, ""
    if what == "whole model":
        source, words = base, "a whole model, without an adapter"
    elif what == "no adapter":
        config.unlink()
        words = "there is no adapter_config.json"
    elif what == "base gone":
        base.rename(tmp_path / "elsewhere")
        words = "its base is not there any more"
    elif what == "truncated":
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        words = "adapter_model.safetensors is damaged"
    elif what == "another rank":
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 8}))
        words = "it does not fit the model: .*size mismatch for .*lora_A"
    elif what == "no alpha":
        config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": None}))
        words = "lora_alpha is None"
    elif what == "missing tensor":
        weights = adapter / "adapter_model.safetensors"
        save_file(dict(sorted(load_file(weights).items())[1:]), weights)
        words = "1 of its weights are missing"
    elif what == "unknown tensor":
        weights = adapter / "adapter_model.safetensors"
        other = {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}
        save_file({**load_file(weights), **other}, weights)
        words = "1 of its weights have no place in the model, the first is base_model.model.model.layers.7"
    elif what == "integers":
        weights = adapter / "adapter_model.safetensors"
        save_file({name: tensor.int() for name, tensor in load_file(weights).items()}, weights)
        words = "lora_A.weight is in int32"
    elif what == "integers in the base":
        weights = sorted(base.glob("model-*.safetensors"))[0]
        found = {n: t.to(torch.int8) if "q_proj" in n else t for n, t in load_file(weights).items()}
        save_file(found, weights, metadata={"format": "pt"})
        words = "q_proj.weight is stored as I8, and config.json does not say how it is quantised"
    elif what == "missing shard of the base":
        gone = sorted(base.glob("model-*.safetensors"))[1]
        gone.unlink()
        words = f"{gone.name} is missing, which model.safetensors.index.json names"
    elif what == "truncated base":
        weights = sorted(base.glob("model-*.safetensors"))[1]
        weights.write_bytes(weights.read_bytes()[:-100])
        words = f"{weights.name} is damaged"
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))
        words = "it is of the kind IA3"
    with pytest.raises(ModelError, match=words) as found:
        merge.merge(str(source), tmp_path / "merged")
    assert found.value.where and found.value.fix
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))


def test_folders_in_use(make: Any, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = make(make_model())
    for taken in (base, adapter, tmp_path):
        with pytest.raises(CheckpointError, match=r"in use|is read"):
            merge.merge(str(adapter), taken)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="choose another --output-dir"):
        merge.merge(str(adapter), tmp_path / "file/merged")
    monkeypatch.setattr("strop.disk.free_bytes", lambda path: 1000)
    with pytest.raises(SaveError, match="the disk is too full"):
        merge.merge(str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_room_for_a_head_that_leaves_the_embedding_is_asked_for(
    make: Any, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied model's files have no head; merged with an adapter on it, they do."""
    base, adapter = make(make_model(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    stored = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    asked: list[int] = []
    monkeypatch.setattr(merge, "check_room", lambda target, weights: asked.append(weights))
    merge.merge(str(adapter), tmp_path / "merged")
    merged = sum(tensor.nbytes for tensor in load_file(tmp_path / "merged/model.safetensors").values())
    assert asked == [merged] and merged > stored


def test_the_command(make: Any, make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, adapter = make(make_model())
    target = tmp_path / "merged"
    assert main(["merge", str(adapter), "--output-dir", str(target), "--proof"]) == 0
    told = capsys.readouterr().out
    assert "greedy texts: 20 of 20 equal" in told and str(target) in told
    assert "greedy texts: 20 of 20 equal" in (target / "merge-proof.md").read_text()
    assert main(["merge", str(adapter), "--output-dir", str(target)]) == 1
    assert "the folder is in use" in capsys.readouterr().err
    (target / "config.json").write_text("{}")  # sealed: damage is told by whoever loads it
    assert main(["merge", str(adapter), "--output-dir", str(tmp_path / "again"), "--base", str(target)]) == 1
    assert "it is not what was written" in capsys.readouterr().err
