"""`strop push`: the finished model of a run, to a repository of a hub. Floor 6.

Through huggingface_hub, with its login (HF_TOKEN, or `hf auth login`) and its server (HF_ENDPOINT). What is in the run
folder is only read.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from strop.config import RunConfig
from strop.config.sections import ModelSection
from strop.errors import ModelError, StropError, foreign_errors
from strop.manifest import MANIFEST, carries_manifest, read_manifest
from strop.policy.model.adapter_files import read_weights
from strop.policy.model.adapter_settings import AGAIN, read_adapter
from strop.policy.model.folder import read_json
from strop.policy.model.folder_safety import check_sealed
from strop.policy.model.load import check_finite
from strop.policy.model.shape_check import check_same_shapes
from strop.redact import redact
from strop.uploads import ADAPTER, finished_model

log = logging.getLogger("strop")

BASE = "base_model_name_or_path"


def push(run: str, repo: str, *, private: bool = True, base: str | None = None) -> str:
    """Uploads `final/` of a run, or a model folder, in one commit. Returns where it is.

    Args:
        repo: OWNER/NAME, or NAME in the account that is logged in; made where it is not there.
        private: whether one that is made is private.
        base: the id of an adapter's base at the hub, where its configuration names a folder of this computer.

    Raises:
        ModelError: there is no model, its weights are not those that were written, or its base has no id.
        StropError: the hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi  # takes a while

    folder = finished_model(run)
    with _as_published(folder, base) as published, foreign_errors(lambda why: _failed(why, repo)):
        _check_weights(folder, run)
        api = HfApi(library_name="strop")
        made = api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=published,
            commit_message="Upload by strop push",
            ignore_patterns=[MANIFEST],
        )
    return str(done.commit_url).split("/commit/")[0]


def push_finished(config: RunConfig, model: ModelSection, run: Path) -> None:
    """Uploads the model of a run that has ended, where `training.push_to_hub` asks for it. A failure is a warning with
    the command that does it again."""
    training = config.training
    if not training.push_to_hub:
        return
    repo, private = training.hub_model_id or model.name, training.hub_private_repo
    try:
        place = push(str(run), repo, private=private)
    except StropError as error:
        again = f"strop push {shlex.quote(str(run))} --repo {repo}{'' if private else ' --public'}"
        log.warning("%s: the run is complete, and its model was not uploaded: %s", model.name, error.found)
        log.warning("%s: to upload it: %s", model.name, again)
    else:
        log.info("%s: uploaded to %s", model.name, place)


def _check_weights(folder: Path, run: str) -> None:
    """Refuse weights that nobody could load, before anything is sent. Those of a run are compared with what was
    written; of other models, only the headers are read.

    Raises:
        ModelError: they are not what was written; or missing, damaged, pickles, or of another model than the
            configuration beside them.
    """
    check_sealed(folder, run, weights=True)
    if carries_manifest(folder):
        listed = (name for name in read_manifest(folder).files if name.endswith(".safetensors"))
        if gone := [name for name in listed if not (folder / name).is_file()]:
            raise ModelError(f"there is no {gone[0]}", where=run, fix="copy the folder again, completely")
        return
    if not (folder / ADAPTER).is_file():
        check_same_shapes(ModelSection(huggingface_id=str(folder), name=folder.resolve().name))
        return
    _check_adapter(folder, run)


def _check_adapter(folder: Path, run: str) -> None:
    settings, weights = read_adapter(str(folder), run)
    stored = read_weights(weights, run)
    check_finite(stored, run)
    foreign = f"{weights.name} does not belong to {ADAPTER}: "
    if not any(name.startswith("base_model.") for name in stored):
        why, expected = "it holds no weights of an adapter", "tensors base_model..., as peft saves them"
        raise ModelError(foreign + why, where=run, expected=expected, fix=AGAIN)
    ranks = {settings.get("r"), *(settings.get("rank_pattern") or {}).values()}
    holders = [name.rpartition(".")[0] for name in settings.get("target_parameters") or ()]
    fused = tuple(f".{name}" if name else "" for name in holders)  # peft takes the name of the weight alone, too
    for name, tensor in stored.items():
        layer, of_a, _ = name.partition(".lora_A.weight")
        if not of_a or layer.removesuffix(".base_layer").endswith(fused):  # of experts: the rank times their number
            continue
        if tensor.shape[0] not in ranks:
            why, expected = f"{name} has the rank {tensor.shape[0]}", f"weights of the rank {settings.get('r')}"
            raise ModelError(foreign + why, where=run, expected=expected, fix=AGAIN)


@contextmanager
def _as_published(folder: Path, base: str | None) -> Iterator[Path]:
    """The folder, or for an adapter that is to name another base a copy that does."""
    file = folder / ADAPTER
    settings = read_json(file, str(folder)) if file.is_file() else {}
    if base is not None and not settings:
        raise ModelError(
            f"--base {base}: it is a whole model, which has no base", where=str(folder), fix="leave --base out"
        )
    named = base or settings.get(BASE)
    if base is not None and not _may_be_id(base):
        raise ModelError(f"--base {base} is no id", expected="the id of the base at the hub: OWNER/NAME")
    if base is None and isinstance(named, str) and (not _may_be_id(named) or os.path.exists(named)):
        raise ModelError(
            "the adapter names its base by a folder of this computer, where nobody else finds it",
            where=str(file),
            expected="the id of the base at the hub",
            fix="give it with --base OWNER/NAME; or merge the adapter (strop merge) and push the merged model",
        )
    if base is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="strop-push-") as place:
        copy = Path(place) / "model"
        shutil.copytree(folder, copy)
        (copy / ADAPTER).write_text(json.dumps({**settings, BASE: base}, indent=2) + "\n", encoding="utf-8")
        _name_base(copy / "README.md", base)
        yield copy


def _may_be_id(name: str) -> bool:
    """Whether a model at the hub may have this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is only not declared

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _name_base(card: Path, base: str) -> None:
    """Has the model card name the base, too."""
    from huggingface_hub import ModelCard

    if card.is_file():
        content = ModelCard.load(card)
        content.data.base_model = base
        content.save(card)


def _failed(why: str, repo: str) -> StropError:
    return StropError(
        f"it could not be uploaded: {redact(why)}",
        where=repo,
        fix="see that you are logged in (hf auth login, or HF_TOKEN) and may write there; the run is as it was, so "
        "the command can be given again",
    )
