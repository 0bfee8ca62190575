"""Models in the layout that Meta publishes Llama in: `consolidated.NN.pth` beside `params.json`. Floor 2, no torch."""

from __future__ import annotations

import re
from pathlib import Path

from strop.errors import ModelError
from strop.policy.model.folder_safety import check_links

FIRST = "consolidated.00.pth"
PARAMS = "params.json"


def consolidated_folder(model_id: str) -> Path | None:
    """The folder of such a model, where a model is named by it or by one of its files. A folder that has a config.json
    too is one of transformers. None: it is none of these."""
    path = Path(model_id).expanduser()
    if re.fullmatch(r"consolidated\.\d+\.pth", path.name) and path.is_file():
        return path.parent
    is_one = (path / FIRST).is_file() and (path / PARAMS).is_file() and not (path / "config.json").exists()
    return path if is_one else None


def check_consolidated(folder: Path, where: str) -> None:
    """Refuse a folder without what training needs beside the weights.

    Raises:
        ModelError: there is no params.json, or no tokenizer that transformers reads.
    """
    for name in (PARAMS, "tokenizer.json"):
        if not (folder / name).is_file():
            raise ModelError(
                f"there is no {name} beside {FIRST}",
                where=where,
                expected=f"{FIRST}, {PARAMS}, tokenizer.json and tokenizer_config.json in one folder",
                fix="copy the tokenizer of the same model in transformers' layout into the folder"
                if name != PARAMS
                else "copy the file from where the weights come from",
            )


def consolidated_names(given: str) -> list[str]:
    """The names of the files with weights, in order.

    Raises:
        ModelError: there is no such folder, or a file of it is missing.
    """
    folder = Path(given)
    if not folder.is_dir():
        raise ModelError("there is no such folder", where=given, fix="check the path")
    check_links(folder, given)
    names = sorted(p.name for p in folder.iterdir() if re.fullmatch(r"consolidated\.\d+\.pth", p.name))
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(names))]
    if not names or names != wanted:
        missing = next((name for name in wanted if name not in names), FIRST)
        raise ModelError(
            f"there is no {missing}",
            where=given,
            expected="all files of the model, from 00 on",
            fix="copy what is missing; a folder of transformers needs no conversion",
        )
    if not (folder / PARAMS).is_file():
        raise ModelError(
            f"there is no {PARAMS}",
            where=given,
            expected="it stands beside the weights",
            fix="copy it from where the weights come from",
        )
    return names
