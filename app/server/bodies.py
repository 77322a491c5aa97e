"""One bound on the bytes of all requests' bodies together, whoever sends them and however slowly.

A body counts as its bytes come, and until its request has been answered: what was made of it lives as long.
Small bodies have a share of their own, so that large ones do not keep questions out. Uploads go to the disk
in blocks; they are bounded in number here and in bytes by the store.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.server.guard import error_response
from app.server.replies import ApiError

SMALL = 1 << 20
UPLOADS = ("/v1/files", "/gradio_api/upload")


@dataclass
class Pool:
    """Something of which there is so much and no more."""

    limit: int
    used: int = 0

    def take(self, amount: int) -> bool:
        """Take that much; False when there is not so much left."""
        if self.used + amount > self.limit:
            return False
        self.used += amount
        return True

    def give(self, amount: int) -> None:
        """Give it back."""
        self.used -= amount


class Bodies:
    """ASGI middleware. limit: bytes of all bodies, a quarter of it for small ones. uploads: at a time."""

    def __init__(self, app: ASGIApp, limit: int, uploads: int) -> None:
        self._app = app
        self._small, self._large = Pool(limit // 4), Pool(limit - limit // 4)
        self._uploads = Pool(uploads)
        self._parsing = asyncio.Semaphore(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["fluxchat.parsing"] = self._parsing  # large bodies are parsed one after the other
        if scope["method"] == "POST" and scope["path"].rstrip("/") in UPLOADS:
            if not self._uploads.take(1):
                raise _full("Too many uploads are under way")
            try:
                await self._app(scope, receive, send)
            finally:
                self._uploads.give(1)
            return
        length = Headers(scope=scope).get("content-length", "")
        declared = int(length[:18]) if length.isdecimal() else None
        pool = self._small if declared is not None and declared <= SMALL else self._large
        # What is too large for any route is told so there.
        if declared is not None and declared <= pool.limit < pool.used + declared:
            raise _full("Too many large requests are under way")
        taken = 0
        refused: ApiError | None = None
        started = False

        async def counted() -> Message:
            nonlocal taken, refused
            message = await receive()
            size = len(message.get("body", b""))
            if not pool.take(size):
                refused = _full("Too many large requests are under way")
                raise refused
            taken += size
            return message

        async def answer(message: Message) -> None:
            nonlocal started
            if refused is not None and not started:  # whatever was made of the refusal
                started = True
                await error_response(refused)(scope, receive, send)
            if refused is None:
                started = True
                await send(message)

        try:
            await self._app(scope, counted, answer)
        finally:
            pool.give(taken)


def _full(what: str) -> ApiError:
    return ApiError(
        503,
        f"{what}: try again in a moment; videos are best uploaded to /v1/files.",
        kind="server_error",
        code="overloaded",
        headers={"Retry-After": "5", "Connection": "close"},
    )
