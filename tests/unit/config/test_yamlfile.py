"""YAML as configurations use it: what scalars mean, what is refused and where, and that written values read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yaml import SafeLoader

from strop.config import yamlfile
from strop.config.yamlfile import MAX_BYTES, MAX_DEPTH, parse, parse_value, read_file, scalar, write_value
from strop.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("1e-5", 1e-5),
        ("5.0e-7", 5e-7),
        ("1E5", 1e5),
        (".5", 0.5),
        ("2.", 2.0),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # text in YAML 1.2 though YAML 1.1 reads a boolean, an octal, a sexagesimal, a date
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("012", "012"),
        ("0o17", "0o17"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("nan", "nan"),
        ("infinity", "infinity"),
        ("1e", "1e"),
        ("--1", "--1"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = scalar(text)
    assert found == value
    assert type(found) is type(value)
    assert parse(f"key: {text}\n".encode(), "f").data == {"key": value}


def test_infinity_and_nan_are_floats_for_the_schema_to_refuse() -> None:
    assert scalar(".inf") == math.inf
    assert scalar("-.inf") == -math.inf
    assert math.isnan(scalar(".nan"))  # type: ignore[arg-type]


def test_quoted_scalars_are_text() -> None:
    assert parse(b"a: '1'\nb: \"true\"\nc: |\n  x\n", "f").data == {"a": "1", "b": "true", "c": "x\n"}


def test_every_key_and_element_has_its_line() -> None:
    text = b"# comment\nmodels:\n  - name: a\n    huggingface_id: b\n\n  - name: c\ntraining: {seed: 1,\n  beta: 2}\n"
    assert parse(text, "f").lines == {
        ("models",): 2,
        ("models", 0): 3,
        ("models", 0, "name"): 3,
        ("models", 0, "huggingface_id"): 4,
        ("models", 1): 6,
        ("models", 1, "name"): 6,
        ("training",): 7,
        ("training", "seed"): 7,
        ("training", "beta"): 8,
    }


@pytest.mark.parametrize(
    ("end", "bom"), [(b"\n", b""), (b"\r\n", b""), (b"\n", b"\xef\xbb\xbf"), (b"\r\n", b"\xef\xbb\xbf")]
)
def test_line_ends_and_bom_change_nothing(end: bytes, bom: bytes) -> None:
    document = parse(bom + b"a: 1" + end + b"b:" + end + b"  c: x" + end, "f")
    assert document.data == {"a": 1, "b": {"c": "x"}}
    assert document.lines["b", "c"] == 3


HOSTILE: dict[str, tuple[bytes, str, str]] = {
    # text, where, a word of the message
    "empty": (b"", "f", "empty"),
    "only a comment": (b"# nothing\n\n", "f", "empty"),
    "null": (b"null\n", "f", "empty"),
    "a list": (b"- a\n- b\n", "f", "list"),
    "a scalar": (b"hello\n", "f", "single value"),
    "python tag": (b"a: 1\nb: !!python/object/apply:os.system ['touch PWNED']\n", "f:2", "tag"),
    "standard tag": (b"a: !!str 1\n", "f:1", "tag"),
    "own tag": (b"a: !thing 1\n", "f:1", "tag"),
    "tagged key": (b"!!str a: 1\n", "f:1", "tag"),
    "tagged mapping": (b"a: !!map {}\n", "f:1", "tag"),
    "alias": (b"a: &x [1]\nb: *x\n", "f:1", "anchor"),
    "undefined alias": (b"b: *x\n", "f:1", "anchor"),
    "billion laughs": (b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n", "f:1", "anchor"),
    "duplicate key": (b"a: 1\nb: 2\na: 3\n", "f:3", "twice; first on line 1"),
    "duplicate inner key": (b"t:\n  a: 1\n  a: 1\n", "f:3", "t.a is given twice"),
    "duplicate in quotes": (b"a: 1\n'a': 2\n", "f:2", "twice"),
    "depth 10k": (b"a: " + b"[" * 10_000, "f:1", "nesting"),
    "depth 200 in blocks": (b"".join(b" " * i + b"a:\n" for i in range(200)), f"f:{MAX_DEPTH + 1}", "nesting"),
    "tab": (b"a:\n\tb: 1\n", "f:2", "tab"),
    "NUL": (b"a: 1\nb: \0\n", "f:2", "NUL"),
    "never closed": (b"a: 1\nb: [\n", "f:3", "YAML"),
    "UTF-16": ("a: 1\n".encode("utf-16"), "f", "UTF-16"),
    "UTF-16 without BOM": ("a: 1\n".encode("utf-16-le"), "f:1", "NUL"),
    "UTF-32": ("a: 1\n".encode("utf-32"), "f", "UTF-16"),
    "invalid UTF-8": (b"a: 1\nb: \xff\n", "f:2", "UTF-8"),
    "latin-1": ("a: caf\u00e9\n".encode("latin-1"), "f:1", "UTF-8"),
    "control character": (b"a: 1\nb: \x07\n", "f:2", "character"),
    "half a surrogate pair": (b"a: \xed\xa0\x80\n", "f:1", "UTF-8"),
    "two documents": (b"a: 1\n---\nb: 2\n", "f:2", "document"),
    "unclosed": (b"a: [1, 2\nb: 3\n", "f:2", "YAML"),
    "bad indentation": (b"a: 1\n  b: 2\n", "f:2", "YAML"),
    "a key that is a list": (b"? [1]\n: 2\n", "f:1", "key"),
    "huge": (b"a: " + b"x" * MAX_BYTES, "f", "larger"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_at_their_line(case: str) -> None:
    text, where, word = HOSTILE[case]
    with pytest.raises(ConfigError) as caught:
        parse(text, "f")
    assert caught.value.where == where
    assert word in str(caught.value)


def test_long_numbers_stay_text() -> None:
    assert scalar("1" * 5000) == "1" * 5000  # int() would refuse it


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="No such file") as caught:
        read_file(tmp_path / "none.yaml", "none.yaml")
    assert "other.yaml" in caught.value.fix
    with pytest.raises(ConfigError, match="folder"):
        read_file(tmp_path, "here")
    with pytest.raises(ConfigError, match="regular"):
        read_file(Path("/dev/null"), "/dev/null")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file(Path("a\0b"), "a?b")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(["", "~", "null", "yes", "1e-5", "012", "a: b", "# x", "- x", "[", " x "])
    | st.sampled_from(["\x7f", "\x85", "\u2028", "\ufeff", "\U0001f600"])
)


@given(SCALARS | st.lists(SCALARS, max_size=4))
def test_written_values_read_back(value: Any) -> None:
    text = f"key: {write_value(value)}  # comment\n"
    found = parse(text.encode(), "f").data["key"]
    assert found == value
    assert type(found) is type(value)
    assert parse_value(write_value(value), "f") == value


PIECES = (
    "a",
    "b: 1",
    "key:",
    ": ",
    "- ",
    "\n",
    "\n  ",
    "\n- ",
    "[",
    "]",
    "{",
    "}",
    ", ",
    "'",
    '"',
    "#",
    " # x",
    "\\n",
    "\t",
)
PIECES += (
    "&x ",
    "*x",
    "!t ",
    "| ",
    "> ",
    "? ",
    "---\n",
    "...\n",
    "%",
    "@",
    "~",
    "\u263a",
    "\ufeff",
    "\r\n",
    "1e3",
    "true",
)


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_the_parser_in_c_changes_nothing(text: str) -> None:
    def found() -> object:
        try:
            return repr(parse(text.encode(), "c.yaml"))
        except ConfigError as error:
            return str(error)

    with pytest.MonkeyPatch.context() as patch:
        fast = found()
        patch.setattr(yamlfile, "FAST", SafeLoader)
        assert found() == fast
