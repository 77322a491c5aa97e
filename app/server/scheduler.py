"""The scheduler of answers: a bounded queue in front of a few worker threads, each running one answer.

    job = await scheduler.start(lambda: chat.stream(video, question))
    async for piece in job: ...

A slow client does not slow the worker down: pieces are queued. A client that disconnects stops its job.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

from app.answer import Answer
from app.server.errors import ApiError, shutting_down
from app.streaming import AnswerStream, Thought

Source = Callable[[], AbstractContextManager[AnswerStream]]
_END = object()


class Job:
    """One answer being made in a thread; iterate for its pieces of text. Belongs to one event loop.

    What the model thinks comes as Thoughts among them.
    """

    def __init__(self) -> None:
        self._pieces: asyncio.Queue[Any] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self._stream: AnswerStream | None = None
        self._stopped = self._cut = False
        self.answer: Answer | None = None

    def run(self, source: Source) -> None:
        """Make the answer (in a thread)."""
        error: BaseException | None = None
        try:
            with source() as stream:
                self._stream = stream
                stream.on_thinking(lambda piece: self._put(Thought(piece)))
                if self._stopped:
                    stream.stop()
                for piece in stream:
                    self._put(piece)
                if self._cut and stream.answer.finish == "cancelled":
                    raise shutting_down()
                self.answer = stream.answer
        except BaseException as caught:  # noqa: BLE001 - it is raised where the pieces are read
            error = caught
        self._put(error if error is not None else _END)

    def abandon(self, error: BaseException) -> None:
        """Raise this error to the reader now, without waiting for the thread."""
        self.stop()
        self._pieces.put_nowait(error)

    def _put(self, item: Any) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._pieces.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[str]:
        while (item := await self._pieces.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop(self) -> None:
        """End computing within one token; the pieces end soon after."""
        self._stopped = True
        if self._stream is not None:
            self._stream.stop()

    def cut(self) -> None:
        """The same for the server's sake: the reader gets a 503, unless the answer is complete."""
        self._cut = self._cut or not self._stopped
        self.stop()


class Scheduler:
    """At most `slots` answers at a time and `queue` waiting; the next one is refused with 429."""

    def __init__(self, slots: int, queue: int) -> None:
        self._slots, self._queue = slots, queue
        self._free = asyncio.Semaphore(slots)
        self._threads = ThreadPoolExecutor(slots, "fluxchat-answer")
        self.jobs: set[Job] = set()
        self._waiting = 0
        self._mean_s = 5.0  # moving average of an answer's duration
        self._draining = self._closed = False

    @property
    def running(self) -> int:
        """Answers being made."""
        return len(self.jobs)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting

    @property
    def draining(self) -> bool:
        """Whether no new request is accepted any more."""
        return self._draining

    def check(self) -> None:
        """Raises ApiError when a request is refused: 429 past the queue's length, 503 at the end."""
        if self._draining:
            raise shutting_down()
        if self._free.locked() and self._waiting >= self._queue:
            seconds = max(1, math.ceil(self._mean_s * (self._waiting + 1) / self._slots))
            raise ApiError(
                429,
                f"{self._waiting} questions are waiting already: try again in {seconds} s.",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    async def start(self, source: Source) -> Job:
        """Wait for a turn, then start an answer; raises ApiError as `check` does.

        source: entered in the job's thread, it gives the stream. Cancel the call to leave the queue.
        """
        self.check()
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        if self._closed:
            self._free.release()
            raise shutting_down()
        job = Job()
        self.jobs.add(job)
        started = time.monotonic()

        def ended(_: object) -> None:
            self._mean_s += 0.2 * (time.monotonic() - started - self._mean_s)
            self.jobs.discard(job)
            self._free.release()

        asyncio.get_running_loop().run_in_executor(self._threads, job.run, source).add_done_callback(ended)
        return job

    async def drain(self, seconds: float) -> None:
        """Refuse what is new, let what runs and waits finish, and stop what takes longer than `seconds`."""
        self._draining = True
        end = time.monotonic() + seconds
        while (self.jobs or self._waiting) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        for job in self.jobs:
            job.cut()

    def close(self) -> None:
        """Stop everything; who waits gets a 503."""
        self._draining = self._closed = True
        for job in self.jobs:
            job.cut()
        for _ in range(self._waiting):
            self._free.release()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def abandon(self) -> None:
        """After `close`: a 503 for whoever still waits for an answer whose thread does not end."""
        for job in self.jobs:
            job.abandon(shutting_down())
