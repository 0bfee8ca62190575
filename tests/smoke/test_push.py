"""`strop push` to a server of the test's own."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from strop.cli import main
from strop.config.layers import load_config
from strop.errors import ConfigError, ModelError
from strop.manifest import seal
from strop.named_models import check_converts, check_named
from strop.policy.model.adapter_base import saved_model
from strop.push import _check_weights

TOKEN = "hf_" + "a1B2c3D4e5" * 3


class Hub:
    """A hub that takes files as they are in a commit. refuses: the status of every answer, if not 0."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = 0
        self.tokens: set[str] = set()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return {"url": f"{self.address}/me/model"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.address}/me/model/commit/1", "commitOid": "1", "pullRequestUrl": None}
        return {"errors": [], "warnings": []}  # the check of the card's metadata

    address = ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization") or "")
            status = hub.refuses or 200
            content = json.dumps({"error": "no"} if hub.refuses else hub.answer(self.path.split("?")[0], body)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Not to standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_whole_model_is_pushed_as_it_is(runs: Any, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    final = runs(max_steps=1).path / "final"
    assert main(["push", str(final.parent), "--repo", "me/model"]) == 0
    assert capsys.readouterr().out == f"{hub.address}/me/model\n"
    (made,) = hub.made
    assert made["name"] == "model" and made.get("private", made.get("visibility")) in (True, "private")
    assert f"Bearer {TOKEN}" in hub.tokens
    there = {p.name: p.read_bytes() for p in final.iterdir() if p.name != "MANIFEST.json"}
    assert hub.files == there
    private = str(Path(final).parents[2]).encode()
    assert not any(private in content or TOKEN.encode() in content for content in hub.files.values())


def test_an_adapter_of_a_local_base_needs_the_base_s_id(
    runs: Any, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(max_steps=1, r=4).path
    before = {p.name: p.read_bytes() for p in (run / "final").iterdir()}
    assert main(["push", str(run), "--repo", "me/model"]) == 1
    assert "--base OWNER/NAME" in capsys.readouterr().err and not hub.files
    assert main(["push", str(run), "--repo", "me/model", "--base", "org/base", "--public"]) == 0
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert b"base_model: org/base" in hub.files["README.md"]
    assert hub.files["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert hub.made[0].get("private", hub.made[0].get("visibility")) in (False, "public")
    assert {p.name: p.read_bytes() for p in (run / "final").iterdir()} == before


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_one_message_and_loses_nothing(
    runs: Any, hub: Hub, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(max_steps=1).path
    before = {p.name: p.read_bytes() for p in (run / "final").iterdir()}
    hub.refuses = status
    assert main(["push", str(run), "--repo", "me/model"]) == 1
    said = capsys.readouterr().err
    assert "it could not be uploaded" in said and "hf auth login" in said and TOKEN not in said
    assert "Traceback" not in said
    assert {p.name: p.read_bytes() for p in (run / "final").iterdir()} == before


def test_what_is_no_model_is_not_pushed(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path), "--repo", "me/model"]) == 1
    assert "there is no finished model" in capsys.readouterr().err and not hub.made
    assert main(["push", str(tmp_path)]) == 1
    assert "--repo is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("named", "base", "words"),
    [
        ("../bases/llama", None, "by a folder of this computer"),
        ("bases/8b/llama", None, "by a folder of this computer"),
        ("org/base", "/models/base", "--base /models/base is no id"),
        (None, "org/base", "a whole model, which has no base"),
    ],
)
def test_a_base_that_nobody_else_finds_is_not_published(
    named: str | None, base: str | None, words: str, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"base_model_name_or_path": named}
    (tmp_path / ("config.json" if named is None else "adapter_config.json")).write_text(json.dumps(settings))
    assert main(["push", str(tmp_path), "--repo", "me/model", *(() if base is None else ("--base", base))]) == 1
    assert words in capsys.readouterr().err and not hub.made


def test_what_is_damaged_is_not_pushed(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("{", "[]", '{"base_model_name_or_path"'):
        (tmp_path / "adapter_config.json").write_text(content)
        assert main(["push", str(tmp_path), "--repo", "me/model"]) == 1
        assert "adapter_config.json" in capsys.readouterr().err and not hub.made
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"weights of a run")
    seal(tmp_path, 0, {})
    weights.write_bytes(b"weights of")
    assert main(["push", str(tmp_path), "--repo", "me/model"]) == 1
    assert "it is not what was written" in capsys.readouterr().err and not hub.made


@pytest.mark.share(3)
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", "model.safetensors is damaged"),
        ("of another model", "weights have another shape than config.json says, the first is"),
        ("no weights", "there are no weights"),
        ("truncated adapter", "adapter_model.safetensors is damaged"),
        ("adapter of numbers that are none", "holds NaN or infinity"),
        ("adapter of another rank", "has the rank 4"),
        ("a model as an adapter", "it holds no weights of an adapter"),
        ("a run without its weights", "there is no model.safetensors"),
    ],
)
def test_weights_that_nobody_could_load_are_not_pushed(
    what: str, words: str, runs: Any, hub: Hub, make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    is_adapter = "adapter" in what
    folder = tmp_path / "model"
    shutil.copytree(runs(max_steps=1, **({"r": 4} if is_adapter else {})).path / "final", folder)
    if "run" not in what.split():
        (folder / "MANIFEST.json").unlink()
    weights = folder / ("adapter_model.safetensors" if is_adapter else "model.safetensors")
    config = folder / "adapter_config.json"
    if "truncated" in what:
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "adapter of numbers that are none":
        save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights)
    elif what == "adapter of another rank":
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 8}))
    elif "with" in what or "no" in what.split():
        weights.unlink()
    else:
        make_model(hidden_size=64).save_pretrained(tmp_path / "other")
        shutil.copyfile(tmp_path / "other/model.safetensors", weights)
    base = ("--base", "org/base") if is_adapter else ()
    assert main(["push", str(folder), "--repo", "me/model", *base]) == 1
    assert words in capsys.readouterr().err and not hub.made and not hub.files


def test_the_model_of_the_working_directory(
    model_dir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model_dir)
    assert main(["push", ".", "--repo", "me/model"]) == 0, capsys.readouterr().err
    assert "model.safetensors" in hub.files
    for given in (".", "./"):
        check_named(given)
        check_converts(given, "consolidated")
        assert saved_model(given).huggingface_id == os.getcwd()


def test_weights_of_experts_have_the_rank_for_each(tmp_path: Path) -> None:
    """As peft saves what lora.target_parameters names."""
    experts = "base_model.model.model.layers.0.mlp.experts"
    names = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **names}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    layer = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 8)}
    fused = {f"{experts}.lora_A.weight": torch.ones(16, 8), f"{experts}.base_layer.lora_A.weight": torch.ones(16, 8)}
    save_file({**layer, **fused}, tmp_path / "adapter_model.safetensors")
    _check_weights(tmp_path, "here")
    save_file({name: torch.ones(3, 8) for name in layer} | fused, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="has the rank 3"):
        _check_weights(tmp_path, "here")


PUSHED = {"training.push_to_hub": True, "training.max_steps": 1}


def test_training__push_to_hub(runs: Any, hub: Hub) -> None:
    made = pushed_by_a_run({}, runs, hub)
    assert (made.get("organization"), made["name"]) == (None, "run") and is_private(made)


def test_training__hub_model_id(runs: Any, hub: Hub) -> None:
    made = pushed_by_a_run({"training.hub_model_id": "me/model"}, runs, hub)
    assert (made["organization"], made["name"]) == ("me", "model") and is_private(made)


def test_training__hub_private_repo(runs: Any, hub: Hub) -> None:
    assert not is_private(pushed_by_a_run({"training.hub_private_repo": False}, runs, hub))


def pushed_by_a_run(keys: dict[str, Any], runs: Any, hub: Hub) -> dict[str, Any]:
    """What the hub was asked to make, by a run that has uploaded its model."""
    run = runs({**PUSHED, **keys}, fresh=True)
    assert hub.files == {p.name: p.read_bytes() for p in (run.path / "final").iterdir() if p.name != "MANIFEST.json"}
    (made,) = hub.made
    return made


def is_private(made: dict[str, Any]) -> bool:
    found = made.get("private", made.get("visibility"))
    assert found in (True, "private", False, "public")
    return found in (True, "private")


@pytest.mark.share(1)
@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_failed_upload_ends_no_run_and_is_told_with_the_command(
    status: int, runs: Any, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.refuses = status
    run = runs({**PUSHED, "training.hub_model_id": "me/model", "training.hub_private_repo": False}, fresh=True)
    assert "the run is complete, and its model was not uploaded" in caplog.text and TOKEN not in caplog.text
    (command,) = (r.getMessage() for r in caplog.records if "to upload it: strop " in r.getMessage())
    hub.refuses = 0
    assert main(shlex.split(command.partition("to upload it: strop ")[2])) == 0
    assert not is_private(hub.made[-1])
    assert hub.files == {p.name: p.read_bytes() for p in (run.path / "final").iterdir() if p.name != "MANIFEST.json"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora.enabled": True}, "where nobody else finds it"),
        ({"training.hub_model_id": "a/b/c"}, "a hub takes no such name"),
        ({"models.0.name": "a model"}, "a hub takes no such name"),
    ],
)
def test_an_upload_that_cannot_be_is_refused_before_the_run(
    keys: dict[str, Any], said: str, runs: Any, hub: Hub
) -> None:
    with pytest.raises(ConfigError, match=said):
        runs({**PUSHED, **keys}, fresh=True)
    assert not hub.made


def test_without_a_login_or_a_network_a_run_that_uploads_is_refused(
    runs: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="there is no login for the hub"):
        runs(PUSHED, fresh=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        runs(PUSHED, fresh=True)
    with pytest.raises(ConfigError, match="nothing is uploaded"):
        load_config(overrides={"models": [{"huggingface_id": "org/a"}], "training.hub_model_id": "me/model"})
