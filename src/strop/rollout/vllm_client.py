"""A vLLM server, asked over HTTP by its documented routes, without a package for it. Floor 4.

    GET  /health, /version, /v1/models
    POST /v1/load_lora_adapter, /v1/unload_lora_adapter     with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
    POST /v1/completions                                    with return_token_ids and logprobs

What can pass (no connection, a server that is starting or too busy) is tried again, with growing pauses, until
`retry_seconds` have passed since the first failure. Every other failure is raised at once.

Source: docs.vllm.ai, pages "OpenAI-Compatible Server" and "LoRA Adapters".
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from strop.errors import ConfigError, TrainingError, foreign_errors

OLDEST, NEWEST = (0, 15), (0, 33)
"""The versions of vLLM whose documentation this was written by."""
MODELS = "/v1/models"
PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""Status codes of a server that may answer later."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two tries; each pause is twice the one before."""
API_KEY = "VLLM_API_KEY"
"""The variable of the environment from which vLLM itself takes its key."""
READ_BYTES = 1 << 16


class Refusal(Exception):  # noqa: N818 (it carries an answer)
    """The server understood a request and says no. status: of HTTP. why: its message."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(status, why)
        self.status, self.why = status, why


class _Passing(Exception):  # noqa: N818
    """A failure that may be gone when it is tried again."""


@dataclass(frozen=True)
class VllmClient:
    """Asks one server.

    timeout: seconds that one answer may take. retry_seconds: how long what can pass is tried again. note: called with a
    message when it is. pause: waits this many seconds.
    """

    url: str
    timeout: float
    retry_seconds: float
    note: Callable[[str], None]
    pause: Callable[[float], None] = time.sleep

    @property
    def where(self) -> str:
        return f"vLLM at {self.url}"

    def check(self, model: str | None) -> str:
        """The name of the base model that the server serves, once it is known to be well.

        Args:
            model: the name that it must serve; None: the first that is no adapter.

        Raises:
            ConfigError: its version is too old, or it does not serve that model. TrainingError: as `ask`.
        """
        self.ask("/health")
        self._check_version(str(self.answer("/version").get("version")))
        listed = self.answer(MODELS).get("data") or []
        with self.reading(MODELS):
            served = [str(m["id"]) for m in listed if not m.get("parent")]
        if model is None and served:
            return served[0]
        if model not in served:
            raise ConfigError(
                f"it serves {', '.join(served) or 'no model'}" + (f", and not {model}" if model else ""),
                where=self.where,
                expected="the base model of this run",
                fix="start the server with it, or name it in rollout.vllm_model",
            )
        return model

    def _check_version(self, found: str) -> None:
        digits = found.split(".")[:2]
        version = tuple(int(d) for d in digits) if all(d.isdecimal() for d in digits) else ()
        oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        if version and version < OLDEST:
            raise ConfigError(
                f"its version is {found}",
                where=self.where,
                expected=f"vLLM {oldest} to {newest}",
                fix=f"start a server of vLLM {newest}",
            )
        if not version or version > NEWEST:
            self.note(f"{self.where}: its version is {found}, and strop knows the routes of {oldest} to {newest}")

    def load(self, name: str, path: str) -> None:
        """Has an adapter loaded under a new name; one that the server has under it already stays.

        Raises:
            TrainingError: it cannot be loaded.
        """
        try:
            self.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except Refusal as refusal:
            if "already been loaded" in refusal.why:
                return
            fix = "look at the server's log"
            if refusal.status in (404, 405):
                fix = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment and --enable-lora"
            elif "rank" in refusal.why:
                fix = "start it with --max-lora-rank of at least lora.r"
            raise TrainingError(
                f"the adapter cannot be loaded: {refusal.why} (status {refusal.status})",
                where=self.where,
                expected=f"a server that reads {path}",
                fix=fix,
            ) from refusal

    def unload(self, name: str) -> None:
        """Has an adapter removed. That the server does not know it any more does no harm: no name is used twice."""
        try:
            self.ask("/v1/unload_lora_adapter", {"lora_name": name}, passing=PASSING - {500})
        except Refusal as refusal:
            if refusal.status not in (400, 404, 500):
                raise self.refused(refusal) from refusal

    def refused(self, refusal: Refusal) -> TrainingError:
        """The error for a request that was refused."""
        fix = "start the server as docs/methods/grpo.md says, with a --max-model-len of at least max_seq_length"
        if refusal.status in (401, 403):
            fix = f"put its key into {API_KEY} of the environment"
        return TrainingError(
            f"it refuses a request: {refusal.why} (status {refusal.status})", where=self.where, fix=fix
        )

    def answer(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `ask`, of a route that answers with a JSON object; a refusal is an error."""
        try:
            text = self.ask(path, body)
        except Refusal as refusal:
            raise self.refused(refusal) from refusal
        return self.parsed(path, text)

    def parsed(self, path: str, text: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._foreign(path, f"is no JSON object but {text[:60]!r}")
        return found

    def reading(self, path: str) -> AbstractContextManager[None]:
        """While the parts of an answer are looked at: what goes wrong there is an answer of another form.

        Raises:
            TrainingError: the same, in words.
        """
        return foreign_errors(lambda why: self._foreign(path, f"has another form: {why}"))

    def _foreign(self, path: str, why: str) -> TrainingError:
        return TrainingError(
            f"its answer to {path} {why}",
            where=self.where,
            expected="the routes of `vllm serve`",
            fix="look at rollout.vllm_url: does another program listen there?",
        )

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, passing: frozenset[int] = PASSING) -> str:
        """What the server answers: to a POST with `body`, else to a GET.

        Raises:
            Refusal: the server says no.
            TrainingError: it gave no answer in time, or was not there for `retry_seconds`.
        """
        failed_at: float | None = None
        pause = FIRST_PAUSE
        while True:
            try:
                return self._once(path, body, passing)
            except _Passing as failure:
                now = time.monotonic()
                if failed_at is None:
                    failed_at = now
                    self.note(f"{self.where}: {failure}; trying again for {self.retry_seconds:g} seconds")
                if now - failed_at + pause > self.retry_seconds:
                    raise TrainingError(
                        f"{failure}, and has been tried again for {self.retry_seconds:g} seconds",
                        where=self.where,
                        expected="a server that answers (rollout.vllm_url, rollout.vllm_retry_seconds)",
                        fix="start it again, then go on from the last checkpoint with strop train --resume",
                    ) from failure
            self.pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _once(self, path: str, body: Mapping[str, Any] | None, passing: frozenset[int]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
        until = time.monotonic() + self.timeout
        try:
            with _DIRECT.open(request, timeout=self.timeout) as response:
                return self._read(response, path, until)
        except urllib.error.HTTPError as error:
            why = _message(error.read(READ_BYTES).decode(errors="replace")) or str(error.reason)
            if error.code in passing:
                raise _Passing(f"it answers {path} with status {error.code} ({why})") from error
            raise Refusal(error.code, why) from error
        except TimeoutError as error:
            raise self._too_slow(path) from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self._too_slow(path) from error
            raise _Passing(f"it cannot be reached ({reason or type(error).__name__})") from error

    def _read(self, response: http.client.HTTPResponse, path: str, until: float) -> str:
        parts = []
        while part := response.read1(READ_BYTES):
            parts.append(part)
            if time.monotonic() > until:
                raise self._too_slow(path)
        return b"".join(parts).decode(errors="replace")

    def _too_slow(self, path: str) -> TrainingError:
        return TrainingError(
            f"no whole answer to {path} within {self.timeout:g} seconds",
            where=self.where,
            expected="an answer within rollout.vllm_timeout",
            fix="raise it, or lower rollout.vllm_requests or training.max_completion_length; then go on from the last "
            "checkpoint with strop train --resume",
        )


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks the server itself, whatever proxies the environment names."""


def _message(text: str) -> str:
    """What an error of the server says, in the form of OpenAI's routes or in that of its framework."""
    try:
        found = json.loads(text)
    except ValueError:
        return text.strip()[:200]
    if isinstance(found, Mapping):
        inner = found.get("error", found)
        found = inner.get("message", inner.get("detail")) if isinstance(inner, Mapping) else inner
    return str(found)[:400]
