"""File descriptors handed to the decoding child: what the parent opened and checked is what is read.

In the child such a file is named `fd:7.mp4`: descriptor 7 with the suffix of its path, which helps FFmpeg
with raw formats. Where descriptors cannot travel (Windows), the name is a path, and the same functions take
it.
"""

from __future__ import annotations

import io
import os
import re
import sys
from typing import BinaryIO

from encoder.errors import VideoError

PASSES_DESCRIPTORS = sys.platform != "win32"
_MAX_POSITION = (1 << 63) - 1  # of the kernel
_NAME = re.compile(r"fd:(\d+)(\.\w*)?")


class DescriptorReader(io.RawIOBase):
    """Reads a descriptor from a position of its own, so that several readers can share it."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self._descriptor, self._position = descriptor, 0
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        self._size = os.lseek(descriptor, 0, os.SEEK_END)
        os.lseek(descriptor, before, os.SEEK_SET)  # shared with the caller where there is no /proc

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new position, or -1 for an impossible one: FFmpeg then goes on as with a file of its own."""
        position = (0, self._position, self._size)[whence] + offset
        if not 0 <= position <= _MAX_POSITION:
            return -1
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        if self._position >= self._size:
            return b""
        if size is None or size < 0:
            size = self._size - self._position
        data = os.pread(self._descriptor, size, self._position)
        self._position += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def descriptor_name(descriptor: int, path: str) -> str:
    """The name by which the functions below know a descriptor; of the path only the suffix is kept."""
    suffix = os.path.splitext(path)[1].lower()
    return f"fd:{descriptor}{suffix if re.fullmatch(r'[.][a-z0-9]{1,8}', suffix) else ''}"


def open_unbuffered(name: str) -> BinaryIO | DescriptorReader:
    """The file without a buffer, at its start."""
    match = _NAME.fullmatch(name)
    return DescriptorReader(int(match[1]), name) if match else open(name, "rb", buffering=0)


def open_file(name: str) -> BinaryIO:
    """The file for reading in Python, at its start."""
    return io.BufferedReader(open_unbuffered(name))  # type: ignore[type-var]


def native_path(name: str) -> str:
    """A path for libraries that only take one. Raises VideoError where a descriptor has none."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    if not os.path.exists(f"/proc/self/fd/{match[1]}"):  # elsewhere such paths share one position
        raise VideoError("decord needs a path here, and there is none; use decoder='auto'")
    return f"/proc/self/fd/{match[1]}"
