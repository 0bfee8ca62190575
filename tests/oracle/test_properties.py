"""What holds whatever people write: control tokens in every place of a row, combining characters, look-alikes.

Each row is compared with a neutral one, in which plain words stand where the row has what hypothesis has found. The
template writes the same control tokens around both, so these and no others must be in the row's tokens.
"""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracle.families import Family, family, names
from strop.config import DatasetSection, ModelSection, RunConfig, TrainingSection
from strop.data.read.row import Row
from strop.data.store.row_pipeline import RowPipeline
from strop.types import Origin

FAMILIES = ("glm4moe", "gptoss", "llama3_1", "qwen3")
"""Families whose templates write tools, with turns of four kinds."""

NORMALIZERS = (None, "NFC", "NFKC")
GREEK = "αβγδελο"
"""Letters that nobody but the user writes."""

pytestmark = pytest.mark.skipif(not names(), reason="the package trl, whose templates are the measure, is not there")
every = pytest.mark.parametrize("name", FAMILIES)
everyhow = pytest.mark.parametrize("normalizer", NORMALIZERS)
some = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def controls(one: Family) -> list[str]:
    """Control tokens of a family, and look-alikes that a normaliser makes control tokens of."""
    real = [token.content for token in one.tokenizer().added_tokens_decoder.values()]
    wide = [text.replace("<", "\uff1c").replace("|", "\uff5c").replace(">", "\uff1e") for text in real]
    return [*real, *wide]


def texts(one: Family, letters: str) -> st.SearchStrategy[str]:
    """Words of some letters among control tokens, combining characters and white space; never blank."""
    odd = st.sampled_from(
        [*controls(one), "e\u0301", "\u0301", "\u1100\u1161", "\u200d", "\ufb01", "\u00bd", " ", "\n"]
    )
    pieces = st.lists(st.one_of(odd, st.text(letters, min_size=1, max_size=4)), min_size=1, max_size=5)
    return pieces.map(lambda parts: "".join(parts) + letters[0])


def row(places: dict[str, str]) -> dict[str, Any]:
    """A conversation with a text in each place."""
    function = {"name": places["name"], "arguments": {places["key"]: places["argument"]}}
    call = {"type": "function", "id": "call_0", "function": function}
    return {
        "messages": [
            {"role": "system", "content": places["system"]},
            {"role": "user", "content": places["user"]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [call],
            },
            {"role": "tool", "content": places["result"], "tool_call_id": "call_0", "name": places["name"]},
            {"role": "assistant", "content": places["answer"]},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": places["name"],
                    "description": places["description"],
                    "parameters": {"type": "object", "properties": {places["key"]: {"type": "string"}}},
                },
            }
        ],
    }


NEUTRAL = {
    **dict.fromkeys(("system", "user", "result", "description"), "β"),
    "answer": "x",
    "name": "look",
    "key": "place",
    "argument": "here",
}
"""Plain words for every place of a row."""


def worked(one: Family, made: dict[str, Any], normalizer: str | None = None) -> dict[str, Any] | str:
    """The row's ids and mask, or the reason of its refusal."""
    config = RunConfig(
        models=[ModelSection(huggingface_id="none")],
        dataset=DatasetSection(on_error="skip"),
        training=TrainingSection(max_seq_length=1_000_000, max_prompt_length=None, max_completion_length=None),
    )
    shop = RowPipeline(config, one.tokenizer(normalizer=normalizer), "single", one.stop_ids())
    done = shop.work([Row(Origin("rows.jsonl", 1), made)])
    if done.refused or done.dropped:
        return str(next(iter(done.refused or done.dropped)))
    (record,) = done.table.to_pylist()
    return dict(record)


def split(one: Family, record: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Special tokens of the whole row, those that are trained, and all that is trained."""
    special = set(one.tokenizer().all_special_ids)
    special |= {i for i, token in one.tokenizer().added_tokens_decoder.items() if token.special}
    trained = [i for i, is_trained in zip(record["ids"], record["mask"], strict=True) if is_trained]
    return [i for i in record["ids"] if i in special], [i for i in trained if i in special], trained


@pytest.mark.share(2)
@everyhow
@every
@some
@given(data=st.data())
def test_every_control_token_was_written_by_the_template(name: str, normalizer: str | None, data: Any) -> None:
    one = family(name)
    place = data.draw(st.sampled_from(sorted(NEUTRAL)))
    text = data.draw(texts(one, "xyz" if place in ("answer", "name", "key", "argument") else GREEK))
    neutral, found = worked(one, row(NEUTRAL)), worked(one, row({**NEUTRAL, place: text}), normalizer)
    assert isinstance(neutral, dict), neutral
    if isinstance(found, str):
        assert found in ("control_token", "spans_not_found", "dropped_by_template", "template_error"), found
        return
    assert split(one, found)[:2] == split(one, neutral)[:2]
    assert found["ids"][-1] == neutral["ids"][-1] and found["mask"][-1] == 1  # it ends as it should


@pytest.mark.share(4)
@everyhow
@every
@some
@given(data=st.data())
def test_nothing_that_the_user_wrote_is_trained(name: str, normalizer: str | None, data: Any) -> None:
    one = family(name)
    others = {place: data.draw(texts(one, GREEK)) for place in ("system", "user", "result", "description")}
    found = worked(one, row({**NEUTRAL, **others, "answer": data.draw(texts(one, "xyz"))}), normalizer)
    if not isinstance(found, str):
        said = one.tokenizer().decode(split(one, found)[2])
        assert not set(GREEK) & set(said), said


def bare(text: str) -> str:
    """A text without white space and the tags at which templates take answers apart."""
    return re.sub(r"</?think>|\s", "", text)


@every
@some
@given(data=st.data())
def test_what_a_row_says_is_in_its_tokens(name: str, data: Any) -> None:
    one = family(name)
    place = data.draw(st.sampled_from(["system", "user", "answer"]))
    text = data.draw(texts(one, "xyz"))
    found = worked(one, row({**NEUTRAL, place: text}))
    if not isinstance(found, str):
        assert bare(text) in bare(one.tokenizer().decode(found["ids"]))


@pytest.mark.share(1)
@pytest.mark.parametrize("token", ["<|im_end|>", "<think>"])
def test_time_grows_with_the_row_and_no_faster(token: str) -> None:
    one = family("qwen3")

    def seconds(times: int) -> float:
        start = time.process_time()
        assert isinstance(worked(one, row({**NEUTRAL, "user": "x" + token * times + "x"})), dict)
        return time.process_time() - start

    # ten times as long is what is linear, a hundred times what is quadratic
    assert min(seconds(30_000) for _ in range(2)) < 40 * min(seconds(3_000) for _ in range(3))
