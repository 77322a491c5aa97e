"""One process at a time writes: a lock that ends with its process, however that ends.

with WriteLock(folder / "writing.lock", "the library"): ...
"""

from __future__ import annotations

import os
from pathlib import Path

from encoder.errors import ConfigError
from encoder.video.sources import reason

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]


class WriteLock:
    """Held until the `with` block ends or the process does. what: is written, for the error's sentence.

    passing: the file goes when the lock does. Raises ConfigError when another process holds it, or its folder
    cannot be written.
    """

    def __init__(self, file: Path, what: str, *, passing: bool = False) -> None:
        self._file, self._what, self._passing = file, what, passing

    def __enter__(self) -> None:
        while True:
            try:
                self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise ConfigError(
                    f"Cannot write into {self._what}: {reason(error)}; name another place."
                ) from error
            try:
                if fcntl is not None:
                    fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._handle)
                raise ConfigError(
                    f"Another process is writing into {self._what}: wait for its end, or stop it."
                ) from None
            except OSError:  # a file system without locks
                return
            if self._is_there():
                return
            os.close(self._handle)  # who held it before has taken the file away

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._file), os.fstat(self._handle))
        except FileNotFoundError:
            return False

    def __exit__(self, *_: object) -> None:
        if self._passing and fcntl is not None:
            self._file.unlink(missing_ok=True)
        os.close(self._handle)
