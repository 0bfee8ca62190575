"""A reward model scores a conversation by itself, whatever it is batched with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from conftest import WITH_ENDS, build_tokenizer
from strop.errors import ConfigError, ModelError, TrainingError
from strop.rollout.reward_model import RewardModel

CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"


def make(folder: Path, labels: int = 1, template: str | None = TEMPLATE, **keys: Any) -> Path:
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**{**WITH_ENDS, **keys}, num_labels=labels)).save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "question"}, {"role": "assistant", "content": text}]


def test_padding_changes_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path / "rm")
    model = RewardModel(str(folder), CPU)
    chats = [chat(text) for text in ("a", "a much longer answer", "yes", "no and no and no")]
    together, why = model.values(chats)
    tokenizer = build_tokenizer()
    own = LlamaForSequenceClassification.from_pretrained(folder)
    for one, found in zip(chats, together, strict=True):
        ids = tokenizer(f"question {one[1]['content']}", add_special_tokens=False, return_tensors="pt").input_ids
        hidden = own.model(ids).last_hidden_state[:, -1]
        assert found == pytest.approx(own.score(hidden).item(), abs=1e-6)
        assert model.values([one])[0] == pytest.approx([found], abs=1e-6)
    assert not why and len(set(together)) == 4


def test_a_conversation_that_is_too_long_has_no_reward(tmp_path: Path) -> None:
    model = RewardModel(str(make(tmp_path / "rm", max_position_embeddings=16)), CPU)
    values, why = model.values([chat("yes"), chat("no " * 40)])
    assert values[0] is not None and values[1] is None and why == "1 conversations have more than 16 tokens"


def test_memory_that_does_not_suffice_is_survived_by_fewer_conversations_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, most = RewardModel(str(make(tmp_path / "rm")), CPU), 100
    chats = [chat(text) for text in ("a", "a much longer answer", "yes", "no and no and no", "no")]
    expected, own = model.values(chats)[0], LlamaForSequenceClassification.forward

    def short_of_memory(self: Any, **given: Any) -> Any:
        if len(given["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return own(self, **given)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", short_of_memory)
    most = 2
    assert model.values(chats)[0] == pytest.approx(expected, abs=1e-6)
    most = 0
    with pytest.raises(TrainingError, match="memory ran out where a conversation of"):
        model.values(chats)


def test_it_reads_the_tools_of_the_row(tmp_path: Path) -> None:
    template = "{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}" + TEMPLATE
    model = RewardModel(str(make(tmp_path / "rm", template=template)), CPU)
    said = chat("yes")
    as_text = [{**said[0], "content": "yes question"}, said[1]]
    expected = model.values([as_text])[0]
    tool = {"name": "yes", "parameters": {}}
    assert model.values([said], [tool])[0] == model.values([said], [{"type": "function", "function": tool}])[0]
    assert model.values([said], [tool])[0] == expected != model.values([said])[0]


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has 2 labels"):
        RewardModel(str(make(tmp_path / "two", labels=2)), CPU)
    language = make(tmp_path / "language")
    LlamaForCausalLM(LlamaConfig(**WITH_ENDS, num_labels=1)).save_pretrained(language)
    with pytest.raises(ConfigError, match=r"no weights of score\.weight, as a language model has none"):
        RewardModel(str(language), CPU)
    with pytest.raises(ConfigError, match="no chat template"):
        RewardModel(str(make(tmp_path / "plain", template=None)), CPU)
    with pytest.raises(ModelError):
        RewardModel(str(tmp_path / "absent"), CPU)
