"""A configuration as YAML that loads as the same configuration, and as plain values. Floor 1, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strop.config.base_section import Section
from strop.config.run import RunConfig
from strop.config.yamlfile import write_value


def to_yaml(config: RunConfig) -> str:
    """Every key with its value, and its origin as a comment; `load_config` of the text gives an equal configuration."""
    lines = ["# The resolved configuration. Behind # stands where a value came from; the others are defaults."]
    origins, section, model = config.origins, "", ""
    for key, value, _ in config.leaves():
        *prefix, name = key.split(".")
        if prefix and prefix[0] != section:
            section = prefix[0]
            lines.append(f"{section}:")
        if section == "models" and prefix:
            lead = "    " if prefix[1] == model else "  - "
            model = prefix[1]
        else:
            lead = "  " if prefix else ""
        origin = "".join(char if char.isprintable() else "?" for char in origins.get(key, ""))
        lines.append(f"{lead}{name}: {write_value(value)}" + (f"  # {origin}" if origin not in ("", "default") else ""))
    return "\n".join(lines) + "\n"


def to_values(config: RunConfig) -> dict[str, Any]:
    """Every key with its value, section by section, as values that JSON has; models by their index."""
    found: dict[str, Any] = {}
    for key, value, _ in config.leaves():
        *sections, name = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(name): _plain(own) for name, own in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(own) for own in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
