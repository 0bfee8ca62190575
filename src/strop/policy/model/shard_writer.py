"""A safetensors file that is written one tensor at a time. Floor 2."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strop.durable import NewFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in the headers of safetensors files."""
IN_FILES = (
    *(torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16),
    *(torch.int16, torch.int8, torch.uint8, torch.bool),
)
"""In which order safetensors writes tensors: by dtype, then by name."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of a file, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardWriter:
    """A safetensors file that is written front to back, a tensor at a time, and synced at the end.

    Args:
        specs: its tensors, in the order in which they will come.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self._waiting = list(specs.items())[::-1]
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        at = 0
        for name, spec in specs.items():
            header[name] = {
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.nbytes],
            }
            at += spec.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        self._file = NewFile(path)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        expected, spec = self._waiting.pop()
        found = Spec(tuple(tensor.shape), tensor.dtype)
        assert (name, found) == (expected, spec), f"{name} {found} comes where {expected} {spec} was announced"
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        assert kind is not None or not self._waiting, f"{self._waiting[-1][0]} was announced and did not come"
        self._file.__exit__(kind, *rest)
