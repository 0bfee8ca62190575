"""What every section of the configuration is. Floor 1, no torch.

A section is frozen and strict; null for a key that does not admit null means its default; rules that join several
keys are said by `problems`, all at once, so that a user sees every mistake in one go.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from strop.redact import redact

LARGEST_INT = 2**63 - 1
PATHS = frozenset(
    {"output_dir", "mount_dir", "logging_dir", "train_file", "val_file", "splits_dir", "template", "name"}
    | {"huggingface_id", "adapter", "ref_model_id", "resume_from_checkpoint"}
)
"""Keys of any section whose value is or can be a path."""
MAY_BE_BLANK = frozenset({"stop"})
"""Keys of any section whose texts may be white space alone."""
NO_UTF8 = "its locale knows no UTF-8"
WITH_UTF8 = (
    "a locale with UTF-8, such as C.UTF-8",
    "start strop with PYTHONUTF8=1 or LC_ALL=C.UTF-8 in the environment",
)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a section, in the words of an error message.

    keys: the keys involved, dotted, relative to the section; the message points at the place of the first.
    """

    keys: tuple[str, ...]
    found: str
    expected: str = ""
    fix: str = ""

    def __str__(self) -> str:
        return "; ".join(part for part in (self.found, self.expected and f"expected {self.expected}", self.fix) if part)


class SectionError(ValueError):
    """Problems of one section; pydantic carries it inside its ValidationError."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(" | ".join(map(str, problems)))
        self.problems = tuple(problems)


def admits_null(annotation: Any) -> bool:
    """Whether a type takes null."""
    return annotation is type(None) or any(admits_null(part) for part in get_args(annotation))


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _InOurWords(ModelMetaclass):
    """Makes a section that is written in Python fail with the words of the command line. Pydantic itself, which makes
    the sections of a file, goes past this: its errors are gathered there."""

    def __call__(self, *arguments: Any, **values: Any) -> Any:
        try:
            return super().__call__(*arguments, **values)
        except ValidationError as error:
            from strop.config.explain import of_section

            raise of_section(error, self, values) from None


class Section(BaseModel, metaclass=_InOurWords):
    """Frozen, unknown keys refused, no silent conversions: `"8"` is not 8, `yes` is not true, 1 is not true.

    Raises:
        ConfigError: every problem, with what was found, what was expected and what to do.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def problems(self) -> Iterator[Problem]:
        """What is wrong with this section beyond the type and range of its single keys."""
        return iter(())

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        fields = cls.model_fields

        def stays(name: str, value: Any) -> bool:
            return value is not None or name not in fields or admits_null(fields[name].annotation)

        return {name: value for name, value in data.items() if stays(name, value)}

    @model_validator(mode="after")
    def _no_problems(self) -> Self:
        found = [p for name, value in self.__dict__.items() for p in _unusable(name, value)]
        found += self.problems()
        if found:
            raise SectionError(found)
        return self


def _unusable(name: str, value: Any) -> Iterator[Problem]:
    """Texts and numbers that no key of any section can mean."""
    for item in _items(value):
        if isinstance(item, int) and abs(item) > LARGEST_INT:
            yield Problem((name,), f"{name} is larger than 64 bits can hold", "a smaller whole number")
        elif not isinstance(item, str):
            continue
        elif not item.strip() and not (item and name in MAY_BE_BLANK):
            yield Problem((name,), f"{name} is empty", fix=f"write a value, or remove {name}")
        elif any("\udc80" <= c <= "\udcff" for c in item):  # how Python keeps bytes that it could not decode
            yield Problem((name,), f"{name} holds letters that this process cannot read: {NO_UTF8}", *WITH_UTF8)
        elif "\0" in item or any("\ud800" <= c <= "\udfff" for c in item):
            yield Problem((name,), f"{name} holds a NUL or half a surrogate pair", "plain text")
        elif name in PATHS and not _can_be_path(item):
            yield Problem((name,), f"{name} is {item!r}, which cannot be a path in this process: {NO_UTF8}", *WITH_UTF8)
        elif redact(item) != item:
            yield Problem(
                (name,),
                f"{name} holds an access token or a password (not shown)",
                "nothing secret: the configuration is copied into the run folder",
                "put tokens into the environment (HF_TOKEN) and replace this one, since it stands in a file",
            )
        elif "${" in item:
            yield Problem((name,), f"{name} holds ${{...}}; variables are not replaced here", fix="write the value")


def _can_be_path(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _items(value: Any) -> Iterator[Any]:
    """What a value is made of: the elements of lists, the names and values of mappings."""
    if isinstance(value, Mapping):
        yield from _items([*value.keys(), *value.values()])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _items(item)
    else:
        yield value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value


T = TypeVar("T")
ListOf = Annotated[tuple[T, ...], BeforeValidator(_as_tuple)]
"""A YAML list, kept as a tuple."""


def _with_names(value: Any) -> Any:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return value
    return tuple({"name": item} if isinstance(item, str) else item for item in value)


NamedOf = Annotated[tuple[T, ...], BeforeValidator(_with_names)]
"""A YAML list of mappings that have a `name`. A text in it stands for the mapping with that name and nothing else."""


class JsonMapping(dict[str, Any]):
    """JSON values by name. It is a value of a section, so it is not changed and has a hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


def _as_mapping(value: Any) -> Any:
    return JsonMapping(value) if isinstance(value, Mapping) else value


MappingOf = Annotated[Mapping[str, T], AfterValidator(_as_mapping)]
"""A YAML mapping whose names are the user's own."""
