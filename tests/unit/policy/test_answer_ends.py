"""The end token that training wrote: found in the groups, and saved where generation looks for it."""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from strop.config.sections import ModelSection
from strop.data.text.template_writer import Ends
from strop.errors import ModelError
from strop.policy.model.end_tokens import closing, stop_tokens, stopping, trained_ends, write_generation
from strop.types import Completion, Group, Origin

END_OF_TEXT, END_OF_TURN = 1, 3


def group(*completions: list[int], masks: list[bytes] | None = None) -> Group:
    parts = [Completion(array("q", ids), b"\1" * len(ids)) for ids in completions]
    if masks:
        parts = [Completion(part.ids, mask) for part, mask in zip(parts, masks, strict=True)]
    return Group(array("q", [5, 6]), tuple(parts), Origin("rows", 1))


@pytest.fixture
def base(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tokenizer of a base model, whose texts end otherwise than turns."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def test_the_last_trained_token_counts(base: PreTrainedTokenizerFast) -> None:
    ends = [group([50, END_OF_TURN, 51], masks=[b"\1\1\0"]), group([50, END_OF_TURN], [60, 61, END_OF_TURN])]
    assert trained_ends(ends, base) == {END_OF_TURN: 1.0}
    cut = group([50, 51])  # ends in text, as a row that was cut
    assert trained_ends([*ends, cut], base) == {END_OF_TURN: 1.0}
    assert trained_ends([cut], base) == {}
    calls = trained_ends([*[group([50, END_OF_TURN])] * 19, group([50, END_OF_TEXT])], base)
    assert calls == {END_OF_TURN: 0.95, END_OF_TEXT: 0.05} and list(calls) == [END_OF_TURN, END_OF_TEXT]
    assert trained_ends([*[group([50, END_OF_TURN])] * 199, group([50, 2])], base) == {END_OF_TURN: 0.995}


@pytest.mark.parametrize(
    ("before", "ends", "after"),
    [
        (END_OF_TEXT, [END_OF_TURN], [END_OF_TEXT, END_OF_TURN]),
        ([END_OF_TURN, END_OF_TEXT], [END_OF_TURN], [END_OF_TURN, END_OF_TEXT]),
        (END_OF_TURN, [END_OF_TURN], END_OF_TURN),
        (None, [END_OF_TURN], END_OF_TURN),
        (END_OF_TEXT, [], END_OF_TEXT),
        (None, [], None),
    ],
)
def test_what_the_base_stops_at_stays(before: Any, ends: list[int], after: Any) -> None:
    config = GenerationConfig(eos_token_id=before, max_new_tokens=7)
    found = stopping(config, ends)
    assert found.eos_token_id == after and found.max_new_tokens == 7
    assert config.eos_token_id == before
    assert stopping(None, [END_OF_TURN]).eos_token_id == END_OF_TURN


@pytest.mark.parametrize(
    ("stops", "ends", "template", "changes"),
    [
        (END_OF_TEXT, {END_OF_TURN: 1.0}, None, True),
        (None, {END_OF_TURN: 0.995, 2: 0.005}, None, True),
        ([END_OF_TEXT, END_OF_TURN], {END_OF_TURN: 1.0}, None, False),  # a chat model whose family has it so
        (END_OF_TEXT, {END_OF_TEXT: 1.0}, None, False),
        (END_OF_TEXT, {END_OF_TURN: 0.9, 2: 0.1}, None, False),
        (END_OF_TEXT, {END_OF_TURN: 1.0}, "{{ eos_token }}{{ messages[0].content }}<|im_end|>", False),
        (END_OF_TEXT, {}, None, False),
    ],
)
def test_when_the_tokenizers_end_token_changes(
    stops: Any, ends: dict[int, float], template: str | None, changes: bool, base: PreTrainedTokenizerFast
) -> None:
    if template:
        base.chat_template = template
    found = closing(base, GenerationConfig(eos_token_id=stops), ends)
    assert base.eos_token == "<|endoftext|>"
    assert found.eos_token == ("<|im_end|>" if changes else "<|endoftext|>")
    assert changes or found is base


def test_what_is_written_and_said(
    base: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "strop")
    config = GenerationConfig(eos_token_id=END_OF_TEXT)
    config.temperature = 0.5  # without sampling, which save_pretrained refuses
    write_generation(tmp_path, config, base, {END_OF_TURN: 1.0}, "here")
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.5
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [END_OF_TEXT, END_OF_TURN]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"
    assert "trained to end with <|im_end|>" in caplog.text and "the tokenizer's end token is <|im_end|>" in caplog.text
    caplog.clear()
    write_generation(tmp_path, config, base, {END_OF_TEXT: 1.0}, "here")
    assert not caplog.records
    write_generation(tmp_path, config, base, {}, "here")
    assert "may not stop by itself" in caplog.text


@pytest.mark.parametrize("stops", [None, 3, [1, 3], []])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_where_generation_stops_is_what_transformers_says(file: str, stops: Any, model_dir: Path) -> None:
    """generation_config.json decides; a folder without one is generated with as its config.json says."""
    folder = model_dir
    (folder / "generation_config.json").unlink()
    config = {**json.loads((folder / "config.json").read_text()), "eos_token_id": 2}
    if file == "config.json":
        config["eos_token_id"] = stops
    else:
        (folder / file).write_text(json.dumps({"eos_token_id": stops}))
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    listed = model.generation_config.eos_token_id
    expected = [] if listed is None else listed if isinstance(listed, list) else [listed]
    assert list(stop_tokens(ModelSection(huggingface_id=str(folder)))) == expected


def test_a_stop_token_that_the_tokenizer_does_not_have_is_none(base: PreTrainedTokenizerFast) -> None:
    assert Ends(base, (END_OF_TURN, -1, 10**9)).stops == Ends(base, (END_OF_TURN,)).stops


@pytest.mark.parametrize("found", [1e300, "3", [3, None], {"a": 1}, True, [[3]]], ids=str)
def test_an_end_token_that_is_none_is_refused(found: Any, model_dir: Path) -> None:
    """Before training, and not when the model is saved."""
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    with pytest.raises(ModelError, match="eos_token_id holds"):
        stop_tokens(ModelSection(huggingface_id=str(model_dir)))
