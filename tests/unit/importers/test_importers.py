"""Files of other tools become configurations of strop: nothing is lost, and the values are those the tool would use.

The tables are written from the documentation and examples of the tools.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strop.cli import main
from strop.config import RunConfig, load_config
from strop.config.other_tools import RENAMED
from strop.config.schema import KEYS
from strop.config.yamlfile import parse, write_value
from strop.errors import ConfigError
from strop.importers import import_file, to_text, transformers_trainer
from strop.importers.foreign_file import leaves, read
from strop.importers.key_answers import Fate, KeyAnswer, View
from strop.importers.tools import TOOLS
from strop.importers.translate import PREFIXES
from strop.preflight import check

PAIRS = [{"prompt": f"q {i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
ALPACA = [{"instruction": f"q {i}", "input": "", "output": "yes"} for i in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "y"}]} for i in range(12)
]
LABELLED = [{"prompt": f"q {i}", "completion": "yes", "label": i % 2 == 0} for i in range(12)]
SHAREGPT = [
    {
        "conversations": [{"from": "human", "value": f"q {i}"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    for i in range(12)
]
INFO = {
    "pairs": {
        "file_name": "sharegpt.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "identity": {"file_name": "alpaca.json"},
    "more": {"file_name": "alpaca.json", "num_samples": 5},
    "labelled": {
        "file_name": "kto.jsonl",
        "columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"},
    },
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows in the shapes that the examples name."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for name, rows in (("pairs", PAIRS), ("chats", CHATS), ("kto", LABELLED), ("prompts", ALPACA)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "alpaca.json").write_text(json.dumps(ALPACA))
    (data / "sharegpt.json").write_text(json.dumps(SHAREGPT))
    (data / "dataset_info.json").write_text(json.dumps(INFO))
    return tmp_path


LF_DPO = """
model_name_or_path: MODEL
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
dataset: pairs
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/dpo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
LF_SFT = """
model_name_or_path: MODEL
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: identity,more
template: qwen3
cutoff_len: 1024
output_dir: saves/sft
per_device_train_batch_size: 1
learning_rate: 1.0e-4
val_size: 0.1
eval_strategy: steps
eval_steps: 500
bf16: true
"""
LF_KTO = """
model_name_or_path: MODEL
stage: kto
finetuning_type: full
dataset: labelled
pref_beta: 0.2
kto_chosen_weight: 2.0
output_dir: saves/kto
learning_rate: 5e-6
fp16: true
"""
AXOLOTL_SFT = """
base_model: MODEL
load_in_8bit: false
load_in_4bit: false
strict: false
datasets:
  - path: data/alpaca.json
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_fan_in_fan_out:
lora_target_modules:
  - gate_proj
  - q_proj
wandb_project: mine
wandb_name: first
wandb_entity:
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
early_stopping_patience:
logging_steps: 1
flash_attention: true
loss_watchdog_threshold: 5.0
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""
AXOLOTL_DPO = """
base_model: MODEL
model_type: LlamaForCausalLM
special_tokens:
  pad_token: <|finetune_right_pad_id|>
  eos_token: <|eot_id|>
chat_template: llama3
rl: dpo
datasets:
  - path: data/pairs.jsonl
    type: chat_template.default
    field_messages: conversation
    field_chosen: chosen
    field_rejected: rejected
    message_property_mappings:
      role: role
      content: content
    roles:
      user: [user]
val_set_size: 0.05
output_dir: ./outputs/lora-out
sequence_len: 4096
sample_packing: false
adapter: lora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
learning_rate: 0.0002
logging_steps: 1
"""
AXOLOTL_GRPO = """
base_model: MODEL
rl: grpo
trl:
  beta: 0.0
  use_vllm: false
  num_generations: 4
  max_completion_length: 64
  reward_funcs: [my_rewards.exact]
  reward_weights: [2.0]
datasets:
  - path: data/prompts.jsonl
adapter: lora
lora_r: 8
lora_alpha: 16
micro_batch_size: 8
gradient_accumulation_steps: 4
learning_rate: 1e-5
optimizer: adamw_torch_fused
lr_scheduler: constant_with_warmup
output_dir: ./out
"""
TRL_DPO = """
model_name_or_path: MODEL
dataset_name: data/pairs.jsonl
learning_rate: 5.0e-6
num_train_epochs: 1
per_device_train_batch_size: 2
max_steps: 1000
gradient_accumulation_steps: 8
eval_strategy: steps
eval_steps: 50
output_dir: Qwen2-0.5B-DPO
no_remove_unused_columns: true
use_peft: true
lora_r: 32
lora_alpha: 16
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.2]
precompute_ref_log_probs: true
report_to: [clearml]
push_to_hub: false
hub_model_id: me/model
"""
TRL_SFT = """
model_name_or_path: MODEL
dataset_name: data/chats.jsonl
learning_rate: 2.0e-5
num_train_epochs: 1
packing: true
max_length: 2048
gradient_checkpointing: true
assistant_only_loss: false
eos_token: "<|im_end|>"
output_dir: Qwen2-0.5B-SFT
"""
TRL_GRPO = """
model_name_or_path: MODEL
dataset_name: data/prompts.jsonl
num_generations: 8
max_completion_length: 256
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
reward_funcs: [think_format_reward, get_soft_overlong_punishment]
reward_weights: [1.0, 0.5]
loss_type: dr_grpo
scale_rewards: none
use_vllm: true
vllm_mode: colocate
output_dir: grpo
"""
TRL_PYTHON = """
from trl import KTOConfig, KTOTrainer
from peft import LoraConfig
from datasets import load_dataset
import os
os.system("touch ran")
rate = 5e-7
train = load_dataset("json", data_files="data/kto.jsonl", split="train")
args = KTOConfig(output_dir="kto", learning_rate=rate, beta=0.3, desirable_weight=1.33, warmup_steps=0.1)
trainer = KTOTrainer(model="MODEL", args=args, train_dataset=train, peft_config=LoraConfig(
    r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
trainer.train()
"""
UNSLOTH = """
from unsloth import FastLanguageModel, is_bfloat16_supported
from trl import SFTTrainer, SFTConfig
max_seq_length = 2048
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="MODEL", max_seq_length=max_seq_length, dtype=None, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(
    model, r=16, target_modules=["q_proj", "k_proj"], lora_alpha=16, lora_dropout=0, bias="none",
    use_gradient_checkpointing="unsloth", random_state=3407, use_rslora=False, loftq_config=None)
dataset = load_dataset("json", data_files={"train": "data/alpaca.json"}, split="train")
trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=dataset, args=SFTConfig(
    per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=5, max_steps=60, learning_rate=2e-4,
    fp16=not is_bfloat16_supported(), bf16=is_bfloat16_supported(), logging_steps=1, optim="adamw_8bit",
    weight_decay=0.01, lr_scheduler_type="linear", seed=3407, output_dir="outputs", report_to="none"))
"""
OPENSLOTH = """
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig, TrainingArguments, DPOArgs
opensloth_config = OpenSlothConfig(
    data_cache_path='data/pairs.jsonl', devices=[0], training_type="dpo",
    fast_model_args=FastModelArgs(model_name='MODEL', max_seq_length=2048, load_in_4bit=True),
    lora_args=LoraArgs(r=64, lora_alpha=64, target_modules=['q_proj', 'o_proj'], lora_dropout=0.0),
    dpo_args=DPOArgs(beta=0.1, max_length=1024, max_prompt_length=512), sequence_packing=False)
training_config = TrainingArguments(
    output_dir='outputs/dpo_training', per_device_train_batch_size=2, learning_rate=5e-6, num_train_epochs=3,
    warmup_ratio=0.1, optim="adamw_8bit")
"""
CASES: dict[str, tuple[str, str, str, dict[str, Any], tuple[str, ...]]] = {
    "llamafactory-dpo": (
        "llamafactory",
        "a.yaml",
        LF_DPO,
        {
            "post_training.method": "dpo",
            "post_training.loss_type": "sigmoid",
            "post_training.beta": 0.1,
            "lora.enabled": True,
            "lora.r": 8,
            "lora.lora_alpha": 16,
            "lora.lora_dropout": 0.0,
            "lora.target_modules": "all-linear",
            "dataset.template": "llama3_instruct",
            "dataset.train_file": "data/sharegpt.json",
            "dataset.validation_split": 0.0,
            "training.max_seq_length": 2048,
            "training.max_prompt_length": None,
            "training.num_epochs": 3,
            "training.lr_scheduler": "cosine",
            "training.warmup_ratio": 0.1,
            "training.bf16": True,
            "training.per_device_train_batch_size": 1,
            "training.optim": "adamw_torch_fused",
            "finetuning.load_best_model_at_end": False,
        },
        ("ddp_timeout",),
    ),
    "llamafactory-sft": (
        "llamafactory",
        "a.yml",
        LF_SFT,
        {
            "post_training.method": "sft",
            "lora.r": 8,
            "lora.lora_alpha": 16,
            "lora.target_modules": ("q_proj", "v_proj"),
            "dataset.validation_split": 0.1,
            "training.eval_steps": 500,
            "training.gradient_accumulation_steps": 1,
            "training.num_epochs": 3,
            "training.warmup_steps": 0,
            "training.warmup_ratio": None,
            "training.logging_steps": 500,
            "training.max_completion_length": None,
        },
        ("template",),
    ),
    "llamafactory-kto": (
        "llamafactory",
        "a.yaml",
        LF_KTO,
        {
            "post_training.method": "kto",
            "post_training.beta": 0.2,
            "post_training.desirable_weight": 2.0,
            "lora.enabled": False,
            "training.fp16": True,
            "training.max_seq_length": 2048,
            "training.per_device_train_batch_size": 8,
        },
        (),
    ),
    "llamafactory-rm": (
        "llamafactory",
        "a.yaml",
        "model_name_or_path: MODEL\nstage: rm\nfinetuning_type: full\ndataset: pairs\n"
        "template: qwen\noptim: paged_adamw\n",
        {
            "post_training.method": "reward",
            "training.learning_rate": 5e-5,
            "training.optim": "paged_adamw_32bit",
            "dataset.template": "qwen2.5_instruct",
        },
        (),
    ),
    "axolotl-sft": (
        "axolotl",
        "a.yml",
        AXOLOTL_SFT,
        {
            "post_training.method": "sft",
            "dataset.train_file": "data/alpaca.json",
            "dataset.validation_split": 0.1,
            "dataset.filter_overlength_samples": True,
            "training.packing": True,
            "logging.report_to": ("wandb",),
            "logging.wandb_project": "mine",
            "logging.run_name": "first",
            "training.auto_precision": True,
            "training.optim": "adamw_8bit",
            "training.warmup_steps": 10,
            "training.max_seq_length": 2048,
            "training.save_total_limit": 4,
            "training.per_device_eval_batch_size": 2,
            "lora.target_modules": ("gate_proj", "q_proj"),
            "lora.lora_dropout": 0.05,
            "training.gradient_checkpointing": True,
        },
        ("evals_per_epoch", "loss_watchdog_threshold", "saves_per_epoch"),
    ),
    "axolotl-dpo": (
        "axolotl",
        "a.yaml",
        AXOLOTL_DPO,
        {
            "post_training.method": "dpo",
            "post_training.beta": 0.1,
            "lora.target_modules": "all-linear",
            "lora.lora_dropout": 0.0,
            "training.lr_scheduler": "cosine",
            "training.warmup_ratio": 0.03,
            "training.num_epochs": 4,
            "dataset.template": "llama3_instruct",
        },
        (
            "datasets.0.field_messages",
            "datasets.0.message_property_mappings.content",
            "datasets.0.message_property_mappings.role",
            "datasets.0.roles.user",
        ),
    ),
    "axolotl-grpo": (
        "axolotl",
        "a.yaml",
        AXOLOTL_GRPO,
        {
            "post_training.method": "grpo",
            "post_training.advantage": "group",
            "post_training.aggregation": "token",
            "post_training.epsilon": 0.2,
            "post_training.epsilon_high": 0.2,
            "rollout.num_generations": 4,
            "training.groups_per_step": 8,
            "training.max_completion_length": 64,
            "training.lr_scheduler": "constant",
        },
        (),
    ),
    "trl-dpo": (
        "trl",
        "a.yaml",
        TRL_DPO,
        {
            "post_training.method": "dpo",
            "post_training.loss_type": "sigmoid",
            "post_training.sft_weight": 0.2,
            "training.learning_rate": 5e-6,
            "training.max_steps": 1000,
            "training.eval_steps": 50,
            "training.eval_at_start": False,
            "training.max_seq_length": 1024,
            "training.bf16": True,
            "lora.r": 32,
            "lora.lora_alpha": 16,
            "lora.lora_dropout": 0.05,
            "lora.target_modules": ("q_proj", "v_proj"),
            "training.warmup_steps": 0,
        },
        ("no_remove_unused_columns", "report_to"),
    ),
    "trl-sft": (
        "trl",
        "a.yaml",
        TRL_SFT,
        {
            "post_training.method": "sft",
            "training.packing": True,
            "training.max_seq_length": 2048,
            "training.per_device_train_batch_size": 8,
            "training.gradient_accumulation_steps": 1,
            "dataset.validation_split": 0.0,
            "lora.enabled": False,
        },
        ("assistant_only_loss", "eos_token"),
    ),
    "trl-gdpo": (
        "trl",
        "a.yaml",
        TRL_GRPO + "multi_objective_aggregation: normalize_then_sum\nentropy_coef: 0.01\n",
        {
            "post_training.advantage": "gdpo",
            "post_training.aggregation": "constant",
            "post_training.entropy_coef": 0.01,
        },
        ("use_vllm", "vllm_mode"),
    ),
    "trl-grpo": (
        "trl",
        "a.yaml",
        TRL_GRPO,
        {
            "post_training.method": "grpo",
            "post_training.advantage": "mean",
            "post_training.aggregation": "constant",
            "post_training.normalizer_length": 256,
            "rollout.num_generations": 8,
            "training.groups_per_step": 2,
            "training.learning_rate": 1e-6,
        },
        ("use_vllm", "vllm_mode"),
    ),
    "trl-python": (
        "trl",
        "a.py",
        TRL_PYTHON,
        {
            "post_training.method": "kto",
            "post_training.beta": 0.3,
            "post_training.desirable_weight": 1.33,
            "training.learning_rate": 5e-7,
            "training.warmup_ratio": 0.1,
            "lora.r": 4,
            "lora.target_modules": "all-linear",
            "dataset.train_file": "data/kto.jsonl",
        },
        (),
    ),
    "unsloth": (
        "unsloth",
        "a.py",
        UNSLOTH,
        {
            "post_training.method": "sft",
            "models.0.quant": "none",
            "lora.r": 16,
            "lora.lora_dropout": 0.0,
            "lora.target_modules": ("q_proj", "k_proj"),
            "training.max_steps": 60,
            "training.auto_precision": True,
            "training.gradient_checkpointing": True,
            "training.max_seq_length": 2048,
            "seed": 3407,
        },
        (),
    ),
    "opensloth": (
        "opensloth",
        "a.py",
        OPENSLOTH,
        {
            "post_training.method": "dpo",
            "post_training.beta": 0.1,
            "models.0.quant": "4bit",
            "lora.r": 64,
            "training.max_seq_length": 1024,
            "training.max_prompt_length": 512,
            "training.gradient_accumulation_steps": 4,
            "training.weight_decay": 0.01,
            "training.warmup_steps": 10,
            "training.save_total_limit": 2,
        },
        (),
    ),
}


def value_of(config: RunConfig, key: str) -> Any:
    return next(value for name, value, _ in config.leaves() if name == key)


@pytest.mark.parametrize("case", CASES)
def test_an_example_of_the_tool(case: str, place: Path, model_dir: Path) -> None:
    """It is recognised, every key is in one list, and the values are those of the tool; what is lost is named."""
    tool, name, text, expected, lost = CASES[case]
    file = place / name
    model = str(model_dir).replace("'", r"\'") if name.endswith(".py") else str(model_dir)
    file.write_text(text.replace("MODEL", model))
    found = import_file(file)
    assert found.tool == TOOLS[tool].title
    assert [e.key for e in found.of(Fate.LEFT)] == sorted(lost, key=[e.key for e in found.entries].index)
    assert all(entry.answer.why for entry in found.of(Fate.LEFT))
    written = place / "strop.yaml"
    written.write_text(to_text(found))
    config = load_config(written)
    assert {key: value_of(config, key) for key in expected} == expected
    if tool != "opensloth":  # bitsandbytes may not be there
        check(config, needs_weights=False)
    assert not (place / "ran").exists()
    for entry in found.of(Fate.LEFT):
        assert entry.key in written.read_text()


@pytest.mark.parametrize(
    "case",
    [
        "llamafactory-dpo",
        "unsloth",
        *(pytest.param(case, marks=pytest.mark.nightly) for case in ("llamafactory-kto", "axolotl-sft", "trl-python")),
    ],
)
def test_what_is_written_dry_runs(
    case: str, place: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, name, text, _, _ = CASES[case]
    (place / name).write_text(text.replace("MODEL", str(model_dir)))
    assert main(["import", name, "--output", "my run.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "not carried over" in shown and "next: strop train --config 'my run.yaml' --dry-run" in shown
    line = ["train", "--config", "my run.yaml", "--dry-run", "--no-time", "--optim", "adamw_torch"]
    assert main(line) == 0, capsys.readouterr().err
    assert "nothing was trained" in capsys.readouterr().out


# ---- nothing is lost

NAMES = sorted({name for tool in TOOLS.values() for name in tool.rules} | set(RENAMED))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 4000),
    st.floats(0, 2, allow_subnormal=False),
    st.sampled_from(["no", "steps", "epoch", "linear", "5e-6", "a,b", "none", "\0", "sk-" + "a" * 48, "ü"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "path", "type", "beta"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.mark.share(2)
@pytest.mark.parametrize("tool", TOOLS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.dictionaries(
        st.one_of(st.sampled_from(NAMES), st.text(min_size=1, max_size=8)), VALUES, min_size=1, max_size=12
    )
)
def test_every_key_is_in_one_of_the_lists(tool: str, data: dict[str, Any], tmp_path: Path) -> None:
    """Or the file is refused by one message."""
    file = tmp_path / "x.json"
    file.write_text(json.dumps(data))
    overrides = {
        "models.0.huggingface_id": "org/model",
        "dataset.train_file": "rows.jsonl",
        "post_training.method": "dpo",
    }
    try:
        found = import_file(file, tool, overrides)
    except ConfigError as error:
        assert str(error)
        return
    keys = [path for path, _ in leaves(data)]
    assert all(entry.answer.why for entry in found.of(Fate.LEFT))
    assert len(found.entries) == len(keys) == sum(len(found.of(fate)) for fate in Fate)
    text = to_text(found)
    assert "sk-" + "a" * 48 not in text
    assert parse(text.encode(), "x").data["post_training"]["method"] == "dpo"


def test_names_mean_the_same_in_hints_and_in_files() -> None:
    """A name that the hint of a wrong key leads to a key of strop is not answered with another key."""
    samples: tuple[Any, ...] = (True, 4, 0.2, "steps", "lora", "a", ["a"], "linear", "alpha_divergence", 512)
    checked = 0
    for name, tool in TOOLS.items():
        for method in ("dpo", "kto", "grpo", "sft"):
            view = View(name, {"sync_ref_model": True, "eval_strategy": "steps"}, {}, method, Path())
            for key in RENAMED.keys() & tool.rules.keys():
                for value in samples:
                    try:
                        answer = tool.rules[key](value, view)
                    except ConfigError:
                        continue
                    if isinstance(answer, KeyAnswer) and answer.fate is Fate.CARRIED and answer.values:
                        assert list(answer.values) == [RENAMED[key].replace(".N.", ".0.")], (name, key)
                        checked += 1
    assert checked > 100
    keys = {key.dotted for key in KEYS}
    assert set(RENAMED.values()) <= keys


# ---- bad files


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", "a: 1\nb: 2\nc: 3\n", "none of the tools"),
        ("a.yaml", "models:\n  - huggingface_id: org/a\n", "a configuration of strop already"),
        ("a.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "anchor"),
        ("a.yaml", "x: !!python/object/apply:os.system ['touch ran']\n", "tag"),
        ("a.yaml", b"\0" * 9, "NUL"),
        ("a.yaml", b"a: 1\n" * (20 << 10) * 3, "larger than"),
        ("a.json", "[1]", "no names"),
        ("a.json", "{" * 5, "not valid JSON"),
        ("a.json", '{"a": ' * 40_000, "levels of nesting"),
        ("a.json", '{"beta": 1, "beta": 2}', "given twice"),
        ("a.py", "import os\nos.system('touch ran')\n", "nothing in this Python file"),
        ("a.py", "DPOConfig(", "not valid Python"),
        ("a.py", "DPOConfig(beta=" + "(" * 3000 + ")" * 3000 + ")", "not valid Python"),
        ("a.py", "DPOConfig(beta=__import__('os').system('touch ran'))\n", "names no model"),
        ("a.yaml", "stage: ppo\nmodel_name_or_path: a\ncutoff_len: 5\n", "stage is 'ppo'"),
        ("a.yaml", "rl: gdpo\nbase_model: a\nsequence_len: 5\n", "rl is 'gdpo'"),
        ("a.yaml", "model_name_or_path: a\nlearning_rate: 1\nmax_length: 5\ndataset_name: a\n", "which method"),
        ("a.yaml", "stage: sft\nmodel_name_or_path: a\ndataset: nothing\n", "names no data"),
    ],
)
def test_a_bad_file_gets_one_message(
    name: str,
    content: str | bytes,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["import", name]) == 1
    error = capsys.readouterr().err
    assert words in error and name in error and len(error) < 1000 and "Traceback" not in error
    assert not Path("ran").exists() and not Path("strop.yaml").exists()


def test_100_mb_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        read(tmp_path / "a.yaml")


def test_what_is_given_beside_the_file_wins(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "a.json").write_text(
        json.dumps({"learning_rate": 1e-3, "beta": 0.5, "ld_alpha": 0.5, "use_weighting": True})
    )
    line = ["import", "a.json", "--from", "trl", "--model", "org/m", "--train-file", "data/pairs.jsonl"]
    assert main([*line, "--learning-rate", "1e-6"]) == 0
    config = load_config("strop.yaml")
    assert config.training.learning_rate == 1e-6 and config.post_training.method == "dpo"
    assert "another value is given beside the file" in capsys.readouterr().out
    assert main(line) == 1 and "there is a file of this name" in capsys.readouterr().err


def lost_of(text: str, name: str, tool: str | None, folder: Path, **beside: Any) -> tuple[Any, dict[str, str]]:
    """What is read, and why keys are not carried over."""
    (folder / name).write_text(text)
    found = import_file(folder / name, tool, {key.replace("__", "."): value for key, value in beside.items()})
    return found, {entry.key: entry.answer.why for entry in found.of(Fate.LEFT)}


def test_families_of_names_have_a_reason() -> None:
    assert all(PREFIXES.values())


@pytest.mark.parametrize("field", ["", "    field_messages: turns\n", "    field_messages: messages\n"])
def test_pairs_of_axolotl_with_turns_in_a_column_that_strop_does_not_read(field: str, tmp_path: Path) -> None:
    text = f"base_model: a\nrl: dpo\nsequence_len: 9\ndatasets:\n  - path: a/b\n    type: chat_template\n{field}"
    _, lost = lost_of(text, "a.yaml", "axolotl", tmp_path)
    (why,) = (why for key, why in lost.items() if key.startswith("datasets"))
    assert "from the column conversations: rename it" in why
    read_there = text.replace(field, "") + "    field_messages: conversations\n"
    assert not [key for key in lost_of(read_there, "b.yaml", "axolotl", tmp_path)[1] if key.startswith("datasets")]


def test_code_in_the_place_of_a_value_says_how_to_give_the_value(tmp_path: Path) -> None:
    text = "from trl import DPOConfig\nLR = 1e-6\nDPOConfig(learning_rate=LR * 2, model_name_or_path='a', r=f(8))\n"
    _, lost = lost_of(text, "a.py", None, tmp_path, dataset__train_file="x.jsonl")
    assert "give its value beside the file, --learning-rate VALUE" in lost["DPOConfig.learning_rate"]
    assert "--r VALUE" in lost["DPOConfig.r"]


@pytest.mark.parametrize(
    ("given", "kept", "code"),
    [
        ("[rew, 'some/rm']", ["model:some/rm"], "rew"),
        ("['some/rm', lambda x: [1], m.rew]", ["model:some/rm"], "lambda x: [1], m.rew"),
        ("['some/rm', 'mod.rew']", ["model:some/rm", "mod:rew"], ""),
        ("'some/rm'", ["model:some/rm"], ""),
    ],
)
def test_rewards_of_a_script_are_mapped_one_by_one(given: str, kept: list[str], code: str, tmp_path: Path) -> None:
    text = f"from trl import GRPOTrainer\nt = GRPOTrainer(model='a', reward_funcs={given})\n"
    found, lost = lost_of(text, "a.py", None, tmp_path, dataset__train_file="x.jsonl")
    assert [reward["name"] for reward in found.values["rewards"]] == kept
    assert ("GRPOTrainer.reward_funcs" in lost) == bool(code)
    assert not code or lost["GRPOTrainer.reward_funcs"].startswith(f"{code} is code")


SCRIPT = (
    "from trl import GRPOConfig, GRPOTrainer\n"
    "c = GRPOConfig({})\n"
    "t = GRPOTrainer(model='a', reward_funcs=['m.f', 'o/rm'])\n"
)


@pytest.mark.parametrize(
    ("given", "weights", "carried"),
    [
        ("reward_weights=[0.5, 0]", [0.5, 0.0], True),
        ("reward_weights=[1.0, 2]", [1.0, 2.0], True),
        ("reward_weights=[0.5]", [1.0, 1.0], False),
        ("reward_weights=W * 2", [1.0, 1.0], False),
        ("reward_weights=[0.5, 'x']", [1.0, 1.0], False),
    ],
)
def test_weights_of_rewards_are_carried_over_or_said_to_be_lost(
    given: str, weights: list[float], carried: bool, tmp_path: Path
) -> None:
    found, lost = lost_of(SCRIPT.format(given), "a.py", None, tmp_path, dataset__train_file="x.jsonl")
    assert [reward.get("weight", 1.0) for reward in found.values["rewards"]] == weights
    assert ("GRPOConfig.reward_weights" not in lost) == carried


def test_a_reward_model_alone_has_its_weight(tmp_path: Path) -> None:
    text = "model_name_or_path: a\nreward_model_name_or_path: o/rm\nreward_weights: [2.0]\nnum_generations: 4\n"
    found, lost = lost_of(text, "a.yaml", "trl", tmp_path, dataset__train_file="x.jsonl")
    assert found.values["rewards"] == [{"name": "model:o/rm", "weight": 2.0}] and not lost


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ("steps_per_generation=4", 1),
        ("steps_per_generation=2", 1),
        ("steps_per_generation=16", 4),
        ("steps_per_generation=6", None),
        ("generation_batch_size=32", 1),
        ("generation_batch_size=64", 2),
        ("generation_batch_size=20", None),
    ],
)
def test_several_steps_of_one_sampling_are_so_many_here(given: str, steps: int | None, tmp_path: Path) -> None:
    """TRL counts micro-batches, or completions of these, and strop optimizer steps."""
    given += ", per_device_train_batch_size=8, gradient_accumulation_steps=4"
    found, lost = lost_of(SCRIPT.format(given), "a.py", None, tmp_path, dataset__train_file="x.jsonl")
    assert found.values.get("rollout.steps_per_generation", 1) == (steps or 1)
    assert bool(lost) == (steps is None)


def test_a_server_that_samples_for_axolotl_gets_the_adapter_that_stands_beside_its_block(tmp_path: Path) -> None:
    block = "trl: {use_vllm: true, vllm_mode: server, vllm_server_host: h, reward_funcs: [m.f]}\n"
    for text, lost_keys in (
        ("adapter: lora\n", set()),
        ("adapter: lora\npeft_use_dora: true\n", {"trl.use_vllm", "trl.vllm_mode"}),
        ("", {"trl.use_vllm", "trl.vllm_mode"}),
    ):
        text = f"base_model: a\nrl: grpo\n{text}{block}"
        found, lost = lost_of(text, "a.yaml", "axolotl", tmp_path, dataset__train_file="x.jsonl")
        assert lost.keys() == lost_keys
        samples = {key: found.values.get(key) for key in ("rollout.sampler", "post_training.sampler_correction")}
        assert list(samples.values()) == ([None, None] if lost_keys else ["vllm", "sequence_mask"])


@pytest.mark.parametrize(
    ("bounds", "high"),
    [
        ("epsilon_high: 5.0\n", 4.0),
        ("epsilon: 5.0\n", 4.0),
        ("epsilon: 0.2\nepsilon_high: 5.0\n", 4.0),
        ("epsilon: 5.0\nepsilon_high: 0.2\n", None),
        ("", None),
    ],
)
def test_the_bound_of_cispo_is_epsilon_where_no_other_is_given(bounds: str, high: float | None, tmp_path: Path) -> None:
    text = f"model_name_or_path: a\nloss_type: cispo\nnum_generations: 4\nreward_funcs: [m.f]\n{bounds}"
    found, lost = lost_of(text, "a.yaml", "trl", tmp_path, dataset__train_file="x.jsonl")
    assert found.values.get("post_training.epsilon_high") == high
    assert bool(lost) == (high is None and bool(bounds))


@pytest.mark.parametrize("loss", ["exo_pair", "[exo_pair]", "[exo_pair, sft]"])
def test_a_loss_in_a_list_has_what_trl_gives_it(loss: str, tmp_path: Path) -> None:
    text = f"model_name_or_path: a\nloss_type: {loss}\nprecompute_ref_log_probs: true\n"
    found, lost = lost_of(text, "a.yaml", "trl", tmp_path, dataset__train_file="x.jsonl")
    assert found.values["post_training.label_smoothing"] == 0.001 and not lost


def test_all_trackers_are_those_that_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_trainer, "find_spec", lambda name: name in ("wandb", "mlflow") or None)
    text = json.dumps({"model_name_or_path": "a", "dataset_name": "b/c", "report_to": "all"})
    found, lost = lost_of(text, "a.json", "trl", tmp_path, post_training__method="sft")
    assert found.values["logging.report_to"] == ["wandb", "mlflow"] and not lost


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        ("llamafactory", "model_name_or_path: a\nstage: dpo\npref_beta: 0.2\npref_loss: sigmoid\n"),
        ("trl", "model_name_or_path: a\nloss_type: sigmoid\nbeta: 0.2\n"),
        ("axolotl", "base_model: a\nrl: ipo\nrl_beta: 0.2\n"),
    ],
)
@pytest.mark.parametrize("method", ["distill", "orpo", "reward", "sft"])
def test_another_method_beside_a_file_for_pairs(tool: str, text: str, method: str, tmp_path: Path) -> None:
    """The beta of preferences is not that of a method that has another one, or none."""
    beside = {"post_training__method": method, "dataset__train_file": "x.jsonl"}
    found, _ = lost_of(text, "a.yaml", tool, tmp_path, **beside)
    assert found.method == method and "post_training.loss_type" not in found.values
    assert ("post_training.beta" in found.values) == (method == "orpo")


def test_rows_beside_a_file_without_dataset_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which command reads the file, and it does."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("model_name_or_path: a\nstage: sft\ncutoff_len: 9\ndataset: identity,other\n")
    with pytest.raises(ConfigError, match=r"there is no dataset_info\.json in data") as refused:
        import_file(Path("a.yaml"))
    command = refused.value.fix.partition(": ")[2].split()
    assert command[0] == "strop" and main(command[1:]) == 0
    assert load_config("strop.yaml").dataset.train_file == "rows.jsonl"
    found = import_file(Path("a.yaml"), None, {"dataset.train_file": "rows.jsonl"})
    assert [e.answer.why for e in found.entries if e.key == "dataset"] == ["other rows are named beside the file"]


def test_numbers_of_yaml_1_1_are_numbers(tmp_path: Path) -> None:
    """There `5e-6` is a text, and `yes` is true."""
    (tmp_path / "a.yaml").write_text(
        "stage: sft\nmodel_name_or_path: a\ncutoff_len: '512'\nlearning_rate: 5e-6\nbf16: yes\nlora_alpha: 32\n"
    )
    found = import_file(tmp_path / "a.yaml", None, {"dataset.train_file": "x.jsonl"})
    assert found.values["training.learning_rate"] == 5e-6 and found.values["training.bf16"] is True
    assert found.values["training.max_seq_length"] == 512


def test_a_value_that_strop_does_not_take_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("stage: dpo\nmodel_name_or_path: a\nlora_dropout: 1.5\ncutoff_len: many\n")
    found = import_file(tmp_path / "a.yaml", None, {"dataset.train_file": "x.jsonl"})
    lost = {entry.key: entry.answer.why for entry in found.of(Fate.LEFT)}
    assert "below 1" in lost["lora_dropout"] and "whole number" in lost["cutoff_len"]


@pytest.mark.parametrize("value", ["# x\nmodels: evil", "a\u2028b", "\u202egnp", "x" * 500])
def test_comments_stay_comments(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"stage": "sft", "model_name_or_path": "a", value: value, "cutoff_len": 9})
    )
    found = import_file(tmp_path / "a.json", "llamafactory", {"dataset.train_file": "x.jsonl"})
    data = parse(to_text(found).encode(), "x").data
    assert set(data) <= {"models", "dataset", "post_training", "lora", "training", "finetuning"}
    assert write_value(data["models"]) == "[{huggingface_id: a}]"


@pytest.mark.parametrize(
    ("tool", "uploads"),
    [
        ("trl", "push_to_hub: true\n"),
        ("llamafactory", "push_to_hub: true\n"),
        ("axolotl", ""),
        ("trl", "push_to_hub: false\n"),
    ],
)
def test_where_a_model_is_uploaded_is_carried_over(tool: str, uploads: str, tmp_path: Path) -> None:
    """axolotl uploads wherever there is a hub_model_id."""
    (tmp_path / "a.yaml").write_text(f"{uploads}hub_model_id: me/model\n")
    given = {"models.0.huggingface_id": "a", "dataset.train_file": "x.jsonl", "post_training.method": "dpo"}
    found = import_file(tmp_path / "a.yaml", tool, given)
    pushed = "false" not in uploads
    assert found.values.get("training.push_to_hub", False) is pushed
    assert found.values.get("training.hub_model_id") == ("me/model" if pushed else None)


def test_a_script_is_found_by_its_calls(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "from trl import DPOConfig, GRPOConfig\nx = 3\nx = 4\nc = DPOConfig(beta=x, **more)\nd = DPOConfig(beta=0.2)\n"
    )
    data = read(tmp_path / "a.py").data
    assert list(data) == ["DPOConfig", "DPOConfig 2"] and repr(data["DPOConfig"]["beta"]) == "x"


SERVED = """
model_name_or_path: MODEL
dataset_name: data/prompts.jsonl
reward_funcs: [think_format_reward]
num_generations: 8
max_completion_length: 256
output_dir: grpo
use_vllm: true
"""
ADAPTS = "use_peft: true\nlora_r: 8\nlora_target_modules: all-linear\n"


def served(place: Path, model_dir: Path, text: str) -> tuple[RunConfig, dict[str, str]]:
    """The configuration of a GRPO run of TRL with vLLM, and what is not carried over, with the reasons."""
    file = place / "grpo.yaml"
    file.write_text((SERVED + text).replace("MODEL", str(model_dir)))
    found = import_file(file)
    (place / "strop.yaml").write_text(to_text(found))
    return load_config(place / "strop.yaml"), {e.key: e.answer.why for e in found.of(Fate.LEFT)}


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("", "http://127.0.0.1:8000"),
        ("vllm_server_host: node7\n", "http://node7:8000"),
        ("vllm_server_host: 0.0.0.0\nvllm_server_port: 9000\n", "http://127.0.0.1:9000"),
        ("vllm_server_port: 9001\n", "http://127.0.0.1:9001"),
        ("vllm_server_base_url: https://node8:1/\nvllm_server_port: 9000\n", "https://node8:1"),
    ],
)
def test_a_server_that_samples_is_carried_over(address: str, url: str, place: Path, model_dir: Path) -> None:
    text = f"{ADAPTS}vllm_mode: server\nvllm_server_timeout: 120\nvllm_group_port: 51216\n{address}"
    config, lost = served(place, model_dir, text)
    assert not lost
    assert (config.rollout.sampler, config.rollout.vllm_url) == ("vllm", url)
    assert config.rollout.vllm_retry_seconds == 120
    # TRL weighs what a server samples unless it is told not to
    method = config.post_training
    assert (method.sampler_correction, method.sampler_correction_max) == ("sequence_mask", 3.0)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("vllm_importance_sampling_correction: false\n", ("none", 3.0, 0.0)),
        (
            "vllm_importance_sampling_mode: token_truncate\nvllm_importance_sampling_clip_max: 2.0\n"
            "vllm_importance_sampling_clip_min: 0.1\n",
            ("token_truncate", 2.0, 0.0),
        ),
        ("vllm_importance_sampling_clip_min: 0.1\n", ("sequence_mask", 3.0, 0.1)),
        ("vllm_importance_sampling_correction: true\ntop_p: 0.9\n", ("none", 3.0, 0.0)),
    ],
)
def test_the_correction_of_what_a_server_samples(
    correction: str, expected: tuple[str, float, float], place: Path, model_dir: Path
) -> None:
    config, lost = served(place, model_dir, f"{ADAPTS}vllm_mode: server\n{correction}")
    method = config.post_training
    assert (method.sampler_correction, method.sampler_correction_max, method.sampler_correction_min) == expected
    named = {"top_p": "vllm_importance_sampling_correction", "truncate": "vllm_importance_sampling_clip_min"}
    assert list(lost) == [key for word, key in named.items() if word in correction]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ADAPTS, "does not run inside"),
        (f"{ADAPTS}vllm_mode: colocate\n", "does not run inside"),
        ("vllm_mode: server\n", "all weights train"),
        (f"{ADAPTS}vllm_mode: server\nlora_modules_to_save: [lm_head]\n", "no adapters with lora_modules_to_save"),
        (f"{ADAPTS}vllm_mode: server\nuse_dora: true\n", "no adapters with use_dora"),
        (f"{ADAPTS}vllm_mode: server\ntemperature: 0.7\ntop_p: 0.9\n", "not those of training"),
    ],
)
def test_where_no_server_can_sample_the_policy_does(text: str, why: str, place: Path, model_dir: Path) -> None:
    config, lost = served(place, model_dir, f"{text}vllm_server_port: 9000\n")
    assert config.rollout.sampler == "policy" and config.post_training.sampler_correction == "none"
    assert lost.keys() <= {"use_vllm", "vllm_mode"} and all(why in found for found in lost.values())
    assert "use_vllm" in lost


@pytest.mark.parametrize(
    ("arguments", "stop", "ids", "lost"),
    [
        ("{stop: '</answer>'}", ("</answer>",), (), []),
        ("{stop: [a, b], stop_token_ids: [5, 7]}", ("a", "b"), (5, 7), []),
        ("{stop_strings: [a]}", ("a",), (), []),
        ('\'{"stop": ["a"], "stop_token_ids": [5]}\'', ("a",), (5,), []),
        ("{stop: [a], top_p: 0.5}", ("a",), (), ["generation_kwargs.top_p"]),
        ("{num_beams: 4}", (), (), ["generation_kwargs.num_beams"]),
        ('\'{"stop": ["a"], "num_beams": 4}\'', ("a",), (), ["generation_kwargs"]),
        ("'{'", (), (), ["generation_kwargs"]),
        ("{}", (), (), []),
    ],
)
def test_texts_that_end_a_completion(
    arguments: str, stop: tuple[str, ...], ids: tuple[int, ...], lost: list[str], place: Path, model_dir: Path
) -> None:
    config, left = served(place, model_dir, f"{ADAPTS}vllm_mode: server\ngeneration_kwargs: {arguments}\n")
    assert (config.rollout.stop, config.rollout.stop_token_ids, list(left)) == (stop, ids, lost)
    if left:
        assert all("generation_kwargs" in why or "strop samples by" in why or "read" in why for why in left.values())
