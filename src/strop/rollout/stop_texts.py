"""Texts that end a completion. Floor 4.

A completion ends with the token that completes one of them in its text. That token stays, with whatever else it holds,
since it was drawn: what is trained are exactly the tokens that were sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

LEAD = 4
"""Tokens that are decoded before those that can hold a text: tokenizers treat the first ones of a text differently."""
BROKEN = "\ufffd"
"""What a tokenizer writes for bytes that are only a part of a character."""


class StopTexts:
    """Finds texts in completions, token by token. Special tokens count as the text that they are written as.

    Args:
        texts: at least one; none is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self._tokenizer = tokenizer
        # a token has at least one byte, so a text of n bytes lies in its last n tokens
        self._tail = LEAD + max(len(text.encode()) for text in texts)
        self._last_characters = frozenset(text[-1] for text in texts)
        self._can_complete: dict[int, bool] = {}

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether one of the texts is in the completion `ids`; no shorter beginning of it has been found to end."""
        return self._may_complete(ids[-1]) and self._has_text(ids[-self._tail :])

    def _has_text(self, ids: Sequence[int]) -> bool:
        found = self._decoded(ids)
        return any(text in found for text in self.texts)

    def _may_complete(self, token: int) -> bool:
        """Whether a text can end within this token; looked up, since most tokens cannot, and decoding takes time."""
        if token not in self._can_complete:
            written = self._decoded([token])
            # white space at the start of a text is left out by some tokenizers
            is_certain = written and BROKEN not in written and not any(c.isspace() for c in self._last_characters)
            self._can_complete[token] = not is_certain or not self._last_characters.isdisjoint(written)
        return self._can_complete[token]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))
