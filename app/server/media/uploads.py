"""Multipart uploads, written to the store block by block within limits; an interrupted one leaves nothing."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.server.errors import ApiError, too_large
from app.server.media.store import BLOCK, IncomingFile, MediaStore, StoredFile
from app.server.request_body import body_blocks

HEAD_BYTES = 8192  # of one part
FIELD_BYTES = 65536
FIELDS = 16
MIB = 2**20
BROWSER_ESCAPES = (("%22", '"'), ("%0A", "\n"), ("%0D", "\r"))  # in the name of a file


class _MultipartParser:
    """A streaming multipart parser: events ("head", name, filename or None), ("data", bytes), ("end",)."""

    def __init__(self, boundary: bytes) -> None:
        self._events: list[tuple[Any, ...]] = []
        self._name, self._value, self._head, self._size = b"", b"", b"", 0
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._more("_name", data[start:end]),
                    "on_header_value": lambda data, start, end: self._more("_value", data[start:end]),
                    "on_header_end": self._header,
                    "on_headers_finished": self._headed,
                    "on_part_data": lambda data, start, end: self._events.append(("data", data[start:end])),
                    "on_part_end": lambda: self._events.append(("end",)),
                },
            )
        except FormParserError:  # more than 256 bytes
            raise _bad("its boundary is too long") from None

    def feed(self, block: bytes) -> list[tuple[Any, ...]]:
        """The events of the next block; raises ApiError."""
        self._events.clear()
        try:
            self._parser.write(block)
        except FormParserError:
            raise _bad("it is not valid multipart/form-data") from None
        return self._events

    def end(self) -> None:
        """Raises ApiError when the last part did not end."""
        try:
            self._parser.finalize()
        except FormParserError:
            raise _bad("it is cut off") from None

    def _begin(self) -> None:
        self._name, self._value, self._head, self._size = b"", b"", b"", 0

    def _more(self, what: str, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > HEAD_BYTES:
            raise _bad("a part's headers are too long")
        setattr(self, what, getattr(self, what) + piece)

    def _header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._head = self._value
        self._name, self._value = b"", b""

    def _headed(self) -> None:
        _, options = parse_options_header(self._head)
        if b"name" not in options:
            raise _bad("a part has no name")
        file = options.get(b"filename")
        name = None if file is None else file.decode("utf-8", "replace")
        if name is not None:
            for escape, sign in BROWSER_ESCAPES:
                name = name.replace(escape, sign)
        self._events.append(("head", options[b"name"].decode("utf-8", "replace"), name))


async def receive_files(
    request: Request,
    store: MediaStore,
    field: str,
    *,
    limit: int,
    max_files: int = 1,
    page: str | Path | None = None,
    on_data: Callable[[str, bytes], None] | None = None,
) -> list[StoredFile]:
    """The files of a multipart body, at least one and at most `max_files`, owned by the client.

    limit: bytes of one file. page: the folder where the page's files go. on_data: called with
    each (file name, piece).
    Raises ApiError; nothing stays then.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise ApiError(415, f"Send the file as multipart/form-data, in a field named {field}.")
    client = request.scope.get("fluxchat.client", "")
    parts, done = _MultipartParser(options[b"boundary"]), list[StoredFile]()
    incoming: IncomingFile | None = None
    buffer, part_bytes, fields = bytearray(), 0, 0

    async def flush() -> None:
        if incoming is not None and buffer:
            await asyncio.to_thread(incoming.write, bytes(buffer))
            buffer.clear()

    try:
        async for block in body_blocks(request, max_files * limit + MIB):
            for event in parts.feed(block):
                if event[0] == "head":
                    fields, part_bytes = fields + 1, 0
                    if event[2] is None:
                        if fields > FIELDS + max_files:
                            raise _bad("it has too many fields")
                    elif event[1] != field:
                        raise _bad(f"the field of a file is called {field}")
                    elif len(done) == max_files:
                        raise _bad(f"more than {max_files} came at once")
                    else:
                        name = file_name(event[2])
                        incoming = await asyncio.to_thread(store.receive, name, client, page=page)
                elif event[0] == "data":
                    part_bytes += len(event[1])
                    if incoming is None:
                        if part_bytes > FIELD_BYTES:
                            raise _bad("a field is too long")
                        continue
                    if part_bytes > limit:
                        raise too_large(limit)
                    buffer += event[1]
                    if on_data is not None:
                        on_data(incoming.name, event[1])
                    if len(buffer) >= BLOCK // 4:
                        await flush()
                elif incoming is not None:
                    await flush()
                    done.append(await asyncio.to_thread(incoming.keep))
                    incoming = None
        parts.end()
        if incoming is not None:
            raise _bad("it is cut off")
        if not done:
            raise ApiError(400, f"The upload lacks a file, in a field named {field}.", param=field)
        return done
    except BaseException:
        if incoming is not None:
            incoming.drop()
        for stored in done:
            store.delete(stored.id, client)
        raise


def file_name(sent: str) -> str:
    """A safe file name: the last part of the sent one, without characters special to paths or headers."""
    name = re.sub(r"[^\w .,()+@-]", "_", sent.replace("\\", "/").rpartition("/")[2]).strip(" .")
    stem, ending = os.path.splitext(name)
    kept = stem.encode("utf-8", "ignore")[:180].decode("utf-8", "ignore") + ending[:16]
    return kept if kept.strip("_ .") else "file"


def _bad(reason: str) -> ApiError:
    return ApiError(400, f"The upload cannot be read: {reason}.", param="file")
