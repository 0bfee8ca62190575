"""FLOPs that a case needs at least, and what the machine does a second at its best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .cases import Case
from .inputs import RANK, Lengths

SIZE = 2048
"""Rows and columns of the square product that the machine's rate is measured by."""


def needed_flops(case: Case, config: Mapping[str, Any], lengths: Sequence[Lengths]) -> float:
    """Of training on these groups, the reference pass included: products only, two FLOPs a multiplication.

    Every prompt once, no padding, no recomputation; the head where a token is scored. A backward pass costs as much
    as the forward pass for the gradients that flow down, and as much again for weights that train. Causal attention
    sees half of its square; its backward pass is 2.5 forward passes, the scores being computed again.
    """
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    widths = [(d, d), (d, d), (d, kv), (d, kv), *[(d, config["intermediate_size"])] * 3]
    body = layers * sum(a * b for a, b in widths)
    low_rank = layers * RANK * sum(a + b for a, b in widths) if case.lora else 0
    head = d * config["vocab_size"]
    backward = 1 if case.lora else 2
    total = 0.0
    for prompt, completions in lengths:
        scored = sum(completions)
        tokens = prompt + scored - len(completions)
        seen = prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in completions)
        attention = layers * 4 * d * seen
        products = 2 * body * tokens + 2 * head * scored
        forward = products + 2 * low_rank * tokens + attention
        total += forward + backward * products + 4 * low_rank * tokens + 2.5 * attention
        total += forward if case.method == "dpo" else 0
    return total


def sharing_factor(lengths: Sequence[Lengths]) -> float:
    """Tokens where every completion brings its prompt, by tokens where a prompt stands once."""
    apart = sum(prompt + n for prompt, completions in lengths for n in completions)
    return apart / sum(prompt + sum(completions) for prompt, completions in lengths)


def matmul_rates(seconds: float = 1.0) -> dict[str, float]:
    """FLOPs a second of a SIZE x SIZE product, by dtype: the median over so many seconds, of the fastest way that this
    machine has for it: strop's; torch's and oneDNN's, in 16 bits where oneDNN can: torch's own loops take a minute."""
    import torch

    from strop.policy.kernels.matmul import linear

    def by_onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    onednn = torch.backends.mkldnn.is_available()
    takes_bf16 = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not without 512-bit vectors
    others = {"fp32": [torch.matmul, *([by_onednn] if onednn else [])]}
    others["bf16"] = others["fp32"] if takes_bf16 else []
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ways = [linear, *others[name]]
        a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        found = []
        for product in ways:
            times: list[float] = []
            product(a, b)
            while sum(times) < seconds or len(times) < 3:
                started = time.perf_counter()
                product(a, b)
                times.append(time.perf_counter() - started)
            found.append(2 * SIZE**3 / statistics.median(times))
        rates[name] = max(found)
    return rates


def main() -> None:
    import json
    import os

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(json.dumps(matmul_rates()))


if __name__ == "__main__":
    main()
