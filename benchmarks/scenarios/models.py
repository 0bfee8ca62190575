"""The tiny models of the runs, with one tokenizer of words."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from benchmarks.scenarios.rows import WORDS


class TinyModel(StrEnum):
    """A model by the name of its folder. As the value of a setting it stands for the path of that.

    OTHER: other weights. TWICE: its chat template writes two BOS tokens. TAUGHT: has learnt the chosen answers by sft,
    so that it ends its completions (`scenario.TAUGHT`).
    """

    MODEL = "model"
    OTHER = "other"
    TWICE = "twice"
    TAUGHT = "taught"


BEGINS_TWICE = (
    "{{ bos_token }} {{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %} {{ m.content }} {{ eos_token }}{% endgeneration %}"
    "{% else %} {{ m.content }}{% endif %}{% endfor %}"
)


def write_models(folder: Path) -> None:
    """All but the taught one."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<eos>", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(words), eos_token_id=2, bos_token_id=None, pad_token_id=0, max_position_embeddings=128, **sizes
    )
    for name in (TinyModel.MODEL, TinyModel.OTHER, TinyModel.TWICE):
        torch.manual_seed(int(name is TinyModel.OTHER))
        model = LlamaForCausalLM(config)
        if name is TinyModel.OTHER:  # far enough to be told from rounding
            with torch.no_grad():
                model.lm_head.weight.mul_(20)
        if name is TinyModel.TWICE:
            tokenizer.bos_token, tokenizer.chat_template = "<eos>", BEGINS_TWICE
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
