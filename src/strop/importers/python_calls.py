"""The calls of a Python file that configure a training run, with their arguments. Floor 2, no torch.

The file is parsed and never run. A literal is a value; a name that is set once, at the top of the file, to a literal is
that literal; everything else stays as text (`Code`), which nobody evaluates.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from strop.errors import ConfigError
from strop.importers.key_answers import Code

WATCHED = frozenset(
    {
        *(
            "SFTConfig",
            "DPOConfig",
            "KTOConfig",
            "GRPOConfig",
            "ORPOConfig",
            "CPOConfig",
            "RewardConfig",
            "TrainingArguments",
        ),
        *("SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "ORPOTrainer", "CPOTrainer", "RewardTrainer"),
        *("LoraConfig", "BitsAndBytesConfig", "ModelConfig", "ScriptArguments", "load_dataset"),
        *("from_pretrained", "get_peft_model"),
        *("OpenSlothConfig", "FastModelArgs", "LoraArgs", "DPOArgs"),
    }
)
"""Functions and classes whose arguments are settings of a run."""
OF_TRL = ("SFT", "DPO", "KTO", "GRPO", "ORPO", "CPO", "Reward")
"""How the names of TRL's configurations and trainers begin."""
POSITIONS: Mapping[str, tuple[str, ...]] = {
    "from_pretrained": ("model_name",),
    "get_peft_model": ("model", "peft_config"),
    "load_dataset": ("path", "name"),
    "TrainingArguments": ("output_dir",),
    **{f"{method}Config": ("output_dir",) for method in OF_TRL},
    **{f"{method}Trainer": ("model",) for method in OF_TRL},
}
"""What the arguments without a name are called."""
OF_MODELS = ("AutoModelForCausalLM", "FastLanguageModel", "FastModel", "FastVisionModel")


def calls(text: str, name: str) -> tuple[dict[str, dict[str, Any]], frozenset[str]]:
    """(call -> argument -> value; the packages that are imported). A second call of the same name is numbered.

    Raises:
        ConfigError: it is no Python, or nothing in it configures a run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ConfigError("this is not valid Python", where=f"{name}{line}") from None
    found: dict[str, dict[str, Any]] = {}
    try:
        known = _constants(tree)
        for call in _watched(tree):
            title = _title(call)
            number = sum(1 for other in found if other.partition(" ")[0] == title)
            found[f"{title} {number + 1}" if number else title] = dict(_arguments(title, call, known))
    except RecursionError:
        raise ConfigError("too many levels of nesting", where=name) from None
    if not any(found.values()):
        raise ConfigError(
            "nothing in this Python file configures a training run",
            where=name,
            expected="a call such as DPOConfig(...), SFTConfig(...) or FastLanguageModel.from_pretrained(...)",
        )
    return found, _imports(tree)


def _title(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _watched(tree: ast.Module) -> Iterator[ast.Call]:
    """The calls that are watched, in the order of the file. Of `from_pretrained`, those of models."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _title(node) in WATCHED]
    for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset)):
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        if _title(node) != "from_pretrained" or (isinstance(owner, ast.Name) and owner.id in OF_MODELS):
            yield node


def _arguments(title: str, call: ast.Call, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    names = POSITIONS.get(title, ())
    for i, argument in enumerate(call.args):
        value = _value(argument, known)
        if not _is_other_call(argument):
            yield (names[i] if i < len(names) else f"argument {i + 1}"), value
    for keyword in call.keywords:
        if not _is_other_call(keyword.value):
            yield keyword.arg or f"**{ast.unparse(keyword.value)[:60]}", _value(keyword.value, known)


def _is_other_call(node: ast.expr) -> bool:
    """Whether an argument is itself a call that is watched; its arguments stand under its own name."""
    return isinstance(node, ast.Call) and _title(node) in WATCHED


def _constants(tree: ast.Module) -> Mapping[str, Any]:
    """Names that are set once in the whole file, at its top, to a literal."""
    set_at: dict[str, list[ast.expr | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr | ast.For):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) and node in tree.body else None
            for target in targets:
                for inner in ast.walk(target):
                    if isinstance(inner, ast.Name):
                        set_at.setdefault(inner.id, []).append(value if inner is target else None)
    found = {}
    for name, values in set_at.items():
        if len(values) == 1 and values[0] is not None:
            value = _value(values[0], {})
            if not isinstance(value, Code):
                found[name] = value
    return found


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Code(" ".join(ast.unparse(node).split())[:200])
    return _plain(value) if _is_plain(value) else Code(" ".join(ast.unparse(node).split())[:200])


def _is_plain(value: Any) -> bool:
    """Whether YAML has this value, too."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return sorted(map(_plain, value), key=str) if isinstance(value, set) else value


def _imports(tree: ast.Module) -> frozenset[str]:
    found = set()
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {name.partition(".")[0] for name in names}
    return frozenset(found)
