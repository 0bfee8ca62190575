"""Scripts have the defaults of the classes that they use, of TRL, transformers and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strop.importers import import_file
from strop.importers.key_answers import Fate
from strop.importers.translate import Imported

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


ARGUMENTS = """
from trl import SFTConfig, SFTTrainer
rows = load_dataset("json", data_files="a.jsonl")
arguments = {arguments}
trainer = SFTTrainer("m", train_dataset=rows, args=arguments)
"""


def of_arguments(tmp_path: Path, arguments: str) -> Imported:
    path = tmp_path / "a.py"
    path.write_text(ARGUMENTS.format(arguments=arguments))
    return import_file(path)


def test_training_arguments_have_their_own_defaults(tmp_path: Path) -> None:
    found = of_arguments(tmp_path, 'TrainingArguments("out")').values
    assert (found["models.0.huggingface_id"], found["training.output_dir"]) == ("m", "out")
    assert (found["training.learning_rate"], found["training.logging_steps"]) == (5e-5, 500)
    assert "training.bf16" not in found
    found = of_arguments(tmp_path, 'SFTConfig("out")').values
    assert (found["training.learning_rate"], found["training.bf16"]) == (2e-5, True)


def test_evaluations_without_steps_are_as_often_as_logs(tmp_path: Path) -> None:
    text = 'SFTConfig("out", eval_strategy="steps", logging_steps=7{more})'
    assert of_arguments(tmp_path, text.format(more="")).values["training.eval_steps"] == 7
    assert of_arguments(tmp_path, text.format(more=", eval_steps=9")).values["training.eval_steps"] == 9


def test_no_limit_is_said_to_be_lost(tmp_path: Path) -> None:
    found = of_arguments(tmp_path, 'SFTConfig("out", max_length=None, eval_steps=None)')
    assert [entry.key for entry in found.of(Fate.LEFT)] == ["SFTConfig.max_length"]


PEFT = """
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer
rows = load_dataset("json", data_files="a.jsonl")
adapter = LoraConfig(r=4)
model = get_peft_model(AutoModelForCausalLM.from_pretrained("m"), adapter)
trainer = SFTTrainer(model, train_dataset=rows, args=SFTConfig("out"))
"""


def test_a_function_of_peft_does_not_make_a_script_of_unsloth(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(PEFT)
    found = import_file(path)
    assert found.tool == "TRL" and found.of(Fate.LEFT) == []
    assert (found.values["lora.r"], found.values["lora.lora_alpha"]) == (4, 8)
    assert "models.0.quant" not in found.values
