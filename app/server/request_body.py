"""Reading request bodies: at most so many bytes, and strict JSON.

Python's json takes NaN, lone surrogates and a key twice (the last one counts); none of them is JSON that two
programs read alike, so each is refused with its place in the body.
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from app.server.errors import ApiError, ClientDisconnected, disk_errors, too_large

SPOOL = 1 << 20  # bytes of a body that stay in memory while the rest comes
INLINE = 1 << 16  # bytes of JSON that are parsed at once, in a millisecond
MAX_PARTS = 200_000  # values of a body, an upper bound; each takes up to some 200 bytes of memory
Steps = (
    tuple[Any, str | int] | None
)  # path of a value as a linked list: (path of its container, key or index)


async def body_blocks(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body in blocks; raises ApiError 413 past the limit, whatever its headers say.

    Raises ApiError 415 for a compressed one, ClientDisconnected when it is cut off.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise ApiError(
            415,
            "Compressed bodies are not taken: send it without a Content-Encoding.",
            code="unsupported_content_encoding",
            headers={"Connection": "close"},  # it is not read
        )
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
        raise ClientDisconnected from None


async def read_json(request: Request, limit: int) -> Any:
    """The body as JSON; raises ApiError."""
    # Anything else a foreign page could send without asking first (CORS preflight).
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The Content-Type must be application/json.")
    return await parse_json(await read_body(request, limit), request.scope.get("fluxchat.parsing"))


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, spooled to disk while a large one arrives; raises ApiError."""
    with tempfile.SpooledTemporaryFile(SPOOL) as spool:
        got = 0
        async for block in body_blocks(request, limit):
            got += len(block)
            with disk_errors():
                if got <= SPOOL:
                    spool.write(block)
                else:
                    await asyncio.to_thread(spool.write, block)
        spool.seek(0)
        return spool.read() if got <= SPOOL else await asyncio.to_thread(spool.read)


async def parse_json(body: bytes, one_at_a_time: asyncio.Semaphore | None = None) -> Any:
    """JSON as Python objects; raises ApiError. A large body is parsed in a thread, one at a time."""
    if len(body) <= INLINE:
        return decode_json(body)
    async with one_at_a_time or asyncio.Semaphore(1):
        return await asyncio.to_thread(decode_json, body)


def decode_json(body: bytes | bytearray) -> Any:
    """A body as plain values; raises ApiError 400 that says what is wrong with it."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_PARTS:
        raise ApiError(
            400,
            f"The body has too many parts: at most {MAX_PARTS} commas and brackets are read.",
            code="too_many_items",
        )
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
        _check_texts(value)
    except _Refused as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", param=error.param) from None
    except UnicodeDecodeError:
        raise ApiError(400, "The body is not valid JSON: it is not encoded as UTF-8.") from None
    except RecursionError:
        raise ApiError(400, "The body is not valid JSON: it is nested too deeply.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"The body is not valid JSON: {error.msg} at {where}.") from None
    return value


class _Refused(ValueError):
    """Valid JSON syntax, but ambiguous or not representable."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the field {twice[:80]!r} is there twice", None)
    return made


def _constant(name: str) -> Any:
    raise _Refused(f"{name} is no number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused(f"the number {digits[:40]} is too large")
    return value


def _int(digits: str) -> int:
    if len(digits) > 40:
        raise _Refused(f"the number {digits[:40]}... is too large")
    return int(digits)


def _check_texts(value: Any, steps: Steps = None) -> None:
    """Raises _Refused where a text holds half of a character (a lone surrogate)."""
    if isinstance(value, str):
        if not _is_unicode(value):
            path = _path(steps)
            raise _Refused(f"{path or 'a text'} holds half of a character (a lone surrogate)", path or None)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not _is_unicode(key):
                raise _Refused(
                    "the name of a field holds half of a character (a lone surrogate)", _path(steps) or None
                )
            _check_texts(inner, (steps, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_texts(inner, (steps, index))


def _path(steps: Steps) -> str:
    """messages[1].content; made for errors only, since names can be megabytes."""
    path = ""
    while steps is not None:
        steps, step = steps
        path = f"[{step}]{path}" if isinstance(step, int) else f".{step[:80]}{path}"
    return path.removeprefix(".")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
