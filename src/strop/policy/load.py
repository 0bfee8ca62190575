"""A model section to its tokenizer, and to its model: the way in for programs that use strop's parts. Floor 2.

Inside of strop these are imported from `model/`, where they live.
"""

from __future__ import annotations

from strop.policy.model.load import LoadedModel, load_model
from strop.policy.model.tokenizer import load_tokenizer

__all__ = ["LoadedModel", "load_model", "load_tokenizer"]
