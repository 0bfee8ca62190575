"""The process that calls rewards: python -m strop.rewards.worker DESCRIPTOR PARENT. Floor 2, no torch.

In, through a socket: the names and settings of the rewards, and the columns of the rows where those are to be checked;
then per call the number of a reward, its arguments and the columns. Out: ("values", a list), or ("error", words) for
what a function raised, or ("refused", a StropError) for what no other completion would change. What it prints goes
nowhere. It ends with its parent.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from multiprocessing.connection import Connection
from typing import Any

from strop import time_limit
from strop.errors import ConfigError, StropError
from strop.rewards.lookup import find_reward
from strop.rewards.shipped import SHIPPED, columns_in_words
from strop.types import LARGEST

Answer = tuple[str, Any]

GIVEN = ("prompts", "completions", "chats", "num_tokens")
"""Arguments that are no columns of the rows: lists of one entry per completion."""


def call(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    columns: Mapping[str, Sequence[Any]],
    settings: Mapping[str, Any],
) -> Answer:
    """The values of one reward, one per completion: numbers of a size of at most `LARGEST`, or None where it gave none.

    A setting wins over a column of the rows that has its name. A parameter that has the form of a setting (after `*`,
    with a default) gets no column. `columns` has all of them, whatever their names.
    """
    num = len(given["completions"])  # before the function may change what it is given
    try:
        values = function(**_arguments(function, given, columns, settings))
        listed = _listed(asyncio.run(_awaited(values)) if inspect.isawaitable(values) else values)
        numbers = [_number(value) for value in listed]
    except StropError as error:
        return "refused", error
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 (a user's function may raise anything)
        return "error", _in_words(error)
    if len(numbers) != num:
        return "refused", ConfigError(f"it gave {len(numbers)} values for {num} completions")
    return "values", numbers


def check(name: str, function: Callable[..., Any], columns: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Refuses a reward that cannot be called with these columns and settings, whatever the completions. One that is
    shipped is called, with no completions; a user's own function is not, since it need not expect that.

    Raises:
        StropError: the reward does not fit.
    """
    given: dict[str, list[Any]] = {each: [] for each in GIVEN}
    empty: dict[str, list[Any]] = {column: [] for column in columns}
    try:
        inspect.signature(function).bind(**_arguments(function, given, empty, settings))
    except ValueError:
        return  # nothing is known of its arguments, as of some functions that are written in C
    except TypeError as error:
        expected = "its arguments among its settings, or " + columns_in_words(columns)
        raise ConfigError(f"it cannot be called: {error}", expected=expected) from error
    if name in SHIPPED:
        kind, answer = call(function, given, empty, settings)
        if kind == "refused":
            raise answer
        if kind == "error":
            raise ConfigError(f"it cannot be called: {answer}")


async def _awaited(values: Awaitable[Any]) -> Any:
    return await values


def _listed(values: Any) -> list[Any]:
    """What a function returned, as a list.

    Raises:
        TypeError: it has no order of the completions, though it could be gone through: letters of a text, keys.
    """
    if isinstance(values, str | bytes | bytearray | Mapping | Set):
        raise TypeError(f"it returned a {type(values).__name__}, not a list with a number per completion")
    return list(values)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None  # NaN is not, either


def _in_words(error: BaseException) -> str:
    """The kind and the text of an error, whose class may be a user's own."""
    try:
        return f"{type(error).__name__}: {error}"[:2000]
    except Exception:  # noqa: BLE001
        return type(error).__name__


def _arguments(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    columns: Mapping[str, Sequence[Any]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What the function is called with."""
    parameters = inspect.signature(function).parameters.values()
    set_by_user = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    offered = {**{name: values for name, values in columns.items() if name not in set_by_user}, **given}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        offered = {p.name: offered[p.name] for p in parameters if p.name in offered}
    if any(p.name == "columns" and p.kind is not p.VAR_KEYWORD for p in parameters):
        offered["columns"] = columns
    return {**offered, **settings}


def find_rewards(
    rewards: Sequence[tuple[str, Mapping[str, Any]]], to_check: Sequence[str] | None
) -> list[Callable[..., Any]]:
    """The functions of the rewards. to_check: columns that these are checked with, see `check`.

    Raises:
        StropError: one cannot be found, or does not fit.
    """
    functions = []
    for name, settings in rewards:
        try:
            function = find_reward(name)
            if to_check is not None:
                check(name, function, to_check, settings)
        except StropError as error:
            raise at_reward(name, error) from error
        functions.append(function)
    return functions


def serve(pipe: Connection, parent: int) -> None:
    """Answer calls until the pipe is closed."""
    time_limit.enter(parent)
    own = os.getpid()
    rewards, to_check = pipe.recv()
    try:
        functions = find_rewards(rewards, to_check)
    except StropError as error:
        pipe.send(("refused", error))
        return
    pipe.send(("values", []))
    while True:
        try:
            number, given, columns = pipe.recv()
        except EOFError:
            return
        name, settings = rewards[number]
        kind, answer = call(functions[number], given, columns, settings)
        if os.getpid() != own:  # a copy of this process, made by the function, whose answer nobody has asked for
            os._exit(0)
        pipe.send((kind, at_reward(name, answer) if kind == "refused" else answer))


def at_reward(name: str, error: StropError) -> ConfigError:
    """The error, with the reward in its place."""
    return ConfigError(error.found, where=f"rewards: {name}", expected=error.expected, fix=error.fix)


if __name__ == "__main__":
    descriptor, started_by = map(int, sys.argv[1:3])
    serve(Connection(descriptor), started_by)
