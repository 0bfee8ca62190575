"""transformers' folders to consolidated files and back: the same to the bit, and the published layout."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from conftest import TINY
from strop.cli import main
from strop.errors import CheckpointError, ModelError, SaveError
from strop.export import convert
from strop.export.convert import to_consolidated, to_transformers

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**TINY, rope_parameters=SCALED),
    "llama tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral": MistralConfig(**TINY, head_dim=16, sliding_window=None),
    "qwen2 with biases": Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3 with norms per head": Qwen3Config(**TINY, head_dim=16),
    "olmo2 with norms of all heads": Olmo2Config(**TINY),
}


@pytest.fixture
def save(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Callable[..., Path]:
    def made(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16, shard: str = "50GB") -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():  # norms and biases, too
            weight.data += 0.1 * torch.randn_like(weight)
        model.to(dtype).save_pretrained(tmp_path / "hf", max_shard_size=shard)
        make_tokenizer().save_pretrained(tmp_path / "hf")
        return tmp_path / "hf"

    return made


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_to_the_bit(family: str, save: Any, tmp_path: Path) -> None:
    source = save(FAMILIES[family], shard="60KB")
    for words in ([str(source), "--to", "consolidated"], [str(tmp_path / "one"), "--to", "hf"]):
        target = tmp_path / ("one" if "consolidated" in words else "back")
        assert main(["convert", *words, "--output-dir", str(target)]) == 0
    before, after = tensors(source), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    assert configs[0] == configs[1]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


# ---- the published layout, by hand


def by_hand(w: dict[str, Tensor], ids: Tensor, heads: int, key_heads: int, layers: int, theta: float) -> Tensor:
    """Logits of a Llama as its authors compute them: positions turn neighbouring numbers, as complex ones."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def turn(x: Tensor) -> Tensor:
        dim = x.shape[-1]
        angles = torch.outer(torch.arange(len(x)), theta ** -(torch.arange(0, dim, 2) / dim))
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones(()), angles)[:, None]
        return torch.view_as_real(turned).flatten(-2)

    x = w["tok_embeddings.weight"][ids]
    for i in range(layers):
        at = f"layers.{i}."
        h = norm(x, f"{at}attention_norm.weight")
        q, k, v = (h @ w[f"{at}attention.w{n}.weight"].T for n in "qkv")
        q, k, v = turn(q.view(len(ids), heads, -1)), *(y.view(len(ids), key_heads, -1) for y in (k, v))
        k = turn(k)
        k, v = (y.repeat_interleave(heads // key_heads, 1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        scores += torch.full((len(ids), len(ids)), -math.inf).triu(1)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[f"{at}attention.wo.weight"].T
        h = norm(x, f"{at}ffn_norm.weight")
        gate = torch.nn.functional.silu(h @ w[f"{at}feed_forward.w1.weight"].T)
        x = x + (gate * (h @ w[f"{at}feed_forward.w3.weight"].T)) @ w[f"{at}feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ w["output.weight"].T


def published(num_files: int = 1, tied: bool = False) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """A model made by hand in the published layout, cut for so many GPUs; and whole."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) * 0.2

    whole = {"tok_embeddings.weight": draw(96, 32), "norm.weight": 1 + draw(32)}
    whole["output.weight"] = whole["tok_embeddings.weight"].clone() if tied else draw(96, 32)
    for i in range(2):
        sizes = {"attention.wq": (32, 32), "attention.wk": (16, 32), "attention.wv": (16, 32), "attention.wo": (32, 32)}
        sizes |= {"feed_forward.w1": (48, 32), "feed_forward.w2": (32, 48), "feed_forward.w3": (48, 32)}
        whole |= {f"layers.{i}.{name}.weight": draw(*shape) for name, shape in sizes.items()}
        whole |= {f"layers.{i}.{name}.weight": 1 + draw(32) for name in ("attention_norm", "ffn_norm")}

    def part(name: str, tensor: Tensor, at: int) -> Tensor:
        if "norm" in name:
            return tensor.clone()
        return tensor.chunk(num_files, 1 if ".wo." in name or ".w2." in name else 0)[at].clone()

    files = [{name: part(name, tensor, i) for name, tensor in whole.items()} for i in range(num_files)]
    return files, whole


def write(folder: Path, files: list[dict[str, Any]], **params: Any) -> Path:
    folder.mkdir()
    for number, content in enumerate(files):
        torch.save(content, folder / f"consolidated.{number:02d}.pth")
    known = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "norm_eps": 1e-5}
    text = {**known, "multiple_of": 16, "ffn_dim_multiplier": 1.3, "rope_theta": 10000.0, **params}
    (folder / "params.json").write_text(json.dumps(text))
    return folder


@pytest.mark.parametrize("num_files", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_a_published_file_gives_the_logits_of_its_authors(num_files: int, tied: bool, tmp_path: Path) -> None:
    files, whole = published(num_files, tied)
    to_transformers(str(write(tmp_path / "meta", files)), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(0, 96, (17,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(ids[None]).logits[0]
    torch.testing.assert_close(found, by_hand(whole, ids, 4, 2, 2, 10000.0), rtol=1e-4, atol=1e-5)
    assert model.config.tie_word_embeddings is tied and model.config.intermediate_size == 48
    to_consolidated(str(tmp_path / "hf"), tmp_path / "again")
    again = torch.load(tmp_path / "again/consolidated.00.pth", weights_only=True)
    assert again.keys() == whole.keys() and all(torch.equal(again[n], whole[n]) for n in whole)


def test_stretched_positions_follow_from_the_keys(tmp_path: Path) -> None:
    files, _ = published()
    to_transformers(str(write(tmp_path / "meta", files, use_scaled_rope=True, rope_theta=5e5)), tmp_path / "hf")
    rope = json.loads((tmp_path / "hf/config.json").read_text())["rope_parameters"]
    assert rope == {**SCALED, "factor": 32.0}  # as wide as Llama 3.2 at most


def test_shards(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(FAMILIES["llama"])
    monkeypatch.setattr(convert, "SHARD_BYTES", 30_000)
    to_consolidated(str(source), tmp_path / "one")
    to_transformers(str(tmp_path / "one"), tmp_path / "back")
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    plain, back = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "back"))
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in plain.state_dict().items())


CONVERTS = """
import sys
from pathlib import Path

from strop.export.convert import to_consolidated, to_transformers

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

for source, there, back in (sys.argv[1:4], sys.argv[4:7]):  # the first imports what is needed
    before, peaks = kib("VmRSS"), []
    for convert, one, two in ((to_consolidated, source, there), (to_transformers, there, back)):
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        convert(one, Path(two))
        peaks.append(kib("VmHWM") - before)
print(*peaks)
"""


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads and resets the peak in /proc")
def test_no_more_than_a_shard_is_in_memory(save: Any, tmp_path: Path) -> None:
    """Files that are mapped count, too."""
    folders = []
    for name, config in (
        ("small", FAMILIES["llama"]),
        ("large", LlamaConfig(**{**TINY, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8})),
    ):
        save(config, shard="64MB").rename(tmp_path / name)
        folders += [str(tmp_path / f"{name}{part}") for part in ("", "-one", "-back")]
    command = [sys.executable, "-c", CONVERTS, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    there, back = (1024 * int(number) for number in done.stdout.split())
    shards = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    assert len(shards) >= 4 and there < 1.3 * max(shards)
    assert back < 1.3 * (tmp_path / "large-one/consolidated.00.pth").stat().st_size


# ---- what is refused


class Evil:
    """Code in a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("code", "consolidated.00.pth is not read"),
        ("no tensors", "it holds something else"),
        ("truncated", "consolidated.00.pth is not read"),
        ("missing file", "there is no consolidated.01.pth"),
        ("missing last file", "self_attn.k_proj.weight|rows"),
        ("no params", "there is no params.json"),
        ("another tensor", "a tensor layers.0.attention.wz.weight"),
        ("missing tensor", "model.norm.weight: absent"),
        ("wrong heads", "as the configuration says"),
        ("no folder", "there is no such folder"),
    ],
)
def test_bad_folders(how: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files: list[Any] = published(3 if how == "missing file" else 2 if how == "missing last file" else 1)[0]
    if how == "code":
        files[0]["norm.weight"] = Evil()
    elif how == "no tensors":
        files[0] = [1, 2]
    elif how == "another tensor":
        files[0]["layers.0.attention.wz.weight"] = torch.zeros(2)
    elif how == "missing tensor":
        del files[0]["norm.weight"]
    folder = write(tmp_path / "meta", files, **({"n_heads": 16} if how == "wrong heads" else {}))
    if how == "truncated":
        file = folder / "consolidated.00.pth"
        file.write_bytes(file.read_bytes()[:-300])
    elif how == "missing file" or how == "missing last file":
        (folder / "consolidated.01.pth").unlink()
    elif how == "no params":
        (folder / "params.json").unlink()
    source = tmp_path / "gone" if how == "no folder" else folder
    with pytest.raises(ModelError, match=words) as refused:
        to_transformers(str(source), tmp_path / "hf")
    assert refused.value.fix and "weights_only" not in str(refused.value)  # torch advises to run the code
    assert not (tmp_path / "hf").exists() and not (tmp_path / "evil-was-here").exists()
    assert not list(tmp_path.glob(".*"))


def test_other_families_and_places(save: Any, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(FAMILIES["llama"])
    with pytest.raises(CheckpointError, match=r"in use|is read"):
        to_consolidated(str(source), source)
    with monkeypatch.context() as patch:
        patch.setattr("strop.disk.free_bytes", lambda path: 1000)
        with pytest.raises(SaveError, match="the disk is too full"):
            to_consolidated(str(source), tmp_path / "one")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(source)}))
    (tmp_path / "adapter/adapter_model.safetensors").touch()
    with pytest.raises(ModelError, match="it is an adapter") as refused:
        to_consolidated(str(tmp_path / "adapter"), tmp_path / "one")
    assert "strop merge" in refused.value.fix
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "cohere"}))
    with pytest.raises(ModelError, match="its family is cohere"):
        to_consolidated(str(source), tmp_path / "one")
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(ModelError, match="its weights are quantised"):
        to_consolidated(str(source), tmp_path / "one")
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"down_proj\.weight"):
        to_consolidated(str(source), tmp_path / "one")
    assert not (tmp_path / "one").exists()
