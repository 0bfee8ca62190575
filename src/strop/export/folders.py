"""What an export copies and where it writes: a folder that nothing else is in. Floor 6."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from strop.config.sections import ModelSection
from strop.disk import ensure_space, refuse_in_the_way, unusable
from strop.durable import published
from strop.errors import CheckpointError
from strop.policy.model.folder import GENERATION, PROCESSOR_FILES, copy_files, fetch, place_of, source_of
from strop.policy.model.folder_safety import TEMPLATES

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
)
"""What tokenizers of transformers consist of; a model has some of them, and the templates of `templates`."""
SMALL_FILES = 2**24
"""Bytes for all files but the weights, at most."""


def check_output(target: Path, sources: Sequence[str]) -> None:
    """Refuse a folder that something is in, or that is one of `sources`, which are read.

    Raises:
        CheckpointError: it cannot be written, or holds files.
    """
    refuse_in_the_way(target, "--output-dir")
    real = Path(os.path.realpath(target))
    for source in sources:
        if os.path.isdir(source) and real == Path(os.path.realpath(source)):
            raise CheckpointError("it is the folder that is read", where=str(target), fix="choose another --output-dir")
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(
            f"the folder is in use: it holds {min(p.name for p in target.iterdir())}",
            where=str(target),
            expected="a folder that is not there yet, or is empty",
            fix="choose another --output-dir, or remove the folder",
        )


def check_room(target: Path, weights: int) -> None:
    """Refuse a folder on a disk that is too full.

    Args:
        weights: bytes of all weights that are to be written.

    Raises:
        SaveError: there is no room for them and the small files beside them.
    """
    ensure_space(target, weights + SMALL_FILES, "make room, or choose an --output-dir on another disk")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` once the block ends; if the block raises, nothing is left.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with published(target) as folder:
            yield folder
    except OSError as error:
        raise unusable(target, error, "--output-dir") from error


def templates(source: str, revision: str | None = None) -> list[str]:
    """The files of the chat templates that a tokenizer has beside its default one, such as one for tools."""
    if os.path.isdir(source):
        found = [path.stem for path in Path(source, TEMPLATES).glob("*.jinja")]
    else:
        from transformers.utils.hub import list_repo_templates  # slow to import, and needed for the hub alone

        try:
            found = list_repo_templates(source, local_files_only=constants.HF_HUB_OFFLINE, revision=revision)
        except (OSError, ValueError):  # as `fetch` has it: none can be had
            found = []
    return sorted(f"{TEMPLATES}/{name.removesuffix('.jinja')}.jinja" for name in found)


def copy_tokenizer(model: ModelSection, target: Path) -> None:
    """The tokenizer and the generation settings of an adapter, which a run saves beside it; else those of its base."""
    assert model.adapter is not None
    where = place_of(model)
    adapter, base = source_of(model.adapter), source_of(model.huggingface_id)
    has_own = fetch(adapter, "tokenizer.json", None, where, optional=True) is not None
    source, revision = (adapter, None) if has_own else (base, model.revision)
    copy_files((*TOKENIZER_FILES, *templates(source, revision)), source, revision, where, target)
    copy_files([*PROCESSOR_FILES, GENERATION], base, model.revision, where, target)
    copy_files([GENERATION], adapter, None, where, target)  # in place of the base's
