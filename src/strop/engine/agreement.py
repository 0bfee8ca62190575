"""Whether all processes train the same: the same code, configuration, data and weights. Floor 3."""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Mapping

from strop.config import RunConfig, to_yaml
from strop.errors import ConfigError
from strop.packages import installed_version
from strop.world import World

COMPARED = ("strop", "torch", "transformers", "peft")
"""Packages whose versions decide the result."""
NAMES = {
    "data": "the rows (training or validation groups)",
    "weights": "the weights that the run begins with",
    "configuration": "the model's config.json",
    "settings": "the configuration of the run",
}


def start_facts(config: RunConfig) -> dict[str, str]:
    """What can be compared before anything is loaded: versions, and a hash of the configuration."""
    settings = hashlib.sha256(to_yaml(config).encode()).hexdigest()
    return {
        "python": platform.python_version(),
        **{name: installed_version(name) or "absent" for name in COMPARED},
        "settings": settings,
    }


def check_alike(world: World, facts: Mapping[str, str]) -> None:
    """Compares `facts` of all processes.

    Raises:
        ConfigError: those of a process differ from those of rank 0. It is raised in all processes.
    """
    if world.size == 1:
        return
    hosts, everywhere = zip(*world.gather((socket.gethostname(), dict(facts))), strict=True)
    first = everywhere[0]
    for rank, found in enumerate(everywhere):
        if differing := [name for name in first if found.get(name) != first[name]]:
            listed = "".join(f"\n    {_difference(name, first[name], found.get(name, 'absent'))}" for name in differing)
            raise ConfigError(
                f"process {rank} on {hosts[rank]} does not train what process 0 on {hosts[0]} trains:{listed}",
                expected="the same configuration, files and versions for all processes",
                fix="give all machines the same command, the same files and the same packages",
            )


def _difference(name: str, first: str, other: str) -> str:
    if name in NAMES:
        return f"{NAMES[name]}: {first[:12]} in process 0, {other[:12]} there (hashes)"
    return f"{name}: {first} in process 0, {other} there"
