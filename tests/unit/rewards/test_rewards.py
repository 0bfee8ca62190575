"""The shipped rewards, and calls in a process apart."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strop.errors import ConfigError
from strop.rewards.calls import RewardCaller, check_rewards
from strop.rewards.shipped import NEEDS, SHIPPED, exact_match, format, length, regex
from strop.rewards.worker import GIVEN, call, find_rewards

THINKING = "<think>2 and 2</think>\n<answer>4</answer>"


def test_exact_match() -> None:
    texts = [" 4\n", "four", "4.0"]
    assert exact_match(texts, {"completion": ["4", "Four", 4]}) == [1.0, 0.0, 0.0]
    assert exact_match(texts, {"answer": ["4", "Four", "4"]}, column="answer", ignore_case=True) == [1.0, 1.0, 0.0]
    with pytest.raises(ConfigError, match="no column 'answer'"):
        exact_match(texts, {"completion": ["4"] * 3}, column="answer")


def test_regex() -> None:
    texts = ["so #### 4", "first #### 5, no: #### 4", "4"]
    assert regex(texts, {}, pattern="####") == [1.0, 1.0, 0.0]
    assert regex(texts, {"answer": ["4", "4", "4"]}, pattern=r"#### (\d+)", column="answer") == [1.0, 1.0, 0.0]
    assert regex(texts, {"answer": ["4", "5", "4"]}, pattern=r"\d+", column="answer") == [1.0, 0.0, 1.0]


def test_format() -> None:
    assert format([THINKING, f"{THINKING} and more", "4", f"\n{THINKING} "]) == [1.0, 0.0, 0.0, 1.0]
    assert format(["ab", "b"], pattern="a.") == [1.0, 0.0]


def test_length_is_the_soft_penalty_of_the_paper() -> None:
    """Eq. 13: 0 up to L_max - L_cache, linear between, -1 from L_max on."""
    assert length([10, 80, 90, 95, 100, 300], max_length=100, cache=20) == [0.0, 0.0, -0.5, -0.75, -1.0, -1.0]
    with pytest.raises(ConfigError, match="cache is 200"):
        length([1], max_length=100, cache=200)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(
        "import os, time\n"
        "def where(completions): return [float(os.getpid())] * len(completions)\n"
        "def hangs(completions): time.sleep(60)\n"
        "def dies(completions): os._exit(3)\n"
        "def exits(completions):\n"
        "    import atexit, sys\n"
        "    atexit.register(time.sleep, 0.3)\n"
        "    sys.exit(4)\n"
        "def copies(completions):\n"
        "    return [float(os.fork() != 0 or 7)] * len(completions)\n"
        "def takes(completions, prompts, *, factor): return [factor * len(p) for p in prompts]\n"
        "def fills(completions):\n"
        "    kept = bytearray(os.urandom(1) * (300 << 20))\n"
        "    time.sleep(60)\n"
        "def reserves(completions):\n"
        "    import mmap\n"
        "    reserved = [mmap.mmap(-1, 3 << 30) for _ in range(4)]\n"
        "    return [1.0] * len(completions)\n"
    )
    return path


def caller(own: Path, name: str, timeout: float = 20.0, **settings: Any) -> RewardCaller:
    return RewardCaller([(f"{own}:{name}", settings)], timeout)


def test_it_is_called_elsewhere_with_what_it_names(own: Path) -> None:
    calls = caller(own, "takes", factor=2)
    given = {"completions": ["x", "y"], "prompts": ["abc", "de"]}
    assert calls.values(0, given, {"more": [1, 2]}).values == (6.0, 4.0)
    calls.close()
    calls = caller(own, "where")
    (first,), (second,) = (calls.values(0, {"completions": ["x"]}).values for _ in range(2))
    assert first == second != os.getpid()
    calls.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "why"), [("hangs", "more than 0.3 seconds"), ("dies", "exit code 3")])
def test_a_process_that_is_lost_is_replaced(own: Path, name: str, why: str) -> None:
    calls = RewardCaller([(f"{own}:{name}", {}), (f"{own}:where", {})], 0.3)
    for _ in range(2):
        call = calls.values(0, {"completions": ["x", "y"]})
        assert call.values == (None, None) and why in call.error
        assert calls.values(1, {"completions": ["x"]}).values[0] is not None
    calls.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory another process uses")
def test_the_memory_that_is_used_is_limited_not_what_is_reserved(own: Path) -> None:
    """A model on a GPU reserves far more addresses than it uses memory."""
    calls = RewardCaller([(f"{own}:fills", {}), (f"{own}:reserves", {})], 30.0, memory=200 << 20)
    call = calls.values(0, {"completions": ["x"]})
    assert call.values == (None,) and call.error == "its process used more than 0.195 GiB of memory"
    assert calls.values(1, {"completions": ["x"]}).values == (1.0,)
    calls.close()


def test_it_ends_with_the_process_that_calls_it(own: Path) -> None:
    script = (
        "import os, sys\nfrom strop.rewards.calls import RewardCaller\n"
        f"caller = RewardCaller([({f'{own}:where'!r}, {{}})], 20.0)\n"
        "print(int(caller.values(0, {'completions': ['x']}).values[0]), flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    pid, until = int(done.stdout), time.monotonic() + 20
    while time.monotonic() < until:
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the process that calls rewards outlives the one that started it")


class Stubborn:
    def __float__(self) -> float:
        raise RuntimeError("no number")


class Silent(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError("no text")


async def _cancelled(completions: list[str]) -> list[float]:
    raise asyncio.CancelledError("given up")


def _silent(completions: list[str]) -> list[float]:
    raise Silent


@pytest.mark.parametrize(
    ("reward", "found"),
    [
        (lambda completions: "01", "it returned a str"),
        (lambda completions: b"01", "it returned a bytes"),
        (lambda completions: {0: 1.0, 1: 2.0}, "it returned a dict"),
        (lambda completions: {1.0, 2.0}, "it returned a set"),
        (lambda completions: 1.0, "not iterable"),
        (lambda completions: [Stubborn(), 1.0], "RuntimeError: no number"),
        (_silent, "Silent"),
        (_cancelled, "CancelledError: given up"),
    ],
)
def test_what_is_no_list_of_numbers_is_said(reward: Callable[..., Any], found: str) -> None:
    kind, said = call(reward, {"completions": ["a", "b"]}, {}, {})
    assert kind == "error" and found in said


@pytest.mark.parametrize("value", [10**400, 1e200, -1.7e308, math.inf, -math.inf, math.nan, None, "seven", 1j])
def test_what_no_float_can_be_squared_of_is_no_reward(value: Any) -> None:
    """Its deviation from the mean of a group would be infinite, and every advantage 0."""
    assert call(lambda completions: [value, 1e60], {"completions": ["a", "b"]}, {}, {}) == ("values", [None, 1e60])


@pytest.mark.parametrize(
    "values", [(0, 1), [Decimal("0"), Fraction(1)], [False, True], np.arange(2), torch.arange(2.0), iter([0, 1])]
)
def test_numbers_of_any_kind_are_rewards(values: Any) -> None:
    assert call(lambda completions: values, {"completions": ["a", "b"]}, {}, {}) == ("values", [0.0, 1.0])


def test_a_reward_may_use_up_what_it_is_given() -> None:
    def reward(completions: list[str], answer: list[int]) -> list[float]:
        values = [float(a) for a in answer]
        completions.clear()
        answer.clear()
        return values

    assert call(reward, {"completions": ["a", "b"]}, {"answer": [3, 4]}, {}) == ("values", [3.0, 4.0])


def test_a_copy_of_the_process_answers_nothing(own: Path) -> None:
    """Its answer would be taken for that of the next call."""
    calls = RewardCaller([(f"{own}:copies", {}), (f"{own}:where", {})], 20.0)
    for _ in range(2):
        assert calls.values(0, {"completions": ["x", "y"]}).values == (1.0, 1.0)
        assert calls.values(1, {"completions": ["x"]}).values != (1.0,)
        time.sleep(0.1)
    calls.close()


def test_a_process_that_takes_its_time_to_end_says_how_it_ended(own: Path) -> None:
    calls = RewardCaller([(f"{own}:exits", {})], 20.0)
    assert calls.values(0, {"completions": ["x"]}).error == "its process ended (exit code 4)"
    calls.close()


def test_settings_that_do_not_fit_are_an_error(own: Path) -> None:
    calls = caller(own, "takes", factr=2)
    assert "factr" in calls.values(0, {"completions": ["x"], "prompts": ["p"]}).error
    calls.close()


def test_a_setting_wins_over_a_column_of_its_name() -> None:
    given = {"completions": ["so 4", "5"]}
    columns = {"answer": ["4", "4"], "column": ["x", "y"], "pattern": ["z", "z"]}
    assert call(regex, given, columns, {"pattern": r"\d", "column": "answer"}) == ("values", [1.0, 0.0])


COLUMN_REWARDS = {
    "exact_match": ({}, "4", "4"),
    "math_equal": ({}, "2 + 2 = 4", "4"),
    "regex": ({"pattern": r"\d"}, "it is 4", "4"),
    "json_schema": ({}, "4", {"type": "integer"}),
    "python_tests": ({"enabled": True}, "x = 4", "assert x == 4"),
}
"""Every shipped reward with the setting `column`: its other settings, a completion, and the value of a column for which
that gets 1."""


def test_all_shipped_rewards_with_a_column_are_tried() -> None:
    taking = {name for name, function in SHIPPED.items() if "column" in inspect.signature(function).parameters}
    assert taking == set(COLUMN_REWARDS)


def names_of_arguments() -> list[tuple[str, str]]:
    taken = {name: [*inspect.signature(SHIPPED[name]).parameters, *GIVEN, "answer"] for name in COLUMN_REWARDS}
    return [(name, column) for name, columns in taken.items() for column in dict.fromkeys(columns)]


@pytest.mark.parametrize(("name", "column"), names_of_arguments())
def test_the_column_that_is_named_reaches_the_reward(name: str, column: str) -> None:
    """Whatever its name: also one of the reward's own parameters, and of what every reward is given."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    settings, text, wanted = COLUMN_REWARDS[name]
    given = {each: [text] if each == "completions" else ["-"] for each in GIVEN}
    assert call(SHIPPED[name], given, {column: [wanted]}, {**settings, "column": column}) == ("values", [1.0])


def test_columns_fill_parameters_but_not_those_that_are_settings() -> None:
    """What stands after `*` and has a default is a setting; everything else of its name is a column."""

    def reward(completions: list[str], answer: Any = None, *, scale: Any = 1.0, needed: Any, **columns: Any) -> Any:
        return [100 * len(columns) + 10 * scale + float(answer[i]) + needed[i] for i, _ in enumerate(completions)]

    given, columns = {"completions": ["x"]}, {"answer": ["4"], "scale": ["9"], "needed": [0.5], "more": [1]}
    assert call(reward, given, columns, {}) == ("values", [114.5])
    assert call(reward, given, columns, {"scale": 2.0}) == ("values", [124.5])


@pytest.mark.parametrize(
    ("name", "settings", "found"),
    [
        ("exact_match", {"column": "answr"}, "no column 'answr'"),
        ("exact_match", {"colum": "answer"}, "unexpected keyword argument 'colum'"),
        ("regex", {}, "missing a required argument: 'pattern'"),
        ("regex", {"pattern": "("}, "'\\(' is not a regular expression"),
        ("format", {"pattern": "["}, "not a regular expression"),
        ("length", {}, "missing a required argument: 'max_length'"),
        ("length", {"max_length": 4, "cache": 8}, "cache is 8 and max_length 4"),
        ("json_schema", {}, "neither a schema nor the column"),
        ("json_schema", {"schema": {"type": "integr"}}, "not a JSON schema"),
        ("python_tests", {"column": "answer"}, "runs code that the model wrote, and that is off"),
        ("python_tests", {"enabled": True}, "no column 'tests'"),
        ("absent", {}, "there is no reward of this name"),
        ("OWN:takes", {}, "missing a required argument: 'factor'"),
        ("OWN:where", {"seed": 1}, "unexpected keyword argument 'seed'"),
        ("OWN:absent", {}, "cannot be imported"),
    ],
)
def test_what_cannot_be_called_is_refused_before_anything_is_sampled(
    name: str, settings: dict[str, Any], found: str, own: Path
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    name = name.replace("OWN", str(own))
    with pytest.raises(ConfigError, match=found) as refused:
        find_rewards([(name, settings)], ["answer"])
    assert refused.value.where == f"rewards: {name}" and "rewards:" not in refused.value.found


def test_the_check_is_made_in_another_process(own: Path) -> None:
    with pytest.raises(ConfigError, match="rewards: length: it cannot be called"):
        check_rewards([(f"{own}:where", {}), ("length", {})], [], 20.0)
    with pytest.raises(ConfigError, match="model:some/id: a reward model has no settings, and scale is given"):
        check_rewards([("model:some/id", {"scale": 2})], [], 20.0)


def test_what_can_be_called_is_not_refused(own: Path) -> None:
    """A user's function is not called for this: it need not expect that there are no completions."""
    needing = [("regex", {"pattern": "x", "column": "answer"}), ("length", {"max_length": 4, "cache": 2})]
    check_rewards(
        [*needing, (f"{own}:takes", {"factor": 2}), (f"{own}:dies", {}), ("model:some/id", {})], ["answer"], 20.0
    )
