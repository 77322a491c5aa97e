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
except ImportError:  # no such locks on Windows: what a killed process leaves, stays
    fcntl = None  # type: ignore[assignment]


class ScratchFolder:
    """A folder that is this process's own until `remove`, or until the end of a `with` block.

    prefix: begins its name; abandoned folders with that prefix are removed first. parent: where it lies, by
    default the system's place for temporary files. Raises OSError where nothing can be written.
    """

    def __init__(self, prefix: str, parent: str | os.PathLike[str] | None = None) -> None:
        parent = Path(parent or tempfile.gettempdir())
        for folder in parent.glob(f"{prefix}*"):
            _remove_abandoned(folder)
        self.path: str
        self._handle: int | None
        # Another process may take it for abandoned just before it is locked: then it gets another one.
        while True:
            self.path = tempfile.mkdtemp(dir=parent, prefix=prefix)
            self._handle = _opened(self.path)
            if self._handle is not None:
                if _lock(self._handle) is not False and os.path.exists(self.path):
                    return
                os.close(self._handle)
            elif fcntl is None:
                return

    def remove(self) -> None:
        """Delete it with all files; a second time does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Path:
        return Path(self.path)

    def __exit__(self, *_: object) -> None:
        self.remove()


def _opened(folder: str | Path) -> int | None:
    """A handle of a folder that is no link; None where there is none for us, or no locks."""
    if fcntl is None:
        return None
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone, or another user's
        return None


def _lock(handle: int) -> bool | None:
    """Whether the lock is ours now; None on file systems that have none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_abandoned(folder: Path) -> None:
    if (handle := _opened(folder)) is not None:
        if _lock(handle):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)
