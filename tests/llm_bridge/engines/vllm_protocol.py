"""A server that speaks the part of vLLM's protocol that its engine uses, around a tiny language model."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from llm_bridge.llm import LanguageModel


@dataclass
class Behaviour:
    """What a test asks of the server.

    breaks: after how many tokens the next requests break off. refusal: status and body of every request.
    pass_s: what each token takes. requests: bodies that came. aborted: set when a reader left.
    """

    breaks: list[int] = field(default_factory=list)
    refusal: tuple[int, str] | None = None
    pass_s: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    aborted: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(llm: LanguageModel, port: int = 0) -> Iterator[tuple[str, Behaviour]]:
    """The server's address, and how it behaves."""
    behaviour = Behaviour()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._reply(200, json.dumps({"data": [{"id": "tiny"}]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            behaviour.requests.append(body)
            if behaviour.refusal is not None:
                self._reply(*behaviour.refusal)
                return
            self.send_response(200)
            self.end_headers()
            try:
                self._stream(body)
            except OSError:
                behaviour.aborted.set()

        def _reply(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def _stream(self, body: dict[str, Any]) -> None:
            most = behaviour.breaks.pop(0) if behaviour.breaks else None
            for count, (token, finish) in enumerate(_greedy(llm, body)):
                if count == most:
                    return
                time.sleep(behaviour.pass_s)
                self._event({"choices": [{"token_ids": [token], "finish_reason": finish}]})
            self._event({"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 16}}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, event: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@torch.inference_mode()
def _greedy(llm: LanguageModel, body: dict[str, Any]) -> Iterator[tuple[int, str | None]]:
    """Tokens as transformers' own loop makes them, and why the last one was the last."""
    embeddings = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    inputs: dict[str, Any] = {"inputs_embeds": embeddings[None]}
    for count in range(1, body["max_tokens"] + 1):
        out = llm.model(**inputs, use_cache=True)
        scores = out.logits[0, -1]
        for token, bias in (body.get("logit_bias") or {}).items():
            scores[int(token)] += bias
        token = int(scores.argmax())
        ended = token in body.get("stop_token_ids", [])
        yield token, "stop" if ended else "length" if count == body["max_tokens"] else None
        if ended:
            return
        inputs = {"input_ids": torch.tensor([[token]]), "past_key_values": out.past_key_values}
