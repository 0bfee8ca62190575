"""Variables of chat templates: every rendering gets them, so prompts are those of transformers with the same ones."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest

from oracle.cells import judge, trained_by_strop
from oracle.conversations import CONVERSATIONS
from oracle.families import family, names
from strop.config import DatasetSection, ModelSection, RunConfig
from strop.data.read.row import Row
from strop.data.store.row_pipeline import RowPipeline
from strop.data.text.render import Renderer, TextRules
from strop.data.text.sandbox import variables
from strop.types import Example, Origin

pytestmark = pytest.mark.skipif(not names(), reason="the package trl, whose templates are the measure, is not there")

VALUES: dict[str, tuple[Any, ...]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "clear_thinking": (False, True),
    "preserve_thinking": (False, True),
    "truncate_history_thinking": (False, True),
    "keep_past_thinking": (False, True),
    "reasoning_effort": ("low", "high"),
    "low_effort": (True,),
    "medium_effort": (True,),
    "model_identity": ("You are strop.",),
    "builtin_tools": (["python"],),
    "date_string": ("1 May 2026",),
    "tools_in_user_message": (False,),
}
KINDS = ("one_turn", "several_turns_with_system", "reasoning", "reasoning_in_every_turn", "tool_call_and_result")
HERE = Origin("rows.jsonl", 1)


@pytest.mark.share(6)
@pytest.mark.parametrize("name", names())
def test_what_is_trained_is_what_transformers_writes_with_the_same_variable(name: str) -> None:
    for variable in sorted(variables(family(name).template) & VALUES.keys()):
        for kind, value in product(KINDS, VALUES[variable]):
            row = {**CONVERSATIONS[kind], "chat_template_kwargs": {variable: value}}
            cell = judge(family(name), row, twin=False)
            assert cell.kind != "WRONG", (variable, value, kind, *cell.words)


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "gptoss", "llama3_1"])
def test_templates_have_such_variables(name: str) -> None:
    assert variables(family(name).template) & VALUES.keys()


@pytest.mark.parametrize("by", ["configuration", "row"])
def test_qwen3_without_thinking_is_asked_with_its_empty_think_block(by: str) -> None:
    one, row = family("qwen3"), CONVERSATIONS["one_turn"]
    tokenizer = one.tokenizer()
    given = {"enable_thinking": False}
    config = RunConfig(
        models=[ModelSection(huggingface_id="none")],
        dataset=DatasetSection(chat_template_kwargs=given if by == "configuration" else {"enable_thinking": True}),
    )
    made = {**row, "chat_template_kwargs": given} if by == "row" else row
    shop = RowPipeline(config, tokenizer, "single", one.stop_ids())
    group = shop.work([Row(HERE, made)]).first
    assert group is not None
    asked = tokenizer.apply_chat_template(
        row["messages"][:1], add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert asked.endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(list(group.prompt_ids)) == asked
    assert tokenizer.decode(list(group.completions[0].ids)) == "The quick brown fox jumps.<|im_end|>"


def test_a_pair_is_asked_with_its_variables_too() -> None:
    one = family("qwen3")
    example = Example("q", ("yes", "no"), HERE, template_kwargs={"enable_thinking": False})
    for side in Renderer(one.tokenizer(), TextRules(), one.stop_ids()).render(example):
        assert side.text[: side.boundary].endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("write", [lambda value: value, json.dumps])
def test_a_row_says_which_of_its_variables_nobody_reads(write: Any) -> None:
    one = family("qwen3")
    given = {"enable_thinking": False, "no_such_name": 1}
    found = trained_by_strop(one, one.template, {**CONVERSATIONS["one_turn"], "chat_template_kwargs": write(given)})
    assert not isinstance(found, str) and found.counts["template_kwargs_unread"] == 1
    known = trained_by_strop(
        one, one.template, {**CONVERSATIONS["one_turn"], "chat_template_kwargs": {"enable_thinking": False}}
    )
    assert not isinstance(known, str) and known.counts["template_kwargs_unread"] == 0
    assert known.ids == found.ids


@pytest.mark.parametrize("given", [{"messages": []}, {"bos_token": "x"}, {"a b": 1}, ["enable_thinking"], "x", 3])
def test_variables_that_are_none_are_refused(given: Any) -> None:
    one = family("qwen3")
    found = trained_by_strop(one, one.template, {**CONVERSATIONS["one_turn"], "chat_template_kwargs": given})
    assert isinstance(found, str) and found.startswith("wrong_type")


def test_the_configuration_says_which_of_its_variables_nobody_reads() -> None:
    one = family("qwen3")
    rules = TextRules(chat_template_kwargs={"enable_thinkng": False, "enable_thinking": False})
    assert Renderer(one.tokenizer(), rules).unread_kwargs() == ["enable_thinkng"]
    shipped = TextRules(template="chatml", chat_template_kwargs={"enable_thinking": False})
    assert Renderer(one.tokenizer(), shipped).unread_kwargs() == ["enable_thinking"]


def test_another_variable_is_another_entry_of_the_cache() -> None:
    one = family("qwen3")

    def identity(**given: Any) -> Any:
        config = RunConfig(
            models=[ModelSection(huggingface_id="none")], dataset=DatasetSection(chat_template_kwargs=given)
        )
        return RowPipeline(config, one.tokenizer(), "single").identity()

    assert identity() == identity()
    assert len({str(identity()), str(identity(enable_thinking=False)), str(identity(enable_thinking=True))}) == 3
