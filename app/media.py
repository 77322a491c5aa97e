"""The videos and images that requests name: uploaded files, data: URLs, files under one root, allowed hosts.

    store = MediaStore()
    with resolver.open(["file-0a1b...", "data:video/mp4;base64,..."]) as paths: ...

Everything becomes the path of a file in a folder of our own, or under the root; nothing else is readable.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from app.api_types import ApiError
from app.download import download
from app.scratch import ScratchFolder

BLOCK = 1 << 20
_DATA = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),")
_FILE_ID = re.compile(r"file-[0-9a-f]{32}")


@dataclass
class StoredFile:
    """One file of the store. uploaded: by name, until deleted or unused for long; else it can be sent again.

    created: seconds since 1970.
    """

    id: str
    path: str
    bytes: int
    name: str
    uploaded: bool
    created: int = field(default_factory=lambda: int(time.time()))
    used: float = field(default_factory=time.monotonic)
    users: int = 0
    deleted: bool = False


class MediaStore:
    """Files that clients sent, in a folder that goes away with the store; bounded in bytes and in time.

    limit_bytes: of all files. keep_s: a file not used for so long is deleted.
    """

    def __init__(self, limit_bytes: int = 2 * 2**30, keep_s: float = 3600.0) -> None:
        self._scratch = ScratchFolder("files")
        self.folder = self._scratch.path
        self._limit, self._keep_s = limit_bytes, keep_s
        self._files: dict[str, StoredFile] = {}
        self._lock = threading.Lock()

    def add(self, source: BinaryIO, name: str) -> StoredFile:
        """Keep an uploaded file; raises ApiError when there is no room for it."""
        return self._keep(f"file-{uuid.uuid4().hex}", source, name, uploaded=True)

    def add_bytes(self, content: bytes) -> StoredFile:
        """Keep what a data: URL held; the same bytes are kept once."""
        key = f"data-{hashlib.blake2b(content, digest_size=16).hexdigest()}"
        with self._lock:
            if (known := self._files.get(key)) is not None:
                known.used = time.monotonic()
                return known
        import io

        return self._keep(key, io.BytesIO(content), key, uploaded=False)

    def _keep(self, key: str, source: BinaryIO, name: str, *, uploaded: bool) -> StoredFile:
        handle, path = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(handle, "wb") as target:
            shutil.copyfileobj(source, target, BLOCK)
        stored = StoredFile(key, path, os.path.getsize(path), name, uploaded)
        with self._lock:
            self._sweep(stored.bytes)
            if sum(file.bytes for file in self._files.values()) + stored.bytes > self._limit:
                os.unlink(path)
                raise ApiError(
                    429,
                    "The server's store of files is full: delete files, or try again later.",
                    kind="server_error",
                    code="storage_full",
                    headers={"Retry-After": "60"},
                )
            if (known := self._files.get(key)) is not None:  # sent twice at the same time
                os.unlink(path)
                return known
            self._files[key] = stored
        return stored

    def find(self, key: str) -> StoredFile:
        """An uploaded file; raises ApiError 404."""
        with self._lock:
            found = self._files.get(key) if _FILE_ID.fullmatch(key) else None
        if found is None:
            raise ApiError(404, "There is no such file: upload it again.", code="file_not_found")
        return found

    @contextmanager
    def use(self, stored: StoredFile) -> Iterator[str]:
        """The file's path, which stays while it is used."""
        with self._lock:
            if stored.deleted:
                raise ApiError(404, "There is no such file: upload it again.", code="file_not_found")
            stored.users += 1
        try:
            yield stored.path
        finally:
            with self._lock:
                stored.users -= 1
                stored.used = time.monotonic()
                if stored.deleted and not stored.users:
                    _unlink(stored.path)

    def delete(self, key: str) -> None:
        """Forget an uploaded file; raises ApiError 404."""
        stored = self.find(key)
        with self._lock:
            self._drop(stored)

    def sweep(self) -> None:
        """Delete what has not been used for long."""
        with self._lock:
            self._sweep(0)

    @property
    def size(self) -> tuple[int, int]:
        """(files, bytes)"""
        with self._lock:
            return len(self._files), sum(file.bytes for file in self._files.values())

    def close(self) -> None:
        """Delete all of it."""
        with self._lock:
            self._files.clear()
        self._scratch.remove()

    def _sweep(self, wanted: int) -> None:
        now = time.monotonic()
        idle = sorted((f for f in self._files.values() if not f.users), key=lambda f: f.used)
        total = sum(file.bytes for file in self._files.values())
        for file in idle:
            crowded = total + wanted > self._limit and not file.uploaded
            if crowded or now - file.used > self._keep_s:
                total -= file.bytes
                self._drop(file)

    def _drop(self, stored: StoredFile) -> None:
        self._files.pop(stored.id, None)
        stored.deleted = True
        if not stored.users:
            _unlink(stored.path)


@dataclass(frozen=True)
class Resolver:
    """Turns what a request names into paths. root: files under it may be named. hosts: may be fetched from.

    max_bytes: of one file.
    """

    store: MediaStore
    root: Path | None = None
    hosts: tuple[str, ...] = ()
    max_bytes: int = 200 * 2**20

    @contextmanager
    def open(self, urls: Sequence[str]) -> Iterator[list[str]]:
        """Paths of all that is named, which stay until the end; raises ApiError. Reads and may fetch."""
        with ExitStack() as stack:
            yield [self._path(url, stack) for url in urls]

    def _path(self, url: str, stack: ExitStack) -> str:
        scheme = url.partition(":")[0].lower() if ":" in url else ""
        if scheme == "data":
            return stack.enter_context(self.store.use(self.store.add_bytes(self._data(url))))
        if url.startswith("file-") and _FILE_ID.fullmatch(url):
            return stack.enter_context(self.store.use(self.store.find(url)))
        if scheme in ("http", "https"):
            return stack.enter_context(self.store.use(self._fetched(url)))
        return self._under_root(url)

    def _data(self, url: str) -> bytes:
        head = _DATA.match(url[:1024])
        if head is None or "base64" not in head[2].lower().split(";"):
            raise _refused("A data: URL must look like data:video/mp4;base64,...")
        if (len(url) - head.end()) * 3 // 4 > self.max_bytes:
            raise too_large(self.max_bytes)
        try:
            content = base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise _refused("The data: URL is not valid base64.") from None
        if not content:
            raise _refused("The data: URL is empty.")
        return content

    def _fetched(self, url: str) -> StoredFile:
        if not self.hosts:
            raise _refused("This server fetches nothing: send a data: URL, or upload to /v1/files.")
        return self.store.add_bytes(download(url, self.hosts, self.max_bytes))

    def _under_root(self, url: str) -> str:
        # One message for all: a stranger must not learn which files there are elsewhere.
        missing = _refused("There is no such media: use a data: URL, a file id" + self._or_root())
        if self.root is None or "\0" in url:
            raise missing
        name = url
        if url.lower().startswith("file:"):
            parts = urllib.parse.urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise missing
            name = urllib.parse.unquote(parts.path)
        if "\0" in name:
            raise missing
        root = os.path.realpath(self.root)
        try:
            path = os.path.realpath(os.path.join(root, name), strict=True)
        except (OSError, ValueError):
            raise missing from None
        if os.path.commonpath([root, path]) != root or not os.path.isfile(path):
            raise missing
        return path

    def _or_root(self) -> str:
        return "." if self.root is None else ", or a path under the media root."


def too_large(limit: int) -> ApiError:
    """413: larger than `limit` bytes."""
    return ApiError(
        413,
        f"That is more than {limit / 2**20:g} MiB: cut or compress it.",
        code="request_too_large",
        headers={"Connection": "close"},  # the rest is not read
    )


def _refused(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_media", param="messages")


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
