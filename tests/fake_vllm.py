"""A server with the routes of `vllm serve` that strop uses, as vLLM documents them, with a tiny model on the CPU.

It really loads the base and the adapters that it is told to load, and draws from them. What else a server may do (be
slow, gone, or answer something else) is done by `before` and `after`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from conftest import build_tokenizer
from strop.policy.model.configuration import quiet


class GoneError(Exception):
    """Raised in `before`: the connection is closed without an answer."""


class FakeVllm:
    """`with FakeVllm(model_dir) as server:` listens at `server.url`.

    mode: which log-probs it gives, `raw_logprobs` or `processed_logprobs`. version: what it says of itself. loras:
    whether adapters may be loaded. before: called with path and body ahead of an answer, and may return (status, text)
    in its place. after: called with path and answer, and returns the answer that is sent. requests: all that were made;
    keys: what they were authorised by.
    """

    def __init__(
        self, model_dir: Path, *, mode: str = "raw_logprobs", version: str = "0.33.0", loras: bool = True
    ) -> None:
        self.model_dir, self.mode, self.version, self.loras = model_dir, mode, version, loras
        self.before: Callable[[str, dict[str, Any]], tuple[int, str] | None] = lambda path, body: None
        self.after: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda path, answer: answer
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.adapters: dict[str, tuple[str, Any]] = {}
        self.keys: list[str] = []
        self._lock = threading.Lock()
        self._tokenizer: PreTrainedTokenizerBase = build_tokenizer()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeVllm:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def asked(self, path: str) -> list[dict[str, Any]]:
        """The bodies of the requests to one route."""
        return [body for own, body in self.requests if own == path]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        self.requests.append((path, body))
        instead = self.before(path, body)
        if instead is not None:
            return instead
        route = {
            "/health": lambda _: (200, None),
            "/version": lambda _: (200, {"version": self.version}),
            "/v1/models": lambda _: (200, self._models()),
            "/v1/completions": self._complete,
        }
        if self.loras:
            route |= {"/v1/load_lora_adapter": self._load, "/v1/unload_lora_adapter": self._unload}
        if path not in route:
            return 404, json.dumps({"detail": "Not Found"})
        with self._lock:
            status, found = route[path](body)
        if status == 200 and isinstance(found, dict):
            found = self.after(path, found)
        return status, "" if found is None else found if isinstance(found, str) else json.dumps(found)

    def _models(self) -> dict[str, Any]:
        base = {"id": str(self.model_dir), "object": "model", "parent": None, "max_model_len": 512}
        loaded = [{"id": n, "root": p, "parent": str(self.model_dir)} for n, (p, _) in self.adapters.items()]
        return {"object": "list", "data": [base, *loaded]}

    def _load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return 400, _error(f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file():
            return 404, _error(f"No adapter found for {path}")
        with quiet():
            base = AutoModelForCausalLM.from_pretrained(self.model_dir)
            self.adapters[name] = (path, PeftModel.from_pretrained(base, path).eval())
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["lora_name"] not in self.adapters:
            return 404, _error(f"The lora adapter '{body['lora_name']}' cannot be found.")
        del self.adapters[body["lora_name"]]
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in self.adapters:
            return 404, _error(f"The model `{body['model']}` does not exist.")
        model = self.adapters[body["model"]][1]
        choices = [self._choice(model, body, i) for i in range(body["n"])]
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices}

    @torch.no_grad()
    def _choice(self, model: Any, body: dict[str, Any], index: int) -> dict[str, Any]:
        draws = torch.Generator().manual_seed(body.get("seed", 0) + index)
        ids, logps, tops, reason, stop = [], [], [], "length", None
        while len(ids) < body["max_tokens"] and reason == "length":
            logits = model(input_ids=torch.tensor([body["prompt"] + ids])).logits[0, -1].double()
            raw = logits.log_softmax(-1)
            for banned, bias in (body["logit_bias"] or {}).items():
                logits[int(banned)] += bias
            heat = body["temperature"]
            processed = _truncated((logits / heat).log_softmax(-1), body) if heat else raw
            token = int(torch.multinomial(processed.exp(), 1, generator=draws)) if heat else int(logits.argmax())
            given = raw if self.mode == "raw_logprobs" else processed
            best = given.topk(body["logprobs"])
            ids.append(token)
            logps.append(float(given[token]))
            tops.append({f"token_id:{i}": v for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)})
            text = self._tokenizer.decode(ids, skip_special_tokens=body["skip_special_tokens"])
            stop = next((s for s in body["stop"] if s in text), None)
            if stop is None and token in body["stop_token_ids"]:
                stop = token
            reason = "length" if stop is None else "stop"
        return {
            "index": index,
            "text": text,
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": logps, "top_logprobs": tops},
            "finish_reason": reason,
            "stop_reason": stop,
        }


def _truncated(logps: Tensor, body: dict[str, Any]) -> Tensor:
    """Log-probs after min_p, top_k and top_p, scaled again."""
    probs = logps.exp()
    if body["min_p"]:
        probs = probs.where(probs >= body["min_p"] * probs.max(), 0.0)
    if body["top_k"]:
        probs = probs.where(probs >= probs.topk(body["top_k"]).values[-1], 0.0)
    if body["top_p"] < 1:
        ordered, places = probs.sort(descending=True)
        kept = ordered.cumsum(-1) - ordered < body["top_p"] * ordered.sum()
        probs = torch.zeros_like(probs).scatter(-1, places, ordered.where(kept, 0.0))
    return (probs / probs.sum()).log()


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}


def _handler(server: FakeVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: dict[str, Any]) -> None:
            if key := self.headers.get("Authorization"):
                server.keys.append(key)
            try:
                status, text = server.answer(self.path, body)
            except GoneError:
                self.close_connection = True
                return
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    return Handler
