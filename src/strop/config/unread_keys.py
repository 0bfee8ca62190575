"""Which keys a run reads, as far as its configuration tells; what nobody reads need not be shown. Floor 1, no torch."""

from __future__ import annotations

from collections.abc import Mapping

from strop.config.guidance import is_default
from strop.config.methods import ReferenceSettings
from strop.config.run import RunConfig
from strop.types import RowShape

PAIRS = ("dataset.chosen_column", "dataset.rejected_column")
COMPLETIONS = ("dataset.completion_column", "dataset.label_column")
MARGINS = "logging.margins"
UNREAD: Mapping[RowShape, tuple[str, ...]] = {
    "single": (*PAIRS, MARGINS),
    "pair": COMPLETIONS,
    "labelled": (MARGINS,),
    "group": (*PAIRS, *COMPLETIONS, MARGINS),
}
"""Keys that methods on rows of a shape do not read."""


def unread(config: RunConfig) -> set[str]:
    """Dotted keys that this method, or this variant of it, does not read, and that nobody gave a value."""
    method = config.post_training
    keys = {*(f"post_training.{name}" for name in method.unread()), *UNREAD[method.ROWS]}
    if not method.PACKS:
        keys.add("training.packing")
    if not isinstance(method, ReferenceSettings):
        keys.add("training.reference_store")
    if not any(map(config.adapts, config.models)):
        keys |= {f"lora.{name}" for name in type(config.lora).model_fields if name != "enabled"}
    return {key for key in keys if is_default(config.origins.get(key, "default"))}
