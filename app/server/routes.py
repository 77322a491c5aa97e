"""The routes of the API: OpenAI-style chat completions and files, health, metrics, documentation.

app = FastAPI(); Api(chat).install(app)

client = openai.OpenAI(base_url="http://127.0.0.1:7860/v1", api_key="none")
client.chat.completions.create(model="fluxchat", messages=[{"role": "user", "content": [
    {"type": "video_url", "video_url": {"url": file.id}}, {"type": "text", "text": "What moves?"}]}],
    extra_body={"token_budget": 128})
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.chat import SHIPPED, VideoChat
from app.library.library import Library
from app.messages import Media, with_part
from app.model_slot import ModelSlot
from app.note import Note
from app.server.chat_request import (
    ChatRequest,
    Reference,
    check_text,
    longest_text,
    parse_chat,
    validation_error,
)
from app.server.embeddings import ClipEmbedder, parse_embeddings
from app.server.errors import ApiError, ClientDisconnected, PathRedactor, error_response
from app.server.media.resolver import Resolver
from app.server.media.store import MediaStore, StoredFile
from app.server.media.uploads import receive_files
from app.server.metrics import CONTENT_TYPE, Metrics
from app.server.openapi import POLICY, Operation, docs_page, openapi_document
from app.server.replies import EventStream, Reply, TextFilter, until_disconnected
from app.server.request_body import read_json
from app.server.scheduler import Job, Scheduler
from app.server.schemas import (
    MODEL,
    ChatBody,
    ChatCompletion,
    DeletedFile,
    EmbeddingList,
    EmbeddingsBody,
    FileList,
    FileObject,
    FilesQuery,
    ModelList,
    ModelObject,
)
from app.streaming import AnswerStream, Thought
from encoder.errors import VideoError
from encoder.video.reader import VideoInfo
from llm_bridge.prompt import Message

LOG = logging.getLogger("fluxchat")
MIB = 2**20
SWEEP_S = 60.0
PURPOSES = ("user_data", "vision", "assistants")
Handler = Callable[[Request], Awaitable[Response]]


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


class Api:
    """The HTTP API around one VideoChat. Belongs to one event loop; `close` it at the end.

    library: its features are those of /v1/embeddings, in place of the shipped encoder's.
    """

    def __init__(
        self,
        chat: VideoChat | ModelSlot,
        settings: ServerSettings | None = None,
        library: Library | None = None,
    ) -> None:
        self.slot, self.library = ModelSlot.of(chat), library
        self.settings = settings = settings or ServerSettings()
        self.store = MediaStore(settings.store_mib * MIB, settings.keep_s)
        self.scheduler = Scheduler(settings.slots, settings.queue)
        self.metrics = Metrics(self.slot, self.scheduler, self.store)
        self._resolver = Resolver(
            self.store, settings.media_root, settings.url_hosts, settings.upload_mib * MIB
        )
        self._embedder = ClipEmbedder(self.library, self._resolver)
        self._embedding, self._to_embed = asyncio.Semaphore(1), 0  # one at a time, so many wait
        self._probing = asyncio.Semaphore(settings.probes)
        self._started = int(time.time())
        own = {str(SHIPPED): "the model", str(self.chat.model.llm.name): "the model"}
        self._redact = PathRedactor(own, [self.store.folder, settings.media_root])
        self._operations = self._routes()
        self._document = openapi_document(list(self._operations), "FluxChat", _version())

    @property
    def chat(self) -> VideoChat:
        """The model in use."""
        return self.slot.chat

    def _routes(self) -> dict[Operation, Handler]:
        """The operations of the API and their handlers."""
        usual = (400, 401, 413, 415, 429, 500, 503)
        return {
            Operation(
                "POST",
                "/v1/chat/completions",
                "An answer about videos and images, whole or streamed.",
                answer=ChatCompletion,
                body=ChatBody,
                errors=(*usual, 404),
            ): self.chat_completions,
            Operation(
                "POST",
                "/v1/embeddings",
                "Features of texts and clips in one space, as a library has them.",
                answer=EmbeddingList,
                body=EmbeddingsBody,
                errors=(*usual, 404),
            ): self.embeddings,
            Operation(
                "POST",
                "/v1/files",
                "Keep a video or image for questions to come.",
                answer=FileObject,
                upload=True,
                errors=usual,
            ): self.upload,
            Operation(
                "GET",
                "/v1/files",
                "The files that you uploaded.",
                answer=FileList,
                query=FilesQuery,
                errors=(400, 401),
            ): self.files,
            Operation(
                "GET", "/v1/files/{id}", "What is known of a file.", answer=FileObject, errors=(401, 404)
            ): self.file,
            Operation(
                "DELETE", "/v1/files/{id}", "Delete a file.", answer=DeletedFile, errors=(401, 404)
            ): self.delete_file,
            Operation("GET", "/v1/models", "The models: one.", answer=ModelList, errors=(401,)): self.models,
            Operation(
                "GET", "/v1/models/{id}", "What is known of the model.", answer=ModelObject, errors=(401, 404)
            ): self.model,
            Operation("GET", "/healthz", "200 while it answers, 503 when it is about to end."): self.health,
            Operation(
                "GET", "/metrics", "Figures in Prometheus' text format.", errors=(401,)
            ): self.read_metrics,
            Operation("GET", "/openapi.json", "This description, for programs."): self.read_openapi,
            Operation("GET", "/docs", "This description, for people."): self.docs,
        }

    def install(self, app: FastAPI) -> None:
        """Add the routes."""
        for operation, handler in self._operations.items():
            answering = self._with_errors(handler, operation.path)
            app.router.add_route(operation.path, answering, [operation.method], include_in_schema=False)
        # Unknown paths below /v1 must not fall through to the page.
        not_found = _AnyMethod(self._with_errors(self.not_found, "other"))
        others = [o.path for o in self._operations if not o.path.startswith("/v1/")]
        for path in ("/v1", "/v1/{rest:path}", *others):
            app.router.routes.append(Route(path, not_found, include_in_schema=False))
        app.openapi = lambda: self._document  # type: ignore[method-assign]
        app.add_exception_handler(HTTPException, self._with_errors(self.not_found, "other"))

    async def tidy(self) -> None:
        """Delete long unused files every SWEEP_S seconds; runs until it is cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            await asyncio.to_thread(self.store.sweep)

    def close(self) -> None:
        """Stop computing, delete the files."""
        self.scheduler.close()
        self.store.close()

    def _with_errors(self, handler: Handler, route: str) -> Callable[..., Coroutine[Any, Any, Response]]:
        """The handler, with exceptions turned into error responses, and requests counted."""

        async def answer(request: Request, _: object = None) -> Response:
            try:
                response = await handler(request)
            except ClientDisconnected:
                response = Response(status_code=499)
            except Exception as error:  # noqa: BLE001 - every failure must leave as JSON
                response = error_response(self._error(error))
            self.metrics.requests.labels(route=route, status=str(response.status_code)).inc()
            return response

        return answer

    def _error(self, error: BaseException) -> ApiError:
        """The error response for an exception, without paths of the server."""
        known = ApiError.of(error)
        if known.status == 500:
            LOG.error("A request failed", exc_info=error)
        # The Python API has another name for it.
        return known.redacted(lambda text: self._redact(text).replace("max_new_tokens", "max_tokens"))

    # -- small routes ---------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """200 while it answers, 503 when it is about to end."""
        draining = self.scheduler.draining
        return JSONResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)

    async def read_metrics(self, _: Request) -> Response:
        """Prometheus' text format."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def models(self, _: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The same by name."""
        name = request.path_params["id"]
        if name != MODEL:
            message = f"There is no model {name[:80]!r} here: use {MODEL!r}."
            raise ApiError(404, message, code="model_not_found", param="model")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": MODEL,
            "object": "model",
            "created": self._started,
            "owned_by": MODEL,
            "description": self.chat.name,
            "default_token_budget": self.chat.model.default_tokens,
        }

    async def read_openapi(self, _: Request) -> Response:
        """The OpenAPI document."""
        return JSONResponse(self._document)

    async def docs(self, _: Request) -> Response:
        """The same as a page."""
        return HTMLResponse(docs_page(self._document), headers={"Content-Security-Policy": POLICY})

    async def not_found(self, request: Request) -> Response:
        """405 for an existing path with another method, else 404 that lists the routes."""
        path = request.url.path
        methods = [o.method for o in self._operations if _matches(o.path, path)]
        if methods:
            allowed = ", ".join(sorted({*methods, *(["HEAD"] if "GET" in methods else [])}))
            raise ApiError(
                405,
                f"{request.method[:20]} is not possible here: use {' or '.join(sorted(methods))}.",
                code="method_not_allowed",
                headers={"Allow": allowed},
            )
        routes = ", ".join(f"{o.method} {o.path}" for o in self._operations if o.path.startswith("/v1"))
        raise ApiError(
            404,
            f"There is no {request.method[:20]} {path[:200]} here: the routes are {routes}; see /docs.",
            code="unknown_url",
        )

    # -- files ----------------------------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        """Store an uploaded video or image; one that cannot be read is refused and deleted."""
        limit = self.settings.upload_mib * MIB
        [stored] = await receive_files(request, self.store, "file", limit=limit)
        try:
            async with self._probing:
                info = await asyncio.to_thread(self._probe, stored)
        except BaseException:
            self.store.delete(stored.id, stored.client)
            raise
        media = {"kind": info.kind, "width": info.width, "height": info.height, "codec": info.codec}
        return JSONResponse({**_file(stored), "media": {**media, "duration_s": info.duration_s}})

    def _probe(self, stored: StoredFile) -> VideoInfo:
        """Metadata of an upload; raises ApiError that names it as its client does."""
        try:
            with self.store.use(stored) as path, open(path, "rb") as file:
                return self.chat.probe(Media(file, stored.name))
        except VideoError as error:
            raise ApiError.of(error).about("file") from error

    async def files(self, request: Request) -> Response:
        """The caller's own files."""
        try:
            query = FilesQuery.model_validate(dict(request.query_params))
        except ValidationError as error:
            raise validation_error(error, FilesQuery) from None
        files = self.store.files(client_of(request))
        if query.order == "desc":
            files.reverse()
        if query.purpose not in (None, *PURPOSES):
            files = []
        if query.after is not None:
            positions = [index for index, stored in enumerate(files) if stored.id == query.after]
            files = files[positions[0] + 1 :] if positions else []
        shown = [_file(stored) for stored in files[: query.limit]]
        first, last = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
        more = len(files) > len(shown)
        return JSONResponse(
            {"object": "list", "data": shown, "first_id": first, "last_id": last, "has_more": more}
        )

    async def file(self, request: Request) -> Response:
        """What is known of an uploaded file."""
        return JSONResponse(_file(self.store.find(request.path_params["id"], client_of(request))))

    async def delete_file(self, request: Request) -> Response:
        """Delete an uploaded file."""
        name = request.path_params["id"]
        self.store.delete(name, client_of(request))
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    # -- features -------------------------------------------------------------------------------------------

    async def embeddings(self, request: Request) -> Response:
        """Unit vectors of texts and clips."""
        self.scheduler.check()
        body = await read_json(request, self.settings.body_mib * MIB)
        wanted = parse_embeddings(body)
        stop = threading.Event()

        if self._embedding.locked() and self._to_embed >= self.settings.queue:
            raise ApiError(
                429,
                f"{self._to_embed} requests for features are waiting already: try again later.",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "5"},
            )

        async def compute() -> dict[str, Any]:
            self._to_embed += 1
            try:
                await self._embedding.acquire()
            finally:
                self._to_embed -= 1
            try:
                return await asyncio.to_thread(self._embedder.answer, wanted, client_of(request), stop)
            finally:
                self._embedding.release()

        try:
            return JSONResponse(await until_disconnected(request, compute()))
        except BaseException:
            stop.set()
            raise

    # -- chat -----------------------------------------------------------------------------------------------

    async def chat_completions(self, request: Request) -> Response:
        """An answer, whole or as server-sent events."""
        arrived = time.monotonic()
        self.scheduler.check()  # before a large body is read
        body = await read_json(request, self.settings.body_mib * MIB)
        check_text(body, longest_text(self.chat))
        chat_request = parse_chat(body)
        self._check(chat_request)
        stop, client = threading.Event(), client_of(request)
        try:
            job = await until_disconnected(
                request, self.scheduler.start(lambda: self._stream(chat_request, client, stop))
            )
        except BaseException:
            stop.set()
            raise
        filtered = self._filtered(job, chat_request, arrived)
        try:
            # The status is sent after the first piece, since most errors come before it.
            first = await until_disconnected(request, _next(filtered))
            if chat_request.stream:
                return EventStream(
                    _events(filtered, first, job, chat_request), job, self.settings.send_s, self._error
                )
            pieces = await until_disconnected(request, _collected(filtered))
        except BaseException:
            stop.set()  # also during a download, before there is a stream
            job.stop()
            raise
        assert job.answer is not None
        text = "".join(piece for piece in [first or "", *pieces] if not isinstance(piece, Thought))
        return JSONResponse(Reply().completion(text, job.answer, thoughts=chat_request.include_reasoning))

    def _check(self, chat_request: ChatRequest) -> None:
        """Raises ApiError or BudgetError for a request that must fail, before it is queued."""
        self.chat.plan_budget(chat_request.token_budget)
        if chat_request.sampling["min_tokens"] > self._longest(chat_request):
            message = f"min_tokens must be at most {self._longest(chat_request)}, the length of this answer."
            raise ApiError(400, message, param="min_tokens")
        llm = self.chat.model.llm
        if chat_request.sampling.get("think") and llm.thinking_marks is None:
            message = "This model does not think before it answers: leave enable_thinking out."
            raise ApiError(400, message, param="chat_template_kwargs")
        size = llm.model.config.get_text_config().vocab_size
        for name in ("stop_token_ids", "logit_bias"):
            for token in chat_request.sampling[name] or ():
                if token >= size:
                    message = f"{name} names token {token}, but the last one is {size - 1}."
                    raise ApiError(400, message, param=name)

    def _longest(self, chat_request: ChatRequest) -> int:
        return min(chat_request.max_tokens or self.settings.default_tokens, self.settings.max_tokens)

    def _most_thinking(self, chat_request: ChatRequest) -> int:
        asked = chat_request.sampling.get("max_thinking_tokens", self.settings.max_tokens)
        return min(asked, self.settings.max_tokens)

    @contextmanager
    def _stream(
        self, chat_request: ChatRequest, client: str, stop: threading.Event
    ) -> Iterator[AnswerStream]:
        """The answer's stream, entered in the job's thread; the media stay open until it ends."""
        references = chat_request.media
        with (
            self._resolver.open(references, client, stop) as media,
            self.slot.using(stop, after_loading=True) as chat,
        ):
            try:
                yield chat.stream_messages(
                    with_part(_resolved(chat_request.messages, media), chat_request.part),
                    budget=chat_request.token_budget,
                    selector=chat_request.selector,
                    parts=chat_request.parts,
                    max_new_tokens=self._longest(chat_request),
                    scope=" ".join(filter(None, ("api", client, chat_request.label))),
                    stop=stop,
                    **{**chat_request.sampling, "max_thinking_tokens": self._most_thinking(chat_request)},
                )
            except VideoError as error:
                raise ApiError.of(error).about(_param_of(str(error), media, references)) from error

    async def _filtered(self, job: Job, chat_request: ChatRequest, arrived: float) -> AsyncIterator[str]:
        text, first_seen, note = TextFilter(chat_request.stop), False, ""
        async for piece in job:
            if not first_seen:
                first_seen = True
                self.metrics.first_token.observe(time.monotonic() - arrived)
            if isinstance(piece, Thought):
                if chat_request.include_reasoning:
                    yield piece
            elif isinstance(piece, Note):  # stop texts are looked for in the model's own words
                note = piece
            elif out := text.push(piece):
                yield note + out
                note = ""
            if text.done:
                job.stop()
        if out := text.flush():
            yield note + out
        if job.answer is not None:
            self.metrics.record(job.answer, time.monotonic() - arrived)


async def _next(pieces: AsyncIterator[str]) -> str | None:
    """The next piece, None at the end."""
    return await anext(pieces, None)


async def _collected(pieces: AsyncIterator[str]) -> list[str]:
    return [piece async for piece in pieces]


async def _events(
    pieces: AsyncIterator[str], first: str | None, job: Job, chat_request: ChatRequest
) -> AsyncIterator[dict[str, Any]]:
    """The objects of a streamed answer."""
    reply = Reply()
    yield reply.chunk({"role": "assistant", "content": ""})
    piece = first
    while piece is not None:
        yield reply.chunk({"reasoning_content" if isinstance(piece, Thought) else "content": piece})
        piece = await _next(pieces)
    assert job.answer is not None
    yield reply.chunk({}, job.answer)
    if chat_request.include_usage:
        yield reply.usage_chunk(job.answer)


class _AnyMethod:
    """A handler for every method, as an ASGI application."""

    def __init__(self, handler: Callable[..., Coroutine[Any, Any, Response]]) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handler(Request(scope, receive))
        await response(scope, receive, send)


def client_of(request: Request) -> str:
    """The client id that access control put into the scope."""
    return str(request.scope.get("fluxchat.client", ""))


def _resolved(messages: Sequence[Message[Reference]], media: Sequence[Media]) -> list[Message[Media]]:
    """The messages with opened media in place of their references."""
    remaining = iter(media)

    def parts(message: Message[Reference]) -> tuple[str | Media, ...]:
        return tuple(part if isinstance(part, str) else next(remaining) for part in message.content)

    return [Message(message.role, parts(message)) for message in messages]


def _param_of(message: str, media: Sequence[Media], references: Sequence[Reference]) -> str:
    """The request field of the medium that an error is about; "messages" when it names none."""
    if len(references) == 1:
        return references[0].param
    count = len(media)
    named = [index for index in range(count) if media[index].label(index, count) in message]
    return references[named[0]].param if len(named) == 1 else "messages"


def _matches(template: str, path: str) -> bool:
    """Whether a path matches a template such as /v1/files/{id}."""
    pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template))
    return re.fullmatch(pattern, path) is not None


def _version() -> str:
    try:
        return metadata.version("fluxchat")
    except metadata.PackageNotFoundError:
        return "0"


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
