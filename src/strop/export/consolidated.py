"""A folder with `consolidated.NN.pth` and `params.json`, as one model. Floor 6.

Several files hold a part of every weight each, as a model was cut for so many GPUs: rows of most, columns of those that
come last in attention and feed-forward; norms are whole in each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from strop.errors import ModelError
from strop.export.layout import ACROSS, DERIVED, EMBEDDING, HEAD, Layout
from strop.export.params_json import config_of, layout_of
from strop.export.pth import read_pth
from strop.policy.model.consolidated_files import PARAMS, consolidated_names
from strop.policy.model.folder import read_json
from strop.policy.model.shard_writer import Spec


@dataclass(frozen=True)
class Consolidated:
    """files: the tensors of each, whose values are on the disk. specs: of whole tensors, in the order of the files.
    width: numbers per token in the embedding, which tells along which dimension files have a part of it."""

    folder: Path
    where: str
    config: PreTrainedConfig
    layout: Layout
    files: Sequence[Mapping[str, Tensor]]
    specs: Mapping[str, Spec]
    width: int

    @classmethod
    def open(cls, folder: Path) -> Consolidated:
        """Look at a folder.

        Raises:
            ModelError: a file is missing, damaged, or holds code; or they describe no model.
        """
        where, names = str(folder), consolidated_names(str(folder))
        params = read_json(folder / PARAMS, where)
        files = [
            {name: tensor for name, tensor in read_pth(folder / name).items() if not name.endswith(DERIVED)}
            for name in names
        ]
        for name, tensors in zip(names, files, strict=True):
            if other := sorted(tensors.keys() ^ files[0].keys()):
                raise ModelError(f"{other[0]} is not in every file ({name})", where=where, fix="copy all files again")
        width = params.get("dim")
        if type(width) is not int or EMBEDDING not in files[0]:
            found = f"no {EMBEDDING}" if type(width) is int else f"{PARAMS}: dim is {width!r}"
            raise ModelError(found, where=where, expected="a model in the layout that Meta publishes Llama in")
        specs = {name: _joined(name, [tensors[name] for tensors in files], width) for name in files[0]}
        head = [tensors[HEAD] for tensors in files] if HEAD in specs else []
        embedding = [tensors[EMBEDDING] for tensors in files]
        tied = not head or all(torch.equal(a, b) for a, b in zip(head, embedding, strict=True))
        config = config_of(params, specs, tied=tied, where=where)
        if config.tie_word_embeddings and not tied:
            raise ModelError(
                f"{HEAD} is not the embedding, and {PARAMS} says that they are one",
                where=where,
                fix='set "tie_word_embeddings": false in its hf_config',
            )
        return cls(folder, where, config, layout_of(config, where), files, specs, width)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor.

        Raises:
            ModelError: a norm is not the same in all files.
        """
        parts = [tensors[name] for tensors in self.files]
        if len(parts) == 1:
            return parts[0]
        dim = _joined_along(name, parts[0], self.width)
        if dim is not None:
            return torch.cat(parts, dim)
        if not all(torch.equal(parts[0], part) for part in parts[1:]):
            raise ModelError(f"{name} is not the same in all files", where=self.where, fix="copy all files again")
        return parts[0]


def _joined_along(name: str, part: Tensor, width: int) -> int | None:
    """Along which of its dimensions the parts of a tensor lie; None: each file has it whole."""
    if name.endswith("norm.weight"):
        return None
    if name == EMBEDDING:  # Llama 2 cuts its columns, Llama 3 its rows
        return 0 if part.shape[-1] == width else 1
    return 1 if name.endswith(ACROSS) else 0


def _joined(name: str, parts: Sequence[Tensor], width: int) -> Spec:
    shape, dim = list(parts[0].shape), _joined_along(name, parts[0], width)
    if len(parts) > 1 and dim is not None:
        shape[dim] = sum(part.shape[dim] for part in parts)
    return Spec(tuple(shape), parts[0].dtype)
