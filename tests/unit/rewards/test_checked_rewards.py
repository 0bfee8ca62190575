"""Rewards that check an answer: mathematics, JSON, and code that is run."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from strop.errors import ConfigError
from strop.rewards import lookup
from strop.rewards.calls import RewardCaller
from strop.rewards.lookup import find_reward
from strop.rewards.shipped import json_schema, python_tests

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None or importlib.util.find_spec("jsonschema") is None,
    reason="the extra `rewards` is not installed",
)


@needs_extra
def test_answers_are_equal_as_mathematics() -> None:
    """In the reward's own process, as in a run: math-verify limits its time by a signal."""
    caller = RewardCaller([("math_equal", {"column": "answer"})], 30.0)
    texts = ["so it is 1/2", r"thus \boxed{\frac{1}{2}}", "0.5", "#### 3", "no answer", "1,000", "4"]
    wanted = ["0.5", "1/2", r"\frac{2}{4}", "4", "4", "1000", ""]
    call = caller.values(0, {"completions": texts}, {"answer": wanted})
    caller.close()
    assert call.values == (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, None) and not call.error


@needs_extra
def test_json_is_what_the_schema_admits() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    texts = ['{"a": 1}', '```json\n{"a": 1}\n```', '{"a": "1"}', "{}", "a: 1", "[" * 100_000]
    assert json_schema(texts, {}, schema=schema) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert json_schema(["1", "1"], {"s": ['{"type": "integer"}', {"type": "string"}]}, column="s") == [1.0, 0.0]
    for wrong in ({"type": "integr"}, "{"):
        with pytest.raises(ConfigError, match="not a JSON schema"):
            json_schema(["1"], {"s": [wrong]}, column="s")
    with pytest.raises(ConfigError, match="neither a schema nor the column"):
        json_schema(["1"], {})


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "NEEDS", {"math_equal": "no_such_package_here"})
    with pytest.raises(ConfigError, match=r"no_such_package_here, which is not installed.*\n.*\[rewards\]"):
        find_reward("math_equal")


def test_code_is_run_only_where_that_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="runs code that the model wrote, and that is off"):
        python_tests(["x = 1"], {"tests": ["assert x == 1"]})


@pytest.mark.nightly
def test_the_share_of_tests_that_pass(tmp_path: Path) -> None:
    """And nothing that the code does gives it more: an early exit, another process, a file, a flood of text."""
    add = "def add(a, b):\n    return a + b\n"
    tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 4"]
    texts = {
        f"Here:\n```python\n{add}```\nthat is all": 0.5,
        add: 0.5,
        "import sys\nsys.exit(0)": 0.0,
        "import os\nos._exit(0)": 0.0,
        "while True: pass": 0.0,
        "x = bytearray(4 << 30)\n" + add: 0.0,
        f"print('x' * 50_000_000)\n{add}": 0.5,
        f"import os\nfor i in range(3, 64):\n    try: os.write(i, b'2\\n')\n    except OSError: pass\n{add}": 0.5,
        f"open({str(tmp_path / 'left')!r}, 'w').write('y' * (20 << 20))\n{add}": 0.0,
        "no code": 0.0,
    }
    found = python_tests(list(texts), {"tests": [tests] * len(texts)}, enabled=True, seconds=1.0)
    assert dict(zip(texts, found, strict=True)) == texts
    assert python_tests([add], {"tests": ["\n".join(tests[:1] * 2)]}, enabled=True) == [1.0]


@pytest.mark.parametrize("language", ["", "python", "python3", "python title=x", "python \r"])
def test_code_in_a_fence_is_found_whatever_stands_behind_it(language: str) -> None:
    text = f"First:\n```bash\npip install x\n```\nThen:\n```{language}\nx = 1\n```\nThat is all."
    assert python_tests([text], {"tests": ["assert x == 1"]}, enabled=True) == [1.0]
    assert json_schema([f"```{language}\n4\n```"], {}, schema={"type": "integer"}) == [1.0]


def test_what_the_code_starts_ends_with_it(tmp_path: Path) -> None:
    late = f"import time; time.sleep(1); open({str(tmp_path / 'late')!r}, 'w')"
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {late!r}])\n"
    assert python_tests([code], {"tests": ["pass"]}, enabled=True, seconds=5.0) == [1.0]
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()
