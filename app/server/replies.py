"""Successful responses: OpenAI chat completions, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.answer import Answer
from app.server.errors import ApiError, ClientDisconnected
from app.server.scheduler import Job
from app.server.schemas import MODEL

T = TypeVar("T")


@dataclass
class TextFilter:
    """Strips an answer and cuts it at the first stop text, while it is streamed.

    `push` pieces as they are generated, `flush` at the end; the joined results are the answer. done: whether
    a stop text came.
    """

    stops: tuple[str, ...] = ()
    done: bool = False
    _held: str = field(default="", repr=False)
    _begun: bool = field(default=False, repr=False)

    def push(self, piece: str) -> str:
        """The next part that is certain to belong to the answer."""
        if self.done:
            return ""
        text = self._held + piece
        if not self._begun:
            text = text.lstrip()
        # The one that is complete first, else the answer would depend on how the pieces are cut.
        ends = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.done, self._held = True, ""
            return text[: min(ends)[1]].rstrip()
        keep = len(text.rstrip())
        for stop in self.stops:
            keep = min(keep, self._begins(text, stop))
        # A blank before what may become a stop text would be the answer's last.
        keep = len(text[:keep].rstrip())
        self._held, out = text[keep:], text[:keep]
        self._begun = self._begun or bool(out)
        return out

    def flush(self) -> str:
        """The rest."""
        rest, self._held = self._held.rstrip(), ""
        return rest

    @staticmethod
    def _begins(text: str, stop: str) -> int:
        """Where a beginning of `stop` at the end of the text starts, or the text's length."""
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                return len(text) - size
        return len(text)


class Reply:
    """Builds the chat.completion objects of one request."""

    def __init__(self) -> None:
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def completion(self, text: str, answer: Answer, *, thoughts: bool = True) -> dict[str, Any]:
        """The whole answer as a chat.completion. thoughts: with them, if there are any."""
        message = {"role": "assistant", "content": text, "refusal": None}
        if thoughts and answer.thinking:
            message["reasoning_content"] = answer.thinking
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(answer)}
        return {**self._head("chat.completion"), "choices": [choice], **self._usage(answer)}

    def chunk(self, delta: dict[str, Any], answer: Answer | None = None) -> dict[str, Any]:
        """One chat.completion.chunk; answer: given for the last one, which says why it ended."""
        finish = None if answer is None else _finish(answer)
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """The chunk with usage and timings, sent when stream_options.include_usage asks for it."""
        return {**self._head("chat.completion.chunk"), "choices": [], **self._usage(answer)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": MODEL}

    @staticmethod
    def _usage(answer: Answer) -> dict[str, Any]:
        usage, timings = answer.usage, answer.timings
        return {
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "prompt_tokens_details": {
                    "cached_tokens": usage.cached_tokens,
                    "visual_tokens": usage.visual_tokens,
                },
                **(
                    {"completion_tokens_details": {"reasoning_tokens": usage.thinking_tokens}}
                    if usage.thinking_tokens
                    else {}
                ),
                "seen_tokens": usage.seen_tokens,
                "kept_tokens": usage.kept_tokens,
                **({} if answer.familiar is None else {"familiar": answer.familiar}),
            },
            "timings": {
                name: round(getattr(timings, name), 6)
                for name in ("decode_s", "encode_s", "prefill_s", "first_token_s", "total_s", "tokens_per_s")
            },
        }


def _finish(answer: Answer) -> str:
    return "length" if answer.finish == "length" else "stop"


class EventStream(Response):
    """Server-sent events; stops the job when the client disconnects or reads nothing for `send_s` seconds.

    failed: turns an exception into the error event that is sent, since the status has been sent already.
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


async def until_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises ClientDisconnected when the client disconnects first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
