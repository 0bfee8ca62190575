"""What is measured: the named cases, as data. No torch here, so that the process that measures stays small."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "toy": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 200,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32_000,
    },
    "smol": {  # SmolLM2-135M
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
    },
    "qwen05": {  # Qwen2.5-0.5B; not named qwen2, whose folders get a tokenizer that drops the synthetic words
        "model_type": "llama",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
}
"""Bodies with tied heads and random weights."""

LENGTHS = {
    "toy": (12, 8, 6, 64),
    "uf": (190, 280, 250, 1024),
    "hh": (150, 75, 70, 1024),
    "long": (1000, 150, 150, 2048),
}
"""Mean tokens of prompt, chosen and rejected, log-normal with sigma 0.5; the most that a prompt and one completion
may have together."""

REAL = ("hh_helpful", "pref_mix", "instruct_sft")
"""Real rows, found in ../shared/data beside the project; they take the tokenizer of 131,072 entries found there."""

GROUP = (300, 8, 200)
"""Tokens of the prompt, completions, tokens of each, of the case of a group against repeated prompts."""

SIDES = {
    "strop": "strop",
    "alone": "strop, prompts repeated before every completion, nothing padded, the same layers and kernels",
    "denormal": "strop, denormal numbers computed, as torch does",
    "widened": "strop, products of bfloat16 made in float32, as where they are slower than float32's",
    "fp32": "strop in float32",
    "plain": "strop's plain rows: prompts repeated before every completion, rows padded, attention by SDPA",
    "D": "TRL default: gradient checkpointing, reference in every step",
    "B": "TRL, best shipped flags: no checkpointing, reference ahead, rows bucketed by length; of a group: the loss of "
    "GRPOTrainer",
    "G": "B, and the head at completion tokens only, as TRL has it on CUDA",
    "P": "G, padding-free instead of bucketed",
}


@dataclass(frozen=True)
class Target:
    """`figure` of `against` by that of strop is at least `ratio`; for shares, strop's figure is at least `ratio`."""

    figure: str
    against: str
    ratio: float


@dataclass(frozen=True)
class Case:
    """One row of the table.

    rows: a name of LENGTHS or REAL, or `group`. batch: pairs (or sequences, or groups) of a step, taken by one
    micro-batch of a trainer that counts rows. steps: all of them; the first `warmup` are not timed. vocabulary: in
    place of the shape's own. whole_micro_batch: strop, too, takes all pairs of a step at once. spread: standard
    deviation of the logits, in place of what random weights have, which is below 1; 25 makes a quarter of all
    probabilities denormal.
    """

    name: str
    shape: str
    rows: str
    method: str = "dpo"
    lora: bool = True
    bf16: bool = True
    batch: int = 4
    steps: int = 5
    warmup: int = 1
    sides: tuple[str, ...] = ("strop", "D", "B", "G")
    vocabulary: int | None = None
    whole_micro_batch: bool = False
    spread: float | None = None
    targets: tuple[Target, ...] = ()

    @property
    def is_real(self) -> bool:
        return self.rows in REAL

    @property
    def num_rows(self) -> int:
        return self.batch * self.steps

    @property
    def num_measured(self) -> int:
        return self.batch * (self.steps - self.warmup)

    @property
    def unit(self) -> str:
        return {"sft": "sequence", "group": "group"}.get(self.method, "pair")

    @property
    def max_length(self) -> int:
        return 2048 if self.rows == "group" else 1024 if self.is_real else LENGTHS[self.rows][3]

    def with_rows(self, num_measured: int) -> Case:
        """The case with at least so many rows measured, in whole steps."""
        return replace(self, steps=self.warmup + max(1, -(-num_measured // self.batch)))

    def in_float32(self) -> Case:
        """The case without bfloat16, under a name that says so. Of its targets those that are for every dtype."""
        if not self.bf16:
            return self
        name = self.name.replace("bf16", "fp32") if "bf16" in self.name else f"{self.name}-fp32"
        kept = tuple(
            t
            for t in self.targets
            if (self.is_real and t.figure != "share") or t.against in ("B", "alone", "plain") or t.figure == "peak"
        )
        sides = tuple(side for side in self.sides if side not in ("widened", "fp32"))
        return CASES.get(name) or replace(self, name=name, bf16=False, sides=sides, targets=kept)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Case:
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        targets = tuple(Target(**t) for t in values.pop("targets", ()))
        return cls(**{**values, "sides": tuple(values.pop("sides")), "targets": targets})


def _faster(against_g: float, share: float | None = None) -> tuple[Target, ...]:
    speed = (Target("seconds", "G", against_g), Target("seconds", "B", 4.0))
    return speed if share is None else (*speed, Target("share", "strop", share))


_SHARE = Target("share", "strop", 0.60)
_REAL = _faster(3.0)
_MEMORY = (Target("peak", "G", 2.5),)

CASES = {
    case.name: case
    for case in (
        Case("dpo-lora-bf16-smol-uf", "smol", "uf", targets=_faster(3.2, 0.60)),
        Case("dpo-lora-bf16-smol-long", "smol", "long", batch=2, targets=_faster(5.0, 0.60)),
        Case("dpo-full-bf16-smol-uf", "smol", "uf", lora=False, targets=_faster(3.0, 0.60)),
        Case("dpo-lora-fp32-smol-uf", "smol", "uf", bf16=False, steps=4, targets=_faster(2.1, 0.75)),
        Case("dpo-lora-bf16-tiny-uf", "tiny", "uf", steps=9, targets=_faster(3.5)),
        Case("dpo-lora-fp32-tiny-hh", "tiny", "hh", bf16=False, steps=13, targets=_faster(3.0)),
        Case("dpo-lora-bf16-qwen05-uf", "qwen05", "uf", batch=2, steps=3, targets=(Target("seconds", "B", 4.0),)),
        *(
            Case(
                f"sft-{'lora' if lora else 'full'}-bf16-smol-uf",
                "smol",
                "uf",
                method="sft",
                lora=lora,
                batch=8,
                sides=("strop", "D", "B", "G", "P"),
                targets=(Target("seconds", "P", 4.0), Target("seconds", "B", 4.0), _SHARE),
            )
            for lora in (True, False)
        ),
        Case(
            "group8-lora-bf16-smol",
            "smol",
            "group",
            method="group",
            batch=1,
            steps=6,
            sides=("strop", "alone", "plain", "B", "G"),
            targets=(Target("seconds", "alone", 2.5), Target("seconds", "plain", 2.5)),
        ),
        Case(
            "group8-lora-fp32-tiny",
            "tiny",
            "group",
            method="group",
            bf16=False,
            batch=1,
            steps=6,
            sides=("strop", "alone", "plain", "B", "G"),
        ),
        Case("real-hh_helpful-smol", "smol", "hh_helpful", steps=6, targets=(*_REAL, _SHARE)),
        Case(
            "real-hh_helpful-smol-dtypes",
            "smol",
            "hh_helpful",
            sides=("strop", "widened", "fp32", "B", "G"),
            targets=(Target("seconds", "G", 3.0), Target("seconds", "B", 4.5)),
        ),
        Case("real-pref_mix-smol", "smol", "pref_mix", targets=(*_REAL, _SHARE)),
        Case(
            "real-instruct_sft-tiny",
            "tiny",
            "instruct_sft",
            method="sft",
            lora=False,
            batch=8,
            steps=9,
            sides=("strop", "D", "B", "G", "P"),
            targets=_REAL,
        ),
        Case(
            "whole-process-smol-uf",
            "smol",
            "uf",
            steps=8,
            warmup=0,
            batch=1,
            sides=("strop", "G"),
            targets=(Target("wall", "G", 1 / 0.6),),
        ),
        Case(
            "peak-lora-bf16-smol-uf",
            "smol",
            "uf",
            steps=3,
            sides=("strop", "G"),
            whole_micro_batch=True,
            targets=_MEMORY,
        ),
        Case(
            "sharp-dpo-lora-fp32-tiny-hh",
            "tiny",
            "hh",
            bf16=False,
            steps=9,
            sides=("strop", "denormal", "B", "G"),
            spread=25.0,
            targets=_faster(3.0),
        ),
        *(
            Case(
                f"peak-vocabulary-{size // 1000}k",
                "tiny",
                "uf",
                steps=3,
                sides=("strop", "G"),
                vocabulary=size,
                whole_micro_batch=True,
            )
            for size in (32_000, 131_072, 151_936)
        ),
    )
}
TOY = Case("toy", "toy", "toy", bf16=False, batch=2, steps=3, sides=("strop",))
"""Seconds long: shows that the harness runs."""
