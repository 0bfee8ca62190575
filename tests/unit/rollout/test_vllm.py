"""Sampling by a vLLM server: what is sent, what is taken, and each way in which a server can fail."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fake_vllm import FakeVllm, GoneError
from rollout_policies import make_policy, prompts, trained_logps
from strop.errors import ConfigError, StropError, TrainingError
from strop.rollout import vllm_client
from strop.rollout.sampler import Prompt
from strop.rollout.vllm_client import VllmClient
from strop.rollout.vllm_sampler import DrawSettings, ServedAdapter, VllmSampler
from strop.world import World
from worlds import in_worlds

NAME = "strop-now"
PROMPT = Prompt(7, [5, 6, 7], 4)
ASKED = DrawSettings(1.0, 0, 1.0, 0.0, (3,), ("END",), 400, 400)
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeVllm]:
    """Its adapters are not real: each test says what it answers."""
    with FakeVllm(tmp_path / "no model") as fake:
        yield fake


def client(server: FakeVllm, **keys: Any) -> VllmClient:
    notes: list[str] = []
    pauses: list[float] = []
    made = VllmClient(server.url, keys.pop("timeout", 20.0), keys.pop("retry", 0.0), notes.append, pauses.append)
    object.__setattr__(made, "notes", notes)
    object.__setattr__(made, "pauses", pauses)
    return made


def sampler(of: VllmClient, asked: DrawSettings = ASKED, num: int = 2, **keys: Any) -> VllmSampler:
    loaded: list[str] = []
    served: Any = SimpleNamespace(client=of, name=NAME, load_again=lambda: loaded.append(NAME), loaded=loaded)
    made = VllmSampler(served, num, asked, **{"seed": 1, "requests": 8, "trains": True, **keys})
    object.__setattr__(made, "loaded", loaded)
    return made


def choice(index: int, ids: list[int], reason: str = "stop") -> dict[str, Any]:
    logps = {"token_logprobs": [-0.5 - index] * len(ids), "top_logprobs": [{"a": -0.5, "b": -2.0}] * len(ids)}
    return {"index": index, "token_ids": ids, "logprobs": logps, "finish_reason": reason, "text": ""}


def good() -> dict[str, Any]:
    return {"model": NAME, "choices": [choice(0, [8, 3]), choice(1, [8, 9, 10, 11], "length")]}


def completes(server: FakeVllm, *answers: Any) -> None:
    """Completions are these, one after the other, the last one for ever: an answer, or (status, text)."""
    waiting = list(answers)

    def before(path: str, body: dict[str, Any]) -> tuple[int, str] | None:
        if path != "/v1/completions":
            return None
        found = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        return found if isinstance(found, tuple) else (200, json.dumps(found))

    server.before = before


def test_what_is_sent_and_taken(server: FakeVllm) -> None:
    completes(server, good())
    ((first, second),) = sampler(client(server), replace(ASKED, model_vocabulary=403)).sample(3, [PROMPT])
    assert (list(first.ids), list(first.logps), first.ended) == ([8, 3], [-0.5, -0.5], True)
    assert (list(second.ids), second.ended, second.entropy) == ([8, 9, 10, 11], False, None)
    (body,) = server.asked("/v1/completions")
    sent = {"model": NAME, "prompt": [5, 6, 7], "n": 2, "max_tokens": 4, "temperature": 1.0, "stop_token_ids": [3]}
    sent |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "stop": ["END"], "ignore_eos": True}
    sent |= {"logit_bias": {"400": -100, "401": -100, "402": -100}}  # the model has more tokens than the tokenizer
    assert sent.items() <= body.items() and body["return_token_ids"] is True and body["logprobs"] == 1


def test_seeds_are_those_of_the_step_and_the_prompt(server: FakeVllm) -> None:
    completes(server, good())
    several = [(step, number, seed) for step in (1, 2) for number in (1, 2) for seed in (1, 2)]
    for step, number, seed in [*several, several[0]]:
        sampler(client(server), seed=seed).sample(step, [replace(PROMPT, number=number)])
    sent = [body["seed"] for body in server.asked("/v1/completions")]
    assert len(set(sent)) == len(several) and sent[0] == sent[-1] and max(sent) < 2**63


def _with(**keys: Any) -> Change:
    return lambda answer: answer["choices"][0].update(keys)


def _logps(*values: Any) -> Change:
    return _with(logprobs={"token_logprobs": list(values)})


WRONG: dict[str, tuple[Change, str]] = {
    "stale": (lambda a: a.update(model="strop-before"), "strop-before answers"),
    "fewer": (lambda a: a["choices"].pop(), "1 completions for a prompt"),
    "none": (lambda a: a.update(choices=[]), "0 completions for a prompt"),
    "twice": (_with(index=1), "2 completions for a prompt"),
    "no ids": (_with(token_ids=None), "without token_ids"),
    "no tokens": (_with(token_ids=[]), "without token_ids"),
    "outside": (_with(token_ids=[400, 3]), "token 400"),
    "negative": (_with(token_ids=[-1, 3]), "token -1"),
    "no log-probs": (_with(logprobs=None), "0 log-probs for 2 tokens"),
    "too few log-probs": (_logps(-1.0), "1 log-probs for 2 tokens"),
    "a missing one": (_logps(-1.0, None), "None as the log-prob"),
    "not a number": (_logps(-1.0, float("nan")), "nan as the log-prob"),
    "logits": (_logps(-1.0, 7.5), "7.5 as the log-prob"),
    "aborted": (_with(finish_reason="abort"), "ended by 'abort'"),
    "cut short": (_with(finish_reason="length", token_ids=[8, 9], logprobs={"token_logprobs": [-1, -1]}), "not ended"),
    "too long": (_with(token_ids=[8] * 5, logprobs={"token_logprobs": [-1] * 5}), "a completion of 5 tokens"),
    "goes on": (_with(token_ids=[3, 8], logprobs={"token_logprobs": [-1, -1]}), "goes on behind an end token"),
    "another prompt": (_with(prompt_token_ids=[5, 6]), "another prompt"),
    "a number of 400 digits": (_logps(-1.0, -(10**400)), "has another form: int too large"),
    "choices are a text": (lambda a: a.update(choices="none"), "has another form"),
    "a choice is null": (lambda a: a["choices"].append(None), "has another form"),
    "a place is null": (_with(index=None), "has another form"),
    "log-probs are a list": (_with(logprobs=[-1.0, -1.0]), "has another form"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_cannot_be_trained_on_is_refused(name: str, server: FakeVllm) -> None:
    change, found = WRONG[name]
    answer = good()
    change(answer)
    completes(server, answer)
    with pytest.raises(TrainingError, match=found) as stopped:
        sampler(client(server)).sample(1, [PROMPT])
    assert server.url in str(stopped.value) and stopped.value.expected and stopped.value.fix


def test_what_passes_is_tried_again_with_growing_pauses(server: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    completes(server, (503, "loading"), (429, "{}"), (500, json.dumps({"error": {"message": "dead"}})), good())
    of = client(server, retry=60.0)
    assert len(sampler(of).sample(1, [PROMPT])[0]) == 2
    pauses: Any = of.pauses  # type: ignore[attr-defined]
    assert pauses == [0.5, 1.0, 2.0]
    notes: Any = of.notes  # type: ignore[attr-defined]
    assert len(notes) == 1 and "status 503 (loading); trying again for 60 seconds" in notes[0], "said once"
    assert len({body["seed"] for body in server.asked("/v1/completions")}) == 1, "the same request"

    now = [0.0]
    monkeypatch.setattr(vllm_client.time, "monotonic", lambda: now[0])
    completes(server, (503, "busy"))
    waiting = replace(of, pause=lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(TrainingError, match=r"status 503 \(busy\), and has been tried again for 60 seconds") as gone:
        sampler(waiting).sample(1, [PROMPT])
    assert 30 <= now[0] <= 60 and "--resume" in gone.value.fix


def test_a_server_that_is_gone_is_said_and_may_come_back(server: FakeVllm) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(TrainingError, match=r"cannot be reached \(.*refused") as gone:
        replace(client(server), url=nobody).check(None)
    assert nobody in str(gone.value) and "rollout.vllm_url" in gone.value.expected
    hung_up = [True]

    def before(path: str, body: dict[str, Any]) -> tuple[int, str]:
        if hung_up.pop() if hung_up else False:
            raise GoneError
        return 200, json.dumps(good())

    server.before = before
    assert sampler(client(server, retry=60.0)).sample(1, [PROMPT])


@pytest.mark.parametrize("while_sending", [False, True])
def test_a_server_that_is_too_slow_is_not_waited_for(while_sending: bool, tmp_path: Path) -> None:
    """Whether nothing comes, or a byte now and then."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def slowly() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                if while_sending:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(20):
                    time.sleep(0.05)
                    try:
                        connection.sendall(b"x" if while_sending else b"")
                    except OSError:
                        return

        thread = threading.Thread(target=slowly)
        thread.start()
        slow = VllmClient(f"http://127.0.0.1:{listening.getsockname()[1]}", 0.3, 60.0, print)
        started = time.monotonic()
        with pytest.raises(TrainingError, match=r"no whole answer to /health within 0\.3 seconds") as stopped:
            slow.ask("/health")
        assert time.monotonic() - started < 5 and "rollout.vllm_timeout" in stopped.value.expected
        thread.join()


def test_a_refusal_says_what_the_server_says(server: FakeVllm) -> None:
    completes(server, (400, json.dumps({"error": {"message": "This model's maximum context length is 8"}})))
    with pytest.raises(TrainingError, match=r"refuses a request: This model's maximum context length is 8") as no:
        sampler(client(server, retry=60.0)).sample(1, [PROMPT])
    assert len(server.asked("/v1/completions")) == 1 and "--max-model-len" in no.value.fix


def test_a_server_that_was_started_anew_gets_the_adapter_again(server: FakeVllm) -> None:
    unknown = (404, json.dumps({"error": {"message": f"The model `{NAME}` does not exist."}}))
    completes(server, unknown, good())
    made = sampler(client(server))
    assert made.sample(1, [PROMPT])
    completes(server, unknown)
    with pytest.raises(TrainingError, match="does not exist"):
        made.sample(1, [PROMPT])
    loaded: Any = made.loaded  # type: ignore[attr-defined]
    assert loaded == [NAME, NAME], "once each time"


@pytest.mark.parametrize("most", [1, 3])
def test_so_many_requests_are_under_way_at_once(most: int, server: FakeVllm) -> None:
    under_way, seen, lock = [0], [0], threading.Lock()

    def before(path: str, body: dict[str, Any]) -> tuple[int, str]:
        with lock:
            under_way[0] += 1
            seen[0] = max(seen[0], under_way[0])
        time.sleep(0.05)
        with lock:
            under_way[0] -= 1
        return 200, json.dumps({"model": NAME, "choices": [choice(0, [body["prompt"][0], 3])]})

    server.before = before
    asked = [Prompt(i, [10 + i], 4) for i in range(7)]
    found = sampler(client(server), num=1, requests=most).sample(1, asked)
    assert [list(own[0].ids) for own in found] == [[10 + i, 3] for i in range(7)], "in the order of the prompts"
    assert seen[0] == most


def test_the_check_at_the_start(server: FakeVllm) -> None:
    base = str(server.model_dir)
    assert client(server).check(None) == client(server).check(base) == base
    assert [path for path, _ in server.requests[:3]] == ["/health", "/version", "/v1/models"]
    with pytest.raises(ConfigError, match=r"it serves .*no model, and not other"):
        client(server).check("other")
    for version, is_noted in (
        ("0.33.1", False),
        ("0.15.0rc1", False),
        ("0.34.0", True),
        ("1.0.0", True),
        ("dev", True),
    ):
        server.version = version
        of = client(server)
        of.check(None)
        notes: Any = of.notes  # type: ignore[attr-defined]
        assert [f"its version is {version}" in note for note in notes] == [True] * is_noted
    server.version = "0.14.2"
    with pytest.raises(ConfigError, match=r"its version is 0\.14\.2") as old:
        client(server).check(None)
    assert old.value.expected == "vLLM 0.15 to 0.33"
    server.before = lambda path, body: (200, "<html>hello</html>")
    with pytest.raises(TrainingError, match="is no JSON object but '<html>hello"):
        client(server).check(None)


def test_an_adapter_that_cannot_be_loaded(server: FakeVllm, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No adapter found"):
        client(server).load(NAME, str(tmp_path / "nothing"))
    server.before = lambda path, body: (400, json.dumps({"message": "LoRA rank 64 is greater than max_lora_rank 16."}))
    with pytest.raises(TrainingError, match="LoRA rank 64") as rank:
        client(server).load(NAME, "x")
    assert "--max-lora-rank" in rank.value.fix
    server.before = lambda path, body: None
    server.loras = False
    with pytest.raises(TrainingError, match="Not Found") as off:
        client(server).load(NAME, "x")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in off.value.fix
    client(server).unload(NAME)
    server.before = lambda path, body: (401, json.dumps({"error": "Unauthorized"}))
    with pytest.raises(TrainingError, match="Unauthorized") as secret:
        client(server).unload(NAME)
    assert "VLLM_API_KEY" in secret.value.fix


def test_the_key_of_the_environment_is_sent(server: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "abc")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    client(server).ask("/health")
    assert server.keys == ["Bearer abc"], "and no proxy is asked"


LIMITED = replace(ASKED, top_p=0.9)
COLD = replace(ASKED, temperature=0.7)


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("asked", "mode", "found"),
    [
        (ASKED, "raw_logprobs", None),
        (ASKED, "processed_logprobs", None),
        (LIMITED, "raw_logprobs", None),
        (LIMITED, "processed_logprobs", "scaled to the tokens that top_k, top_p or min_p leave"),
        (COLD, "processed_logprobs", None),
        (COLD, "raw_logprobs", r"before rollout\.temperature \(0\.7\)"),
    ],
    ids=str,
)
def test_other_log_probs_are_found(asked: DrawSettings, mode: str, found: str | None, tmp_path: Path) -> None:
    policy = make_policy(tmp_path, **{"lora.r": 4})
    with FakeVllm(tmp_path / "dense", mode=mode) as server:
        served = ServedAdapter(client(server), policy, tmp_path / "served", "", World.alone("cpu"))
        served.use(served.write())
        for trains in (False, True):
            made = VllmSampler(served, 2, asked, seed=1, requests=4, trains=trains)
            if found is None or not trains:
                made.sample(1, prompts(room=2)[:2])
                made.sample(1, prompts(room=2)[:1])
            else:
                with pytest.raises(StropError, match=found):
                    made.sample(1, prompts(room=2)[:2])
        probes = 0 if asked is ASKED else 2
        assert len(server.asked("/v1/completions")) == 3 + probes + (3 if found is None else 0), "asked once"


@pytest.mark.nightly
def test_the_server_has_the_adapter_of_now(tmp_path: Path) -> None:
    """Its log-probs are those of the training forward, after every change of the weights; nothing stays behind."""
    policy = make_policy(tmp_path, **{"lora.r": 4})
    draws, folder = torch.Generator().manual_seed(1), tmp_path / "served"
    with FakeVllm(tmp_path / "dense") as server:
        served = ServedAdapter(client(server), policy, folder, "", World.alone("cpu"))
        made = VllmSampler(served, 3, ASKED, seed=1, requests=4, trains=True)
        names = []
        for _ in range(2):
            with torch.no_grad():
                for weight in policy.trainable().values():
                    weight.add_(torch.randn(weight.shape, generator=draws) * 0.3)
            made.prepare()()
            made.prepare()()
            found = made.sample(1, prompts(room=6))
            recorded = torch.tensor([x for own in found for c in own for x in c.logps])
            with policy.scoring():
                trained = trained_logps(policy, prompts(), found)
            torch.testing.assert_close(trained, recorded.float(), rtol=0, atol=1e-4)
            names.append(served.name)
            assert [p.name for p in folder.iterdir()] == [*server.adapters] == [served.name]
        assert names[0] != names[1] and len(server.asked("/v1/load_lora_adapter")) == 2, "once for equal weights"
        server.adapters.clear()  # it is started anew
        assert made.sample(1, prompts(room=6)) == found
        other = ServedAdapter(client(server), policy, folder, "lora_alpha 3", World.alone("cpu"))
        other.use(other.write())
        assert other.name not in names
        served.close()
        other.close()
        assert not server.adapters and not folder.exists()


def test_one_process_publishes_and_all_know_the_name(tmp_path: Path) -> None:
    policy = make_policy(tmp_path, **{"lora.r": 4})
    with FakeVllm(tmp_path / "dense") as server:

        def published(world: World) -> str | None:
            served = ServedAdapter(client(server), policy, tmp_path / "served", "", world)
            served.use(served.write())
            return served.name

        names = in_worlds(3, published)
        assert set(names) == {*server.adapters} and len(server.requests) == 1


def test_a_server_that_is_gone_at_the_end_stops_nothing(tmp_path: Path) -> None:
    policy = make_policy(tmp_path, **{"lora.r": 4})
    with FakeVllm(tmp_path / "dense") as server:
        of = client(server, retry=60.0)
        served = ServedAdapter(of, policy, tmp_path / "served", "", World.alone("cpu"))
        served.use(served.write())
    served.close()
    notes: Any = of.notes  # type: ignore[attr-defined]
    assert "may still be loaded" in notes[-1] and not (tmp_path / "served").exists()
