"""`.pth` files, read and written one tensor at a time. Floor 6.

Read by torch's restricted loader alone, which makes tensors and runs no code that a file brings; their values stay on
the disk until they are asked for. Written as torch writes them: first with room for the values, then these into their
places.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from strop.errors import ModelError, foreign_errors
from strop.policy.model.shard_writer import Spec

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a file in a zip archive: the lengths of its name and of its extra field stand at byte 26."""


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, whose values are on the disk.

    Raises:
        ModelError: it is damaged, or holds anything but tensors by name.
    """

    def refused(why: str) -> ModelError:
        return ModelError(
            f"{path.name} is not read: {why}",
            where=str(path),
            expected="tensors by name, as torch.save writes them; a file that brings code is refused",
            fix="download or copy the file again, from a source that you trust",
        )

    with foreign_errors(lambda why: refused(why.partition(". ")[0])):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UnpicklingError as error:  # torch's own words advise to run the code
            raise refused("it holds more than tensors, which could run code") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) and isinstance(n, str) for n, t in found.items()):
        raise refused("it holds something else")
    return dict(found)


def write_pth(path: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file of these tensors, which come in the order of `specs`. Nothing is synced."""
    with torch.serialization.skip_data():  # tensors that nobody fills take no memory, but for their addresses
        torch.save({name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}, path)
    places = _places(path)
    with path.open("r+b") as file:
        for number, ((name, tensor), expected) in enumerate(zip(tensors, specs, strict=True)):
            assert name == expected and Spec(tuple(tensor.shape), tensor.dtype) == specs[name]
            at, size = places[number]
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            assert data.numel() == size
            file.seek(at)
            file.write(data.numpy().data)


def _places(path: Path) -> dict[int, tuple[int, int]]:
    """Number of a tensor -> where its values begin in the file, and how many bytes they have."""
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            folder, last = os.path.split(entry.filename)
            if os.path.basename(folder) != "data" or not last.isdigit():
                continue
            file.seek(entry.header_offset)
            name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            places[int(last)] = (entry.header_offset + _LOCAL_HEADER.size + name + extra, entry.file_size)
    return places
