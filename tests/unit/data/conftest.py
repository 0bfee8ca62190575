"""Tokenizers of the kinds that exist, made in code, and chat templates of the kinds that exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from strop.config import DatasetSection, ModelSection, RunConfig, TrainingSection
from strop.data.store.table import SCHEMA, Groups, Record, Shard, to_table
from strop.types import Group

TEXT = [
    "The quick brown fox jumps over the lazy dog, again and again.\n\n",
    "User: what is it? Assistant: it is a name of a thing. System: answer in one word.",
    "1 2 3 4 5 6 7 8 9 0 + - = ? ! . , ; : < > | / [ ] hello  world   foo\nbar",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>"]

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
GENERATION_BLOCKS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '\n\n' + (m['content'] | trim) + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}{% endfor %}"
)
SYSTEM_INTO_USER = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (('<<SYS>>' + system + '<</SYS>>') if loop.first and system else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_END_TOKEN = (
    "{% for m in messages %}{{ ('User: ' if m['role'] == 'user' else 'Assistant: ') + m['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
ROLE_TOKENS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "generation_blocks": GENERATION_BLOCKS,
    "trimming": TRIMMING,
    "mistral": MISTRAL,
    "system_into_user": SYSTEM_INTO_USER,
    "no_end_token": NO_END_TOKEN,
    "role_tokens": ROLE_TOKENS,
}


def _byte_level(trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _sentence_piece(legacy: bool) -> Tokenizer:
    """BPE with byte fallback and U+2581 for spaces; legacy: one in front of every part, not of the text alone."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIALS, *bytes_], show_progress=False)
    tokenizer.train_from_iterator([line for text in TEXT for line in text.split()], trainer)
    return _without_byte_tokens(tokenizer)


def _without_byte_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The bytes stay in the vocabulary, but are no added tokens."""
    import json

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": lambda: _byte_level(trim_offsets=False),
    "trimmed_offsets": lambda: _byte_level(trim_offsets=True),
    "sentence_piece": lambda: _sentence_piece(legacy=False),
    "legacy_sentence_piece": lambda: _sentence_piece(legacy=True),
}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """make_tokenizer(kind, template, adds_bos): a tokenizer with the special tokens above, and two added ones."""
    built = {kind: build() for kind, build in KINDS.items()}

    def make(kind: str = "byte_level", template: str | None = CHATML, adds_bos: bool = False, **changes: Any) -> Any:
        backend = Tokenizer.from_str(built[kind].to_str())
        backend.add_tokens([AddedToken("<think>", special=False), AddedToken("<tool_call>", special=False)])
        if adds_bos:
            bos = backend.token_to_id("<s>")
            bos_first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
            before = [backend.post_processor] if backend.post_processor is not None else []
            backend.post_processor = processors.Sequence([*before, bos_first])
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **changes}
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        fast.chat_template = template
        return fast

    return make


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """make_config(training={...}, seed=..., **dataset): a configuration with these settings."""

    def make(training: dict[str, Any] | None = None, seed: int = 42, **dataset: Any) -> RunConfig:
        return RunConfig(
            models=[ModelSection(huggingface_id="none")],
            dataset=DatasetSection(**dataset),
            training=TrainingSection(**(training or {})),
            seed=seed,
        )

    return make


@pytest.fixture
def on_disk(tmp_path: Path) -> Callable[..., Groups]:
    """on_disk(groups): the same groups as a view of a table."""

    def make(groups: Sequence[Group], rows_a_batch: int = 3) -> Groups:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.arrow"
        files = sorted({group.origin.file for group in groups})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for at in range(0, len(groups), rows_a_batch):
                some = groups[at : at + rows_a_batch]
                keys = [g.prompt_ids.tobytes() for g in some]
                records = [Record(g, files.index(g.origin.file), key) for g, key in zip(some, keys, strict=True)]
                writer.write_batch(to_table(records))
        return Groups.of(Shard(path, files))

    return make


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    """Chat templates by what is peculiar about them."""
    return TEMPLATES


@pytest.fixture(scope="session")
def kinds() -> tuple[str, ...]:
    """The kinds of tokenizers that `make_tokenizer` makes."""
    return tuple(KINDS)
