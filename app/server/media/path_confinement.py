"""Opens files under one folder only, safe against path traversal and symlink races.

The path is walked with open folder descriptors, following no link: a file or folder that is swapped for a
link between the check and the opening gives an error, not another file.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

# Opening must not wait for a pipe's other end, take over a terminal, or leak into children.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_CLOEXEC", 0)
_FLAGS |= getattr(os, "O_BINARY", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_HAS_WALK = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd and bool(_NOFOLLOW)


def open_beneath(root: Path, name: str) -> BinaryIO:
    """A regular file under `root`, open for reading; the caller closes it.

    name: relative to the root, or absolute and under it. Links may point to places under the root. Raises
    OSError or ValueError for everything else, whether or not there is such a file elsewhere.
    """
    if not name or "\0" in name:
        raise ValueError("no name of a file")
    top = os.path.realpath(root)
    path = os.path.realpath(_under(root, top, name), strict=True)
    if os.path.commonpath([top, path]) != top or path == top:
        raise ValueError("not under the root")
    steps = os.path.relpath(path, top).split(os.sep)
    handle = _walk(top, steps) if _HAS_WALK else _open_and_compare(path)
    return os.fdopen(handle, "rb")


def _under(root: Path, top: str, name: str) -> str:
    """The name as an absolute path; names that do not begin under the root are not looked at at all."""
    if not os.path.isabs(name):
        return os.path.join(top, name)
    plain = os.path.normpath(name)
    for start in (top, os.path.abspath(root)):
        if plain.startswith(os.path.join(start, "")):
            return name
    raise ValueError("not under the root")


def _walk(top: str, steps: list[str]) -> int:
    """A descriptor of top/steps, none of which is a link."""
    *folders, last = steps
    here = os.open(top, _FLAGS | os.O_DIRECTORY)
    try:
        for folder in folders:
            inner = os.open(folder, _FLAGS | os.O_DIRECTORY | _NOFOLLOW, dir_fd=here)
            os.close(here)
            here = inner
        # A device might act on being opened.
        if not stat.S_ISREG(os.stat(last, dir_fd=here, follow_symlinks=False).st_mode):
            raise ValueError("no regular file")
        return _regular(os.open(last, _FLAGS | _NOFOLLOW, dir_fd=here))
    finally:
        os.close(here)


def _open_and_compare(path: str) -> int:
    """The same where folders cannot be opened: what was opened must be what the checked path still is."""
    before = os.lstat(path)
    if not stat.S_ISREG(before.st_mode):
        raise ValueError("no regular file")
    handle = _regular(os.open(path, _FLAGS))
    after = os.fstat(handle)
    if os.path.realpath(path, strict=True) != path or not os.path.samestat(before, after):
        os.close(handle)
        raise ValueError("changed while it was opened")
    return handle


def _regular(handle: int) -> int:
    """The descriptor, of a regular file, reading as usual."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("no regular file")
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(handle, True)
    return handle
