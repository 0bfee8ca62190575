"""`strop demo`: a small model learns a small task for real, by SFT and then DPO, without a download. Floor 9.

task      the lists, the demonstrators, the pairs, the check of an answer
model     the model and tokenizer, and their answers
run       the whole demo
"""

from __future__ import annotations

from strop.demo.run import run_demo

__all__ = ["run_demo"]
