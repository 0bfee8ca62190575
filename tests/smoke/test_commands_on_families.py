"""Every command that takes a model, on a tiny one of each family: trained, asked, converted; merged or evaluated, and
both in make nightly."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks.tiny import write_model
from safetensors.torch import load_file

from strop.cli import main
from strop.export import merge
from strop.export.layout import FAMILIES
from strop.export.proof import PROMPTS, greedy

KINDS = (
    *("qwen3", "qwen3_moe"),
    *("llama", "mistral", "qwen2", "olmo2", "mixtral", "gemma2", "gemma3_text", "gemma4_text", "phi", "phi3", "olmo3"),
    *("smollm3", "granite", "cohere2", "starcoder2", "gpt2", "gpt_neox", "opt", "exaone4", "seed_oss", "glm4_moe"),
    *("ministral3", "gpt_oss", "qwen3_5_text", "qwen3_next", "nemotron_h", "granitemoehybrid", "falcon_h1", "lfm2"),
    *("gemma3", "deepseek_v3", "minicpm3", "bloom", "falcon", "gptj", "gpt_neo", "mpt"),
)


EVALUATED = ("qwen3_moe", "gpt2", "gemma3_text", "nemotron_h")
"""Families that `eval` is tried on in the suite: it takes twice as long as the others, for it loads two models."""


@pytest.mark.filterwarnings("ignore")  # of the architectures' own code
@pytest.mark.parametrize(
    ("kind", "then"),
    [
        pytest.param(kind, then, marks=() if (then == "eval") == (kind in EVALUATED) else pytest.mark.nightly)
        for kind in KINDS
        for then in ("merge", "eval")
    ],
)
def test_every_command_takes_it(
    kind: str, then: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "PROMPTS", PROMPTS[:3])  # of twenty, and four tokens after each of 24
    monkeypatch.setattr(merge, "greedy", partial(greedy, num_tokens=4))
    write_model(kind, tmp_path / "base")
    prompt = [{"role": "user", "content": "Sort: b a"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "a b"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
    base, rows, run, merged = (str(tmp_path / name) for name in ("base", "rows.jsonl", "out/run", "merged"))

    def strop(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    settings = ["--lora.r", "4", "--max-steps", "1", "--learning-rate", "1e-2", "--max-seq-length", "128"]
    places = ["--output-dir", str(tmp_path / "out"), "--models.0.name", "run"]
    strop("train", "--model", base, "--train-file", rows, "--method", "sft", *settings, *places)
    asked = ("Sort: b a", "--max-new-tokens", "6")
    answer, whole = strop("generate", run, *asked), base
    if then == "merge":
        strop("merge", run, "--output-dir", merged)
        assert strop("generate", merged, *asked) == answer
        whole = merged
    else:
        numbers = str(tmp_path / "numbers.json")
        strop("eval", run, base, "--data", rows, "--max-seq-length", "128", "--output", numbers)
        losses = [m["metrics"]["loss"]["value"] for m in json.loads(Path(numbers).read_text())["models"]]
        assert losses[0] < losses[1]
    one, back = str(tmp_path / "one"), str(tmp_path / "back")
    if kind not in FAMILIES:
        assert main(["convert", whole, "--to", "consolidated", "--output-dir", one]) == 1
        assert f"its family is {kind}" in capsys.readouterr().err and not Path(one).exists()
        return
    strop("convert", whole, "--to", "consolidated", "--output-dir", one)
    strop("convert", one, "--to", "hf", "--output-dir", back)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (whole, back))
    assert before.keys() == after.keys() and all(torch.equal(after[name], own) for name, own in before.items())
