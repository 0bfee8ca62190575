"""Shipped configurations load, explain every key, and the published configuration guide loads unchanged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from strop.config import METHODS, DpoSettings, load_config
from strop.config.schema import KEYS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
ids = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)


def test_they_are_there() -> None:
    assert {path.stem for path in CONFIGS} >= {*METHODS, "dpo_example", "simple_dpo", "multi_model_dpo"}


@ids
def test_it_loads(path: Path) -> None:
    config = load_config(path)
    assert config.post_training.method == (path.stem if path.stem in METHODS else "dpo")
    assert len(config.models) == (3 if path.stem == "multi_model_dpo" else 1)
    assert config.dataset.name


@ids
def test_it_carries_the_editor_hint(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert match
    schema = json.loads((path.parent / match[1]).read_text(encoding="utf-8"))
    assert "models" in schema["properties"]


def test_the_example_explains_every_key_that_dpo_reads() -> None:
    """What `online` reads beside them is in docs/methods/dpo.md."""
    text = (ROOT / "configs" / "dpo_example.yaml").read_text(encoding="utf-8")
    mentioned = set(re.findall(r"^\s*(?:#|-)?\s*([a-z0-9_]+):(?: |$)", text, flags=re.MULTILINE))
    own = [key for key in KEYS if not key.methods or "dpo" in key.methods]
    wanted = {key.name for key in own if "rollout" not in (key.section, key.name) and key.name != "rewards"} | {
        "preset"
    }
    assert wanted - mentioned == set()
    keys = {key.name for key in KEYS} | {key.section for key in KEYS} | {"preset"}
    assert mentioned - keys == set()


def test_what_the_example_comments_out_can_be_commented_in(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "dpo_example.yaml").read_text(encoding="utf-8")
    options = re.findall(r"^( *)# ([a-z0-9_]+): (\S+)", text, flags=re.MULTILINE)
    assert len(options) == 10
    for _, name, value in options:
        source = re.sub(rf"^( *)# ({name}: )", r"\1\2", text, flags=re.MULTILINE)
        if name == "warmup_steps":
            source = source.replace("  warmup_ratio:", "  # warmup_ratio:")
        if name in DpoSettings.READ_BY:
            setting, (reader, *_) = DpoSettings.READ_BY[name]
            source = re.sub(rf"^(  {setting}: )\S+", rf"\g<1>{reader}", source, flags=re.MULTILINE)
        path = tmp_path / f"{name}.yaml"
        path.write_text(source, encoding="utf-8")
        assert load_config(path) is not None, value


# ---- the configuration guide that strop's schema extends

GUIDE = {
    "models.0.name": "model-name",
    "models.0.huggingface_id": "org/model",
    "models.0.trust_remote_code": False,
    "dataset.name": "dataset-name",
    "dataset.subset": "subset-name",
    "dataset.split": "train",
    "dataset.prompt_column": "prompt",
    "dataset.chosen_column": "chosen",
    "dataset.rejected_column": "rejected",
    "dataset.max_samples": 1000,
    "dataset.validation_split": 0.1,
    "post_training.method": "dpo",
    "post_training.beta": 0.1,
    "post_training.label_smoothing": 0.0,
    "post_training.loss_type": "sigmoid",
    "post_training.use_ref_model": True,
    "post_training.ref_model_id": None,
    "lora.r": 16,
    "lora.lora_alpha": 32,
    "lora.lora_dropout": 0.05,
    "lora.bias": "none",
    "lora.target_modules": ("q_proj", "v_proj"),
    "lora.task_type": "CAUSAL_LM",
    "lora.use_rslora": False,
    "lora.use_dora": False,
    "training.output_dir": "./outputs",
    "training.num_epochs": 1,
    "training.per_device_train_batch_size": 2,
    "training.per_device_eval_batch_size": 2,
    "training.gradient_accumulation_steps": 8,
    "training.learning_rate": 5.0e-7,
    "training.warmup_steps": 100,
    "training.max_seq_length": 512,
    "training.max_prompt_length": 256,
    "training.max_completion_length": 256,
    "training.logging_steps": 10,
    "training.save_steps": 500,
    "training.eval_steps": 500,
    "training.save_total_limit": 3,
    "training.fp16": False,
    "training.bf16": True,
    "training.gradient_checkpointing": True,
    "training.optim": "adamw_torch",
    "training.weight_decay": 0.0,
    "training.max_grad_norm": 1.0,
    "gpu.device_ids": (0, 1, 2),
    "gpu.use_ddp": False,
    "finetuning.resume_from_checkpoint": None,
    "finetuning.load_best_model_at_end": True,
    "finetuning.metric_for_best_model": "eval_loss",
    "finetuning.greater_is_better": False,
    "finetuning.early_stopping_patience": 3,
    "logging.report_to": ("tensorboard",),
    "logging.logging_dir": "./logs",
    "logging.log_level": "info",
}


def test_the_published_guide_loads_unchanged(shared: Path, tmp_path: Path) -> None:
    (guide,) = (shared / "seeds").glob("001_*.txt")
    blocks = re.findall(r"^```yaml\n(.*?)^```", guide.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    path = tmp_path / "guide.yaml"
    path.write_text("\n".join(blocks), encoding="utf-8")
    config = load_config(path)
    values = {key: value for key, value, _ in config.leaves()}
    assert {key: values[key] for key in GUIDE} == GUIDE
    given = {key for key, origin in config.origins.items() if origin.startswith(str(path))}
    assert given == set(GUIDE)  # nothing of the guide is dropped, nothing is missing here
    assert config.lora.enabled
    for key, value in GUIDE.items():
        assert type(values[key]) is type(value) or key == "lora.lora_alpha"


# ---- answering at once

QUICK = {
    "import": "import strop.config",
    "names": "import strop; strop.load_config, strop.RunConfig",
    "help": "from strop.cli import main; main(['--help'])",
    "train help": "from strop.cli import main; main(['train', '--help'])",
    "a wrong flag": "from strop.cli import main; main(['train', '--nonsense'])",
    "a wrong file": "from strop.cli import main; main(['train', '--config', 'none.yaml'])",
    "schema": "from strop.cli import main; main(['schema'])",
    "methods": "from strop.cli import main; main(['methods'])",
}


@pytest.mark.share(1)
@pytest.mark.parametrize("case", QUICK)
def test_no_torch_is_loaded_for(case: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'numpy'}"
    code = f"{QUICK[case]}\nimport sys\nsys.exit(f'loaded {{found}}' if (found := {heavy} & set(sys.modules)) else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
