"""What a model folder may not do to whoever reads it: link to other places, be damaged, claim endless sizes. Floor 2.

A folder comes in; nothing goes out, or one error that names the file. No torch, and no weight is read but to compare
its hash.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from strop.errors import ModelError, foreign_errors
from strop.manifest import MANIFEST, Damaged, read_manifest, verify_listed
from strop.readable import is_number

READ = frozenset({".json", ".jinja", ".safetensors", ".model", ".txt", ".tiktoken"})
"""Suffixes of what is read of a model folder, by strop or by the libraries that load it."""
TEMPLATES = "additional_chat_templates"
MOST_LAYERS = 2_000
"""Some ten times the deepest model there is. A model is built layer by layer before anything else can be said of it."""
MOST_EXPERTS = 20_000
LONGEST_JSON = 1 << 26
"""Bytes. The list of the largest model's weights has a tenth of it."""

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LENGTHS = ("max_position_embeddings", "original_max_position_embeddings", "n_positions")
_POSITIVE = ("rope_theta", "rope_local_base_freq", "rotary_emb_base", "partial_rotary_factor", "factor")
"""Of positions: 0 or less makes every rotation the same or not a number, and no library says so."""


def check_links(folder: Path, where: str) -> None:
    """Every file of a model folder that anybody reads is the folder's own.

    Raises:
        ModelError: one is no file, or a link that leads out of the folder, or nowhere.
    """
    for place in (folder, folder / TEMPLATES):
        with foreign_errors(lambda why, at=place: ModelError(f"{at} cannot be read: {why}", where=where)):  # type: ignore[misc]
            names = sorted(os.listdir(place)) if os.path.isdir(place) else []
        for name in names:
            is_read = os.path.splitext(name)[1].lower() in READ or name == TEMPLATES
            is_plain = os.path.isfile(place / name) and not os.path.islink(place / name)
            if is_read and (not is_plain or os.path.islink(place)):
                contained(place / name, folder, where)


def contained(file: Path, folder: Path, where: str) -> Path:
    """The file, which is there. The hub's cache links snapshots/COMMIT/* to blobs/* beside snapshots.

    Raises:
        ModelError: it is no file, or a link that leads out of the folder or nowhere.
    """
    try:
        real, root = file.resolve(), folder.resolve()
        is_there = real.exists()
    except (OSError, RuntimeError):  # a loop
        is_there = False
    if not is_there:
        raise ModelError(f"{file.name} is a link that leads nowhere", where=where, fix="copy the file itself there")
    in_cache = root.parent.name == "snapshots" and real.is_relative_to(root.parents[1] / "blobs")
    if not (real.is_relative_to(root) or in_cache):
        raise ModelError(
            f"{file.name} is a link that leads out of the folder, to {real}",
            where=where,
            expected="files of the model's own: what they hold is copied into what is trained",
            fix="copy the file itself there, if it belongs to the model",
        )
    if not (real.is_file() or file.name == TEMPLATES):
        raise ModelError(f"{file.name} is no file", where=where, fix="put the file itself there, or nothing")
    return file


def check_sealed(folder: Path, where: str, *, weights: bool) -> None:
    """A folder that strop wrote is as strop wrote it; files that are not there any more do not count.

    Args:
        weights: compare the weights, and nothing else; or else everything else.

    Raises:
        ModelError: a file has another content than its MANIFEST.json says.
    """
    if not _is_ours(folder / MANIFEST):
        return
    try:
        manifest = read_manifest(folder)
        there = {
            name: entry
            for name, entry in manifest.files.items()
            if os.path.lexists(folder / name) and name.endswith(".safetensors") is weights
        }
        verify_listed(folder, there)
    except Damaged as damage:
        raise ModelError(
            f"it is not what was written: {damage}",
            where=where,
            expected=f"the files that {MANIFEST} lists, unchanged",
            fix=f"copy the folder again; if you have changed it yourself, remove {folder / MANIFEST}",
        ) from damage


def _is_ours(manifest: Path) -> bool:
    try:
        with manifest.open("rb") as file:
            text = file.read(1 << 24)
    except OSError:
        return False
    return any(key in text for key in (b'"manifest_sha256"', b'"identity"'))


def check_numbers(config: Mapping[str, Any], where: str) -> None:
    """Refuse numbers that no model has, before anything is built from them: layers and experts without end, and
    positions that mean nothing.

    Raises:
        ModelError: a number is out of its range.
    """
    for key, value in _numbers(config):
        expected = _wrong(key, value)
        if expected is not None:
            words = f"{value:,}" if abs(value) < 10**18 else "beyond all bounds"
            raise ModelError(
                f"config.json: {key} is {words}",
                where=where,
                expected=expected,
                fix="download or copy the file again",
            )


def _wrong(key: str, value: float) -> str | None:
    """What is expected of a number that is none of its kind; None where it is one, or may be anything."""
    if key in _LAYERS or key in _EXPERTS:
        least, most = (1, MOST_LAYERS) if key in _LAYERS else (0, MOST_EXPERTS)
        return None if least <= value <= most else f"a number from {least} to {most:,}"
    if key in _LENGTHS:
        return None if value >= 1 else "a number of tokens, at least 1"
    if key in _POSITIVE:
        return None if 0 < value < math.inf else "a number above 0"
    return None


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif is_number(value):
            yield key, value
