"""Whatever stands in a configuration file: a RunConfig or a ConfigError, never anything else."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from strop.config import RunConfig, load_config, to_yaml
from strop.config.schema import KEYS, SECTIONS
from strop.errors import ConfigError

KEY_NAMES = [*(key.name for key in KEYS), *(section for section in SECTIONS if section), "preset", "<<"]
NAMES = st.sampled_from(KEY_NAMES) | st.text(max_size=5)
NUMBERS = ["012", "1e-5", "5e-7", "0", "-1", "1.5", ".nan", ".inf", "1e999", "9" * 40, "9" * 5000]
WORDS = ["", "null", "true", "yes", "dpo", "sft", "sigmoid", "hinge", "auto", "cpu", "org/model", "~", "/", "../.."]
ODD = ["'x'", '"\\0"', '"\\ud800"', "!!python/object/apply:os.system [id]", "&a 1", "*a", "${HOME}", "{}", "[1, a]"]
ODDER = ["[]", "{a: {b: c}}", "|", ">", "@", "%x", "[", "{", "'", "- 1", "a: b", "#"]
SCALARS = st.sampled_from([*NUMBERS, *WORDS, *ODD, *ODDER]) | st.text(max_size=12)
LINES = st.builds(
    lambda indent, dash, name, value: f"{'  ' * indent}{dash}{name}: {value}",
    st.integers(0, 3),
    st.sampled_from(["", "- "]),
    NAMES,
    SCALARS,
)
SENSIBLE = "models:\n  - huggingface_id: org/model\n"


@st.composite
def by_section(draw: st.DrawFn) -> str:
    """Known keys in their sections, with any value."""
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=6, unique_by=lambda key: key.dotted))
    text = SENSIBLE
    for section in dict.fromkeys(key.section for key in keys if key.section not in ("", "models")):
        text += f"{section}:\n" + "".join(f"  {k.name}: {draw(SCALARS)}\n" for k in keys if k.section == section)
    return text


def check(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_bytes(data)
        try:
            config = load_config(path)
        except ConfigError as error:
            assert str(error)
            str(error).encode()
            return
        assert isinstance(config, RunConfig)
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(path) == config


TEXTS = (
    by_section()
    | st.lists(LINES, max_size=12).map("\n".join)
    | st.lists(LINES, max_size=6).map(lambda lines: SENSIBLE + "\n".join(lines))
    | st.text(max_size=60)
)
ANY = TEXTS.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=60)
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settings(CALM, max_examples=100)
@given(ANY)
@example(b"models:\n  - huggingface_id: org/model\npost_training:\n  loss_type: {}\n")
def test_a_configuration_or_an_error(data: bytes) -> None:
    check(data)


@pytest.mark.nightly
@settings(CALM, max_examples=100_000)
@given(ANY)
def test_a_configuration_or_an_error_many_times(data: bytes) -> None:
    check(data)
