"""The store of uploaded files: bounded in bytes and number, each file of one client, deleted when unused."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from app.server.errors import ApiError, disk_errors
from app.server.security.authentication import is_anonymous
from llm_bridge.assets.scratch import ScratchFolder

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
BLOCK = 1 << 20
MAX_FILES = 10_000  # of any size: each takes an inode
PAGE_KEEP_S = 600.0  # uploads to the page that no session holds


@dataclass
class StoredFile:
    """One file of the store.

    uploaded: as a file with an id, kept until deleted or long unused; else from a data: URL or download, and
    dropped first when room is needed. client: its owner (`fluxchat.client` of access_control.py). folder: of
    its own, or None. created: seconds since 1970.
    """

    id: str
    path: str
    bytes: int
    name: str
    uploaded: bool
    client: str = ""
    folder: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    used: float = field(default_factory=time.monotonic)
    users: int = 0
    deleted: bool = False


class MediaStore:
    """All files that clients sent, in folders that are deleted with the store. Thread-safe.

    limit_bytes: of all files, incoming ones included. keep_s: a file unused for so long is deleted, one in
    use never. A file of a key or login is accessible to that client only; files of anonymous clients to
    every anonymous client that knows their ids.
    """

    def __init__(self, limit_bytes: int = 2 * 2**30, keep_s: float = 3600.0) -> None:
        self._scratch = ScratchFolder("fluxchat-files-")
        self.folder = self._scratch.path
        self.limit_bytes, self.keep_s = limit_bytes, keep_s
        self._files: dict[str, StoredFile] = {}
        self._by_path: dict[str, StoredFile] = {}
        self._bytes = 0
        self.incoming_bytes = 0  # of files being received
        self._lock = threading.Lock()

    # -- incoming files --------------------------------------------------------------------------------------

    def receive(
        self, name: str, client: str = "", *, key: str | None = None, page: str | Path | None = None
    ) -> IncomingFile:
        """A file to be written block by block, then committed with `keep` or aborted with `drop`.

        key: in place of a new file id. page: the folder below which the page wants its files, each in one of
        its own that nobody can guess. Raises ApiError when the disk is full.
        """
        return IncomingFile(self, name, client, key, page)

    def add(
        self, source: BinaryIO, name: str, client: str = "", *, page: str | Path | None = None
    ) -> StoredFile:
        """Keep an uploaded file; raises ApiError when there is no room for it."""
        return self._copied(source, self.receive(name, client, page=page))

    def add_bytes(self, content: bytes, client: str = "") -> StoredFile:
        """Store the content of a data: URL; the same bytes of one client are stored once.

        Per client: else usage and timings would reveal to others what a client has sent.
        """
        whose = hashlib.sha256(client.encode()).digest()
        key = f"data-{hashlib.blake2b(content, digest_size=16, key=whose).hexdigest()}"
        with self._lock:
            if (known := self._files.get(key)) is not None:
                known.used = time.monotonic()
                return known
        return self._copied(io.BytesIO(content), self.receive(key, key=key))

    @staticmethod
    def _copied(source: BinaryIO, target: IncomingFile) -> StoredFile:
        try:
            while block := source.read(BLOCK):
                target.write(block)
            return target.keep()
        except BaseException:
            target.drop()
            raise

    def _reserve(self, amount: int) -> None:
        with self._lock:
            self._sweep(amount)
            if self._full(amount):
                raise ApiError(
                    429,
                    "The server's store of files is full: delete files, or try again later.",
                    kind="server_error",
                    code="storage_full",
                    headers={"Retry-After": "60"},
                )
            self.incoming_bytes += amount

    def _settle(self, amount: int, stored: StoredFile | None) -> StoredFile | None:
        """End a reservation. Gives the stored file, or one already there under its id; None: aborted."""
        with self._lock:
            self.incoming_bytes -= amount
            if stored is None:
                return None
            if (known := self._files.get(stored.id)) is not None:  # received twice at the same time
                return known
            self._files[stored.id] = self._by_path[stored.path] = stored
            self._bytes += stored.bytes
            return stored

    # -- stored files --------------------------------------------------------------------------------------

    def find(self, key: str, client: str = "") -> StoredFile:
        """An uploaded file of that client; raises ApiError 404."""
        with self._lock:
            stored = self._files.get(key) if FILE_ID.fullmatch(key) else None
        if stored is None or not _owns(client, stored):
            raise _no_file()
        return stored

    def files(self, client: str) -> list[StoredFile]:
        """The files that this client uploaded, oldest first; an anonymous one's of this visit only."""
        with self._lock:
            return [file for file in self._files.values() if file.uploaded and file.client == client]

    def touch(self, path: str, client: str) -> bool:
        """Whether that path is a file of the client's; if so it counts as used now."""
        with self._lock:
            stored = self._by_path.get(path)
            if stored is None or stored.deleted or not _owns(client, stored):
                return False
            stored.used = time.monotonic()
            return True

    @contextmanager
    def use(self, stored: StoredFile) -> Iterator[str]:
        """The file's path; it is not deleted meanwhile."""
        self._hold(stored)
        try:
            yield stored.path
        finally:
            self._release(stored, delete=False)

    def hold(self, path: str) -> bool:
        """Keep the file of that path until `release`; False when there is none, ApiError 404 when deleted."""
        with self._lock:
            stored = self._by_path.get(path)
        if stored is None:
            return False
        self._hold(stored)
        return True

    def release(self, path: str) -> bool:
        """End one `hold`; the last one deletes the file. False when it is not the store's."""
        with self._lock:
            stored = self._by_path.get(path)
        if stored is None:
            return False
        self._release(stored, delete=True)
        return True

    def _hold(self, stored: StoredFile) -> None:
        with self._lock:
            if stored.deleted:
                raise _no_file()
            stored.users += 1

    def _release(self, stored: StoredFile, delete: bool) -> None:
        with self._lock:
            stored.users -= 1
            stored.used = time.monotonic()
            if stored.users:
                return
            if stored.deleted:
                self._erase(stored)
            elif delete:
                self._drop(stored)

    def delete(self, key: str, client: str = "") -> None:
        """Delete an uploaded file; raises ApiError 404."""
        stored = self.find(key, client)
        with self._lock:
            self._drop(stored)

    def sweep(self) -> None:
        """Delete files unused for longer than keep_s."""
        with self._lock:
            self._sweep(0)

    @property
    def size(self) -> tuple[int, int]:
        """(files, bytes)"""
        with self._lock:
            return len(self._files), self._bytes

    def close(self) -> None:
        """Delete all files."""
        with self._lock:
            for file in self._by_path.values():
                _remove(file.path, file.folder)
            self._files.clear()
            self._by_path.clear()
            self._bytes = 0
        self._scratch.remove()

    def _full(self, wanted: int) -> bool:
        total = self._bytes + self.incoming_bytes + wanted
        return total > self.limit_bytes or len(self._by_path) >= MAX_FILES

    def _sweep(self, wanted: int) -> None:
        now = time.monotonic()
        idle = sorted((f for f in self._files.values() if not f.users), key=lambda f: f.used)
        for file in idle:
            crowded = self._full(wanted) and not file.uploaded
            keep_s = self.keep_s if file.folder is None else min(self.keep_s, PAGE_KEEP_S)
            if crowded or now - file.used > keep_s:
                self._drop(file)

    def _drop(self, stored: StoredFile) -> None:
        if self._files.pop(stored.id, None) is None:
            return
        stored.deleted = True
        if not stored.users:
            self._erase(stored)

    def _erase(self, stored: StoredFile) -> None:
        # A file deleted while in use counts until it is gone from the disk.
        if self._by_path.pop(stored.path, None) is not None:
            self._bytes -= stored.bytes
            _remove(stored.path, stored.folder)


class IncomingFile:
    """A file being received into the store; its bytes count against the limit as they arrive."""

    def __init__(
        self, store: MediaStore, name: str, client: str, key: str | None, page: str | Path | None
    ) -> None:
        self._store, self.name, self._client = store, name, client
        self._key = key or f"file-{uuid.uuid4().hex}"
        self._uploaded, self.bytes, self._open = key is None, 0, True
        self._folder: str | None = None
        self._lock = threading.Lock()  # it may be dropped while a thread still writes
        with disk_errors():
            if page is None:
                handle, self.path = tempfile.mkstemp(dir=store.folder)
            else:
                os.makedirs(page, exist_ok=True)
                self._folder = os.path.join(os.path.realpath(page), uuid.uuid4().hex)
                os.mkdir(self._folder, 0o700)
                self.path = os.path.join(self._folder, name)
                handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self._file = os.fdopen(handle, "wb", buffering=0)
        try:
            store._reserve(0)  # empty files count as files too
        except ApiError:
            self._file.close()
            _remove(self.path, self._folder)
            raise

    def write(self, block: bytes | bytearray) -> None:
        """Append a block; raises ApiError when the store or the disk is full."""
        with self._lock, disk_errors():
            if not self._open:
                return
            self._store._reserve(len(block))
            self.bytes += len(block)
            view = memoryview(block)
            while view:
                view = view[self._file.write(view) :]

    def keep(self) -> StoredFile:
        """Commit the complete file to the store."""
        self._file.close()
        self._open = False
        made = StoredFile(
            self._key, self.path, self.bytes, self.name, self._uploaded, self._client, self._folder
        )
        kept = self._store._settle(self.bytes, made)
        assert kept is not None
        if kept is not made:
            _remove(self.path, self._folder)
        return kept

    def drop(self) -> None:
        """Abort: delete what was received. Does nothing after `keep`."""
        with self._lock:
            if self._open:
                self._open = False
                self._file.close()
                _remove(self.path, self._folder)
                self._store._settle(self.bytes, None)


def _owns(client: str, stored: StoredFile) -> bool:
    return stored.client == client or (is_anonymous(client) and is_anonymous(stored.client))


def _no_file() -> ApiError:
    return ApiError(404, "There is no such file: upload it again.", code="file_not_found")


def _remove(path: str, folder: str | None) -> None:
    """Delete a file, or its folder with all that was made of it there."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(FileNotFoundError):
        os.unlink(path)
