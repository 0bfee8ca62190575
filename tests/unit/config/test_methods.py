"""Dead settings: what a method or a variant of it does not read is refused, with what it does read."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from strop.config import METHODS, load_config, to_yaml
from strop.config.methods import NEUTRAL, DpoSettings, LossType, MethodSettings, Readers, is_neutral
from strop.config.schema import SECTIONS
from strop.errors import ConfigError
from variants import NEEDED, SETTINGS
from variants import name as label

KEYS = {name: key for name, key in SECTIONS["post_training"].items() if name != "method"}


def telling(name: str) -> list[Any]:
    """Values of a setting that mean something: every choice or switch, and numbers within the range."""
    key = KEYS[name]
    candidates: list[Any] = list(key.choices) if key.choices else [True, False] if bool in key.kinds else []
    if name in ("ref_model_id", "teacher_model_id"):
        candidates = ["org/model"]
    if int in key.kinds:
        candidates = [1, 20]
    if float in key.kinds:
        candidates = [0.0, 0.05, 0.1, 0.3, 0.5, 1.0, 2.0]
    return [v for v in candidates if not is_neutral(name, v) and admitted(name, v)]


def admitted(name: str, value: Any) -> bool:
    (owner, *_) = KEYS[name].methods
    try:
        METHODS[owner].model_validate({"method": owner, name: value})
    except ValidationError as error:
        return "does not read it" in str(error)
    return True


def test_every_setting_has_a_telling_value() -> None:
    assert all(telling(name) for name in KEYS)


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_every_other_method_is_refused(method: str) -> None:
    own = METHODS[method].model_fields
    for name in KEYS.keys() - own.keys():
        for value in telling(name):
            with pytest.raises(ValidationError) as refusal:
                METHODS[method].model_validate({"method": method, name: value})
            message = str(refusal.value)
            assert f"{name} is {value!r}, but method {method} does not read it" in message
            assert f"the settings of {method}: {', '.join(n for n in own if n != 'method')}" in message
        assert METHODS[method].model_validate({name: None}) == METHODS[method]()


VARIANTS = [(m, name, who) for m, settings in METHODS.items() for name, who in settings.READ_BY.items()]


@pytest.mark.parametrize(("method", "name", "readers"), VARIANTS, ids=lambda x: str(x)[:20])
def test_every_setting_that_a_variant_does_not_read_is_refused(method: str, name: str, readers: Readers) -> None:
    cls = METHODS[method]
    default = cls.model_fields[name].default
    most = min((bound.le for bound in cls.model_fields[name].metadata if hasattr(bound, "le")), default=None)
    values = [v for v in telling(name) if most is None or v <= most]  # a name may have other bounds elsewhere
    for variant in KEYS[readers.setting].choices or (None, *telling(readers.setting)):
        base = {"method": method, readers.setting: variant, **NEEDED.get(variant, {})}
        for value in values:
            if variant in readers.values if readers.values else variant is not None:
                assert getattr(cls.model_validate({**base, name: value}), name) == value
            elif value != default:
                with pytest.raises(ValidationError, match=rf"{readers.setting} {variant or 'null'} does not read it"):
                    cls.model_validate({**base, name: value})


def test_the_readers_exist() -> None:
    for settings in METHODS.values():
        for name, readers in settings.READ_BY.items():
            assert name in settings.model_fields
            assert set(readers.values) <= set(KEYS[readers.setting].choices)
    assert set(NEUTRAL) <= set(KEYS)


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_what_a_loss_reads_is_named(loss_type: str) -> None:
    unread = DpoSettings(loss_type=loss_type, **NEEDED.get(loss_type, {})).unread()  # type: ignore[arg-type]
    for name in unread:
        (value, *_) = [v for v in telling(name) if v != DpoSettings.model_fields[name].default]
        with pytest.raises(ConfigError) as refusal:
            DpoSettings(loss_type=loss_type, **{**NEEDED.get(loss_type, {}), name: value})  # type: ignore[arg-type]
        listed = str(refusal.value).partition(f"the settings of dpo with {unread[name].setting}")[2].split("\n")[0]
        assert listed and not any(dead in listed.split(": ")[1].split(", ") for dead in unread if dead != name)


@pytest.mark.share(40)
@pytest.mark.parametrize("settings", SETTINGS, ids=label)
def test_a_resolved_configuration_reproduces_its_settings(settings: MethodSettings, tmp_path: Any) -> None:
    config = load_config(overrides={"models": [{"huggingface_id": "org/model"}], "post_training": settings})
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml").post_training == settings


@pytest.mark.parametrize("algorithm", ["maxrl", "gdpo"])
def test_a_divergence_in_the_reward_is_refused_where_the_advantage_cannot_have_it(algorithm: str) -> None:
    keys = {"method": "grpo", "algorithm": algorithm, "kl_in": "reward"}
    with pytest.raises(ConfigError, match=f"kl_in is reward, and advantage {algorithm}"):
        METHODS["grpo"](**keys, beta=0.1)
    METHODS["grpo"](**keys)  # without one, there is nothing to take off
    METHODS["grpo"](**{**keys, "kl_in": "loss"}, beta=0.1)
