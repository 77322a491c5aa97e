"""Temporary folders that do not stay behind even when the process is killed: the next one removes them.

The owner of a folder keeps it locked; one whose lock is free is abandoned.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on Windows: what a killed server leaves, stays
    fcntl = None  # type: ignore[assignment]


class ScratchFolder:
    """A folder in the system's place for temporary files, this process's own until `remove`.

    kind: part of its name; abandoned folders of that kind are removed first.
    """

    def __init__(self, kind: str) -> None:
        prefix = f"fluxchat-{kind}-"
        for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _remove_abandoned(folder)
        self.path = tempfile.mkdtemp(prefix=prefix)
        # Another process may take it for abandoned just before it is locked.
        while (lock := _lock(self.path)) is None and fcntl is not None:
            self.path = tempfile.mkdtemp(prefix=prefix)
        self._handle: int | None = lock

    def remove(self) -> None:
        """Delete it with all files; a second time does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _lock(folder: str | Path) -> int | None:
    """A handle that keeps the folder locked until it is closed; None where another process has it."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # gone, or another user's
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(folder):
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _remove_abandoned(folder: Path) -> None:
    if (handle := _lock(folder)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)
