"""How a base is quantised: as the configuration asks, or as its files are already. Floor 2, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strop.config.sections import ModelSection
from strop.errors import ModelError
from strop.policy.model.folder import inspect_config, place_of

BITSANDBYTES = "bitsandbytes"
_KINDS = ("nf4", "fp4")


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Of the linear layers of a base, by bitsandbytes. bits: 4 or 8. kind: `nf4` or `fp4`, of 4 bits. double: whether
    the scales of 4 bits are quantised, too. stored: whether the files are quantised; else the model is as it is read.
    compute: dtype that 4 bits are multiplied in; `auto`: the run's."""

    bits: int
    kind: str = "nf4"
    double: bool = False
    stored: bool = False
    compute: str = "auto"

    def describe(self) -> str:
        """In words, for the log."""
        how = "stored in" if self.stored else "quantised to"
        if self.bits == 8:
            return f"{how} 8 bits"
        return f"{how} 4 bits ({self.kind}{', double' if self.double else ''})"

    @property
    def bytes_per_weight(self) -> float:
        """With the scales: a float32 for every 64 weights, or with double quantisation a byte for 64 and a float32 for
        64 x 256."""
        if self.bits == 8:
            return 1.0
        return 0.5 + (1 / 64 + 4 / (64 * 256) if self.double else 4 / 64)


def quantisation_of(model: ModelSection) -> Quantisation | None:
    """How the base is quantised; None: it is not.

    Raises:
        ModelError: there is no such model; its files are quantised and are to be quantised otherwise, or are in a way
            that cannot be trained on.
    """
    where = place_of(model)
    found = inspect_config(model).config.get("quantization_config")
    if not found:
        return _asked(model)
    stored = _stored(found, where)
    if model.quant != "none":
        raise ModelError(
            f"its weights are {stored.describe()} already, and quant is {model.quant}",
            where=where,
            fix="leave quant out: how the files are quantised is recognised",
        )
    return stored


def check_adapts(model: ModelSection, adapts: bool) -> None:
    """Refuse full training of a base whose files are quantised; one that `quant` asks for is refused earlier.

    Raises:
        ModelError: it is, and no adapters train.
    """
    found = None if adapts else quantisation_of(model)
    if found is not None:
        raise ModelError(
            f"its weights are {found.describe()}, and all weights are to be trained: quantised ones cannot move by a "
            "step of training, which is smaller than the distance between two of them",
            where=place_of(model),
            expected="adapters on top of the quantised base",
            fix="set lora.enabled: true, or name the model it was made from, in 16 or 32 bits",
        )


def _asked(model: ModelSection) -> Quantisation | None:
    if model.quant == "none":
        return None
    if model.quant == "8bit":
        return Quantisation(8)
    return Quantisation(4, model.bnb_quant_type, model.bnb_double_quant, compute=model.bnb_compute_dtype)


def _stored(found: Any, where: str) -> Quantisation:
    """As `quantization_config` of config.json says."""
    settings: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    four, eight = (settings.get(f"load_in_{bits}bit") is True for bits in (4, 8))
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    if settings.get("quant_method", BITSANDBYTES) != BITSANDBYTES or four == eight or (four and kind not in _KINDS):
        raise ModelError(
            f"its weights are quantised by {settings.get('quant_method', 'an unknown method')} (quantization_config "
            "in config.json), which cannot be trained on",
            where=where,
            expected="16 or 32 bits, or 4 or 8 bits of bitsandbytes as transformers saves them",
            fix="name the model it was made from, in 16 or 32 bits; models[].quant quantises it as it is loaded",
        )
    if eight:
        return Quantisation(8, stored=True)
    return Quantisation(4, str(kind), settings.get("bnb_4bit_use_double_quant") is True, stored=True)
