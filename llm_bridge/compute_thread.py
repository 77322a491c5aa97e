"""A thread in which one model computes, first come, first served, for any number of asking threads."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from encoder.errors import ModelError

T = TypeVar("T")
Job = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]
CLOSED = "The model was closed, so that nothing is computed any more: load it again and ask again."


class ComputeThread:
    """Functions are called in it one after another; it ends with `close`.

    Not a ThreadPoolExecutor, whose locks a garbage collector that gives up an answer (`post`) may find held
    by the very thread that it runs in.
    """

    def __init__(self, name: str = "fluxchat-compute") -> None:
        self._process, self._closed = os.getpid(), False
        self._closing = threading.RLock()  # so that nothing is queued behind the end
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._next: deque[Job | None] = deque()  # before _jobs; in the computing thread only
        arguments = self._jobs, self._next
        thread = threading.Thread(target=_compute, args=arguments, name=name, daemon=True)
        thread.start()
        THREADS.add(thread)
        OWNERS.add(self)
        weakref.finalize(self, self._jobs.put, None)

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
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                raise ModelError(CLOSED)
            self._jobs.put((future, function, args))
        return future

    def waiting(self, kind: type[T]) -> list[T]:
        """First arguments of a class, with which functions wait to be called (computing thread only)."""
        with suppress(Empty):
            while True:
                self._next.append(self._jobs.get_nowait())
        return [first for first in map(_first_argument, self._next) if isinstance(first, kind)]

    def bring_forward(self, arguments: Sequence[object]) -> None:
        """Have what waits with these first arguments called next, in its order (computing thread only)."""
        wanted = set(map(id, arguments))
        ordered = sorted(self._next, key=lambda job: id(_first_argument(job)) not in wanted)
        self._next.clear()
        self._next.extend(ordered)

    def close(self) -> None:
        """The thread ends once what waits was called; nothing is called afterwards."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)


def _first_argument(job: Job | None) -> object:
    return job[2][0] if job is not None and job[2] else None


def _compute(jobs: SimpleQueue[Job | None], first: deque[Job | None]) -> None:
    """What the thread does; it holds none of its ComputeThread, which may be given up."""
    while (job := first.popleft() if first else jobs.get()) is not None:
        _call(*job)
        del job  # and what it holds, while nothing is to be done


def _call(future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(*args)
    except BaseException as error:  # noqa: BLE001 - who waits for it raises it
        future.set_exception(error)
        del future, function, args  # or the error's traceback holds them, and they the error
    else:
        future.set_result(result)


OWNERS: weakref.WeakSet[ComputeThread] = weakref.WeakSet()
THREADS: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    """A thread that computes while the interpreter is taken down would crash it."""
    for owner in list(OWNERS):
        owner.close()
    for thread in list(THREADS):
        thread.join()
