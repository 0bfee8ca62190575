"""Weights that stay in their files until each process reads its own rows of them. Floor 2.

A model that will be sharded over several processes is not loaded whole by each of them. `load_model` gives it
placeholders: tensors of the right shape and dtype over memory that is never touched. transformers places them as it
places loaded ones, so its names, its tied weights and its checks hold. Adapters are added; the weights are sharded;
then each process reads its rows (`DeferredWeights.read`). Until then nothing may compute with a placeholder, which
holds zeros.

All placeholders lie in one buffer, and that of the i-th tensor of the files begins at element i. So a parameter tells
which tensor it stands for, and one that transformers has put together from several tensors is found out.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from strop.errors import ModelError, first_line
from strop.policy.model.model_hashes import digest_line
from strop.policy.model.task import SCORE
from strop.world import World

HASHED_BYTES = 2**26
"""Of a tensor that are in memory at a time while it is hashed."""
_COPY = ".modules_to_save.default."
_COPIED = ".original_module."


@dataclass(frozen=True, slots=True)
class TensorSource:
    """What a parameter is read from. key: of the tensor in the files. dtype: what it is rounded to when it is read, as
    when a model is loaded whole."""

    key: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    path: Path
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Placeholder:
    """Stands for a tensor of a file where transformers asks for it: `tensor[...].to(device=..., dtype=...)`."""

    buffer: Tensor
    number: int
    stored: Stored
    kind: str

    def get_shape(self) -> list[int]:
        return list(self.stored.shape)

    def get_dtype(self) -> str:
        return self.kind

    def __getitem__(self, _: Any) -> _Placeholder:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        assert dtype is not None, "transformers casts what it reads"
        size = torch.Size(self.stored.shape)
        return self.buffer.view(dtype)[self.number : self.number + size.numel()].view(size)


class DeferredWeights:
    """The weights of one model that are still in its files.

    Args:
        files: of safetensors. where: how messages name the model.

    Raises:
        ModelError: a file is damaged.
    """

    def __init__(self, files: Sequence[Path], where: str) -> None:
        self.where = where
        self.names: dict[str, TensorSource] = {}
        """Names of the parameters that are to be read, in the module that was last given to `follow`; all names of
        tied ones."""
        self._stored: dict[str, Stored] = {}
        kinds: dict[str, str] = {}
        for path in files:
            with self._reading(path) as tensors:
                for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    part = tensors.get_slice(key)
                    self._stored[key], kinds[key] = Stored(path, tuple(part.get_shape())), part.get_dtype()
        self._keys = list(self._stored)
        most = max((i + torch.Size(self._stored[key].shape).numel() for i, key in enumerate(self._keys)), default=1)
        pages = mmap.mmap(-1, 8 * most, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # takes no memory until written
        self._buffer = torch.frombuffer(pages, dtype=torch.uint8)
        self.placeholders: dict[str, Any] = {
            key: _Placeholder(self._buffer, i, self._stored[key], kinds[key]) for i, key in enumerate(self._keys)
        }
        """By key, for `from_pretrained`."""

    # -- before sharding -----------------------------------------------------------------------------------------------

    def fits(self, outline: PreTrainedModel) -> bool:
        """Whether every parameter of a model is one tensor of the files, so that rows of it can be read by themselves.

        outline: the model without weights.
        """
        prefix = f"{outline.base_model_prefix}."

        def is_there(name: str) -> bool:
            return any(key in self._stored for key in (name, f"{prefix}{name}", name.removeprefix(prefix)))

        tied = getattr(outline, "all_tied_weights_keys", None) or {}
        if any(is_there(one) and is_there(other) for one, other in tied.items()):
            return False  # which of them counts depends on their values
        return all(is_there(name) or name.startswith(f"{SCORE}.") for name, _ in outline.named_parameters())

    def follow(self, module: nn.Module, *, copies: bool = False) -> bool:
        """Notes the names under which the parameters of a module are to be read later. Buffers are read at once.

        Args:
            copies: adapters have been added to the module, and parts that they train whole begin as copies of its
                weights (`lora.modules_to_save`).

        Returns:
            Whether every placeholder still stands for one whole tensor.
        """
        for name, buffer in list(module.named_buffers()):
            if (source := self._source(buffer)) is not None:
                parent, _, last = name.rpartition(".")
                shape = self._stored[source.key].shape
                setattr(module.get_submodule(parent), last, self.read(source, 0, shape[0] if shape else 0))
        weights = dict(module.named_parameters(remove_duplicate=False))
        found = {name: self._source(weight) for name, weight in weights.items()}
        self.names = {name: source for name, source in found.items() if source is not None}
        if copies:
            originals = {name: name.replace(_COPY, _COPIED) for name in weights if _COPY in name}
            self.names |= {copy: self.names[name] for copy, name in originals.items() if name in self.names}
        return all(tuple(weights[name].shape) == self._stored[s.key].shape for name, s in self.names.items())

    def _source(self, tensor: Tensor) -> TensorSource | None:
        """What a placeholder stands for; None: it is none."""
        if tensor.untyped_storage().data_ptr() != self._buffer.untyped_storage().data_ptr():
            return None
        return TensorSource(self._keys[tensor.storage_offset()], tensor.dtype)

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, source: TensorSource, start: int, stop: int) -> Tensor:
        """Rows of a tensor, on the CPU; no more of the file than these is read. Of a scalar: itself.

        Raises:
            ModelError: the file is damaged.
        """
        with self._reading(self._stored[source.key].path) as tensors:
            part = tensors.get_slice(source.key)
            if start == stop:  # a process without rows of a matrix that has few; safetensors refuses [1:1] of one row
                start = stop = 0
            rows: Tensor = part[start:stop] if part.get_shape() else part[...]
        return rows.to(source.dtype)

    @contextmanager
    def _reading(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt", backend="pread") as tensors:
                yield tensors
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(
                f"{path.name} is damaged: {first_line(error)}", where=self.where, fix="download or copy the file again"
            ) from error

    # -- hashing -------------------------------------------------------------------------------------------------------

    def digests(self, module: nn.Module, world: World) -> dict[str, str]:
        """`model_hashes.digest_line` of the weights that are to be read, by their names in the module. Collective: the
        processes of a machine take turns, so that each file is hashed once per machine."""
        weights = dict(module.named_parameters(remove_duplicate=False))
        wanted = {name: (source, weights[name].dtype) for name, source in self.names.items()}
        pairs = sorted(set(wanted.values()), key=lambda pair: (-self._size(pair[0]), pair[0].key, str(pair)))
        share = pairs[world.local_rank :: world.local_size]
        own = {pair: self._digest(*pair) for pair in share}
        first = world.rank - world.local_rank
        found = {
            pair: line for one in world.gather(own)[first : first + world.local_size] for pair, line in one.items()
        }
        return {name: found[pair] for name, pair in wanted.items()}

    def _size(self, source: TensorSource) -> int:
        return torch.Size(self._stored[source.key].shape).numel()

    def _digest(self, source: TensorSource, dtype: torch.dtype) -> str:
        shape = self._stored[source.key].shape
        parts = (rows.to(dtype) for rows in self._in_parts(source, shape))
        return digest_line(dtype, shape, parts)

    def _in_parts(self, source: TensorSource, shape: Sequence[int]) -> Iterable[Tensor]:
        if not shape:
            return [self.read(source, 0, 0)]
        per_row = max(1, 4 * self._size(source) // max(1, shape[0]))
        step = max(1, HASHED_BYTES // per_row)
        return (self.read(source, at, min(at + step, shape[0])) for at in range(0, shape[0], step))
