"""What a model is, as hashes: of its weights, of their files and of its configuration. Floor 2."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig

from strop import machine
from strop.policy.model.quantised_base import packed_names, plain_parts

_NO_NUMBERS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
"""Keys of a model's configuration that no log-prob depends on."""
SAMPLED = 64
"""So many neighbouring numbers in the middle of a tensor stand for it in `files_hash`."""


def configuration_hash(config: PreTrainedConfig) -> str:
    """A hash of what the model's configuration says about its numbers (heads, norms, rotations, activations), beside
    the defaults of its architecture, which a newer transformers may list more of."""
    text = json.dumps(numbers_of(config.to_diff_dict()), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def numbers_of(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that log-probs depend on."""
    return {key: value for key, value in config.items() if key not in _NO_NUMBERS}


def weights_hash(module: nn.Module, known: Mapping[str, str] = MappingProxyType({})) -> str:
    """A hash of the names, dtypes, shapes and bytes of all weights, and of what adapters are multiplied by. Adapters
    that add nothing yet do not count.

    Args:
        known: `digest_line` of weights that are not in the module yet, by their names in it.
    """
    digests = {_plain_name(name): line for name, line in known.items()}
    packed = packed_names(module)
    tensors = {
        _plain_name(part): tensor
        for name, whole in module.state_dict().items()
        # quantised weights as the bytes that they are, in whatever dtype they lie
        for part, tensor in (plain_parts(name, whole) if name in packed else {name: whole}).items()
    }
    scales = {_plain_name(n): m.scaling for n, m in module.named_modules() if isinstance(m, LoraLayer)}
    zeros = [t for n, t in tensors.items() if ".lora_B." in n or ".lora_embedding_A." in n]
    if zeros and not any(".lora_magnitude" in n for n in tensors) and not any(bool(t.any()) for t in zeros):
        tensors, scales = {n: t for n, t in tensors.items() if ".lora_" not in n}, {}
    with ThreadPoolExecutor(min(8, machine.processor().cores)) as pool:  # hashing lets other threads run
        hashed = pool.map(lambda name: digests.get(name) or _tensor_digest(tensors[name]), tensors)
        lines = [f"{name} {digest}" for name, digest in zip(tensors, hashed, strict=True)]
    lines += [f"{name} times {sorted(factors.items())}" for name, factors in scales.items()]
    return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=20).hexdigest()


def files_hash(files: Iterable[Path]) -> str:
    """Two hashes of the files of a model, however it is loaded: of the names, dtypes and shapes of all tensors, and of
    some numbers of each, which takes milliseconds where reading all of them takes minutes.

    files: safetensors.
    """
    outline, numbers = [], {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                part = file.get_slice(name)
                shape = part.get_shape()
                outline.append(f"{name} {part.get_dtype()} {shape}")
                some = part[_middle(shape)] if shape else file.get_tensor(name)
                numbers[name] = some.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    of_numbers = hashlib.blake2b(b"".join(numbers[name] for name in sorted(numbers)), digest_size=20)
    of_outline = hashlib.blake2b("\n".join(sorted(outline)).encode(), digest_size=20)
    return f"{of_outline.hexdigest()} {of_numbers.hexdigest()}"


def _middle(shape: Sequence[int]) -> tuple[slice, ...]:
    *rows, last = shape
    return (*(slice(size // 2, size // 2 + 1) for size in rows), slice(last // 2, last // 2 + SAMPLED))


def have_other_numbers(one: str, other: str) -> bool:
    """Whether two models, by their `files_hash`, have the same tensors (names, dtypes, shapes) with other numbers in
    them. Where the tensors are not the same, nothing is known: one model may be the other in another dtype."""
    return one != other and one.partition(" ")[0] == other.partition(" ")[0]


def _plain_name(name: str) -> str:
    """A weight's name in the model without adapters around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _tensor_digest(tensor: Tensor) -> str:
    return digest_line(tensor.dtype, tensor.shape, [tensor])


def digest_line(dtype: torch.dtype, shape: Sequence[int], parts: Iterable[Tensor]) -> str:
    """Dtype, shape and a hash of the bytes of a tensor. parts: its rows, in order."""
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{dtype} {list(shape)} {digest.hexdigest()}"
