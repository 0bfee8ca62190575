"""What an upload needs, looked at before anything slow is imported or sent. Floor 2, no torch.

In: a run or a folder, and the name of a repository. Out: the folder that is uploaded, or why it cannot be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from strop.errors import ConfigError, ModelError, first_line
from strop.rundir import FINAL

ADAPTER = "adapter_config.json"


def finished_model(run: str) -> Path:
    """The folder of the model of a run, or a folder with a model or an adapter.

    Raises:
        ModelError: there is none.
    """
    place = Path(run).expanduser()
    folder = place / FINAL if (place / FINAL).is_dir() else place
    if not any((folder / name).is_file() for name in (ADAPTER, "config.json")):
        raise ModelError(
            "there is no finished model" if place.is_dir() else "there is no such folder",
            where=run,
            expected="a run folder with final/, or a folder with a model or an adapter",
            fix="let the run end, or go on with strop train --resume" if place.is_dir() else "check the path",
        )
    return folder


def bad_names(repo: str, where: str, fix: str) -> Iterator[ConfigError]:
    """Why a hub takes no repository of this name."""
    from huggingface_hub.errors import HFValidationError  # here, because what uploads nothing need not wait for it
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is only not declared

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        yield ConfigError(f"a hub takes no such name: {first_line(error)}", where=where, fix=fix)


def no_hub(where: str, later: str = "") -> Iterator[ConfigError]:
    """Why nothing can be uploaded from here, whatever it is. later: what to do without a hub."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield ConfigError("HF_HUB_OFFLINE is set, so nothing can be uploaded", where=where, fix=f"unset it{later}")
    elif get_token() is None:
        yield ConfigError("there is no login for the hub", where=where, fix=f"hf auth login, or set HF_TOKEN{later}")
