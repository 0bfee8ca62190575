"""Files of weights, read and written one tensor at a time. Floor 6.

`rewrite` makes a new file from an old one, with the same names, shapes and order: some tensors are replaced, all others
are copied byte for byte. Never more than one tensor is in memory beside those that replace.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from strop.errors import ModelError, first_line
from strop.machine import machine_of
from strop.policy.model.shard_writer import DTYPES, ShardWriter, Spec

BYTES_OF_TORCHAO = "._weight_qdata"
"""End of the name by which torchao stores a weight's bytes; beside them stand its scale and zero point."""
INDEX, SINGLE = SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A safetensors file by its header: its tensors in the order in which they lie in it."""

    path: Path
    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors, one after the other.

        Raises:
            ModelError: the file is damaged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(self.path, error) from error


def read_header(path: Path) -> SafetensorsFile:
    """A file's tensors, of which none is read.

    Raises:
        ModelError: the file is damaged, or has tensors of a dtype that is not known here.
    """
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
            stored = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    for name, (_, dtype) in stored.items():
        if dtype not in DTYPES:
            raise ModelError(f"{path.name}: {name} is of the dtype {dtype}, which is not known here", where=str(path))
    specs = {name: Spec(shape, DTYPES[dtype]) for name, (shape, dtype) in stored.items()}
    return _of_torchao(SafetensorsFile(path, specs, metadata))


def _of_torchao(shard: SafetensorsFile) -> SafetensorsFile:
    """A shard whose weights torchao quantised: x._weight_qdata stands for x.weight, and the scales beside it are left
    out. Such a weight can be replaced, not read."""
    bytes_of = {name.removesuffix(BYTES_OF_TORCHAO) for name in shard.specs if name.endswith(BYTES_OF_TORCHAO)}
    if not bytes_of:
        return shard
    parts = {name: name.rpartition(".") for name in shard.specs}
    specs = {
        (f"{layer}.weight" if name.endswith(BYTES_OF_TORCHAO) else name): shard.specs[name]
        for name, (layer, _, part) in parts.items()
        if name.endswith(BYTES_OF_TORCHAO) or not (layer in bytes_of and part.startswith("_weight_"))
    }
    # what the metadata says of each tensor is true of this file alone
    return SafetensorsFile(shard.path, specs, {key: value for key, value in shard.metadata.items() if key == "format"})


def memory_dtype(shards: Sequence[SafetensorsFile], stored: torch.dtype) -> torch.dtype:
    """What a model is held in, on a CPU: float32, unless the memory of this computer is too small for it.

    Args:
        stored: the dtype of most of its weights.
    """
    if any(spec.dtype == torch.float64 for shard in shards for spec in shard.specs.values()):
        return torch.float64
    needed = 1.2 * torch.float32.itemsize * sum(num_weights(shards).values())
    memory = machine_of(torch.device("cpu")).memory
    return torch.float32 if memory is None or needed < memory else stored


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path.name} is damaged: {first_line(error)}", where=str(path), fix="download or copy the file again"
    )


def num_weights(shards: Sequence[SafetensorsFile]) -> dict[str, int]:
    """Of each tensor of a model, by name, however they are stored; scales of quantised weights are none."""
    specs = {name: spec for shard in shards for name, spec in shard.specs.items()}
    return {
        name: torch.Size(spec.shape).numel() * (2 if f"{name}.absmax" in specs else 1)  # 4 bits: two in a byte
        for name, spec in specs.items()
        if not quantised_part(name, specs)
    }


def quantised_part(name: str, names: Container[str]) -> bool:
    """Whether a tensor belongs to a quantised weight beside it: its scales, or a table. names: of all tensors."""
    before, _, last = name.partition(".weight.")  # 4 bits: x.weight.absmax; 8 bits: x.SCB, x.weight_format
    if last and f"{before}.weight" in names:
        return True
    layer, _, part = name.rpartition(".")
    return part in ("SCB", "weight_format") and f"{layer}.weight" in names


def rewrite(
    shard: SafetensorsFile,
    target: Path,
    replaced: Mapping[str, Tensor],
    added: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    *,
    usual: torch.dtype,
    left_out: Callable[[str], bool] = lambda name: False,
) -> dict[str, Spec]:
    """A shard with some tensors replaced, some added and some left out, in the same dtypes.

    Args:
        replaced, added: by name; they are rounded once, to the dtype of the new file.
        dtype: what all floating point tensors are stored in; None: each as it was, and added ones as `usual`.
        usual: dtype of added tensors, and of those in place of integers, such as quantised weights.
        left_out: whether a tensor of this name is left out.

    Returns:
        The tensors of the new file.
    """
    usual = dtype or usual
    specs = {n: Spec(spec.shape, _stored(spec.dtype, dtype)) for n, spec in shard.specs.items() if not left_out(n)}
    for name in specs.keys() & replaced.keys():  # a table of tokens may have got rows
        own = specs[name].dtype
        specs[name] = Spec(tuple(replaced[name].shape), own if own.is_floating_point else usual)
    specs |= {name: Spec(tuple(tensor.shape), usual) for name, tensor in added.items()}
    old = [name for name in shard.specs if name in specs and name not in replaced]
    unchanged = shard.tensors(old)
    with ShardWriter(target, specs, shard.metadata) as writer:
        for name, spec in specs.items():
            new = replaced[name] if name in replaced else added.get(name)
            tensor = next(unchanged)[1] if new is None else new
            writer.write(name, tensor.to(spec.dtype))
    return specs


def write_index(folder: Path, files: Mapping[str, Mapping[str, Spec]]) -> None:
    """The index by which transformers finds the weights of a model in several files; one file needs none.

    Args:
        files: their names -> their tensors.
    """
    if SINGLE in files:
        return
    total = sum(spec.nbytes for specs in files.values() for spec in specs.values())
    weight_map = {name: file for file, specs in files.items() for name in specs}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _stored(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own
