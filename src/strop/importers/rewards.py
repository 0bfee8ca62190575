"""The rewards of TRL, as strop's. Floor 2, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strop.importers.key_answers import Code, Fate, KeyAnswer, View, idle, left, real, translated

TRL_REWARDS: Mapping[str, Mapping[str, Any]] = {
    "think_format_reward": {"name": "format", "settings": {"pattern": r"<think>(?!.*<think>).*?</think>.*"}},
    "get_soft_overlong_punishment": {"name": "length", "settings": {"max_length": 1280, "cache": 256}},
}
"""Rewards of TRL that strop has under other names, with the settings of `trl grpo`."""


def reward_functions(value: Any, view: View) -> KeyAnswer:
    """`reward_funcs`: names of TRL's own, dotted import paths, hub ids of reward models, or functions of a script."""
    names = _names(value, view)
    weights = _weights(view, len(names))
    rewards: list[dict[str, Any]] = []
    missing: list[str] = []
    code: list[str] = []
    for i, name in enumerate(names):
        if isinstance(name, Code):
            code.append(name.text)
            continue
        found = reward(str(name))
        if found is None:
            missing.append(str(name))
        else:
            rewards.append(found if weights[i] == 1.0 else {**found, "weight": weights[i]})
    if missing:
        return left(
            f"strop has no reward {', '.join(missing)}: write a function that gives a number for each completion, and "
            "name it with --rewards file.py:function"
        )
    if code:
        # what could be carried over is, but the run would have other rewards than the script
        kept = translated({"rewards": rewards}).values if rewards else {}
        why = f"{', '.join(code)} is code, which is not run: add it to rewards as file.py:function"
        return KeyAnswer(Fate.LEFT, kept, why)
    return translated({"rewards": rewards}, "a function gets completions as texts")


def _names(value: Any, view: View) -> list[Any]:
    """The rewards in the order of TRL, which puts the model first: names, and `Code`."""
    names = value.parts() if isinstance(value, Code) else value if isinstance(value, list) else [value]
    judge = view.get("reward_model_name_or_path")
    return [name for name in (judge and f"model:{judge}", *names) if name is not None]


def _weights(view: View, count: int) -> list[float]:
    """The weights of so many rewards; 1 for all where none are given, or not one number for each."""
    given = view.get("reward_weights")
    found = [real(weight) for weight in given] if isinstance(given, list) else []
    numbers = [weight for weight in found if weight is not None]
    return numbers if len(numbers) == len(found) == count else [1.0] * count


def reward(name: str) -> dict[str, Any] | None:
    """One reward of TRL; None: strop has none for it."""
    if name.startswith("model:"):
        return {"name": name}
    if name in TRL_REWARDS:
        return dict(TRL_REWARDS[name])
    if "/" in name:
        return {"name": f"model:{name}"}
    module, dot, function = name.rpartition(".")
    return {"name": f"{module}:{function}"} if dot else None


def reward_weights(value: Any, view: View) -> KeyAnswer:
    """`reward_weights` stand beside the rewards they are for."""
    rewards = _names(view.get("reward_funcs"), view)
    if not isinstance(value, list) or len(value) != len(rewards) or any(real(weight) is None for weight in value):
        return left(f"it is no list of a number for each of the rewards ({len(rewards)}): give them weights in rewards")
    return idle("each reward has its weight")
