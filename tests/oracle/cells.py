"""One cell of the table of families x conversations: what strop trains, beside what must be trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any, Literal

from oracle.contract import EMPTY_THOUGHT, REASONING, Expected, NotRenderedError, Oracle, Turn, words_of
from oracle.conversations import CONVERSATIONS
from oracle.families import Family, family
from strop.config import DatasetSection, ModelSection, RunConfig, TrainingSection
from strop.data.read.row import Row
from strop.data.store.row_pipeline import RowPipeline
from strop.types import Origin

Kind = Literal["right", "refused", "differs", "WRONG"]
"""right: as transformers marks it. refused: with a reason that holds. differs: as the contract says, and otherwise than
the training twin, with a reason that was checked."""


OTHER_PROMPT = "no answer follows the template's generation prompt; the row is trained as rendered, and counted"
HISTORY = "an earlier turn is history: the template writes it otherwise than inference would"
PROMPT = "the twin marks what the generation prompt writes already"
TAIL = "the twin marks what the template writes behind the token that generation stops at"
NEXT = "generation stops at the first token of what follows the turn, which is trained; the twin does not mark it"
CLOSING = "an earlier turn is closed by another token than inference would write; that one is not trained"
LEAD = (
    "the generation prompt ends in front of the turn's header, which the model has to write; the twin does not mark it"
)
EMPTY = "the twin writes an empty think block into an earlier turn, the template does not"
RESTORED = "the template drops the reasoning of a content; it is put back behind the generation prompt"
SEEN = (
    "once an answer follows, the template leaves things of earlier turns out that inference has seen; the answer is "
    "put behind its generation prompt"
)
REASONS = (TAIL, PROMPT, HISTORY, CLOSING, NEXT, LEAD, EMPTY, RESTORED, OTHER_PROMPT, SEEN)
"""Why what is trained is not what the training twin marks, though it is right; each is checked where it is given."""


@dataclass(frozen=True)
class Cell:
    """What became of a conversation. words: the reasons, or what is wrong."""

    kind: Kind
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """What strop makes of a row. runs: ids of each stretch of trained tokens. counts: what was done to the row."""

    prompt: list[int]
    ids: list[int]
    runs: list[list[int]]
    counts: Mapping[str, int]


def trained_by_strop(family: Family, template: str, row: Mapping[str, Any]) -> Trained | str:
    """The row's tokens, or the text of its refusal."""
    config = RunConfig(
        models=[ModelSection(huggingface_id="none")],
        dataset=DatasetSection(on_error="skip"),
        training=TrainingSection(max_seq_length=8192, max_prompt_length=None, max_completion_length=None),
    )
    tokenizer = family.tokenizer(template)
    worked = RowPipeline(config, tokenizer, "single", family.stop_ids()).work([Row(Origin("rows.jsonl", 1), row)])
    if worked.refused or worked.dropped:
        why = dict(worked.first_refusal or {})
        return f"{next(iter(worked.refused or worked.dropped))}: {why.get('found', '')}"
    (record,) = worked.table.to_pylist()
    ids, mask, prompt = record["ids"], record["mask"], record["prompt"]
    runs = [
        [i for i, _ in run] for is_trained, run in groupby(zip(ids, mask, strict=True), lambda p: p[1]) if is_trained
    ]
    return Trained(ids[:prompt], ids, runs, record)


@cache
def cells(name: str, *, twin: bool) -> dict[str, Cell]:
    """The cell of every conversation under one family's template."""
    return {kind: judge(family(name), row, twin=twin) for kind, row in CONVERSATIONS.items()}


def judge(family: Family, row: Mapping[str, Any], *, twin: bool) -> Cell:
    """Strop's tokens beside those that must be trained.

    Args:
        twin: the training twin is the template, and its generation blocks decide.
    """
    template = (family.twin or family.template) if twin else family.template
    found = trained_by_strop(family, template, row)
    try:
        oracle = Oracle(family, template, row)
    except NotRenderedError as error:
        if isinstance(found, str):
            return Cell("refused", (found,))
        return Cell("WRONG", (f"trained, although it is not rendered in full: {error}", *_texts(family, found)))
    expected = oracle.expected()
    if isinstance(found, str):
        return _refused(found, oracle, expected)
    wanted = [oracle.ids(turn.text) for turn in expected.trained]
    if found.runs != wanted:
        return Cell(
            "WRONG", (*_texts(family, found), "must be " + str([oracle.tokenizer.decode(run) for run in wanted]))
        )
    if not expected.follows_its_prompt:
        if found.counts.get("other_prompts"):
            return Cell("differs", (OTHER_PROMPT,))
        return Cell(
            "WRONG", ("the prompt is not the one that inference sees, and nothing says so", *_texts(family, found))
        )
    if found.prompt not in expected.prompts:
        prompt = oracle.tokenizer.decode(found.prompt)
        return Cell("WRONG", (f"the prompt ends {prompt[-60:]!r}", f"must be {expected.trained[0].opening[-60:]!r}"))
    if expected.by_blocks or family.twin is None:
        return Cell("right")
    if oracle.is_behind_its_prompt:
        return Cell("differs", (SEEN,))
    return _beside_the_twin(family, row, oracle, expected)


def _refused(why: str, oracle: Oracle, expected: Expected) -> Cell:
    contents = [words_of(m) for m in oracle.messages if m["role"] == "assistant" and "tool_calls" not in m]
    if why.startswith("empty_field") and any(not content.strip() for content in contents):
        return Cell("refused", (why,))
    if why.startswith("nothing_trained") and not expected.trained:
        return Cell("refused", (why,))
    if not expected.follows_its_prompt:
        return Cell("refused", (why,))
    texts = [turn.text for turn in expected.trained]
    return Cell("WRONG", (f"refused without need: {why}", f"must be {texts}"))


def _texts(family: Family, found: Trained | str) -> tuple[str, ...]:
    if isinstance(found, str):
        return (found,)
    tokenizer = family.tokenizer()
    return (
        f"the prompt ends {tokenizer.decode(found.prompt)[-60:]!r}",
        f"trained is {[tokenizer.decode(run) for run in found.runs]}",
    )


def _beside_the_twin(family: Family, row: Mapping[str, Any], oracle: Oracle, expected: Expected) -> Cell:
    """Whether what is trained, which is as the contract says, is what the training twin marks; if not, why."""
    assert family.twin is not None
    twin = Oracle(family, family.twin, row)
    marked = [twin.whole[a:b] for a, b in twin.masked()]
    turns = expected.turns
    if len(marked) != len(turns):
        return Cell("WRONG", (f"the twin marks {marked}, and there are {len(turns)} turns",))
    reasons: dict[str, None] = {}
    for turn, text in zip(turns, marked, strict=True):
        why = _why(family, oracle, expected, turn, text)
        if why is None:
            return Cell("WRONG", (f"trained is {turn.text!r}", f"the twin marks {text!r}, and nothing explains it"))
        reasons.update(dict.fromkeys(why))
    return Cell("differs", tuple(reasons)) if reasons else Cell("right")


def _why(family: Family, oracle: Oracle, expected: Expected, turn: Turn, marked: str) -> list[str] | None:
    """The reasons why a turn's trained text is not what the twin marks, each of them checked; None without one."""
    if turn.text == marked:
        return []
    if turn not in expected.trained:
        return [HISTORY]
    reasons = []
    if not oracle.whole.startswith(turn.opening):
        return [RESTORED] if turn.text.removesuffix(family.ends.eos) in words_of(oracle.messages[turn.number]) else None
    head = _repeated(turn, marked)
    lead = turn.text.find(marked.rstrip())
    empty = _empty_thought(marked)
    if head:
        marked = marked[head:]
        reasons.append(PROMPT)
    elif lead > 0 and not any(word in turn.text[:lead] for word in _words(oracle.messages[turn.number])):
        turn = replace(turn, text=turn.text[lead:])
        reasons.append(LEAD)
    if empty and not head and not turn.text.lstrip().startswith(empty.lstrip()):
        # the template can leave the line ends in front of the content that it trims behind a block
        blank = len(turn.text) - len(turn.text.lstrip("\n"))
        marked = turn.text[:blank] + marked.removeprefix(empty)
        reasons.append(EMPTY)
    if marked == turn.text:
        return reasons
    if marked.startswith(turn.text):
        last = turn.number == len(oracle.messages) - 1
        closed = any(turn.text.endswith(stop) for stop in family.stops)
        return [*reasons, TAIL if closed else CLOSING] if closed or not last else None
    if turn.text.startswith(marked) and turn.text[len(marked) :].strip() in family.stops:
        return [*reasons, NEXT]
    return None


def _repeated(turn: Turn, marked: str) -> int:
    """How much of the generation prompt's end the twin marks in front of the turn's text."""
    for head in range(len(marked) - 1, 0, -1):
        rest = marked[head:]
        if turn.opening.endswith(marked[:head]) and (rest.startswith(turn.text) or turn.text.startswith(rest)):
            return head
    return 0


def _words(message: Mapping[str, Any]) -> list[str]:
    """What a row says in a turn."""
    texts = [words_of(message), *(message.get(key) for key in REASONING)]
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return [text for text in [*texts, *names] if text]


def _empty_thought(text: str) -> str:
    found = EMPTY_THOUGHT.match(text)
    return found[0] if found is not None else ""
