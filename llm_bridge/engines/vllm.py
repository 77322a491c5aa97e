"""The engine that asks vLLM servers: a prompt goes out as embeddings over HTTP, its tokens stream back.

    engine = VllmEngine(llm, ["http://127.0.0.1:8000"])     # servers started with --enable-prompt-embeds

Videos are encoded and prompts embedded here; the servers know the language model alone. A conversation stays
with one server, whose prefix cache holds its videos. What breaks off goes on where it was: on another server,
or on the same one once it is back.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import httpx
import torch
from torch import Tensor

from encoder.errors import ConfigError, ModelError
from llm_bridge.engines.engine import Request
from llm_bridge.engines.local import LocalAnswer, piece_ends
from llm_bridge.engines.vllm_server import VllmServer
from llm_bridge.kv_cache import CacheStats
from llm_bridge.llm import LanguageModel
from llm_bridge.sampling import FinishReason, SamplingParams
from llm_bridge.structured import AnswerSchema
from llm_bridge.thinking import AnswerLength

PATIENCE_S = 30.0  # how long an answer waits for a server to come (back)
PAUSE_S = 0.5  # between two tries of all servers
DOWN_S = 10.0  # for which a server that did not answer comes last
BREAKS = 3  # requests in a row that may end without a token
USAGE_S = 2.0  # how long the last token waits for what its server says of the request
POLL_S = 0.02  # how soon a stop is noticed
CONNECT_S = 3.0


@dataclass(frozen=True)
class _Chunk:
    """Token ids that came together; what the end of a request says of it."""

    tokens: tuple[int, ...] = ()
    finish: str | None = None
    cached_tokens: int | None = None


class _Unreachable(Exception):
    """A server that does not answer, or no more."""


class VllmEngine:
    """Makes answers on vLLM servers that all serve the language model `llm`.

    llm: its embedding table and its end tokens are used, its layers are not. addresses: as
    "http://host:8000". key: the servers' --api-key. patience_s: how long an answer waits for a server.
    server: ends with this engine.
    Raises ConfigError for a language model or an address that cannot be served so: one sentence.
    """

    name = "vllm"

    def __init__(
        self,
        llm: LanguageModel,
        addresses: Sequence[str],
        *,
        key: str | None = None,
        patience_s: float = PATIENCE_S,
        server: VllmServer | None = None,
    ) -> None:
        if not addresses:
            raise ConfigError("The vLLM engine needs the address of a server, as http://127.0.0.1:8000.")
        self.llm, self.patience_s, self._server = llm, patience_s, server
        self.addresses = [checked_address(address) for address in addresses]
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._down: dict[str, float] = {}
        self._models: dict[str, str] = {}
        self._forgotten: dict[str | None, int] = {}
        self._lock = threading.Lock()
        self._hits = self._misses = self._made = self._running = 0
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-engine", daemon=True)
        self._thread.start()

    def start(self, request: Request) -> VllmAnswer:
        """An answer to be read. Raises ConfigError for what a server cannot take: one sentence."""
        check_request(self.llm, request)
        return VllmAnswer(self, request)

    def close(self) -> None:
        """Answers being made end with a ModelError; nothing is made afterwards."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._server is not None:
            self._server.close()

    @property
    def kept(self) -> CacheStats:
        """How often a server had the beginning of a prompt already; what it keeps, only it knows."""
        return CacheStats(self._hits, self._misses, 0, 0)

    @property
    def decoding(self) -> tuple[int, int, int]:
        """Tokens that came, twice, since passes are the servers' own, and the answers being made now."""
        return self._made, self._made, self._running

    def forget(self, scope: str | None = None) -> None:
        """What servers keep of a scope, or at all, serves no later question."""
        with self._lock:
            self._forgotten[scope] = self._forgotten.get(scope, 0) + 1

    def salt(self, scope: str) -> str | None:
        """What a server's prefix cache is told apart by; None: shared by all who have no scope."""
        with self._lock:
            times = self._forgotten.get(scope, 0), self._forgotten.get(None, 0)
        if not scope and times == (0, 0):
            return None
        return blake2b(repr((scope, times)).encode(), digest_size=16).hexdigest()

    def count(self, running: int = 0, made: int = 0, hit: bool | None = None) -> None:
        """Note an answer that begins (1) or ends (-1), tokens that came, and whether a prefix was kept."""
        with self._lock:
            self._running, self._made = self._running + running, self._made + made
            if hit is not None:
                self._hits, self._misses = self._hits + hit, self._misses + (not hit)

    def prefill_once(self, tokens: int) -> None:
        """Have a prompt of so many positions computed that no server has kept; raises ModelError."""
        rows = torch.randn(tokens, self.llm.hidden_size, dtype=self.llm.dtype)
        body = {"prompt_embeds": _encoded(rows), "max_tokens": 1, **_sampling(SamplingParams(), 0)}
        body |= {"stream": True, "return_token_ids": True}
        chunks: queue.SimpleQueue[_Chunk | BaseException | None] = queue.SimpleQueue()
        self.submit(body, self.addresses[:1], chunks)
        while (chunk := chunks.get()) is not None:
            if isinstance(chunk, _Unreachable):
                raise ModelError(f"The vLLM server at {self.addresses[0]} broke off: see its log.")
            if isinstance(chunk, BaseException):
                raise chunk

    def submit(self, body: dict[str, Any], ranked: Sequence[str], into: queue.SimpleQueue[Any]) -> Any:
        """Send a request to the first of `ranked` that answers; its chunks, then an error or None, are put.

        Returns a future to cancel it with, which closes the connection: the server then drops the request.
        """
        if self._closed:
            raise ModelError("The vLLM engine is closed: make a new VideoChat.")
        return asyncio.run_coroutine_threadsafe(self._run(body, ranked, into), self._loop)

    def ranked(self, request: Request) -> list[str]:
        """The servers, the one that this conversation belongs to first.

        By rendezvous hashing of what its turns have in common: when servers come or go, few others move.
        """
        keys = request.prompt.cache_keys
        begin = repr((request.scope, keys[: piece_ends(request.prompt)[0]])).encode()

        def weight(address: str) -> bytes:
            return blake2b(begin + address.encode(), digest_size=16).digest()

        return sorted(self.addresses, key=weight)

    @cached_property
    def _client(self) -> httpx.AsyncClient:
        # No limit on reading: a server is silent while it prefills others. trust_env: a proxy is not asked.
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return httpx.AsyncClient(timeout=timeout, limits=limits, headers=self._headers, trust_env=False)

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _run(self, body: dict[str, Any], ranked: Sequence[str], into: queue.SimpleQueue[Any]) -> None:
        error: BaseException | None = None
        try:
            async for chunk in self._first_that_answers(body, ranked):
                into.put(chunk)
        except (ModelError, ConfigError, _Unreachable) as raised:
            error = raised
        except asyncio.CancelledError:
            error = ModelError("The vLLM engine was closed before the answer was complete.")
            raise
        except Exception as raised:  # noqa: BLE001 - else its reader would wait for ever
            error = ModelError(
                f"The vLLM server's answer could not be read ({type(raised).__name__}: {raised})."
            )
        finally:
            into.put(error)

    async def _first_that_answers(self, body: dict[str, Any], ranked: Sequence[str]) -> AsyncIterator[_Chunk]:
        deadline = time.monotonic() + self.patience_s
        while True:
            now = time.monotonic()
            for address in sorted(ranked, key=lambda address: self._down.get(address, 0.0) > now):
                begun = False
                try:
                    async for chunk in self._stream(address, body):
                        begun = True
                        yield chunk
                    return
                except _Unreachable:
                    self._down[address] = time.monotonic() + DOWN_S
                    self._models.pop(address, None)  # another model may be served when it is back
                    if begun:
                        raise  # what came counts: its reader asks for the rest
            if time.monotonic() + PAUSE_S > deadline:
                raise ModelError(
                    f"No vLLM server answers at {', '.join(ranked)}: start one with --enable-prompt-embeds, "
                    "wait until it has loaded its model, or see in its log why it broke off."
                )
            await asyncio.sleep(PAUSE_S)

    async def _stream(self, address: str, body: dict[str, Any]) -> AsyncIterator[_Chunk]:
        """The chunks of one request. Raises _Unreachable when the server is gone, else as it says."""
        try:
            body = {**body, "model": await self._model(address)}
            async with self._client.stream("POST", f"{address}/v1/completions", json=body) as response:
                if response.status_code >= 400:
                    raise _refusal(address, response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    if (data := line[5:].strip()) == "[DONE]":
                        return
                    yield _chunk(address, data)
            raise _Unreachable  # it ended in the middle
        except httpx.TransportError as error:
            raise _Unreachable from error

    async def _model(self, address: str) -> str:
        """The name under which a server serves its model."""
        if address not in self._models:
            answer = await self._client.get(f"{address}/v1/models", timeout=CONNECT_S)
            if answer.status_code >= 400:
                raise _refusal(address, answer.status_code, answer.content)
            try:
                self._models[address] = str(answer.json()["data"][0]["id"])
            except (ValueError, LookupError, TypeError) as error:
                raise ModelError(
                    f"What answers at {address} is no vLLM server: check the address."
                ) from error
        return self._models[address]


class VllmAnswer:
    """One answer of vLLM servers; see TokenStream. cached_tokens is known once the first request ended."""

    def __init__(self, engine: VllmEngine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._length = request.length or AnswerLength(request.sampling.max_new_tokens)
        self._ends = engine.llm.eos_ids | frozenset(request.sampling.stop_token_ids)
        self._tokens: list[int] = []
        self._ended = False
        self.cached_tokens, self.prefill_s = 0, 0.0
        self.finish: FinishReason = "cancelled"

    def __iter__(self) -> Iterator[int]:
        self._engine.count(running=1)
        try:
            yield from self._made()
        finally:
            self._engine.count(running=-1)

    def _made(self) -> Iterator[int]:
        begun = time.perf_counter()
        forced, breaks = self._length.forced(), 0
        while not (self._ended or self._request.stop.is_set()):
            made = len(self._tokens)
            for token in [forced] if forced is not None else self._stretch():
                self.prefill_s = self.prefill_s or time.perf_counter() - begun
                if token in self._ends and forced is None:
                    self._ended, self.finish = True, "stop"
                    continue
                self._tokens.append(token)
                self._engine.count(made=1)
                self._length.count(token)
                yield token
                if self._length.full:
                    self._ended, self.finish = True, "length"
                    continue
                forced = self._length.forced()
                if forced is not None or self._request.stop.is_set():
                    break
            breaks = breaks + 1 if len(self._tokens) == made and not self._ended else 0
            if breaks == BREAKS:
                raise ModelError("The vLLM server breaks off at this question each time: see its log.")

    def _stretch(self) -> Iterator[int]:
        """Tokens of one request: the rest of the answer, or as much of it as comes before its server goes."""
        chunks: queue.SimpleQueue[_Chunk | BaseException | None] = queue.SimpleQueue()
        first = not self._tokens
        sent = self._engine.submit(self._body(), self._engine.ranked(self._request), chunks)
        patience = 0.0
        try:
            while not (self._request.stop.is_set() or (self._ended and time.monotonic() > patience)):
                try:
                    chunk = chunks.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if chunk is None or isinstance(chunk, _Unreachable):
                    return
                if isinstance(chunk, BaseException):
                    raise chunk
                if first and chunk.cached_tokens is not None:
                    self.cached_tokens = chunk.cached_tokens
                    self._engine.count(hit=chunk.cached_tokens > 0)
                for token in chunk.tokens:
                    if not self._ended:
                        yield token
                        patience = time.monotonic() + USAGE_S
                if chunk.finish == "stop" and not self._ended:  # by a token of the server's own
                    self._ended, self.finish = True, "stop"
        finally:
            sent.cancel()

    def _body(self) -> dict[str, Any]:
        """The request for what is still to come, as /v1/completions of vLLM takes it; raises ModelError."""
        sampling, made = self._request.sampling, len(self._tokens)
        if made and sampling.schema is not None:  # the server would begin the JSON anew
            raise ModelError("The vLLM server broke off in the middle of an answer with a schema: ask again.")
        bias = dict(sampling.logit_bias or {})
        most = sampling.max_new_tokens - made
        if self._request.length is not None:
            most += sampling.max_thinking_tokens
        if not made and self._request.first_bias:
            for token, value in self._request.first_bias.items():
                bias[token] = bias.get(token, 0.0) + value
            most = 1  # the bias is for this token alone
        most = max(most, 1)
        body = {
            "prompt_embeds": _encoded(torch.cat([self._embedded, self._answer_embedded()])),
            "max_tokens": most,
            "min_tokens": min(max(sampling.min_tokens - made, 0), most),
            "stop_token_ids": sorted(self._ends),
            "logit_bias": {str(token): value for token, value in bias.items()} or None,
            **_sampling(sampling, made),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if sampling.schema is not None:
            body["structured_outputs"] = {"json": AnswerSchema.of(sampling.schema).with_rules}
        if (salt := self._engine.salt(self._request.scope)) is not None:
            body["cache_salt"] = salt
        return body

    @cached_property
    def _embedded(self) -> Tensor:
        """The prompt's embeddings (L, D)."""
        answer = LocalAnswer(self._engine.llm, self._request)
        with torch.inference_mode():
            return answer.inputs(0, len(self._request.prompt))["inputs_embeds"][0]

    def _answer_embedded(self) -> Tensor:
        """Embeddings of the tokens that were made so far."""
        with torch.inference_mode():
            return self._engine.llm.embed(
                torch.tensor(self._tokens, dtype=torch.long, device=self._engine.llm.device)
            )


def check_request(llm: LanguageModel, request: Request) -> None:
    """Raises ConfigError for what completions from embeddings cannot carry: one sentence."""
    if request.prompt.positions:
        raise ConfigError(
            "The vLLM engine sends embeddings without positions, which this model's videos need (M-RoPE): "
            "use the local engine."
        )
    if any(visual.shape[1] != llm.hidden_size for visual in request.visuals):
        raise ConfigError(
            "The vLLM engine sends one embedding a position, and this model's videos add rows to several "
            "layers: use the local engine."
        )
    if request.sampling.repetition_penalty != 1:
        raise ConfigError(
            "The vLLM engine sends embeddings, in which the server sees no words to penalise: leave "
            "repetition_penalty out, or use the local engine."
        )
    thinks = request.length is not None and not request.length.answering
    if request.sampling.schema is not None and thinks:
        raise ConfigError(
            "The vLLM engine cannot hold the answer of a model that always thinks to a schema: leave the "
            "schema out, or use the local engine."
        )


def _sampling(sampling: SamplingParams, made: int) -> dict[str, Any]:
    """Fields of the request; all are said, since a server has defaults of its model's."""
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    if sampling.seed is not None:  # a continued answer does not draw the same numbers again
        fields["seed"] = (sampling.seed + made) % 2**63
    return fields


def _encoded(embeddings: Tensor) -> str:
    buffer = io.BytesIO()
    torch.save(embeddings.cpu().contiguous(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _chunk(address: str, data: str) -> _Chunk:
    """One event of the stream. Raises ModelError for an error that came in it, or what is none of vLLM's."""
    try:
        event = json.loads(data)
        if "error" in event:
            message = str(event["error"].get("message", event["error"]))
            if "EngineCore" in message:  # what computes has died, and the server ends after it
                raise _Unreachable
            raise ModelError(_said(address, message))
        usage = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        choices = event.get("choices") or [{}]
        return _Chunk(
            tuple(int(token) for token in choices[0].get("token_ids") or ()),
            choices[0].get("finish_reason"),
            usage.get("cached_tokens"),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(_foreign(address)) from error


def _refusal(address: str, status: int, content: bytes) -> ModelError:
    """What a server's error means, in one sentence."""
    if status in (401, 403):
        return ModelError(f"The vLLM server at {address} asks for a key: set FLUXCHAT_ENGINE_KEY to its own.")
    try:
        answer = json.loads(content)
        message = str((answer.get("error") or answer).get("message") or answer)
    except (ValueError, AttributeError):
        message = content.decode(errors="replace")
    if "enable-prompt-embeds" in message:
        return ModelError(
            f"The vLLM server at {address} takes no embeddings: start it with --enable-prompt-embeds."
        )
    return ModelError(_said(address, f"{message} (HTTP {status})"))


def _foreign(address: str) -> str:
    return f"What answers at {address} is no vLLM server: check the address."


def _said(address: str, message: str) -> str:
    return f"The vLLM server at {address} says: {' '.join(message.split())[:300]}"


def checked_address(address: str) -> str:
    """A server's address without what follows its port; raises ConfigError: one sentence."""
    try:
        url = httpx.URL(address)
        known = url.scheme in ("http", "https") and bool(url.host) and not url.query
    except (httpx.InvalidURL, ValueError):
        known = False
    if not known:
        raise ConfigError(f"{address[:80]!r} is no server's address: write it as http://127.0.0.1:8000.")
    return address.rstrip("/").removesuffix("/v1")
