"""Answers to the same prompts while a model trains: at its start, at every evaluation, and at its end. Floor 7.

The policy answers by itself (`rollout/sampler.py`), with the likeliest token each time, so that two answers to a prompt
differ by what was learned between them and by nothing else. No random number is drawn: training is the same with
samples and without. They go to samples.jsonl, one line per answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from strop.durable import JsonLines
from strop.engine.metrics import SCORE, WIN_RATE
from strop.engine.outputs import RunOutputs
from strop.errors import ConfigError, DataError
from strop.generate.prompts import encode, read_prompts
from strop.rewards.calls import RewardCaller, check_rewards
from strop.rollout.build import completion_ends, stop_texts
from strop.rollout.drawing import Drawing
from strop.rollout.sampler import Prompt, Sampled, Sampler
from strop.session import Session
from strop.world import World

BATCH_TOKENS = 16_384
"""Prompts and answers that are decoded together."""
SCORE_SECONDS = 60.0
"""How long scoring one answer may take."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt as text and as tokens, and where it comes from."""

    text: str
    ids: Sequence[int]
    where: str


class Samples:
    """Takes the answers of the policy to `asked`, writes them down, and compares their scores with those of the start.

    Args:
        score: gives the score of an answer, or why there is none; None: answers are not scored.
        file: where earlier processes of the run have written theirs.
        write: writes down the answers of a step. note: called with a message about a score that fails.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        asked: Sequence[Asked],
        rooms: Sequence[int],
        score: Callable[[str, str, int], float | str] | None,
        file: JsonLines,
        write: Callable[[int, Sequence[Mapping[str, Any]]], None],
        note: Callable[[str], None],
        world: World,
    ) -> None:
        self._sampler, self._tokenizer, self._asked, self._rooms = sampler, tokenizer, asked, rooms
        self._score, self._file, self._write, self._note, self._world = score, file, write, note, world
        self._taken: dict[int, list[Mapping[str, Any]]] | None = None
        self._has_warned = False

    def take(self, step: int) -> Mapping[str, float]:
        """The answers after `step`, once for each step; all processes call it. Returns what is measured of them."""
        if self._world.on_main(lambda: len(self._before().get(step, ())) == len(self._asked)):
            return self._world.on_main(lambda: self._measured(step))
        self._world.doing(f"samples after step {step}")
        own = self._world.own_share(range(len(self._asked)))
        found = self._sampler.sample(0, [Prompt(i, self._asked[i].ids, self._rooms[i]) for i in own])
        answers = {i: answer for i, (answer,) in zip(own, found, strict=True)}
        shares = self._world.gather(answers)
        return self._world.on_main(lambda: self._write_down(step, {k: v for share in shares for k, v in share.items()}))

    def _before(self) -> dict[int, list[Mapping[str, Any]]]:
        """By step, the lines of this process and of earlier ones, which may have asked other prompts."""
        if self._taken is None:
            self._taken = {}
            for line in self._file.read():
                self._taken.setdefault(line["step"], []).append(line)
        return self._taken

    def _write_down(self, step: int, answers: Mapping[int, Sampled]) -> Mapping[str, float]:
        lines = [self._line(step, i, answers[i]) for i in range(len(self._asked))]
        if step in self._before():  # a process that died in between left fewer lines
            self._file.retain(lambda line: line["step"] != step)
        self._before()[step] = lines
        self._write(step, lines)
        return self._measured(step)

    def _line(self, step: int, number: int, answer: Sampled) -> Mapping[str, Any]:
        asked = self._asked[number]
        text = str(self._tokenizer.decode(list(answer.ids), skip_special_tokens=True))
        line = {
            "step": step,
            "prompt_number": number,
            "where": asked.where,
            "prompt": asked.text,
            "completion": text,
            "tokens": len(answer.ids),
            "ended": answer.ended,
        }
        if self._score is None:
            return line
        score = self._score(asked.text, text, len(answer.ids))
        if isinstance(score, str):
            if not self._has_warned:
                self._note(f"warning: an answer has no score: {score} ({asked.where}); the run goes on")
            self._has_warned = True
            return {**line, "score": None}
        return {**line, "score": score}

    def _measured(self, step: int) -> Mapping[str, float]:
        """The mean score, and the share of answers that score higher than those of the start to the same prompts; equal
        scores count half."""
        if self._score is None:
            return {}
        start = {line["prompt"]: line["score"] for line in self._before().get(0, ())}
        scores = [(line["score"], start.get(line["prompt"])) for line in self._before()[step]]
        own = [score for score, _ in scores if score is not None]
        wins = [(a > b) + (a == b) / 2 for a, b in scores if a is not None and b is not None]
        return {SCORE: _mean(own), WIN_RATE: _mean(wins)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def samples_of(
    session: Session, asked: Sequence[Asked], outputs: RunOutputs, file: JsonLines
) -> Callable[[int], Mapping[str, float]]:
    """What takes the samples of a run. asked: of `prompts_of`; empty where there are to be none.

    Raises:
        DataError: a prompt leaves no room for an answer.
    """
    options, prepared = session.config.finetuning, session.prepared
    if not asked:
        return lambda step: {}
    score = _scoring(options.score_samples) if options.score_samples is not None else None
    return Samples(
        Sampler(
            session.policy,
            1,
            completion_ends(session.config, session.model, prepared.tokenizer),
            stops=stop_texts(session.config, prepared.tokenizer),
            drawing=Drawing(top_k=1, vocabulary=len(prepared.tokenizer)),
            batch_tokens=BATCH_TOKENS,
        ),
        prepared.tokenizer,
        asked,
        [_room(session, one) for one in asked],
        score,
        file,
        outputs.samples,
        outputs.note,
        session.world,
    ).take


def prompts_of(session: Session) -> list[Asked]:
    """The prompts that `finetuning.sample_prompts` asks for: those of a file, or of the first validation rows. What
    their answers are scored by is looked at, too. No model is needed.

    Raises:
        ConfigError, DataError: there are none, or `finetuning.score_samples` cannot be called.
    """
    options, prepared = session.config.finetuning, session.prepared
    wanted = options.sample_prompts
    if wanted is None:
        return []
    if options.score_samples is not None:
        check_rewards([(options.score_samples, {})], ["num_tokens"], SCORE_SECONDS)
    if isinstance(wanted, str):
        tokenizer, raw = prepared.tokenizer, prepared.data.chat_template is None
        prompts = read_prompts(wanted)
        return [Asked(p.shown(), encode(tokenizer, p, raw=raw), p.where) for p in prompts]
    groups = [group for group in prepared.data.eval[:wanted] if len(group.prompt_ids)]
    if not groups:
        raise ConfigError(
            "there is no validation row with a prompt to take",
            where=f"finetuning.sample_prompts: {wanted}",
            expected="validation rows (dataset.val_file or dataset.validation_split), or a file of prompts",
        )
    decode = prepared.tokenizer.decode
    texts = [str(decode(list(group.prompt_ids), skip_special_tokens=True)) for group in groups]
    return [Asked(text, group.prompt_ids, str(group.origin)) for text, group in zip(texts, groups, strict=True)]


def _room(session: Session, asked: Asked) -> int:
    """Tokens that an answer may have."""
    most = session.config.finetuning.sample_max_new_tokens
    positions = getattr(session.policy.base.config.get_text_config(), "max_position_embeddings", None)
    room = min(most, positions - len(asked.ids)) if isinstance(positions, int) else most
    if room < 1:
        raise DataError(
            f"the prompt has {len(asked.ids)} tokens, and the model has {positions} positions",
            where=asked.where,
            fix="shorten it, or leave it out of finetuning.sample_prompts",
        )
    return room


def _scoring(name: str) -> Callable[[str, str, int], float | str]:
    """Scores one answer by the user's function, which runs in a process of its own. The function has the form of a
    reward: lists by name in, one number for each completion out."""
    caller: RewardCaller | None = None

    def score(prompt: str, completion: str, num_tokens: int) -> float | str:
        nonlocal caller
        if caller is None:  # only the process that scores starts one
            caller = RewardCaller([(name, {})], SCORE_SECONDS)
        call = caller.values(0, {"prompts": [prompt], "completions": [completion], "num_tokens": [num_tokens]})
        (value,) = call.values
        return (call.error or "it gave no finite number") if value is None else value

    return score
