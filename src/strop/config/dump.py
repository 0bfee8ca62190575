"""A configuration as YAML that loads as the same configuration. Floor 1, no torch."""

from __future__ import annotations

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
