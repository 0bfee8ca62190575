"""Families of chat templates as the installed package `trl` ships them, each with a tokenizer made in code.

`trl/chat_templates` holds the templates of some thirty-five families of models and, for most of them, a training twin:
the same template with {% generation %} blocks around what the assistant says. Nobody here wrote them, so they are the
measure of what strop trains. The package is needed by these tests alone.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TWIN = "_training"

BAR = "\uff5c"
"""The bar in DeepSeek's control tokens."""

SPECIAL = re.compile(
    rf"<\|[A-Za-z0-9_]+\|?>|<{BAR}[^{BAR}>]+{BAR}>|<[a-z_]+\|>|<(?:start|end)_of_[a-z]+>|\[gMASK\]|<sop>|<image>|</?s>"
)
"""Texts that are special tokens in the tokenizers of the families."""

PLAIN = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
"""Texts that are added tokens there, but not special ones."""

WORDS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "user assistant system model question answer yes no hello think tool call result analysis commentary final channel",
    "1 2 3 4 5 6 7 8 9 0 + - = ? ! . , ; : { } [ ] \" ' \n\n",
]


@dataclass(frozen=True)
class Ends:
    """What a family's tokenizer and generation settings say. stops: tokens at which generation stops, besides eos."""

    eos: str
    bos: str | None = None
    stops: tuple[str, ...] = ()


ENDS = {
    "cohere": Ends("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>"),
    "deepseek": Ends(f"<{BAR}end▁of▁sentence{BAR}>", f"<{BAR}begin▁of▁sentence{BAR}>"),
    "diffusion_gemma": Ends("<eos>", "<bos>", ("<turn|>", "<|tool_response>")),
    "gemma4": Ends("<eos>", "<bos>", ("<turn|>", "<|tool_response>")),
    "gemma": Ends("<eos>", "<bos>", ("<end_of_turn>",)),
    "glm4moe": Ends("<|endoftext|>", None, ("<|user|>", "<|observation|>")),
    "gptoss": Ends("<|return|>", "<|startoftext|>", ("<|call|>", "<|endoftext|>")),
    "idefics3": Ends("<|end_of_text|>", "<|begin_of_text|>", ("<end_of_utterance>", "<|eot_id|>")),
    "llama3_1": Ends("<|eot_id|>", "<|begin_of_text|>", ("<|eom_id|>", "<|end_of_text|>")),
    "llama3": Ends("<|eot_id|>", "<|begin_of_text|>", ("<|end_of_text|>",)),
    "llava_next": Ends("</s>", "<s>"),
    "muse_glimmer": Ends("<|eot|>", "<|begin_of_text|>", ("<|end_of_text|>",)),
    "phi3": Ends("<|endoftext|>", "<s>", ("<|end|>", "<|assistant|>")),
    "smolvlm": Ends("<end_of_utterance>", "<|im_start|>"),
}
"""By the beginning of the family's name, the first that fits; all others end a turn as ChatML does."""

CHATML = Ends("<|im_end|>", None, ("<|endoftext|>",))


def folder() -> Path | None:
    """Where the templates are; None without the package."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "chat_templates"


def names() -> list[str]:
    """All families, by name."""
    where = folder()
    return sorted(p.stem for p in where.glob("*.jinja") if not p.stem.endswith(TWIN)) if where is not None else []


@dataclass(frozen=True)
class Family:
    """One family. template: as the models ship it. twin: with generation blocks; None where there is none."""

    name: str
    template: str
    twin: str | None
    ends: Ends

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts of all tokens at which generation stops."""
        return (self.ends.eos, *self.ends.stops)

    def tokenizer(self, template: str | None = None, normalizer: str | None = None) -> PreTrainedTokenizerFast:
        """The family's tokenizer with this template, or its own. normalizer: NFC, NFKC or None."""
        return _tokenizer(self.name, template or self.template, normalizer)

    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the tokens at which generation stops."""
        return tuple(self.tokenizer().convert_tokens_to_ids(list(self.stops)))


@cache
def family(name: str) -> Family:
    """The family of this name."""
    where = folder()
    assert where is not None
    twin = where / f"{name}{TWIN}.jinja"
    ends = next((ends for start, ends in ENDS.items() if name.startswith(start)), CHATML)
    return Family(
        name,
        (where / f"{name}.jinja").read_text(encoding="utf-8"),
        twin.read_text(encoding="utf-8") if twin.is_file() else None,
        ends,
    )


@cache
def _tokenizer(name: str, template: str, normalizer: str | None) -> PreTrainedTokenizerFast:
    one = family(name)
    found = [match for text in (one.template, one.twin or "") for match in SPECIAL.findall(text)]
    special = list(dict.fromkeys(["<|pad|>", *filter(None, [one.ends.bos]), *one.stops, *sorted(set(found))]))
    tokenizer = _bpe(one.template)
    if normalizer is not None:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    plain = sorted(set(PLAIN.findall(one.template)))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token=one.ends.eos, bos_token=one.ends.bos
    )
    fast.chat_template = template
    return fast


def _bpe(template: str) -> Tokenizer:
    """Byte-level BPE without any added token, of the words that the template writes and some more."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*WORDS, *re.findall(r"[A-Za-z ,.]{20,}", template)], trainer)
    return tokenizer
