"""strop: post-training for language models. One YAML file in, a fine-tuned model out.

Names load late, so that `import strop.config` and `strop --help` bring in no torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from strop.garbage_collection import paused

if TYPE_CHECKING:
    from strop.config import RunConfig, load_config
    from strop.data.to_datasets import load_preference_jsonl
    from strop.training import train

__version__ = "0.1.0"
__all__ = ["RunConfig", "__version__", "load_config", "load_preference_jsonl", "train"]

_HOMES = {
    "RunConfig": "strop.config",
    "load_config": "strop.config",
    "load_preference_jsonl": "strop.data.to_datasets",
    "train": "strop.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'strop' has no attribute {name!r}")
    library = logging.getLogger("bitsandbytes")  # tells of optional kernels, to whoever imports it
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        with paused():
            return getattr(import_module(_HOMES[name]), name)
    finally:
        library.setLevel(level)


def __dir__() -> list[str]:
    return sorted(__all__)
