"""The four presets, and that defaults < preset < configuration < command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.config import RunConfig, load_config
from strop.config.flags import split_flags

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ("cpu", "gpu-bf16", "gpu-fp16", "memory-efficient")


def load(tmp_path: Path, line: str = "", *, training: str = "", preset: str | None = None) -> RunConfig:
    path = tmp_path / "config.yaml"
    path.write_text(f"models:\n  - huggingface_id: org/model\ntraining:\n  logging_steps: 1\n{training}")
    overrides, _ = split_flags(line.split(), ())
    return load_config(path, preset=preset, overrides=overrides)


def test_gpu_fp16_enables_fp16_and_not_bf16(tmp_path: Path) -> None:
    training = load(tmp_path, preset="gpu-fp16").training
    assert training.fp16 is True
    assert not training.bf16


def test_gpu_bf16_enables_bf16_and_not_fp16(tmp_path: Path) -> None:
    training = load(tmp_path, preset="gpu-bf16").training
    assert training.bf16 is True
    assert not training.fp16


def test_cpu_disables_low_precision_and_accumulation(tmp_path: Path) -> None:
    training = load(tmp_path, preset="cpu").training
    assert (training.bf16, training.fp16) == (False, False)
    assert training.gradient_accumulation_steps == 1


def test_memory_efficient_takes_small_batches_and_leaves_precision(tmp_path: Path) -> None:
    training = load(tmp_path, preset="memory-efficient").training
    assert training.per_device_train_batch_size == 1
    assert training.gradient_accumulation_steps == 8
    assert (training.bf16, training.fp16) == (None, None)
    assert load(tmp_path, preset="memory-efficient", training="  bf16: true\n").training.bf16 is True


def test_the_order_of_the_layers(tmp_path: Path) -> None:
    def steps(preset: str | None = None, training: str = "", line: str = "") -> int:
        return load(tmp_path, line, training=training, preset=preset).training.gradient_accumulation_steps

    file, line = "  gradient_accumulation_steps: 3\n", "--gradient-accumulation-steps 5"
    assert steps() == 8
    assert steps(preset="cpu") == 1
    assert steps(preset="cpu", training=file) == 3
    assert steps(preset="cpu", training=file, line=line) == 5
    assert steps(preset="cpu", line=line) == 5


def test_a_flag_wins_over_the_precision_of_a_preset(tmp_path: Path) -> None:
    training = load(tmp_path, "--bf16", preset="gpu-fp16").training
    assert (training.bf16, training.fp16) == (True, False)
    training = load(tmp_path, "--no-bf16", preset="gpu-bf16").training
    assert (training.bf16, training.fp16) == (False, False)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_presets_work_under_every_shipped_configuration(preset: str, config: Path) -> None:
    alone = load_config(preset=preset, overrides={"huggingface_id": "org/model"}).origins
    sets = {key for key, origin in alone.items() if origin == f"preset {preset}"}
    assert sets
    origins = load_config(config, preset=preset).origins
    assert {origins[key] for key in sets} == {f"preset {preset}"}


def test_the_example_of_the_guide() -> None:
    config = load_config(ROOT / "configs" / "sft.yaml", preset="memory-efficient")
    assert config.training.gradient_accumulation_steps == 8
    assert config.training.per_device_train_batch_size == 1
