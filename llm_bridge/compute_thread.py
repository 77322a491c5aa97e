"""A thread in which one model computes, first come, first served, for any number of asking threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from encoder.errors import ModelError

T = TypeVar("T")
CLOSED = "The model was closed, so that nothing is computed any more: load it again and ask again."


class ComputeThread:
    """Functions are called in it one after another; it ends with `close`."""

    def __init__(self, name: str = "fluxchat-compute") -> None:
        self._thread, self._process = ThreadPoolExecutor(1, name), os.getpid()

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the computing thread, after what waits already; returns what it returns.

        Raises ModelError when there is no such thread any more: after `close`, and in a forked process.
        """
        return self.submit(function, *args).result()

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Have a function called in the computing thread, if there is one; waits for nothing."""
        with suppress(ModelError):  # closed, or in a forked process: what is held is not for long
            self.submit(function, *args)

    def check_process(self) -> None:
        """Raises ModelError in a forked process, where there is no computing thread and locks may be held."""
        if os.getpid() != self._process:
            raise ModelError(
                "The model was loaded before this process was forked, and cannot compute here: load it in "
                "the process that asks."
            )

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """As `run`, without waiting."""
        self.check_process()
        try:
            return self._thread.submit(function, *args)
        except RuntimeError:  # shut down, by `close` or as the interpreter ends
            raise ModelError(CLOSED) from None

    def close(self) -> None:
        """The thread ends once what waits was called; nothing is called afterwards."""
        self._thread.shutdown(wait=False)
