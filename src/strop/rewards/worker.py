"""The process that calls rewards: python -m strop.rewards.worker DESCRIPTOR PARENT. Floor 2, no torch.

In, through a socket: the names of the rewards, then per call the number of one and its arguments. Out: ("values", a
list), or ("error", words) for what a function raised, or ("refused", words) for what no other completion would change.
What it prints goes nowhere. It ends with its parent.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from strop import time_limit
from strop.errors import StropError
from strop.rewards.lookup import find_reward

Answer = tuple[str, Any]

ALWAYS = frozenset({"prompts", "completions", "chats", "num_tokens"})
"""Arguments that are no columns of the rows."""


def call(function: Callable[..., Any], given: Mapping[str, Any], settings: Mapping[str, Any]) -> Answer:
    """The values of one reward, one per completion: finite numbers, or None where it gave none.

    A setting wins over a column of the rows that has its name. A parameter that has the form of a setting (after `*`,
    with a default) gets no column.
    """
    try:
        values = function(**{**_taken(function, given), **settings})
        values = asyncio.run(_awaited(values)) if inspect.isawaitable(values) else values
        listed = list(values)
    except StropError as error:
        return "refused", str(error)
    except Exception as error:  # noqa: BLE001 (a user's function may raise anything)
        return "error", f"{type(error).__name__}: {error}"[:2000]
    if len(listed) != len(given["completions"]):
        return "refused", f"it gave {len(listed)} values for {len(given['completions'])} completions"
    return "values", [_number(value) for value in listed]


async def _awaited(values: Awaitable[Any]) -> Any:
    return await values


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _taken(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments the function takes."""
    parameters = inspect.signature(function).parameters.values()
    settings = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    taken = {name: value for name, value in given.items() if name not in settings - ALWAYS}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return taken
    names = {p.name for p in parameters}
    return {name: value for name, value in taken.items() if name in names}


def serve(pipe: Connection, parent: int) -> None:
    """Answer calls until the pipe is closed."""
    time_limit.enter(parent)
    rewards: Sequence[tuple[str, Mapping[str, Any]]] = pipe.recv()
    try:
        functions = [find_reward(name) for name, _ in rewards]
    except StropError as error:
        pipe.send(("refused", str(error)))
        return
    pipe.send(("values", []))
    while True:
        try:
            number, given = pipe.recv()
        except EOFError:
            return
        pipe.send(call(functions[number], given, rewards[number][1]))


if __name__ == "__main__":
    descriptor, started_by = map(int, sys.argv[1:3])
    serve(Connection(descriptor), started_by)
