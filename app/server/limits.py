"""Limits on what clients hold open: connections, slow requests, bytes of request bodies.

uvicorn waits for slow clients without end. Here every connection knows since when it waits for what, and
`Connections.sweep`, called every second, closes those that are overdue. When there are too many, the one that
has waited longest without a request makes room, so that a new request (/healthz above all) is let in.

`BodyLimits` bounds the bytes of all requests' bodies together. A body counts as its bytes come, and until its
request has been answered: what was made of it lives as long. Small bodies have a share of their own, so that
large ones do not lock questions out. Uploads go to the disk in blocks; they are bounded in number here and in
bytes by the store.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.server.errors import ApiError, error_response
from encoder.video.limits import Limits

LINGER_S = 10.0  # for the rest of an answer when the connection is to be closed
RESERVED = 64  # connections beyond the limit, for /healthz
SMALL_BODY = 1 << 20
UPLOAD_PATHS = ("/v1/files", "/gradio_api/upload")
# On decoding an upload.
WEB_LIMITS = Limits(
    seconds=20.0, max_pixels=8192 * 4320, max_duration_s=3600.0, max_bytes=200 * 2**20, memory_mib=2048
)


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on connections, in seconds and bytes.

    total, per_address: connections at a time, in all and from one address (this machine and proxies: any).
    head_s: for a request's first line and headers. body_s: for a body, and a second more for each body_rate
    bytes received, at most body_s ahead: a body that starts fast must not become slow later.
    send_s: for a client that reads nothing; send_rate: bytes a second that it must read of a large response.
    """

    total: int = 1000
    per_address: int = 128
    head_s: float = 10.0
    body_s: float = 10.0
    body_rate: int = 16 * 1024
    send_s: float = 60.0
    send_rate: int = 4 * 1024


class Connections:
    """All open connections of one server. proxies: addresses without a limit of their own. clock: seconds."""

    def __init__(
        self,
        limits: ConnectionLimits,
        proxies: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits, self.proxies, self.clock = limits, frozenset(proxies), clock
        self._open: dict[Connection, str] = {}
        self._by_address: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def protocol(self, **options: Any) -> Connection:
        """A new connection; uvicorn's `http` protocol factory."""
        return Connection(self, **options)

    def add(self, connection: Connection, address: str) -> bool:
        """Register a connection, closing an idle one if needed; False when there is no room for it."""
        self._open[connection] = address
        self._by_address[address] += 1
        limits = self.limits
        single = not _is_loopback(address) and address not in self.proxies
        if single and self._by_address[address] > limits.per_address:
            return self._make_room(connection, address)
        if len(self._open) > limits.total:
            return self._make_room(connection, None) or len(self._open) <= limits.total + RESERVED
        return True

    def full(self) -> bool:
        """Whether new connections are answered at /healthz only."""
        return len(self._open) > self.limits.total

    def remove(self, connection: Connection) -> None:
        """Unregister a closed connection."""
        address = self._open.pop(connection, None)
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def sweep(self) -> None:
        """Close the overdue connections."""
        now = self.clock()
        for connection in list(self._open):
            connection.check(now)

    def _make_room(self, new: Connection, address: str | None) -> bool:
        waiting = [
            (connection.waiting_since, connection)
            for connection, whose in self._open.items()
            if connection is not new and connection.waiting and address in (None, whose)
        ]
        if not waiting:
            return False
        min(waiting, key=lambda pair: pair[0])[1].end(None)
        return True


class BodyClock:
    """The deadline for the next bytes of a request's body."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._last = self._deadline = 0.0

    def start(self, now: float) -> None:
        """The head is complete: the body is due."""
        self._last, self._deadline = now, now + self._limits.body_s

    def received(self, now: float, amount: int) -> None:
        """Extend the deadline by the time that the bytes pay for, to at most body_s from now."""
        self._last = now
        self._deadline = min(now + self._limits.body_s, self._deadline + amount / self._limits.body_rate)

    def pause(self, now: float) -> None:
        """Do not count the time since the last bytes."""
        self._deadline += now - self._last
        self._last = now

    def overdue(self, now: float) -> bool:
        """Whether the deadline has passed."""
        return now > self._deadline


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with timeouts for one connection."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._all = connections
        self.waiting_since = connections.clock()  # for a request's head
        self._head_begun: float | None = self.waiting_since
        self._body = BodyClock(connections.limits)
        self._write_blocked_since: float | None = None
        self._closing_since: float | None = None
        # Identifies anonymous clients to the access control: requests of one connection are one client's.
        self.app_state = {**self.app_state, "fluxchat.connection": secrets.token_urlsafe(16)}

    @property
    def waiting(self) -> bool:
        """Whether no request is being answered on it."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._all.add(self, self.client[0] if self.client else ""):
            self.end(_busy())
        elif self._all.full():
            self.app = self._only_health

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        now = self._all.clock()
        if self.waiting and self._head_begun is None:  # the next request on it
            self._head_begun = self.waiting_since = now
        cycle = self.cycle
        super().data_received(data)
        if self.cycle is not cycle:  # a head is complete
            self._head_begun = None
            self._body.start(now)
        elif not self.waiting:
            self._body.received(now, len(data))

    def on_response_complete(self) -> None:
        self.waiting_since, self._head_begun = self._all.clock(), None
        before = self.cycle
        super().on_response_complete()
        if self.cycle is not before:  # a pipelined request was in the buffer
            self._body.start(self.waiting_since)
        elif self.conn.trailing_data[0]:  # a part of the next head
            self._head_begun = self.waiting_since

    def _unsupported_upgrade_warning(self) -> None:
        """No warning: there are no websockets here."""

    def pause_writing(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._write_blocked_since = self._all.clock() + waiting / self._all.limits.send_rate
        super().pause_writing()

    def resume_writing(self) -> None:
        self._write_blocked_since = None
        super().resume_writing()

    def check(self, now: float) -> None:
        """End the connection when it is overdue."""
        limits = self._all.limits
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since > LINGER_S:
                self.transport.abort()
            return
        if self._write_blocked_since is not None and now - self._write_blocked_since > limits.send_s:
            self.transport.abort()
            return
        if self.waiting:
            if self._head_begun is not None and now - self._head_begun > limits.head_s:
                self.end(_too_slow("The request's headers did not come in time."))
            return
        if not self.cycle.more_body:
            return
        if self.flow.read_paused:  # the server is slow, not the client
            self._body.pause(now)
        elif self._body.overdue(now):
            self.end(_too_slow("The request's body did not come in time."))

    def end(self, error: ApiError | None) -> None:
        """Close it, with an error response if none has been started."""
        if error is not None and (self.cycle is None or not self.cycle.response_started or self.waiting):
            self.transport.write(_raw(error))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    async def _only_health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of a connection beyond the limit."""
        if scope["path"] == "/healthz":
            await self.config.loaded_app(scope, receive, send)
            return
        error = _busy()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"retry-after", b"5")]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})


def _raw(error: ApiError) -> bytes:
    body = json.dumps(error.body).encode()
    head = (
        f"HTTP/1.1 {error.status} {'Request Timeout' if error.status == 408 else 'Service Unavailable'}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _too_slow(message: str) -> ApiError:
    return ApiError(408, message, code="request_timeout")


def _busy() -> ApiError:
    return ApiError(
        503,
        "The server has too many connections: try again in a moment.",
        kind="server_error",
        code="too_many_connections",
    )


def _is_loopback(address: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return not address  # a Unix socket


@dataclass
class Pool:
    """A counted resource with a limit."""

    limit: int
    used: int = 0

    def acquire(self, amount: int) -> bool:
        """Reserve an amount; False when less is left."""
        if self.used + amount > self.limit:
            return False
        self.used += amount
        return True

    def release(self, amount: int) -> None:
        """Return an amount."""
        self.used -= amount


class BodyLimits:
    """ASGI middleware. limit: bytes of all bodies together, a quarter for small ones. uploads: at a time."""

    def __init__(self, app: ASGIApp, limit: int, uploads: int) -> None:
        self._app = app
        self.small, self.large = Pool(limit // 4), Pool(limit - limit // 4)
        self.uploads = Pool(uploads)
        self._parsing = asyncio.Semaphore(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["fluxchat.parsing"] = self._parsing  # large bodies are parsed one after the other
        if scope["method"] == "POST" and scope["path"].rstrip("/") in UPLOAD_PATHS:
            if not self.uploads.acquire(1):
                raise _full("Too many uploads are under way")
            try:
                await self._app(scope, receive, send)
            finally:
                self.uploads.release(1)
            return
        length = Headers(scope=scope).get("content-length", "")
        declared = int(length[:18]) if length.isdecimal() else None
        pool = self.small if declared is not None and declared <= SMALL_BODY else self.large
        # A body that no route would take gets its 413 there.
        if declared is not None and declared <= pool.limit < pool.used + declared:
            raise _full("Too many large requests are under way")
        taken = 0
        refused: ApiError | None = None
        started = False

        async def counted() -> Message:
            nonlocal taken, refused
            message = await receive()
            size = len(message.get("body", b""))
            if not pool.acquire(size):
                refused = _full("Too many large requests are under way")
                raise refused
            taken += size
            return message

        async def answer(message: Message) -> None:
            nonlocal started
            if refused is not None and not started:  # in place of the application's response
                started = True
                await error_response(refused)(scope, receive, send)
            if refused is None:
                started = True
                await send(message)

        try:
            await self._app(scope, counted, answer)
        finally:
            pool.release(taken)


def _full(what: str) -> ApiError:
    return ApiError(
        503,
        f"{what}: try again in a moment; videos are best uploaded to /v1/files.",
        kind="server_error",
        code="overloaded",
        headers={"Retry-After": "5", "Connection": "close"},
    )
