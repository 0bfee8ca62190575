"""Texts that end a completion: where they are found, and that the sampler ends there and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conftest import build_tokenizer
from rollout_policies import make_policy, prompts
from strop.rollout.sampler import Sampled, Sampler
from strop.rollout.stop_texts import StopTexts


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with the space before them, which the decoder leaves out at the start; bytes for what it does not know."""
    pieces = ["<unk>", "</s>", "\u2581a", "\u2581b", "c", "\u2581", "\n", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def first_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], texts: tuple[str, ...]) -> int | None:
    """By the whole text of every beginning."""
    for n in range(1, len(ids) + 1):
        if any(text in tokenizer.decode(ids[:n], skip_special_tokens=False) for text in texts):
            return n
    return None


def found_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], texts: tuple[str, ...]) -> int | None:
    stops = StopTexts(tokenizer, texts)
    return next((n for n in range(1, len(ids) + 1) if stops.ends(ids[:n])), None)


@pytest.mark.parametrize(
    "texts", [("e",), ("the",), (" a",), ("\n\n", "."), ("é",), ("<|im_end|>",), ("a ", "never there at all")], ids=repr
)
def test_a_text_is_found_at_the_token_that_completes_it(texts: tuple[str, ...]) -> None:
    """However it lies over the tokens: over several, within one, over parts of a character, in a special token."""
    draws = torch.Generator().manual_seed(0)
    # of the second one no bytes at random: one that is no character spoils all bytes beside it
    for tokenizer, some in ((build_tokenizer(), 400), (sentencepiece_like(), 7)):
        written = [tokenizer.encode(f"x{text}y", add_special_tokens=False) for text in texts]
        for i in range(20):
            ids = torch.randint(min(some, len(tokenizer)), (12,), generator=draws).tolist()
            ids[i % 12 : i % 12] = written[i % len(written)]
            assert found_end(tokenizer, ids, texts) == first_end(tokenizer, ids, texts), ids
    assert first_end(build_tokenizer(), build_tokenizer().encode(f"x{texts[0]}y"), texts) is not None


def flat(found: list[list[Sampled]]) -> list[Sampled]:
    return [c for own in found for c in own]


@pytest.mark.parametrize("keys", [{}, {"batch_tokens": 1}], ids=str)
def test_completions_are_those_without_stops_up_to_where_they_end(keys: dict[str, Any], tmp_path: Path) -> None:
    """The same draws and log-probs, with the token that completes the text; and those have ended."""
    policy, tokenizer, texts = make_policy(tmp_path), build_tokenizer(), ("e", "a", "1", "T")
    free = Sampler(policy, 8, (3,), seed=1).sample(1, prompts())
    stopped = Sampler(policy, 8, (3,), seed=1, stops=StopTexts(tokenizer, texts), **keys).sample(1, prompts())
    cut = 0
    for whole, part in zip(flat(free), flat(stopped), strict=True):
        end = first_end(tokenizer, list(whole.ids), texts)
        assert part.ids == whole.ids[:end] and part.ended == (whole.ended or end is not None)
        assert list(part.logps) == pytest.approx(list(whole.logps)[:end], abs=1e-5)
        cut += end is not None and end < len(whole.ids)
        if end is not None:
            assert any(text in tokenizer.decode(list(part.ids)) for text in texts), "what rewards get has the text"
    assert cut > 5, "some end by a text"


def test_stops_alone_can_end_a_model_without_an_end_token(tmp_path: Path) -> None:
    policy, tokenizer = make_policy(tmp_path), build_tokenizer()
    found = flat(Sampler(policy, 8, (), seed=1, stops=StopTexts(tokenizer, ("e", "a"))).sample(1, prompts()))
    assert {c.ended for c in found} == {True, False}
    assert all(c.ended or len(c.ids) == 12 for c in found)
