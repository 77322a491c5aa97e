"""Reading requests and writing answers: bounded bodies, server-sent events, clients that go away."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.server.json_body import decode_json
from app.server.media import disk_errors, too_large
from app.server.replies import ApiError
from app.server.scheduler import Job

if TYPE_CHECKING:
    from app.chat import VideoChat

T = TypeVar("T")
SPOOL = 1 << 20  # bytes of a body that stay in memory while the rest comes
INLINE = 1 << 16  # bytes of JSON that are parsed at once, in a millisecond


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class EventStream(Response):
    """Server-sent events that stop the job when the reader goes away or takes nothing for `send_s`.

    failed: an exception as the error that the reader sees, since the status has been sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any]],
        job: Job,
        send_s: float,
        failed: Callable[[BaseException], ApiError],
    ) -> None:
        self.status_code, self.background = 200, None
        self._events, self._job, self._send_s, self._failed = events, job, send_s, failed
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._job.stop()
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def put(text: str, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": text.encode(), "more_body": more}
            await asyncio.wait_for(send(message), self._send_s)

        try:
            async for event in self._events:
                await put(f"data: {json.dumps(event, ensure_ascii=False)}\n\n")
        except (TimeoutError, asyncio.TimeoutError):
            return
        except Exception as error:  # noqa: BLE001 - the status has been sent: the error is an event
            await put(f"data: {json.dumps(self._failed(error).body)}\n\n")
        await put("data: [DONE]\n\n", more=False)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises ClientGone when the client goes away first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body in blocks; raises ApiError 413 past the limit, whatever its headers say.

    Raises ClientGone when it is cut off.
    """
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise too_large(limit)
    got = 0
    try:
        async for block in request.stream():
            got += len(block)
            if got > limit:
                raise too_large(limit)
            yield block
    except ClientDisconnect:
        raise ClientGone from None


async def read_json(request: Request, limit: int) -> Any:
    """The body as JSON; raises ApiError."""
    # Anything else a foreign page could send without asking first (CORS preflight).
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The Content-Type must be application/json.")
    return await parse_json(await read_body(request, limit), request.scope.get("fluxchat.parsing"))


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; raises ApiError. What has come of a large one waits on the disk for the rest."""
    with tempfile.SpooledTemporaryFile(SPOOL) as spool:
        got = 0
        async for block in limited(request, limit):
            got += len(block)
            with disk_errors():
                if got <= SPOOL:
                    spool.write(block)
                else:
                    await asyncio.to_thread(spool.write, block)
        spool.seek(0)
        return spool.read() if got <= SPOOL else await asyncio.to_thread(spool.read)


async def parse_json(body: bytes, one_at_a_time: asyncio.Semaphore | None = None) -> Any:
    """JSON as Python objects; raises ApiError. A large one is parsed in a thread, in its turn."""
    if len(body) <= INLINE:
        return decode_json(body)
    async with one_at_a_time or asyncio.Semaphore(1):
        return await asyncio.to_thread(decode_json, body)


def longest_text(chat: VideoChat) -> int:
    """Characters of text that a question about anything may have: tokens of 16 are rare in any language."""
    context = chat.model.llm.context_length
    return max(1 << 16, 16 * context) if context else 1 << 20


def check_text(body: Any, limit: int) -> None:
    """Raises ApiError 400 when the messages' texts together have more than `limit` characters.

    Nothing else in a request is tokenised; media are named, or bounded as files.
    """
    found = 0
    messages = body.get("messages") if isinstance(body, dict) else None
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            found += len(text) if isinstance(text, str) else 0
    if found > limit:
        raise ApiError(
            400,
            f"The texts have {found} characters, and at most {limit} can fit the model: shorten them.",
            code="context_length_exceeded",
            param="messages",
        )
