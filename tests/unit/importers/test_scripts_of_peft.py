"""Scripts that make their adapters and their bases in 4 bits by the classes of peft and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strop.importers import import_file

SCRIPT = """
from trl import SFTConfig, SFTTrainer
from peft import LoraConfig
rows = load_dataset("json", data_files="a.jsonl")
model = AutoModelForCausalLM.from_pretrained("m", quantization_config={base})
trainer = SFTTrainer(model=model, train_dataset=rows, args=SFTConfig(output_dir="out"), peft_config={adapter})
"""


def imported(tmp_path: Path, adapter: str, base: str = "None") -> dict[str, Any]:
    path = tmp_path / "a.py"
    path.write_text(SCRIPT.format(adapter=adapter, base=base))
    return dict(import_file(path).values)


@pytest.mark.parametrize(
    ("adapter", "rank", "alpha", "dropout"),
    [
        ("LoraConfig()", 8, 8, 0.0),
        ("LoraConfig(r=64)", 64, 8, 0.0),
        ('LoraConfig(lora_alpha=16, task_type="CAUSAL_LM")', 8, 16, 0.0),
        ("LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1)", 4, 16, 0.1),
    ],
)
def test_an_adapter_has_what_peft_gives_it(
    adapter: str, rank: int, alpha: float, dropout: float, tmp_path: Path
) -> None:
    found = imported(tmp_path, adapter)
    assert found["lora.enabled"] is True
    # what is strop's own default is not written
    assert (found.get("lora.r", 16), found["lora.lora_alpha"], found["lora.lora_dropout"]) == (rank, alpha, dropout)


def test_no_adapter_without_a_call(tmp_path: Path) -> None:
    assert imported(tmp_path, "None")["lora.enabled"] is False


def test_a_base_in_4_bits_has_what_transformers_gives_it(tmp_path: Path) -> None:
    adapter = "LoraConfig(r=4)"
    found = imported(tmp_path, adapter, "BitsAndBytesConfig(load_in_4bit=True)")
    assert (found["models.0.quant"], found["models.0.bnb_quant_type"]) == ("4bit", "fp4")
    named = imported(tmp_path, adapter, 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")')
    assert named.get("models.0.bnb_quant_type", "nf4") == "nf4"
