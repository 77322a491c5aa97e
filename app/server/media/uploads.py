"""Uploads by every door, straight into the one store: bounded as they come, nothing left of a broken one."""

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
from app.server.media.store import BLOCK, Incoming, MediaStore, StoredFile
from app.server.request_body import limited

HEAD_BYTES = 8192  # of one part
FIELD_BYTES = 65536
FIELDS = 16
MIB = 2**20


class _Parts:
    """What a multipart parser finds: ("head", name, filename or None), ("data", bytes), ("end",)."""

    def __init__(self, boundary: bytes) -> None:
        self._found: list[tuple[Any, ...]] = []
        self._name, self._value, self._head, self._size = b"", b"", b"", 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._more("_name", data[start:end]),
                "on_header_value": lambda data, start, end: self._more("_value", data[start:end]),
                "on_header_end": self._header,
                "on_headers_finished": self._headed,
                "on_part_data": lambda data, start, end: self._found.append(("data", data[start:end])),
                "on_part_end": lambda: self._found.append(("end",)),
            },
        )

    def feed(self, block: bytes) -> list[tuple[Any, ...]]:
        """What comes of the next block; raises ApiError."""
        self._found.clear()
        try:
            self._parser.write(block)
        except FormParserError:
            raise _bad("it is not valid multipart/form-data") from None
        return self._found

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
        self._found.append(("head", options[b"name"].decode("utf-8", "replace"), name))


async def receive_files(
    request: Request,
    store: MediaStore,
    field: str,
    *,
    limit: int,
    most: int = 1,
    page: str | Path | None = None,
    tell: Callable[[str, bytes], None] | None = None,
) -> list[StoredFile]:
    """The files of a multipart body, at least one and at most `most`, as files of who sends them.

    limit: bytes of one file. page: the folder where the page's files go. tell: hears of every piece.
    Raises ApiError; nothing stays then.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise ApiError(415, f"Send the file as multipart/form-data, in a field named {field}.")
    client = request.scope.get("fluxchat.client", "")
    parts, done = _Parts(options[b"boundary"]), list[StoredFile]()
    coming: Incoming | None = None
    held, small, fields = bytearray(), 0, 0

    async def flush() -> None:
        if coming is not None and held:
            await asyncio.to_thread(coming.write, bytes(held))
            held.clear()

    try:
        async for block in limited(request, most * limit + MIB):
            for found in parts.feed(block):
                if found[0] == "head":
                    fields, small = fields + 1, 0
                    if found[2] is None:
                        if fields > FIELDS + most:
                            raise _bad("it has too many fields")
                    elif found[1] != field:
                        raise _bad(f"the field of a file is called {field}")
                    elif len(done) == most:
                        raise _bad(f"more than {most} came at once")
                    else:
                        name = file_name(found[2])
                        coming = await asyncio.to_thread(store.receive, name, client, page=page)
                elif found[0] == "data":
                    small += len(found[1])
                    if coming is None:
                        if small > FIELD_BYTES:
                            raise _bad("a field is too long")
                        continue
                    if small > limit:
                        raise too_large(limit)
                    held += found[1]
                    if tell is not None:
                        tell(coming.name, found[1])
                    if len(held) >= BLOCK // 4:
                        await flush()
                elif coming is not None:
                    await flush()
                    done.append(await asyncio.to_thread(coming.keep))
                    coming = None
        parts.end()
        if coming is not None:
            raise _bad("it is cut off")
        if not done:
            raise ApiError(400, f"The upload lacks a file, in a field named {field}.", param=field)
        return done
    except BaseException:
        if coming is not None:
            coming.drop()
        for stored in done:
            store.delete(stored.id, client)
        raise


def file_name(sent: str) -> str:
    """The last part of a name, with nothing in it that a file system or a header takes amiss."""
    name = re.sub(r"[^\w .,()+@-]", "_", sent.replace("\\", "/").rpartition("/")[2]).strip(" .")
    stem, ending = os.path.splitext(name)
    kept = stem.encode("utf-8", "ignore")[:180].decode("utf-8", "ignore") + ending[:16]
    return kept if kept.strip("_ .") else "file"


def _bad(reason: str) -> ApiError:
    return ApiError(400, f"The upload cannot be read: {reason}.", param="file")
