"""The routes for programs: OpenAI-style chat completions and files, health, metrics.

app = FastAPI(); Server(chat).install(app)

client = openai.OpenAI(base_url="http://127.0.0.1:7860/v1", api_key="none")
client.chat.completions.create(model="fluxchat", messages=[{"role": "user", "content": [
    {"type": "video_url", "video_url": {"url": file.id}}, {"type": "text", "text": "What moves?"}]}],
    extra_body={"token_budget": 128})
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from app.api_types import MODEL, ApiError, ChatRequest, Reply, TextFilter, parse_chat
from app.chat import VideoChat
from app.guard import error_response
from app.media import MediaStore, Resolver, StoredFile
from app.metrics import Metrics
from app.readings import declare, record
from app.scheduler import Job, Scheduler
from app.turns import AnswerStream, Videos
from app.uploads import receive_files
from app.wire import ClientGone, EventStream, check_text, longest_text, read_json, until_gone

LOG = logging.getLogger("fluxchat")
MIB = 2**20
SWEEP_S = 60.0


@dataclass(frozen=True)
class ServerSettings:
    """Bounds of the server.

    slots: answers at a time. queue: requests that may wait. media_root: files under it may be named by path.
    url_hosts: hosts that may be fetched from. upload_mib: one file. body_mib: one JSON body, data: URLs
    included. store_mib, keep_s: all uploaded files, and for how long unused ones stay. max_tokens: longest
    answer; default_tokens: when the request does not say. send_s: a reader that takes nothing for so long is
    gone. probes: uploads looked at at a time. bodies_mib: all JSON bodies that are being sent or answered;
    uploads: under way at a time.
    """

    slots: int = 8
    queue: int = 32
    media_root: Path | None = None
    url_hosts: tuple[str, ...] = ()
    upload_mib: int = 200
    body_mib: int = 64
    store_mib: int = 2048
    keep_s: float = 3600.0
    max_tokens: int = 1024
    default_tokens: int = 128
    send_s: float = 60.0
    probes: int = 4
    bodies_mib: int = 256
    uploads: int = 64


@dataclass
class Server:
    """One VideoChat for programs. Belongs to one event loop; `close` when it ends."""

    chat: VideoChat
    settings: ServerSettings = field(default_factory=ServerSettings)

    def __post_init__(self) -> None:
        settings = self.settings
        self.store = MediaStore(settings.store_mib * MIB, settings.keep_s)
        self.scheduler = Scheduler(settings.slots, settings.queue)
        self.metrics = Metrics()
        self._resolver = Resolver(
            self.store, settings.media_root, settings.url_hosts, settings.upload_mib * MIB
        )
        self._probing = asyncio.Semaphore(settings.probes)
        self._started = int(time.time())
        declare(self.metrics, self.chat, self.scheduler, self.store)

    def install(self, app: FastAPI) -> None:
        """Add the routes."""
        routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("GET", "/healthz", self.health),
            ("GET", "/metrics", self.read_metrics),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name}", self.model),
            ("POST", "/v1/chat/completions", self.chat_completions),
            ("POST", "/v1/files", self.upload),
            ("GET", "/v1/files/{name}", self.file),
            ("DELETE", "/v1/files/{name}", self.delete_file),
        ]
        for method, path, handler in routes:
            app.router.add_route(path, self._answering(handler, path), [method])
        # Whatever else begins with /v1 must not fall through to the page.
        methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
        app.router.add_route("/v1/{rest:path}", self._answering(self.nothing, "other"), methods)

    async def tidy(self) -> None:
        """Delete files that nobody uses any more, now and then; runs until it is cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            await asyncio.to_thread(self.store.sweep)

    def close(self) -> None:
        """Stop computing, delete the files."""
        self.scheduler.close()
        self.store.close()

    def _answering(
        self, handler: Callable[[Request], Awaitable[Response]], route: str
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler with errors in OpenAI's shape, counted."""

        async def answer(request: Request) -> Response:
            try:
                response = await handler(request)
            except ClientGone:
                response = Response(status_code=499)
            except Exception as error:  # noqa: BLE001 - every failure must leave as JSON
                response = error_response(self._error(error))
            self.metrics.add("fluxchat_requests_total", route=route, status=str(response.status_code))
            return response

        return answer

    @staticmethod
    def _error(error: BaseException) -> ApiError:
        known = ApiError.of(error)
        if known.status == 500:
            LOG.error("A request failed", exc_info=error)
        return known

    # -- small routes ---------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """200 while it answers, 503 when it is about to end."""
        draining = self.scheduler.draining
        return JSONResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)

    async def read_metrics(self, _: Request) -> Response:
        """Prometheus' text format."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, _: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The same by name."""
        if request.path_params["name"] != MODEL:
            raise ApiError(404, f"There is no such model: use {MODEL!r}.", code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": MODEL,
            "object": "model",
            "created": self._started,
            "owned_by": MODEL,
            "description": self.chat.name,
            "default_token_budget": self.chat.model.config.default_tokens,
        }

    async def nothing(self, request: Request) -> Response:
        """What does not exist."""
        raise ApiError(
            404, f"There is no {request.method} {request.url.path[:200]} here.", code="unknown_url"
        )

    # -- files ----------------------------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        """Keep a video or image that can be read; what cannot is refused and deleted."""
        limit = self.settings.upload_mib * MIB
        [stored] = await receive_files(request, self.store, "file", limit=limit)
        try:
            async with self._probing:
                info = await asyncio.to_thread(self.chat.probe, stored.path)
        except BaseException:
            self.store.delete(stored.id, stored.client)
            raise
        media = {"kind": info.kind, "width": info.width, "height": info.height, "codec": info.codec}
        return JSONResponse({**_file(stored), "media": {**media, "duration_s": info.duration_s}})

    async def file(self, request: Request) -> Response:
        """What is known of an uploaded file."""
        return JSONResponse(_file(self.store.find(request.path_params["name"], client_of(request))))

    async def delete_file(self, request: Request) -> Response:
        """Delete an uploaded file."""
        name = request.path_params["name"]
        self.store.delete(name, client_of(request))
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    # -- chat -----------------------------------------------------------------------------------------------

    async def chat_completions(self, request: Request) -> Response:
        """An answer, whole or as server-sent events."""
        arrived = time.monotonic()
        self.scheduler.check()  # before a body of many megabytes is read
        body = await read_json(request, self.settings.body_mib * MIB)
        check_text(body, longest_text(self.chat))
        asked, client = parse_chat(body), client_of(request)
        job = await until_gone(request, self.scheduler.start(lambda: self._stream(asked, client)))
        filtered = self._filtered(job, asked, arrived)
        try:
            # The first piece decides about the status: most errors come before it.
            first = await until_gone(request, _next(filtered))
            if asked.stream:
                return EventStream(
                    _events(filtered, first, job, asked), job, self.settings.send_s, self._error
                )
            rest = "" if first is None else await until_gone(request, _joined(filtered))
        except BaseException:
            job.stop()
            raise
        assert job.answer is not None
        return JSONResponse(Reply().whole((first or "") + rest, job.answer))

    @contextmanager
    def _stream(self, asked: ChatRequest, client: str) -> Iterator[AnswerStream]:
        """The question as VideoChat takes it, in the job's thread; its files stay until the answer ends."""
        longest = min(asked.max_tokens or self.settings.default_tokens, self.settings.max_tokens)
        with self._resolver.open(asked.media, client) as paths:
            yield self.chat.stream(
                Videos(paths),
                asked.question,
                budget=asked.token_budget,
                history=asked.turns,
                system=asked.system,
                selector=asked.selector,  # type: ignore[arg-type]
                max_new_tokens=longest,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=asked.top_k,
                seed=asked.seed,
                scope=f"api {client} {asked.user}",
            )

    async def _filtered(self, job: Job, asked: ChatRequest, arrived: float) -> AsyncIterator[str]:
        text, told = TextFilter(asked.stop), False
        async for piece in job:
            if not told:
                told = True
                self.metrics.observe("fluxchat_first_token_seconds", time.monotonic() - arrived)
            if out := text.push(piece):
                yield out
            if text.done:
                job.stop()
        if out := text.flush():
            yield out
        if job.answer is not None:
            record(self.metrics, job.answer, time.monotonic() - arrived)


async def _next(pieces: AsyncIterator[str]) -> str | None:
    """The next piece, None at the end."""
    return await anext(pieces, None)


async def _joined(pieces: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in pieces])


async def _events(
    pieces: AsyncIterator[str], first: str | None, job: Job, asked: ChatRequest
) -> AsyncIterator[dict[str, Any]]:
    """The objects of a streamed answer."""
    reply = Reply()
    yield reply.chunk({"role": "assistant", "content": ""})
    piece = first
    while piece is not None:
        yield reply.chunk({"content": piece})
        piece = await _next(pieces)
    assert job.answer is not None
    yield reply.chunk({}, job.answer)
    if asked.include_usage:
        yield reply.usage_chunk(job.answer)


def client_of(request: Request) -> str:
    """Whose request it is (guard.py)."""
    return str(request.scope.get("fluxchat.client", ""))


def _file(stored: StoredFile) -> dict[str, Any]:
    return {
        "id": stored.id,
        "object": "file",
        "bytes": stored.bytes,
        "created_at": stored.created,
        "filename": stored.name,
        "purpose": "user_data",
        "status": "processed",
    }
