"""Opens the media that a request names: uploaded files, data: URLs, files under one root, allowed hosts.

    store = MediaStore()
    with resolver.open([Reference("file-0a1b..."), Reference("data:video/mp4;base64,...")]) as media: ...

Everything becomes an open file of the store or under the media root; nothing else is readable.
"""

from __future__ import annotations

import os
import threading
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from app.messages import Media
from app.server.chat_request import Reference
from app.server.errors import ApiError, invalid_media, too_large
from app.server.media.data_urls import DataError, TooLarge, decode_data, is_data_url
from app.server.media.download import fetch, parse_url
from app.server.media.path_confinement import open_beneath
from app.server.media.store import FILE_ID, MediaStore, StoredFile


@dataclass(frozen=True)
class Resolver:
    """Opens media references. root: files under it may be named. hosts: may be fetched from.

    max_bytes: of one file.
    """

    store: MediaStore
    root: Path | None = None
    hosts: tuple[str, ...] = ()
    max_bytes: int = 200 * 2**20

    @contextmanager
    def open(
        self, references: Sequence[Reference], client: str = "", cancelled: threading.Event | None = None
    ) -> Iterator[list[Media]]:
        """All references as open files, which are kept until the end of the context.

        client: whose uploads may be named. cancelled: set it to abort a download. Raises ApiError that names
        the reference at fault. Reads files and may download.
        """
        count = len(references)
        with ExitStack() as stack:
            media: list[Media] = []
            for index, reference in enumerate(references):
                try:
                    file, name = self._open(reference, client, cancelled, stack)
                except ApiError as error:
                    which = f"video {index + 1} of {count}" if count > 1 else ""
                    raise error.about(reference.param, which) from error.__cause__
                media.append(Media(file, _display(reference.name or name), reference.part))
            yield media

    def _open(
        self, reference: Reference, client: str, cancelled: threading.Event | None, stack: ExitStack
    ) -> tuple[BinaryIO, str]:
        """(open file, the client's name for it)"""
        value = reference.value
        if reference.kind == "data" or is_data_url(value):
            content, name = self._data(value)
            return self._stored(self.store.add_bytes(content, client), stack), name
        if reference.kind == "id" or FILE_ID.fullmatch(value):
            stored = self.store.find(value, client)
            return self._stored(stored, stack), stored.name
        if value.lower().startswith(("http:", "https:")):
            return self._fetched(value, cancelled, stack)
        return stack.enter_context(self._under_root(value)), _base_name(value)

    def _stored(self, stored: StoredFile, stack: ExitStack) -> BinaryIO:
        return stack.enter_context(_opened(stack.enter_context(self.store.use(stored))))

    def _data(self, text: str) -> tuple[bytes, str]:
        try:
            return decode_data(text, self.max_bytes)
        except TooLarge:
            raise too_large(self.max_bytes) from None
        except DataError as error:
            raise invalid_media(str(error)) from None

    def _fetched(self, url: str, cancelled: threading.Event | None, stack: ExitStack) -> tuple[BinaryIO, str]:
        if not self.hosts:
            raise invalid_media("This server fetches nothing: send a data: URL, or upload to /v1/files.")
        name = _base_name(parse_url(url, self.hosts).path.partition("?")[0])
        incoming = self.store.receive(name, key=f"url-{uuid.uuid4().hex}")
        try:
            fetch(url, self.hosts, self.max_bytes, incoming, cancelled)
            file = stack.enter_context(_opened(incoming.path))  # before it can be swept away
        except BaseException:
            incoming.drop()
            raise
        stored = incoming.keep()
        if self.store.hold(stored.path):
            stack.callback(self.store.release, stored.path)  # deletes it
        return file, name

    def _under_root(self, url: str) -> BinaryIO:
        # One message for all: a client must not learn which files exist elsewhere.
        missing = invalid_media(f"There is no such media: use a data: URL{self._or_file()}.")
        if self.root is None:
            raise missing
        try:
            return open_beneath(self.root, _file_name(url))
        except (OSError, ValueError):
            raise missing from None

    def _or_file(self) -> str:
        return " or a file id" if self.root is None else ", a file id, or a path under the media root"


def _opened(path: str) -> BinaryIO:
    """A file of the store, opened by descriptor, so that no error message can contain its path."""
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")


def _file_name(url: str) -> str:
    """The path that a file: URL means; any other text is a path itself. Raises ValueError."""
    if not url.isprintable():
        raise ValueError("control characters")
    if not url.lower().startswith("file:"):
        return url
    parts = urllib.parse.urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost") or parts.query or parts.fragment:
        raise ValueError("no local file")
    return urllib.parse.unquote(parts.path, errors="strict")


def _base_name(path: str) -> str:
    """The last part of a path or URL's path."""
    return urllib.parse.unquote(path).replace("\\", "/").rstrip("/").rpartition("/")[2]


def _display(name: str) -> str:
    """A medium's name in error messages: the base name, printable characters only."""
    return "".join(sign for sign in _base_name(name) if sign.isprintable())[:100]
