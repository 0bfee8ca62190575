"""How a base is quantised: as the configuration asks, or as its files are already. Floor 2, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strop.config.sections import ModelSection
from strop.errors import ModelError
from strop.policy.model.folder import inspect_config, place_of

BITSANDBYTES, TORCHAO = "bitsandbytes", "torchao"
EXTRAS: Mapping[str, str] = {BITSANDBYTES: "bnb", TORCHAO: "torchao"}
"""By package, the extra that installs it."""
_KINDS = ("nf4", "fp4")
_TORCHAO_BITS: Mapping[str, Mapping[str | None, int]] = {
    "Int8WeightOnlyConfig": {None: 8},
    "IntxWeightOnlyConfig": {"int4": 4, "int8": 8},
}
"""By the name of a configuration of torchao, and its dtype if it has one: bits. Of these, only weights are rounded, and
any processor can make them whole."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Of the linear layers of a base. bits: 4 or 8. kind: `nf4` or `fp4`, of bitsandbytes' 4 bits. double: whether the
    scales of 4 bits are quantised, too. stored: whether the files are quantised; else the model is as it is read.
    compute: dtype that bitsandbytes' 4 bits are multiplied in; `auto`: the run's. package: that reads them; those of
    torchao are stored. group: of torchao, the weights that share a scale; None: a row."""

    bits: int
    kind: str = "nf4"
    double: bool = False
    stored: bool = False
    compute: str = "auto"
    package: str = BITSANDBYTES
    group: int | None = None

    def describe(self) -> str:
        """In words, for the log."""
        how = "stored in" if self.stored else "quantised to"
        if self.package == TORCHAO:
            return f"{how} {self.bits} bits (torchao)"
        if self.bits == 8:
            return f"{how} 8 bits"
        return f"{how} 4 bits ({self.kind}{', double' if self.double else ''})"

    @property
    def bytes_per_weight(self) -> float:
        """With the scales: a float32 for every 64 weights, or with double quantisation a byte for 64 and a float32 for
        64 x 256. torchao keeps 4 bits in a byte, and of each group a scale of 2 bytes and a zero point."""
        if self.package == TORCHAO:
            return 1.0 + (0.0 if self.group is None else 3 / self.group)
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


_OF_ITS_ORIGIN = "name the model it was made from, in 16 or 32 bits; models[].quant quantises it as it is loaded"


def _stored(found: Any, where: str) -> Quantisation:
    """As `quantization_config` of config.json says."""
    settings: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    if settings.get("quant_method") == TORCHAO:
        return _of_torchao(settings, where)
    four, eight = (settings.get(f"load_in_{bits}bit") is True for bits in (4, 8))
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    if settings.get("quant_method", BITSANDBYTES) != BITSANDBYTES or four == eight or (four and kind not in _KINDS):
        raise ModelError(
            f"its weights are quantised by {settings.get('quant_method', 'an unknown method')} (quantization_config "
            "in config.json), which cannot be trained on",
            where=where,
            expected="16 or 32 bits, or 4 or 8 bits of bitsandbytes or torchao as transformers saves them",
            fix=_OF_ITS_ORIGIN,
        )
    if eight:
        return Quantisation(8, stored=True)
    return Quantisation(4, str(kind), settings.get("bnb_4bit_use_double_quant") is True, stored=True)


def _of_torchao(settings: Mapping[str, Any], where: str) -> Quantisation:
    """As transformers writes the configurations of torchao: {"default": {"_type": NAME, "_data": {...}}}."""
    asked = _mapping(_mapping(settings.get("quant_type")).get("default"))
    name, how = asked.get("_type"), _mapping(asked.get("_data"))
    kind = _mapping(how.get("weight_dtype")).get("_data")
    bits = _TORCHAO_BITS.get(str(name), {}).get(kind)
    if bits is None or settings.get("include_input_output_embeddings"):
        beside = " with its embeddings" if bits is not None else f" of {kind}" if kind else ""
        raise ModelError(
            f"its weights are quantised by torchao's {name or 'unnamed configuration'}{beside} (quantization_config in "
            "config.json), which cannot be trained on",
            where=where,
            expected="Int8WeightOnlyConfig, or IntxWeightOnlyConfig of int4 or int8: others round what comes in, too, "
            "or need the kernels of one kind of GPU",
            fix=_OF_ITS_ORIGIN,
        )
    group = _mapping(_mapping(how.get("granularity")).get("_data")).get("group_size")
    return Quantisation(bits, "int", stored=True, package=TORCHAO, group=group if isinstance(group, int) else None)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
