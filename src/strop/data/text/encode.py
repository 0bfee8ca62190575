"""Text to tokens: ids and loss masks of rendered conversations, each encoded once and as a whole. Floor 2.

In: the Rendered of each completion of an example. Out: prompt ids, and completions as ids with a mask.

    control tokens in contents   are encoded as the text they are; only the template writes control tokens
    the boundary                 the prompt's ids are those that inference sees: where the conversation's tokens differ
                                 from the prompt's alone, the text around the boundary is encoded again in two parts;
                                 so it is in front of every later answer
    trained                      every token that overlaps a trained span; where the last one has no end token, the
                                 tokenizer's EOS follows
    the end                      tokens after the last trained one are left out: nothing depends on them

Text between two added tokens is encoded on its own by every tokenizer of the package `tokenizers`; this is what makes
it right to encode a part again, and to encode the second side of a pair from its last shared added token on.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain, compress, count, islice
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from strop.data.read.row import RowRefused
from strop.data.text.chat_template import leading_tokens
from strop.data.text.render import Rendered
from strop.errors import ModelError

Place = Literal["start", "after added", "inside"]
"""Where a part stands: at the start of the text, right after an added token, or after other text."""

ANCHORS = ("\n", "x", ".")
"""Text to put in front of a part that stands inside, so that it is not encoded as a beginning."""


@dataclass(slots=True)
class Tokens:
    """Token ids with the characters [starts, ends) that each stands for.

    Ends never fall. Characters that a tokenizer leaves out of its offsets (white space, combining characters) belong to
    the token behind them, or to the one in front of them if that is an added token.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, encoding: Any, added: Container[int]) -> Tokens:
        """The tokens of an encoding. added: ids of added tokens, which take in no character that is not theirs."""
        ids: list[int] = encoding.ids
        starts, stops = zip(*encoding.offsets, strict=True) if ids else ((), ())
        if starts[:1] == (0,) and starts[1:] == stops[:-1] and list(stops) == sorted(stops):
            return cls(ids, list(starts), list(stops))  # the usual case: each begins where the one in front of it ends
        ends = list(accumulate(stops, max))
        filled = list(map(min, starts, chain((0,), ends)))
        if filled != list(starts):
            for i, start in enumerate(starts):
                if start > filled[i] and ids[i] in added:
                    # a normaliser has made two characters one, and the offsets leave out the second
                    filled[i] = start
                    if i and ids[i - 1] not in added:
                        ends[i - 1] = start
        return cls(ids, filled, ends)

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(self.ids[part], self.starts[part], self.ends[part])

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.ids + other.ids, self.starts + other.starts, self.ends + other.ends)

    @classmethod
    def joined(cls, parts: Sequence[Tokens]) -> Tokens:
        """The parts one behind the other."""
        columns = ([part.ids for part in parts], [part.starts for part in parts], [part.ends for part in parts])
        return cls(*(list(chain.from_iterable(column)) for column in columns))

    def shifted(self, by: int) -> Tokens:
        return Tokens(list(self.ids), [s + by for s in self.starts], [e + by for e in self.ends])


@dataclass(frozen=True, slots=True)
class EncodedSide:
    """A completion: its ids and one byte per token, 1 = trained."""

    ids: list[int]
    mask: bytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as tokens, before any limit.

    counts: what was done to the row, by the names of `COUNTERS`. num_prompt_turns: messages in front of the first
    trained answer. left_out: what of the row is not in the tokens, in words. numbers: as in Example.
    """

    prompt_ids: list[int]
    sides: tuple[EncodedSide, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    num_prompt_turns: int = 0
    left_out: tuple[str, ...] = ()
    numbers: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Side:
    rendered: Rendered
    prompt_ids: list[int]
    ids: list[int]
    mask: bytes
    num_split: int
    controls: list[int]


class Encoder:
    """Encodes by one tokenizer.

    Args:
        template: the chat template in use. Added tokens that it contains but that are not special (`<tool_call>`)
            count as control tokens in turns of users and tools; an assistant may write them.
        whole: a completion is everything after the prompt, with what the template writes after the last answer, but
            without padding tokens at the end. Every token counts as trained. Reward models read this.

    Raises:
        ModelError: the tokenizer gives no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "", *, whole: bool = False) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} is a slow one: it does not say which token is which text",
                expected="a fast tokenizer (a folder with tokenizer.json)",
                fix="convert it: AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)",
            )
        self._backend = tokenizer.backend_tokenizer
        self._eos: int | None = tokenizer.eos_token_id
        self._unknown: int | None = tokenizer.unk_token_id
        self._padding: int | None = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._whole = whole
        self._leading = leading_tokens(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._added = {i: str(token.content) for i, token in added.items()}
        self._strips_right = frozenset(i for i, token in added.items() if token.rstrip)
        self._special = frozenset(i for i, token in added.items() if token.special) | set(tokenizer.all_special_ids)
        in_template = {i for i, text in self._added.items() if text in template and not text.isspace()}
        self._controls = self._special | in_template
        clean = (self._added[i] for i in sorted(self._special & added.keys()) if i not in self._strips_right)
        self._anchor = next(clean, "")
        self._part = lru_cache(maxsize=1024)(self._encode_part)

    def is_end_token(self, token: int) -> bool:
        """Whether a completion that ends with this token is complete: the only control tokens in it are end tokens."""
        return token in self._special

    def encode(self, examples: Sequence[Sequence[Rendered]]) -> list[Encoded | RowRefused]:
        """Encodes all sides of all examples in two calls of the tokenizer. Results and refusals are in the order of the
        examples."""
        firsts = self._batch([sides[0].text for sides in examples])
        heads = [
            self._shared(sides[0], tokens, side)
            for sides, tokens in zip(examples, firsts, strict=True)
            for side in sides[1:]
        ]
        others = [side for sides in examples for side in sides[1:]]
        tails = self._batch([side.text[shift:] for side, (_, shift) in zip(others, heads, strict=True)])
        rest = (head + tail.shifted(shift) for (head, shift), tail in zip(heads, tails, strict=True))
        results: list[Encoded | RowRefused] = []
        for sides, first in zip(examples, firsts, strict=True):
            tokens = [first, *islice(rest, len(sides) - 1)]
            try:
                results.append(_joined([self._side(r, t) for r, t in zip(sides, tokens, strict=True)]))
            except RowRefused as refusal:
                results.append(refusal)
        return results

    def _shared(self, first: Rendered, tokens: Tokens, other: Rendered) -> tuple[Tokens, int]:
        """The tokens of `first` up to the last added token of the prompt that `other` has too, and where they end."""
        stop = first.boundary
        if other.boundary != stop or other.text[:stop] != first.text[:stop]:
            return tokens[:0], 0
        i = self._last_added(first.text, tokens, bisect_right(tokens.ends, stop))
        return (tokens[:i], tokens.starts[i]) if i >= 0 else (tokens[:0], 0)

    def _side(self, rendered: Rendered, tokens: Tokens) -> _Side:
        tokens, controls = self._with_controls_as_text(rendered, tokens)
        num_split = 0
        for place in (*rendered.openings[:0:-1], rendered.boundary):
            tokens, start, was_split = self._split(rendered.text, tokens, place)
            num_split += was_split
        ids, mask = self._completion(rendered, tokens, start)
        if self._whole:
            ids, mask = self._read_by_reward_model(rendered, tokens, start, ids)
        leading = self._leading if rendered.starts_bare else []
        return _Side(rendered, leading + tokens.ids[:start], ids, mask, num_split, controls)

    def _with_controls_as_text(self, rendered: Rendered, tokens: Tokens) -> tuple[Tokens, list[int]]:
        """The tokens without control tokens inside of contents, and at which characters there were any."""
        places: list[int] = []
        parts: list[Tokens] = []
        done = 0
        content_starts = [content[0] for content in rendered.contents]
        for i in list(compress(count(), map(self._controls.__contains__, tokens.ids))):
            token, start, stop = tokens.ids[i], tokens.starts[i], tokens.ends[i]
            last = bisect_left(content_starts, stop) - 1
            if last < 0 or rendered.contents[last][1] <= start:
                continue  # most stand between contents
            words = rendered.text[start:stop]
            if not self._is_written(token, words):
                continue
            # white space around it that the token takes in can be the template's
            left, right = stop - len(words.lstrip()), start + len(words.rstrip())
            last = bisect_left(content_starts, right) - 1  # of those that begin before its end
            if last < 0 or rendered.contents[last][1] <= left:
                continue
            if token in self._special or not rendered.contents[last][2]:
                parts += [tokens[done:i], self._part(words, "inside").shifted(start)]
                places.append(left)
                done = i + 1
        return (Tokens.joined([*parts, tokens[done:]]) if parts else tokens), places

    def _is_written(self, token: int, words: str) -> bool:
        """Whether a control token comes from its own text; the unknown token can come from any."""
        return token != self._unknown or words.strip() == self._added.get(token)

    def _is_special(self, text: str, tokens: Tokens, i: int) -> bool:
        return tokens.ids[i] in self._special and self._is_added(text, tokens, i)

    def _is_added(self, text: str, tokens: Tokens, i: int) -> bool:
        token = tokens.ids[i]
        return token in self._added and self._is_written(token, text[tokens.starts[i] : tokens.ends[i]])

    def _last_added(self, text: str, tokens: Tokens, stop: int) -> int:
        """The number of the last added token in front of token `stop`; -1 where there is none."""
        backwards = map(self._added.__contains__, reversed(tokens.ids[:stop]))  # in C: a prompt can be long
        places = compress(range(stop - 1, -1, -1), backwards)
        return next((i for i in places if self._is_added(text, tokens, i)), -1)

    def _split(self, text: str, tokens: Tokens, boundary: int) -> tuple[Tokens, int, bool]:
        """The tokens with none across the boundary, how many stand before it, and whether one stood across."""
        stop = bisect_right(tokens.ends, boundary)
        if stop < len(tokens.ids) and self._takes_in(tokens, stop, boundary):
            return tokens, stop + 1, False  # at inference too
        start = self._last_added(text, tokens, stop) + 1
        left = tokens.ends[start - 1] if start else 0
        alone = self._part(text[left:boundary], "after added" if start else "start")
        if alone.ids == tokens.ids[start:stop]:
            return tokens, stop, False
        across = stop < len(tokens.ids) and tokens.starts[stop] < boundary
        end = stop
        if across:
            while end < len(tokens.ids) and (tokens.starts[end] < boundary or not self._is_added(text, tokens, end)):
                end += 1
        right = tokens.starts[end] if end < len(tokens.ids) else len(text)
        after = self._part(text[boundary:right], "inside").shifted(boundary) if across else tokens[:0]
        return tokens[:start] + alone.shifted(left) + after + tokens[end:], start + len(alone.ids), across

    def _takes_in(self, tokens: Tokens, i: int, place: int) -> bool:
        """Whether token `i` goes beyond this place only because it takes in the white space that follows it."""
        return tokens.starts[i] < place and tokens.ids[i] in self._strips_right

    def _completion(self, rendered: Rendered, tokens: Tokens, start: int) -> tuple[list[int], bytes]:
        """Ids and mask from token `start` on, to the last trained token; the last answer ends with an end token."""
        mask = bytearray(len(tokens.ids))
        after = start
        for begin, stop in rendered.trained:
            first = bisect_right(tokens.ends, begin, start)
            if first < len(tokens.ids) and self._takes_in(tokens, first, begin):
                first += 1  # a header that takes in the white space at the answer's beginning
            after = max(bisect_left(tokens.starts, stop, first), first)
            mask[first:after] = bytes([1]) * (after - first)
        stop = mask.rfind(1) + 1
        if not rendered.may_be_closed or self._is_closed(rendered.text, tokens, mask):
            return tokens.ids[start:stop], bytes(mask[start:stop])
        if self._eos is None:
            raise ModelError(
                "the chat template closes no answer with an end token, and the tokenizer has no EOS token",
                expected="one of the two, so that the model learns to stop",
                fix="set eos_token in the tokenizer's configuration",
            )
        stop = max(stop, after)
        return [*tokens.ids[start:stop], self._eos], bytes(mask[start:stop]) + b"\1"

    def _read_by_reward_model(
        self, rendered: Rendered, tokens: Tokens, start: int, ids: list[int]
    ) -> tuple[list[int], bytes]:
        """Ids and mask from token `start` on, to the end of the text. ids: the same to the last trained token, with an
        end token of the tokenizer where the text has none."""
        rest = tokens.ids[start:]
        found = rest if rest[: len(ids)] == ids else ids
        while found and found[-1] == self._padding:
            found = found[:-1]
        if not found:
            raise RowRefused("nothing_trained", "the completion is padding tokens alone")
        return found, b"\1" * len(found)

    def _is_closed(self, text: str, tokens: Tokens, mask: bytearray) -> bool:
        """Whether the last trained token is an end token, but for white space that a generation block holds behind."""
        last = mask.rfind(1)
        while last >= 0 and mask[last] and not self._is_special(text, tokens, last):
            if text[tokens.starts[last] : tokens.ends[last]].strip():
                return False
            last -= 1
        return last >= 0 and bool(mask[last])

    def _encode_part(self, text: str, place: Place) -> Tokens:
        """A part of a text as plain text, without control tokens, as it is encoded at its place."""
        if not text:
            return Tokens([], [], [])
        tokens = self._at_place(text, place)
        for start, stop in self._written_controls(text, tokens):
            # not special, so the tokenizer always takes it for itself: break it up after its first character
            words = text[start:stop]
            cut = stop - len(words.lstrip()) + 1
            if cut >= stop:
                raise RowRefused("control_token", f"the tokenizer cannot write {words!r} as text")
            return self._part(text[:cut], place) + self._part(text[cut:], "inside").shifted(cut)
        return tokens

    def _written_controls(self, text: str, tokens: Tokens) -> list[tuple[int, int]]:
        """Where the control tokens stand that come from their own text."""
        if self._controls.isdisjoint(tokens.ids):
            return []
        places = zip(tokens.ids, tokens.starts, tokens.ends, strict=True)
        return [(a, b) for token, a, b in places if token in self._controls and self._is_written(token, text[a:b])]

    def _at_place(self, text: str, place: Place) -> Tokens:
        inside = (*ANCHORS, "")
        prefixes = {"start": ("",), "after added": (self._anchor,), "inside": inside}[place]
        tokens = self._after(prefixes, text, as_text=False)
        if self._written_controls(text, tokens):
            # it holds the text of a special token; added tokens are no anchors when special tokens are text
            tokens = self._after(("",) if place == "start" else inside, text, as_text=True)
        return tokens

    def _after(self, prefixes: Sequence[str], text: str, *, as_text: bool) -> Tokens:
        """The tokens of `text` after the first prefix that shares no token with it, or else after the last."""
        for prefix in prefixes:
            (tokens,) = self._batch([prefix + text], as_text=as_text)
            first = bisect_right(tokens.ends, len(prefix)) if prefix else 0
            if first == len(tokens.ids) or tokens.starts[first] >= len(prefix):
                break
        return tokens[first:].shifted(-len(prefix))

    def _batch(self, texts: Sequence[str], *, as_text: bool = False) -> list[Tokens]:
        backend = self._backend
        # a tokenizer.json can switch these on, and transformers sets them with every call of its own
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = as_text
        try:
            encodings = backend.encode_batch(list(texts), add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False
        return [Tokens.of(encoding, self._added) for encoding in encodings]


def _joined(sides: Sequence[_Side]) -> Encoded:
    """The sides with their common prompt; what of a prompt is not common is context in front of the completions."""
    ids = [side.prompt_ids + side.ids for side in sides]
    masks = [bytes(len(side.prompt_ids)) + side.mask for side in sides]
    shared = _num_shared([side.prompt_ids for side in sides])
    if shared == 0:
        # a prompt has at least one token: the first one, which nothing predicts
        if len({side[0] for side in ids}) > 1:
            raise RowRefused("no_common_prompt", "the completions have no token in common before their answers")
        shared = 1
    return Encoded(
        ids[0][:shared],
        tuple(EncodedSide(i[shared:], m[shared:]) for i, m in zip(ids, masks, strict=True)),
        _counts(sides),
        min(side.rendered.num_prompt_turns for side in sides),
        tuple(dict.fromkeys(words for side in sides for words in side.rendered.left_out)),
    )


def _num_shared(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with."""
    shared = min(map(len, prompts))
    if all(prompt[:shared] == prompts[0][:shared] for prompt in prompts):
        return shared
    return next(i for i in range(shared) if len({prompt[i] for prompt in prompts}) > 1)


def _counts(sides: Sequence[_Side]) -> dict[str, int]:
    """What was done to the row, by the names of `COUNTERS`."""
    rendered = [side.rendered for side in sides]
    # what stands in the prompt is met on every side, but counts once
    controls = {
        (0 if at < side.rendered.boundary else n, at) for n, side in enumerate(sides, start=1) for at in side.controls
    }
    return {
        "boundaries_split": sum(side.num_split for side in sides),
        "controls_as_text": len(controls),
        "answers_as_history": sum(side.num_history for side in rendered),
        "answers_left_out": sum(side.num_left_out for side in rendered),
        "reasoning_dropped": sum(side.num_dropped_reasoning for side in rendered),
        "message_keys_unread": any(side.has_unread_keys for side in rendered),
        "template_kwargs_unread": any(side.has_unread_kwargs for side in rendered),
        "other_prompts": not all(side.is_generation_prompt for side in rendered),
    }
