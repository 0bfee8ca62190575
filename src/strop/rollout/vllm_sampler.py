"""Prompts to groups of completions, drawn by a vLLM server with the current adapter. Floor 4.

Before prompts are sampled for, the adapter is written to a folder and loaded by the server, under a name that is a hash
of its weights. Requests name it, so no answer comes from older weights. What is drawn follows from a seed of (seed,
step, prompt), as far as the server keeps to it. Log-probs are recorded as the server gives them; whoever trains scores
the completions again.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from strop.errors import ConfigError, TrainingError
from strop.policy.policy import Policy
from strop.rollout.sampler import Prompt, Sampled
from strop.rollout.vllm_client import Refusal, VllmClient
from strop.world import World

COMPLETIONS = "/v1/completions"
NEVER = -100.0
"""The bias of a logit that is not to be drawn: the lowest that the route takes."""
LEAST_GAP = 1e-3
"""Nats between the two likeliest tokens below which nothing is said about what log-probs mean."""


class ServedAdapter:
    """The adapter of a policy, as a server has it.

    Args:
        folder: where adapters are written; the server reads them there. salt: whatever else decides what an adapter
            computes, so that equal names mean equal models.
    """

    def __init__(self, client: VllmClient, policy: Policy, folder: Path, salt: str, world: World) -> None:
        self.client, self._policy, self._folder = client, policy, folder
        self._salt, self._world = salt, world
        self.name: str | None = None
        self._written: set[str] = set()

    def write(self) -> str:
        """Writes the current weights down, for `use`; all processes call it. Returns their name."""
        return self._world.on_main(self._write)

    def _write(self) -> str:
        digest = hashlib.sha256(self._salt.encode())
        for name, weight in sorted(self._policy.trainable().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        name = f"strop-{digest.hexdigest()[:24]}"
        if not self._written:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
        if name not in self._written:
            self._policy.save_adapter(self._folder / name)
            self._written.add(name)
        return name

    def use(self, name: str) -> None:
        """Has the server load what was written under this name, in place of what it has; all processes call it."""
        self.name = self._world.on_main(lambda: self._use(name))

    def _use(self, name: str) -> str:
        if name != self.name:
            if self.name is not None:
                self.client.unload(self.name)
                shutil.rmtree(self._folder / self.name, ignore_errors=True)
                self._written.discard(self.name)
            self.client.load(name, str((self._folder / name).resolve()))
        return name

    def load_again(self) -> None:
        """After the server has forgotten it: it was started anew."""
        assert self.name is not None
        self.client.load(self.name, str((self._folder / self.name).resolve()))

    def close(self) -> None:
        """Removes what is loaded or written when the run ends; a server that is gone is not waited for."""
        if not self._world.is_main:
            return
        self.client = replace(self.client, retry_seconds=0.0, timeout=min(self.client.timeout, 10.0))
        try:
            if self.name is not None:
                self.client.unload(self.name)
        except TrainingError as error:
            self.client.note(f"{self.name} may still be loaded: {error.found}")
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """How a server is to draw. ends: tokens that end a completion. stop: texts that do. vocabulary: tokens that the
    tokenizer has; model_vocabulary: those that the model has logits for, which may be more."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    ends: tuple[int, ...]
    stop: tuple[str, ...]
    vocabulary: int
    model_vocabulary: int

    @property
    def is_truncated(self) -> bool:
        """Whether a part of the vocabulary is left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def body(self) -> dict[str, Any]:
        """The settings of a request. All are said, since the server would take others from the model's files."""
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {str(token): NEVER for token in range(self.vocabulary, self.model_vocabulary)} or None,
            "stop": list(self.stop),
            "stop_token_ids": list(self.ends),
            "ignore_eos": True,  # those of `ends` alone
            "skip_special_tokens": False,  # stop texts may hold them
            "add_special_tokens": False,
            "return_token_ids": True,
            "stream": False,
        }


class VllmSampler:
    """Samples `num_completions` completions of each prompt.

    Args:
        requests: how many are under way at once. trains: whether the log-probs are compared with those of training.
    """

    def __init__(
        self,
        served: ServedAdapter,
        num_completions: int,
        asked: DrawSettings,
        *,
        seed: int,
        requests: int,
        trains: bool,
    ) -> None:
        self._served, self._num, self._asked = served, num_completions, asked
        self._seed, self._requests = seed, requests
        self._checks_log_probs = trains and (asked.is_truncated or asked.temperature != 1)

    def prepare(self) -> Callable[[], None]:
        """Writes the current weights down; the server gets them when it is to sample with them."""
        return partial(self._served.use, self._served.write())

    def sample(self, step: int, prompts: Sequence[Prompt]) -> list[list[Sampled]]:
        """The completions of each prompt, in the order of the prompts.

        Raises:
            ConfigError: the log-probs of the server are not those that training compares with.
            TrainingError: the server gives no answer, or one that cannot be trained on.
        """
        if not prompts:
            return []
        if self._checks_log_probs:
            self._check_log_probs(prompts[0])
            self._checks_log_probs = False
        with ThreadPoolExecutor(min(self._requests, len(prompts))) as pool:
            futures = [pool.submit(self._completions, step, prompt) for prompt in prompts]
            try:
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()

    def _completions(self, step: int, prompt: Prompt) -> list[Sampled]:
        key = hashlib.sha256(f"{self._seed} {step} {prompt.number}".encode()).digest()
        more = {"n": self._num, "max_tokens": prompt.room, "seed": int.from_bytes(key[:6]), "logprobs": 1}
        answer = self._ask({**self._asked.body(), "prompt": list(prompt.ids), **more})
        with self._served.client.reading(COMPLETIONS):
            return self._checked(answer, prompt)

    def _ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """An answer of the current adapter. A server that was started anew gets it again, once."""
        client, name = self._served.client, self._served.name
        try:
            try:
                text = client.ask(COMPLETIONS, {"model": name, **body})
            except Refusal as refusal:
                if refusal.status != 404:
                    raise
                self._served.load_again()
                text = client.ask(COMPLETIONS, {"model": name, **body})
        except Refusal as refusal:
            raise client.refused(refusal) from refusal
        answer = client.parsed(COMPLETIONS, text)
        if answer.get("model") != name:
            raise self._wrong(f"{answer.get('model')} answers", f"{name}, the adapter of this step")
        return answer

    def _checked(self, answer: Mapping[str, Any], prompt: Prompt) -> list[Sampled]:
        choices = sorted(answer.get("choices") or [], key=lambda choice: int(choice.get("index", -1)))
        if [choice.get("index") for choice in choices] != list(range(self._num)):
            raise self._wrong(f"{len(choices)} completions for a prompt", f"{self._num}, as asked for")
        return [self._sampled(choice, prompt) for choice in choices]

    def _sampled(self, choice: Mapping[str, Any], prompt: Prompt) -> Sampled:
        """One completion, if it can be trained on."""
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        logps = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list) or not ids:
            raise self._wrong("a completion without token_ids", "at least one, by return_token_ids")
        if choice.get("prompt_token_ids") not in (None, list(prompt.ids)):
            raise self._wrong("another prompt was completed", "the tokens that were sent")
        if wrong := [i for i in ids if type(i) is not int or not 0 <= i < self._asked.vocabulary]:
            raise self._wrong(f"token {wrong[0]}", f"tokens from 0 to {self._asked.vocabulary - 1}, the tokenizer's")
        if not isinstance(logps, list) or len(logps) != len(ids):
            raise self._wrong(f"{len(logps or ())} log-probs for {len(ids)} tokens", "one per token")
        if odd := [x for x in logps if not isinstance(x, int | float) or not math.isfinite(x) or x > LEAST_GAP]:
            raise self._wrong(f"{odd[0]} as the log-prob of a token", "a finite number of at most 0", LOG_PROBS)
        if reason not in ("stop", "length"):
            raise self._wrong(f"a completion was ended by {reason!r}", "'stop' or 'length'")
        ended = reason == "stop" or ids[-1] in self._asked.ends
        if len(ids) > prompt.room or (not ended and len(ids) < prompt.room):
            raise self._wrong(f"a completion of {len(ids)} tokens that has not ended", f"one of {prompt.room}")
        if not set(self._asked.ends).isdisjoint(ids[:-1]):
            raise self._wrong("a completion goes on behind an end token", "one that ends there")
        return Sampled(array("i", ids), array("d", map(float, logps)), ended)

    def _wrong(self, found: str, expected: str, fix: str = "look at the server's log and its version") -> TrainingError:
        return TrainingError(
            f"an answer cannot be trained on: {found}", where=self._served.client.where, expected=expected, fix=fix
        )

    def _check_log_probs(self, prompt: Prompt) -> None:
        """Measures whether the server gives log-probs before temperature and top-p or behind them.

        By one token at two temperatures: behind the temperature, the two likeliest tokens are twice as far apart at
        0.5; before it, just as far.
        """
        gaps = [self._gap(prompt, temperature) for temperature in (1.0, 0.5)]
        if min(gaps) < LEAST_GAP:
            return
        is_processed = gaps[1] > 1.5 * gaps[0]
        if is_processed and self._asked.is_truncated:
            raise ConfigError(
                "its log-probs are scaled to the tokens that top_k, top_p or min_p leave",
                where=self._served.client.where,
                expected="those under the whole vocabulary, which training computes",
                fix="start it with --logprobs-mode raw_logprobs, or remove rollout.top_k, top_p and min_p",
            )
        if not is_processed and self._asked.temperature != 1:
            raise ConfigError(
                f"its log-probs are those before rollout.temperature ({self._asked.temperature:g})",
                where=self._served.client.where,
                expected="those at the temperature, which training computes",
                fix=LOG_PROBS,
            )

    def _gap(self, prompt: Prompt, temperature: float) -> float:
        """Nats between the two likeliest first tokens, as the server says it."""
        whole = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        body = {**self._asked.body(), **whole, "prompt": list(prompt.ids), "n": 1, "max_tokens": 1, "logprobs": 2}
        answer = self._ask(body)
        with self._served.client.reading(COMPLETIONS):
            (choice,) = answer.get("choices") or [{}]
            top = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
            values = sorted((top[0] or {}).values(), reverse=True)
            if len(values) < 2:
                raise self._wrong("no log-probs of the likeliest tokens", "2, by logprobs: 2")
            return float(values[0] - values[1])


LOG_PROBS = "start it with --logprobs-mode processed_logprobs"
