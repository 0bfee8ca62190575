"""Encoding: the ids are those of the whole conversation, the mask covers the answers and their end tokens, no more."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from strop.data.read.row import RowRefused
from strop.data.text.encode import Encoded, Encoder, Tokens
from strop.data.text.render import Renderer, TextRules
from strop.errors import ModelError
from strop.types import Example, Message, Origin, Turns

Make = Callable[..., PreTrainedTokenizerFast]
HERE = Origin("rows.jsonl", 1)
KINDS = ("byte_level", "trimmed_offsets", "sentence_piece", "legacy_sentence_piece")
# what tokenizers merge across: spaces, newlines, punctuation, characters of several bytes
ALPHABET = [
    "a",
    "dog",
    "The",
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    "'s",
    "7",
    "<",
    "|",
    "[",
    "é",
    "日本",
    "👩‍👧",
    "\u200f",
    "e\u0301",
]
plain = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=8).map("".join).filter(str.strip)


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant") * len(contents)
    messages = tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))
    return messages if system is None else ({"role": "system", "content": system}, *messages)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Turns, *sides: Turns, mode: Any = "auto") -> Encoded:
    renderer = Renderer(tokenizer, TextRules(mode))
    (result,) = Encoder(tokenizer, renderer.template).encode([renderer.render(Example(prompt, sides, HERE))])
    if isinstance(result, RowRefused):
        raise result
    return result


def runs(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, side: int = 0) -> list[str]:
    """The text of each run of trained tokens."""
    both = zip(encoded.sides[side].mask, encoded.sides[side].ids, strict=True)
    parts = [(trained, [i for _, i in part]) for trained, part in groupby(both, key=lambda pair: pair[0])]
    return [str(tokenizer.decode(ids)) for trained, ids in parts if trained]


def ids_of(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **options))


@pytest.mark.share(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chatml", "generation_blocks", "trimming", "mistral", "role_tokens"])
@given(contents=st.lists(plain, min_size=4, max_size=4), system=st.none() | plain)
@settings(max_examples=20, deadline=None)
def test_ids_are_those_of_the_chat_template(
    kind: str, name: str, contents: list[str], system: str | None, make_tokenizer: Make, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer(kind, templates[name])
    messages = turns(*contents, system=system)
    first = 1 if system is None else 2
    encoded = encode(tokenizer, messages[:first], messages[first:])
    # the prompt is what inference sees, to the id
    assert encoded.prompt_ids == ids_of(tokenizer, messages[:first], add_generation_prompt=True)
    both = encoded.prompt_ids + encoded.sides[0].ids
    whole = ids_of(tokenizer, messages)
    if name == "role_tokens":  # it closes no answer: the tokenizer's EOS does
        assert both.pop() == tokenizer.eos_token_id
    if encoded.counts["boundaries_split"] == 0 and encoded.prompt_ids == whole[: len(encoded.prompt_ids)]:
        assert both == whole[: len(both)]
        # nothing is left out but what follows the last end token
        assert tokenizer.decode(whole[len(both) :]).strip() == ""
    assert tokenizer.decode(both).strip() == tokenizer.decode(whole).strip()


@pytest.mark.parametrize("kind", KINDS[:2])
@given(contents=st.lists(plain, min_size=4, max_size=4), system=st.none() | plain)
@settings(max_examples=30, deadline=None)
def test_trained_are_the_answers_and_their_end_tokens(
    kind: str, contents: list[str], system: str | None, make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(kind)
    messages = turns(*contents, system=system)
    first = 1 if system is None else 2
    encoded = encode(tokenizer, messages[:first], messages[first:])
    first_run, second_run = runs(tokenizer, encoded)
    assert first_run == contents[1] + "<|end|>"
    # the newline of the second header can be part of the token that the answer begins with
    assert second_run in (contents[3] + "<|end|>", "\n" + contents[3] + "<|end|>")


def test_the_empty_answer_is_its_end_token(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    assert runs(tokenizer, encode(tokenizer, turns("q"), turns("q", "")[1:])) == ["<|end|>"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_end_token_means_the_eos_token(kind: str, make_tokenizer: Make, templates: dict[str, str]) -> None:
    for name in ("no_end_token", "role_tokens"):
        tokenizer = make_tokenizer(kind, templates[name])
        encoded = encode(tokenizer, turns("q"), turns("q", "a dog", "r", "the fox")[1:])
        first, second = runs(tokenizer, encoded)
        # the header of the next turn is no end token, though in role_tokens it begins with a control token
        assert first.strip() == "a dog" and second.strip() == "the fox</s>"
        assert encoded.sides[0].ids.count(tokenizer.eos_token_id) == 1


def test_an_eos_token_in_front_of_a_header_of_words_is_an_end_token(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(
        template="{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoded = encode(tokenizer, turns("q"), turns("q", "a dog", "r", "the fox")[1:])
    assert runs(tokenizer, encoded) == ["a dog</s>", "the fox</s>"]


def test_an_empty_answer_without_an_end_token_keeps_its_header(make_tokenizer: Make, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(template=templates["role_tokens"])
    encoded = encode(tokenizer, turns("q"), turns("q", "a dog", "r", "")[1:])
    assert runs(tokenizer, encoded) == ["a dog", "</s>"]
    both = tokenizer.decode(encoded.prompt_ids + encoded.sides[0].ids)
    assert both == "<|user|>\nq<|assistant|>\na dog<|user|>\nr<|assistant|>\n</s>"


def test_a_word_that_the_tokenizer_does_not_know_is_no_control_token(templates: dict[str, str]) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "dog": 3, "user": 4, "assistant": 5}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = template
    encoded = encode(tokenizer, turns("a cat"), turns("", "a cow")[1:])
    # the unknown word at the end closes nothing, so the EOS token follows; the header is the model's to write, as no
    # generation prompt does
    assert encoded.prompt_ids == [4, 2, 0]
    assert (encoded.sides[0].ids, encoded.sides[0].mask) == ([5, 2, 0, 1], b"\1\1\1\1")
    assert encoded.counts["controls_as_text"] == 0
    written = encode(tokenizer, turns("a <unk>"), turns("", "a dog")[1:])
    assert written.counts["controls_as_text"] == 1


def test_a_part_with_an_unknown_word_is_encoded_at_its_place() -> None:
    """Behind a control token some tokenizers begin a word; an unknown word further on changes nothing of that."""
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in "\u2581acdgo\n")], unk_id=0))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
        "{{ ' ' if m['role'] == 'user' else eos_token }}{% endfor %}"
    )
    encoded = encode(tokenizer, turns("a cat"), turns("", "dog")[1:])
    assert encoded.prompt_ids == ids_of(tokenizer, turns("a cat")) and 0 in encoded.prompt_ids


@pytest.mark.parametrize("lead", ["", "  ", "\n"])
def test_a_header_that_takes_in_white_space_is_never_trained(lead: str, templates: dict[str, str]) -> None:
    """The control tokens of Phi 3 take in the white space behind them, also that of an answer."""
    specials = ["<unk>", "</s>", "<|user|>", "<|assistant|>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    words.add_special_tokens([AddedToken(text, special=True, rstrip=True) for text in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = templates["role_tokens"].replace("m['content']", "m['content'] + '</s>'")
    encoded = encode(tokenizer, turns("q"), turns("q", f"{lead}dog", "r", f"{lead}fox")[1:])
    assert runs(tokenizer, encoded) == ["dog</s>", "fox</s>"]
    assert encoded.prompt_ids == ids_of(tokenizer, turns("q"), add_generation_prompt=True)


def test_white_space_before_the_end_token_is_trained(make_tokenizer: Make, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(template=templates["system_into_user"])
    encoded = encode(tokenizer, turns("q"), turns("q", "a dog", "r", "the fox")[1:])
    assert runs(tokenizer, encoded) == [" a dog </s>", " the fox </s>"]


@pytest.mark.share(8)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chatml", "generation_blocks", "mistral", "system_into_user", "no_end_token"])
def test_control_tokens_in_contents_are_text(
    kind: str, name: str, make_tokenizer: Make, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer(kind, templates[name])
    controls = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    clean = turns("a dog", "the fox", "a dog", "the fox")
    for i, control in sorted(tokenizer.added_tokens_decoder.items()):
        if i not in controls:
            continue
        for nasty in (str(control), f"a{control}b", f" {control} ", f"{control}{control}\n"):
            messages = turns(f"a dog{nasty}", f"the fox{nasty}dog", f"a{nasty}dog", f"the{nasty}fox")
            encoded = encode(tokenizer, messages[:1], messages[1:])
            both = encoded.prompt_ids + encoded.sides[0].ids
            base = encode(tokenizer, clean[:1], clean[1:])
            # the same control tokens in the same order as without them
            expected = [t for t in base.prompt_ids + base.sides[0].ids if t in controls]
            assert [t for t in both if t in controls] == expected
            assert encoded.counts["controls_as_text"] == 4 * nasty.count(str(control))
            if "legacy" not in kind:  # which puts spaces between parts
                assert str(control) in "".join(runs(tokenizer, encoded))


def test_an_assistant_may_write_added_tokens_that_are_not_special(make_tokenizer: Make) -> None:
    template = "{% for m in messages %}{{ '<|start|>' + m['content'] + '<|end|>' }}{% endfor %}{# <tool_call> #}"
    tokenizer = make_tokenizer(template=template)
    call, think = tokenizer.convert_tokens_to_ids(["<tool_call>", "<think>"])
    encoded = encode(tokenizer, turns("<tool_call><think>"), turns("", "<tool_call><think>")[1:])
    # in others' mouths it is a control token if the template writes it
    assert call not in encoded.prompt_ids and think in encoded.prompt_ids
    assert call in encoded.sides[0].ids and think in encoded.sides[0].ids
    assert encoded.counts["controls_as_text"] == 1


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=plain, completion=plain, adds_bos=st.booleans())
@settings(max_examples=25, deadline=None)
def test_raw_rows_are_the_prompt_alone_and_what_follows(
    kind: str, prompt: str, completion: str, adds_bos: bool, make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(kind, None, adds_bos=adds_bos)
    encoded = encode(tokenizer, prompt, completion)
    assert encoded.prompt_ids == tokenizer(prompt)["input_ids"]  # with its BOS, once
    (side,) = encoded.sides
    assert side.ids[-1] == tokenizer.eos_token_id and set(side.mask) == {1}
    whole = tokenizer.decode([*encoded.prompt_ids, *side.ids[:-1]], skip_special_tokens=True)
    assert whole == tokenizer.decode(tokenizer(prompt + completion)["input_ids"], skip_special_tokens=True)


def test_a_bos_token_is_never_doubled(make_tokenizer: Make, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(template=templates["mistral"], adds_bos=True)
    bos = tokenizer.bos_token_id
    chat = encode(tokenizer, turns("q"), turns("q", "x")[1:])
    raw = encode(tokenizer, "<s>q", "x", mode="raw")
    for encoded in (chat, raw):
        assert encoded.prompt_ids[0] == bos
        assert [*encoded.prompt_ids, *encoded.sides[0].ids].count(bos) == 1
    assert raw.counts["controls_as_text"] == 1


def test_a_token_across_the_boundary_is_split_and_counted(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=None)
    for word in [w for w in tokenizer.get_vocab() if len(w) > 1 and w.isascii() and w.isalpha()]:
        assert len(tokenizer(word)["input_ids"]) == 1
        encoded = encode(tokenizer, word[:-1], word[-1:])
        assert encoded.counts["boundaries_split"] == 1
        assert encoded.prompt_ids == tokenizer(word[:-1])["input_ids"]
        assert encoded.sides[0].ids[:-1] == tokenizer(word[-1:])["input_ids"]
    # through a template: the header's newline and the first of the answer's are one token
    chat = make_tokenizer()
    assert len(chat("\n\n")["input_ids"]) == 1
    encoded = encode(chat, turns("q"), turns("q", "\n\nx")[1:])
    assert encoded.counts["boundaries_split"] == 1
    assert encoded.prompt_ids == ids_of(chat, turns("q"), add_generation_prompt=True)
    assert runs(chat, encoded) == ["\n\nx<|end|>"]


@pytest.mark.share(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chatml", "mistral", "no_end_token"])
@given(prompt=plain, chosen=plain, rejected=plain)
@settings(max_examples=15, deadline=None)
def test_sides_of_a_pair_are_encoded_as_if_alone(
    kind: str, name: str, prompt: str, chosen: str, rejected: str, make_tokenizer: Make, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer(kind, templates[name])
    sides = [turns("", side)[1:] for side in (chosen, rejected)]
    pair = encode(tokenizer, turns(prompt), *sides)
    for i, side in enumerate(sides):
        alone = encode(tokenizer, turns(prompt), side)
        assert (pair.prompt_ids, pair.sides[i]) == (alone.prompt_ids, alone.sides[0])


def test_what_of_two_prompts_differs_is_context(make_tokenizer: Make) -> None:
    # a template that looks at the answer while it writes the prompt
    template = (
        "{% set last = messages[-1]['content'] %}{% for m in messages %}{{ '<|start|>' + m['role'] }}"
        "{{ ' long' if last | length > 1 and loop.first else '' }}{{ ':' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant:' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template=template)
    encoded = encode(tokenizer, turns("q"), turns("", "x")[1:], turns("", "dog")[1:])
    assert encoded.counts["other_prompts"] == 1
    assert tokenizer.decode(encoded.prompt_ids) == "<|start|>user"
    assert [runs(tokenizer, encoded, i) for i in (0, 1)] == [["x<|end|>"], ["dog<|end|>"]]
    assert tokenizer.decode(encoded.sides[1].ids).startswith(" long:q<|end|>")


def test_without_a_prompt_the_first_token_is_one(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template="{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}")
    encoded = encode(tokenizer, (), turns("", "the dog")[1:])
    assert len(encoded.prompt_ids) == 1
    assert tokenizer.decode(encoded.prompt_ids + encoded.sides[0].ids) == "the dog<|end|>"
    assert set(encoded.sides[0].mask) == {1}


def test_a_tokenizer_without_an_eos_token_needs_a_template_with_end_tokens(
    make_tokenizer: Make, templates: dict[str, str]
) -> None:
    encode(make_tokenizer(eos_token=None), turns("q"), turns("", "x")[1:])
    with pytest.raises(ModelError, match="EOS"):
        encode(make_tokenizer(template=templates["no_end_token"], eos_token=None), turns("q"), turns("", "x")[1:])


def test_slow_tokenizers_are_refused(make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ModelError, match="slow"):
        Encoder(tokenizer, "")


def test_a_tokenizer_that_truncates_by_itself_does_not(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer)
    encoder = Encoder(tokenizer, renderer.template)
    rendered = renderer.render(Example(turns("a dog a dog a dog"), (turns("", "the fox the fox")[1:],), HERE))
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    (encoded,) = encoder.encode([rendered])
    assert isinstance(encoded, Encoded)
    assert runs(tokenizer, encoded) == ["the fox the fox<|end|>"]
    assert tokenizer.decode(encoded.prompt_ids).count("dog") == 3


@pytest.mark.share(1)
@pytest.mark.parametrize("folder", ["tokenizers/gpt2", "tokenizers/mistral-tekken-131k", "tokenizers/mistral-v3-32k"])
def test_real_tokenizers(folder: str, shared: Path) -> None:
    check_real_tokenizer(AutoTokenizer.from_pretrained(shared / folder))


def test_the_base_models_tokenizer(shared: Path) -> None:
    check_real_tokenizer(AutoTokenizer.from_pretrained(shared / "models" / "base-12m"))


def check_real_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(tokenizer)
    tokenizer.chat_template = renderer.template
    clean = turns("What is it?", "A dog.", "Say 日本 to 👩‍👧", "naïve, it is ok\n")
    encoded = encode(tokenizer, clean[:1], clean[1:])
    both = encoded.prompt_ids + encoded.sides[0].ids
    assert both == ids_of(tokenizer, clean)[: len(both)]
    assert encoded.prompt_ids == ids_of(tokenizer, clean[:1], add_generation_prompt=True)
    end = str(tokenizer.eos_token)
    assert [run.lstrip(" ") for run in runs(tokenizer, encoded)] == ["A dog." + end, "naïve, it is ok\n" + end]

    controls = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    few = [*sorted(controls)[:12], *sorted(controls)[-3:]]
    nasty = " ".join(f"{controls[i].content}x{controls[i].content}" for i in few)
    messages = turns(nasty, nasty, "q" + nasty, nasty + "!")
    expected = [t for t in both if t in controls]
    encoded = encode(tokenizer, messages[:1], messages[1:])
    assert [t for t in encoded.prompt_ids + encoded.sides[0].ids if t in controls] == expected
    assert [run.lstrip(" ") for run in runs(tokenizer, encoded)] == [nasty + end, nasty + "!" + end]
    raw = encode(tokenizer, "a" + nasty, nasty, mode="raw")
    leading = len(tokenizer("a")["input_ids"]) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
    assert not {*raw.prompt_ids[leading:], *raw.sides[0].ids[:-1]} & controls.keys()


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=8), st.booleans())
def test_offsets_never_fall_and_leave_no_gap(pairs: list[tuple[int, int]], is_contiguous: bool) -> None:
    offsets = [(start, start + length) for start, length in pairs]
    if is_contiguous:
        stops = [sum(length for _, length in pairs[: i + 1]) for i in range(len(pairs))]
        offsets = list(zip([0, *stops], stops, strict=False))

    encoding = SimpleNamespace(ids=list(range(len(offsets))), offsets=offsets)
    found = Tokens.of(encoding, frozenset())
    ends = [max(stop for _, stop in offsets[: i + 1]) for i in range(len(offsets))]
    starts = [min(start, before) for (start, _), before in zip(offsets, [0, *ends], strict=False)]
    assert (found.ids, found.starts, found.ends) == (encoding.ids, starts, ends)
    assert not is_contiguous or list(zip(found.starts, found.ends, strict=True)) == offsets
