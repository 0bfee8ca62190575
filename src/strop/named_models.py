"""Models that a command names, looked at before anything slow is imported. Floor 3.

In: a word of the command line. Out: nothing, or why that is no model. It takes milliseconds and no torch. What is on
the hub, and what weights hold, is looked at when it is loaded.
"""

from __future__ import annotations

import os

from strop.config.sections import ModelSection
from strop.errors import ModelError
from strop.policy.model.adapter_base import adapter_of, saved_model
from strop.policy.model.consolidated_files import check_consolidated, consolidated_folder, consolidated_names
from strop.policy.model.folder import check_adapter, check_exists, check_files, source_of


def check_named(given: str) -> None:
    """Refuse what is no run, no adapter and no model.

    Raises:
        ModelError: there is no such folder, or files of it are missing.
    """
    if (folder := consolidated_folder(given)) is not None:
        check_consolidated(folder, str(folder))
        return
    check_exists(given, given)
    if os.path.isdir(source_of(given)):
        _check(saved_model(given))


def check_merges(given: str, base: str | None) -> None:
    """Refuse what is no adapter with a base. base: the one that is named beside it.

    Raises:
        ModelError: there is no such folder, it has no adapter, or its base is not there.
    """
    check_exists(given, f"adapter {given}")
    if os.path.isdir(source_of(given)):
        _check(adapter_of(given, base))


def check_converts(given: str, to: str) -> None:
    """Refuse what is not in the layout that is converted. to: `consolidated` or `hf`.

    Raises:
        ModelError: there is no such folder, it is an adapter, or in the other layout already.
    """
    if to == "hf":
        consolidated_names(given)
        return
    if consolidated_folder(given) is not None:
        raise ModelError("it has this layout already", where=given, fix="use it as it is, or --to hf")
    check_exists(given, f"model {given}")
    if not os.path.isdir(source_of(given)):
        return
    model = saved_model(given)
    check_whole(model, given)
    _check(model)


def check_whole(model: ModelSection, given: str) -> None:
    """Refuse an adapter, which cannot be converted.

    Raises:
        ModelError: it is one.
    """
    if model.adapter is not None:
        raise ModelError(
            "it is an adapter, which has no weights of its own to convert",
            where=given,
            expected="a whole model",
            fix="merge it first: strop merge ADAPTER --output-dir DIR",
        )


def _check(model: ModelSection) -> None:
    check_files(model)
    if model.adapter is not None:
        check_adapter(model)
