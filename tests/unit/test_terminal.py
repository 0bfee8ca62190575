"""What steers a terminal does not reach one, whatever a file holds that is quoted; nor does what libraries say."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop import cli
from strop.data.read.row import RowRefused
from strop.data.shapes.examples import RowColumns, to_example
from strop.terminal import escaped, log_to_terminal, session
from strop.types import Origin

NASTY = "\x1b[2J\x1b]0;title\x07\r\x08\x9b31m\u202egnp"


def is_tame(text: str) -> bool:
    return (
        all(char in "\n\t" or (char >= " " and not "\x7f" <= char <= "\x9f") for char in text) and "\u202e" not in text
    )


@given(st.text())
def test_an_escaped_text_steers_nothing(text: str) -> None:
    assert is_tame(escaped(text)) and escaped(escaped(text)) == escaped(text)


@pytest.mark.parametrize("text", ["plain\n\ttext", "Grüße, 你好, مرحبا 👩‍👩‍👧", "C:\\new\\x1b", "\ud800"])
def test_ordinary_text_stays(text: str) -> None:
    assert escaped(text) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_log_is_escaped(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", made := stream())
    monkeypatch.setenv("TERM", "dumb")  # no colours of our own
    with session():
        log_to_terminal("info")
        logging.getLogger("strop").info("a row says %s", NASTY)
        logging.getLogger("strop").warning(NASTY)
    assert is_tame(made.getvalue()) and r"\x1b[2J" in made.getvalue()


def test_only_the_level_of_a_log_line_is_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", made := Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with session():
        log_to_terminal("info")
        logging.getLogger("strop").info("run: GET 11 of 12 in /a/b/c, true, 'quoted', loss 0.5 -> 1e-4")
        logging.getLogger("strop").warning("run: 3 of 4")
    information, warning = made.getvalue().splitlines()
    assert information.rstrip() == "run: GET 11 of 12 in /a/b/c, true, 'quoted', loss 0.5 -> 1e-4"
    assert warning.rstrip() == "\x1b[33mwarning:\x1b[0m run: 3 of 4"


def test_complaints_that_quote_a_row_are_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {NASTY: 1},
        {"messages": [{"role": NASTY, "content": "x"}]},
        {"prompt": "q", "completion": [{"role": "assistant", "content": [{"type": NASTY}]}]},
        {"conversations": [{"from": NASTY, "value": "x"}]},
    ]
    for row in rows:

        def read(arguments: list[str], row: dict[str, Any] = row) -> int:
            origin = Origin(f"{NASTY}.jsonl", 1)
            with pytest.raises(RowRefused) as refusal:
                to_example(row, origin, "single", RowColumns())
            raise refusal.value.at(origin)

        monkeypatch.setattr("strop.cli.train.run", read)
        assert cli.main(["train"]) == 1
        text = capsys.readouterr().err
        assert is_tame(text) and "x1b[2J" in text


def test_a_file_s_name_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", "--input", f"{NASTY}.jsonl", "--output-dir", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert is_tame(text) and "there is no such file" in text


# ---- other libraries

SPEAK = """
import logging, strop.policy
logging.getLogger('bitsandbytes.backends').warning('no kernels')
{listens}
import strop.policy.model.adapters
{then}
"""
LISTEN = "logging.basicConfig(); logging.getLogger('peft.x').error('mine')"
CASES = [
    pytest.param("", LISTEN, id="nobody listens, then the caller does", marks=pytest.mark.nightly),
    pytest.param(LISTEN, "", id="the caller listens", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("listens", "then"), CASES)
def test_libraries_do_not_speak_in_strops_place(listens: str, then: str) -> None:
    """Nor does what they say when they are imported reach the terminal; a caller's own handlers get it. In the suite
    a whole run shows it (`test_runs.py::test_from_python_no_library_has_a_say`)."""
    code = SPEAK.format(listens=listens, then=then)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and done.stdout == ""
    said = [line for line in done.stderr.splitlines(keepends=True) if not listens or "peft.x" in line]
    assert "".join(said) == "ERROR:peft.x:mine\n"


def test_what_libraries_say_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    import strop.policy  # noqa: F401

    with caplog.at_level(logging.DEBUG, logger="strop"):
        logging.getLogger("bitsandbytes.backends.cpu").warning("no kernels for %s", "gemm")
    assert ("strop", logging.DEBUG, "bitsandbytes.backends.cpu: no kernels for gemm") in caplog.record_tuples
