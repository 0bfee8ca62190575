"""What bf16, fp16 and auto_precision mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from strop.config.sections import TrainingSection
from strop.errors import ConfigError
from strop.policy.precision import Precision, resolve_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = Precision(torch.float32), Precision(torch.bfloat16)
FP16 = Precision(torch.float16, scaler=True)


@pytest.mark.parametrize(
    ("keys", "on_old_gpu", "on_gpu"),
    [
        ({}, FP32, FP32),
        ({"fp16": True}, FP16, FP16),
        ({"bf16": False, "fp16": True}, FP16, FP16),
        ({"auto_precision": True}, FP32, BF16),
        ({"auto_precision": True, "bf16": False}, FP32, FP32),
        ({"auto_precision": True, "fp16": False}, FP32, FP32),
        ({"auto_precision": True, "fp16": True}, FP16, FP16),
        ({"bf16": True}, None, BF16),
    ],
)
def test_on_gpus(
    keys: dict[str, bool], on_old_gpu: Precision | None, on_gpu: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    for supported, want in ((False, on_old_gpu), (True, on_gpu)):

        def native(including_emulation: bool = True, supported: bool = supported) -> bool:
            return supported or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", native)
        if want is None:
            with pytest.raises(ConfigError, match="Old GPU does not compute bfloat16"):
                resolve_precision(TrainingSection(**keys), GPU)
        else:
            assert resolve_precision(TrainingSection(**keys), GPU) == want


@pytest.mark.parametrize(
    ("bf16", "onednn", "gains"),
    [(0.3, 0.9, False), (0.6, 0.9, False), (1.05, 0.9, False), (2.0, 0.9, True), (2.0, 2.0, False), (4.0, 2.0, True)],
)
def test_on_the_cpu(bf16: float, onednn: float, gains: bool, pretend: Callable[..., None]) -> None:
    """By what products take, whatever instructions there are."""
    pretend(bf16=bf16, onednn=onednn)
    assert resolve_precision(TrainingSection(auto_precision=True), CPU) == (BF16 if gains else FP32)
    assert resolve_precision(TrainingSection(), CPU) == FP32
    assert resolve_precision(TrainingSection(bf16=True), CPU) == BF16
    assert resolve_precision(TrainingSection(fp16=True), CPU) == FP16


@pytest.mark.parametrize(
    ("kind", "master", "product"),
    [
        (FP32, torch.float32, torch.float32),
        (BF16, torch.float32, torch.bfloat16),
        (FP16, torch.float32, torch.float16),
        (Precision(torch.float64), torch.float64, torch.float64),
    ],
)
def test_masters_and_autocast(kind: Precision, master: torch.dtype, product: Any) -> None:
    assert kind.master == master
    x = torch.ones(2, 2, dtype=master)
    with kind.autocast(CPU):
        assert (x @ x).dtype == product


def test_descriptions_name_every_dtype() -> None:
    assert BF16.describe(adapters=False) == "weights float32, compute bfloat16, optimizer float32"
    assert BF16.describe(adapters=True).startswith("weights adapters float32 on a base in bfloat16,")
    assert "scaler" in FP16.describe(adapters=False)
