"""The Gradio page mounted into the server's application, with the access control that Gradio lacks.

Gradio knows no owners. Here a session of the page belongs to the login that began it, a file to who uploaded
it, and a request names uploads only: no other file of the machine, no URL but of allowed hosts. Routes that
nobody needs (proxies, recordings, deep links) are not there.

Launched, Gradio takes as input only files that were uploaded to it. Mounted, it skips that check (6.31): any
file of the machine could be named as a video. It also fetches whatever public URL a request names.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.chat import SHIPPED
from app.model_slot import ModelSlot
from app.server.errors import ApiError, ClientDisconnected
from app.server.gradio_events import check_event, tell_senders
from app.server.media.download import download
from app.server.media.store import MediaStore
from app.server.media.uploads import receive_files
from app.server.options import LaunchOptions
from app.server.request_body import parse_json, read_body
from app.server.routes import Api
from app.server.security.authentication import is_anonymous

BODY_BYTES = 4 << 20
MAX_FILES = 16  # in one upload
MAX_NAMED_FILES = 64  # files in one request
PATH_LENGTH = 4096  # the system's longest; resolving a path takes the square of its length
MAX_SESSIONS = 10_000  # whose owner is remembered
PAGE_ROUTES = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(/\d+)?"
    r"|/(static|assets|svelte)/.*"
    r"|/gradio_api/(info/?|app_id/?|user/?|login_check/?|startup-events|theme\.css|openapi\.json|queue/status)"
    r"|/gradio_api/(queue/join|queue/data|reset/?|cancel|heartbeat/[\w-]{1,64}|file=.*)"
    r"|/gradio_api/(run|api|call|call/v2)/[\w-]+(/[\w-]*)?"
)
MCP_ROUTES = re.compile(r"/gradio_api/mcp(/.*)?")
FILE_PREFIX = "/gradio_api/file="


def mount_page(app: FastAPI, slot: ModelSlot, api: Api, options: LaunchOptions) -> FastAPI:
    """The application with the page at its root; its uploads go to the server's store."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from app.page.events import build, page_options
    from app.page.gradio_import import gradio

    folder, limit = gradio.utils.get_upload_folder(), options.server.upload_mib * 2**20
    page = build(
        slot,
        options.examples,
        workers=options.server.slots,
        store=api.store,
        login=options.credentials.needed,
        loads=options.for_one,
        library=options.library,
    )
    uploads = PageUploads(api.store, folder, limit)
    app.router.add_route("/gradio_api/upload", uploads.upload, ["POST"])
    app.router.add_route("/gradio_api/upload_progress", uploads.progress, ["GET"])
    mounted = gradio.mount_gradio_app(
        app,
        page,
        "/",
        server_name=options.host,
        server_port=options.port,
        # AccessControl has authenticated the request.
        auth_dependency=_name if options.credentials.needed else None,
        allowed_paths=[],
        blocked_paths=[str(SHIPPED.parents[1])],
        show_error=False,
        max_file_size=limit,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=options.mcp,
        **page_options(),
    )
    restrict_inputs(page, api.store, options.server.url_hosts, limit)
    tell_senders(page)
    mount: Any = mounted.routes[-1]
    mount.app = GradioAccess(mount.app, page, api.store, folder, options.server.url_hosts, mcp=options.mcp)
    app.state.sessions = page.sessions  # type: ignore[attr-defined]
    return mounted


def _name(request: Request) -> str | None:
    name: str | None = request.scope.get("fluxchat.name")
    return name


def restrict_inputs(page: Any, store: MediaStore, hosts: Sequence[str], max_bytes: int) -> None:
    """Make the page take only uploads and URLs of `hosts`, and leave reading files to our own decoders."""
    from gradio import processing_utils

    # Gradio would run ffmpeg over what a stranger uploaded, outside of the sandbox.
    processing_utils.ffmpeg_installed = lambda: False
    page.has_launched = True  # makes Gradio check paths
    for block in page.blocks.values():
        if hasattr(block, "async_move_resource_to_block_cache"):
            block.async_move_resource_to_block_cache = _InputFetcher(block, store, hosts, max_bytes)


class _InputFetcher:
    """Moves the file or URL that a request names into one component's cache."""

    def __init__(self, block: Any, store: MediaStore, hosts: Sequence[str], max_bytes: int) -> None:
        self._block, self._original = block, block.async_move_resource_to_block_cache
        self._store, self._hosts, self._max_bytes = store, hosts, max_bytes

    async def __call__(self, source: str | Path | None) -> str | None:
        if source is None or not str(source).lower().startswith(("http://", "https://")):
            path: str | None = await self._original(source)
            return path
        if (upload := self._upload(str(source))) is not None:
            return upload
        content = await asyncio.to_thread(download, str(source), self._hosts, self._max_bytes)
        stored = await asyncio.to_thread(self._store.add, io.BytesIO(content), "video", page=self._cache())
        return stored.path

    def _upload(self, url: str) -> str | None:
        """The path of the upload that a /gradio_api/file= URL (of any host: a proxy's) names, else None."""
        _, prefix, name = urlsplit(url).path.partition(FILE_PREFIX)
        if not prefix:
            return None
        path = os.path.realpath(unquote(name))
        inside = path.startswith(os.path.join(os.path.realpath(self._cache()), ""))
        return path if inside and os.path.isfile(path) else None

    def _cache(self) -> str:
        os.makedirs(self._block.GRADIO_CACHE, exist_ok=True)
        return str(self._block.GRADIO_CACHE)


class GradioAccess:
    """ASGI application around Gradio's that admits only known routes and the client's own files and sessions.

    page: gradio.Blocks. folder: where the page's uploads are. hosts: may be fetched from. mcp: whether there
    are MCP tools.
    """

    def __init__(
        self,
        app: ASGIApp,
        page: Any,
        store: MediaStore,
        folder: str | Path,
        hosts: Sequence[str],
        *,
        mcp: bool,
    ) -> None:
        self._app, self._page, self._store, self._mcp = app, page, store, mcp
        self._folder = os.path.join(os.path.realpath(folder), "")
        self._hosts = {name.lower() for name in hosts}
        self._sessions: OrderedDict[str, str] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if not (PAGE_ROUTES.fullmatch(path) or (self._mcp and MCP_ROUTES.fullmatch(path))):
            raise ApiError(404, f"There is no {path[:200]} here.", code="unknown_url")
        client = scope.get("fluxchat.client", "")
        if path.startswith(FILE_PREFIX) and self._owned_path(path[len(FILE_PREFIX) :], client) is None:
            raise ApiError(404, "There is no such file here.", code="file_not_found")
        query = parse_qs(scope["query_string"].decode("latin-1"))
        named = query.get("session_hash", []) + re.findall("^/gradio_api/heartbeat/(.*)", path)
        for session in named:
            self._bind_session(session, client)
        if path == "/gradio_api/queue/data":
            await self._events(named, scope, receive, send)
            return
        if scope["method"] == "POST" and not MCP_ROUTES.fullmatch(path):
            try:
                body = await self._body(Request(scope, receive), client)
            except ClientDisconnected:
                return
            receive = _replay(body, receive)
        await self._app(scope, receive, send)

    async def _events(self, named: Sequence[str], scope: Scope, receive: Receive, send: Send) -> None:
        """The events of a session. One that has none, or ends elsewhere, is no failure of Gradio's stream."""
        if named and named[0] not in self._page._queue.pending_messages_per_session:
            raise _no_session()
        try:
            await self._app(scope, receive, send)
        except RuntimeError as error:
            if not isinstance(error.__cause__, HTTPException):
                raise
            await send({"type": "http.response.body"})

    async def _body(self, request: Request, client: str) -> bytes:
        """A request's body; raises ApiError unless everything it names is the client's."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "The Content-Type must be application/json.")
        body = await read_body(request, BODY_BYTES)
        value = await parse_json(body, request.scope.get("fluxchat.parsing"))
        if isinstance(value, dict) and isinstance(value.get("session_hash"), str):
            self._bind_session(value["session_hash"], client)
        check_event(self._page, request.scope["path"], value)
        await asyncio.to_thread(self.check_body, value, client)
        return body

    def check_body(self, value: Any, client: str) -> None:
        """Raises ApiError when a decoded body names files that are not the client's, or too many."""
        named = 0
        for text, is_file in _texts(value):
            named += self._check(text, is_file, client)
            if named > MAX_NAMED_FILES:
                raise ApiError(
                    400, f"At most {MAX_NAMED_FILES} files are taken at once.", code="invalid_media"
                )

    def _bind_session(self, session: str, client: str) -> None:
        """Bind a session to its first client; ApiError 404 for another. Anonymous clients are one owner."""
        owner = "" if is_anonymous(client) else client
        if len(session) > 128 or self._sessions.setdefault(session, owner) != owner:
            raise _no_session()
        self._sessions.move_to_end(session)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)

    def _check(self, text: str, is_file: bool, client: str) -> bool:
        """Whether a text names a file or URL; raises ApiError when it is not the client's upload."""
        if is_file and text.lower().startswith(("http://", "https://")) and FILE_PREFIX not in text:
            try:
                host = (urlsplit(text).hostname or "").lower()
            except ValueError:
                host = ""
            if host not in self._hosts:
                raise ApiError(400, "This server does not fetch from that host.", code="invalid_media")
            return True
        inside = self._folder in text or self._folder in unquote(text)
        if (is_file or inside) and self._owned_path(text, client) is None:
            raise ApiError(404, "There is no such file: upload it again.", code="file_not_found")
        return is_file or inside

    def _owned_path(self, text: str, client: str) -> str | None:
        """The path of the client's upload that a path or a /gradio_api/file= URL names, else None."""
        if FILE_PREFIX in text:
            text = unquote(text.partition(FILE_PREFIX)[2])
        if len(text) > PATH_LENGTH:
            return None
        for path in (text, unquote(text)):
            path = os.path.realpath(path) if path.startswith("/") else os.path.abspath(path)
            if path.startswith(self._folder) and self._store.touch(path, client):
                return path
        return None


def _no_session() -> ApiError:
    return ApiError(404, "There is no such session: reload the page.", code="session_not_found")


def _texts(value: Any) -> Iterator[tuple[str, bool]]:
    """All texts in a decoded body, and whether each names a file for gradio."""
    todo: list[tuple[Any, bool]] = [(value, False)]
    while todo:
        value, is_file = todo.pop()
        if isinstance(value, str):
            if value and "\0" not in value:
                yield value, is_file
            elif is_file and value:
                raise ApiError(400, "A file's name holds a NUL character.", code="invalid_media")
        elif isinstance(value, dict):
            todo += [(item, key == "path") for key, item in value.items()]
        elif isinstance(value, list):
            todo += [(item, is_file) for item in value]


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body again that has been read."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class PageUploads:
    """Gradio's upload routes, with the store behind them. limit: bytes of one file."""

    MAX_TRACKED = 256  # uploads whose progress can be followed

    def __init__(self, store: MediaStore, folder: str | Path, limit: int) -> None:
        self._store, self._folder, self._limit = store, folder, limit
        self._progress: OrderedDict[tuple[str, str], _Progress] = OrderedDict()

    async def upload(self, request: Request) -> Response:
        """The paths of the uploaded files."""
        progress = self._progress[_upload_key(request)] = _Progress()
        while len(self._progress) > self.MAX_TRACKED:
            self._progress.popitem(last=False)
        try:
            stored = await receive_files(
                request,
                self._store,
                "files",
                limit=self._limit,
                max_files=MAX_FILES,
                page=self._folder,
                on_data=progress.add,
            )
        except ClientDisconnected:
            return Response(status_code=499)
        finally:
            progress.done = True
        return JSONResponse([file.path for file in stored])

    async def progress(self, request: Request) -> Response:
        """Server-sent events about an upload that is under way."""
        wanted = _upload_key(request)
        for _ in range(30):
            if wanted[1] and (progress := self._progress.get(wanted)) is not None:
                return StreamingResponse(progress.events(), media_type="text/event-stream")
            await asyncio.sleep(0.1)
        raise ApiError(404, "There is no such upload.", code="unknown_upload")


def _upload_key(request: Request) -> tuple[str, str]:
    """(owner, upload id): only its owner can follow an upload; anonymous clients share one owner."""
    client = request.scope.get("fluxchat.client", "")
    return "" if is_anonymous(client) else client, request.query_params.get("upload_id", "")[:128]


class _Progress:
    """Bytes of an upload received since the last progress event."""

    def __init__(self) -> None:
        self.done, self._name, self._bytes = False, "", 0

    def add(self, name: str, block: bytes) -> None:
        """More of a file."""
        self._bytes = self._bytes + len(block) if name == self._name else len(block)
        self._name = name

    async def events(self) -> AsyncIterator[str]:
        """The events that Gradio's page reads."""
        while not self.done:
            if self._bytes:
                update = {"msg": "update", "orig_name": self._name, "chunk_size": self._bytes}
                self._bytes = 0
                yield f"data: {json.dumps(update)}\n\n"
            await asyncio.sleep(0.1)
        yield f"data: {json.dumps({'msg': 'done'})}\n\n"
