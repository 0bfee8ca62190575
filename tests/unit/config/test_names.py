"""Names as people write them: hints lead to keys that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from strop.cli import COMMANDS
from strop.cli.entry import dispatch
from strop.config import load_config
from strop.config.flags import ALIASES, split_flags
from strop.config.methods import METHODS
from strop.config.names import closest, nearest
from strop.config.other_tools import ABSENT, RENAMED
from strop.config.schema import KEYS, SECTIONS
from strop.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def test_every_name_of_another_tool_leads_to_a_key() -> None:
    keys = {key.dotted for key in KEYS}
    assert set(RENAMED.values()) <= keys
    assert not set(RENAMED) & {key.name for key in KEYS}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("gpu", "gpu-bf16"), ("cpuu", "cpu"), ("memory", "memory-efficient"), ("xyz", None), ("g", None)],
)
def test_the_closest_name(name: str, meant: str | None) -> None:
    assert closest(name, ["gpu-fp16-long", "gpu-bf16", "cpu", "memory-efficient"]) == meant


def test_what_is_absent_has_no_other_name() -> None:
    names = {key.name for key in KEYS} | set(SECTIONS) | set(METHODS) | set(RENAMED) | set(COMMANDS)
    assert not names & set(ABSENT)
    assert all(name == name.lower() and "-" not in name for name in (*ABSENT, *RENAMED))
    assert {name.rpartition(".")[0] for name in RENAMED} <= set(SECTIONS)


@pytest.mark.parametrize("name", RENAMED)
def test_a_name_of_another_tool_is_answered_with_its_key_wherever_it_stands(name: str) -> None:
    section, _, last = name.rpartition(".")
    places = [section] if section else ["", *SECTIONS]
    assert {nearest(last, place) for place in places} == {f"did you mean {RENAMED[name]}?"}
    if name in ALIASES:  # a flag, not a key
        return
    with pytest.raises(ConfigError) as flag:
        split_flags([f"--{name.replace('_', '-')}", "x"], [])
    assert flag.value.fix == f"did you mean --{RENAMED[name].replace('.N.', '.0.')}?"


def test_keys_that_are_named_instead_are_there() -> None:
    known = {key.dotted for key in KEYS} | {"logging.report_to"}
    for instead in ABSENT.values():
        named = re.findall(r"\b(?:training|dataset|lora|logging|post_training|models)\.[a-z_0-9]+", instead)
        assert set(named) <= known, instead
    for page in set(re.findall(r"docs/[a-z-]+\.md", "".join(ABSENT.values()))):
        assert (ROOT / page).is_file()


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_absent_is_never_answered_with_a_key_of_like_spelling(name: str) -> None:
    for section in ("", "training", "lora", "models"):
        assert nearest(name, section) == ABSENT[name]
    with pytest.raises(ConfigError) as flag:
        split_flags([f"--{name.replace('_', '-')}", "x"], [])
    assert flag.value.fix == ABSENT[name]
    with pytest.raises(ConfigError) as command:
        dispatch([name])
    assert command.value.fix == ABSENT[name]


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("post_training.method", "dapo", ABSENT["dapo"]),
        ("post_training.method", "PPO", ABSENT["ppo"]),
        ("post_training.method", "hinge", "write method: dpo and loss_type: hinge"),
        ("post_training.loss_type", "simpo", "write method: simpo"),
        ("post_training.loss_type", "kto", "write method: kto"),
        ("post_training.loss_type", "kto_pear", "did you mean kto_pair?"),
        ("logging.report_to", ["neptune"], f"remove neptune: {ABSENT['neptune']}"),
    ],
)
def test_values_that_stand_elsewhere(key: str, value: object, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides={"models": [{"huggingface_id": "org/a"}], "post_training.method": "dpo", key: value})
    assert f"to do:    {fix}" in str(caught.value)


def test_a_method_as_loss_type_without_a_method() -> None:
    with pytest.raises(ConfigError, match="to do:    write method: simpo"):
        load_config(overrides={"models": [{"huggingface_id": "org/a"}], "post_training.loss_type": "simpo"})


def test_names_for_several_devices_lead_to_what_starts_several_processes() -> None:
    for name in ("nproc_per_node", "num_gpus", "local_rank", "accelerate", "deepspeed", "fsdp_config"):
        assert "gpu.device_ids" in ABSENT[name] and "torchrun" in ABSENT[name]
    assert "gpu.device_ids" in {key.dotted for key in KEYS}
