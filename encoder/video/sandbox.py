"""A pool of decoding child processes, each with a time limit, a memory limit and one pipe for its frames.

Why a child: decoders hang, crash and carry security holes; a thread that hangs cannot be ended. A child
starts with an empty environment and no descriptor but its pipes, gets the file as an open descriptor, and
confines itself (confine.py) before it reads a byte. A child for trusted files is kept a few seconds for the
next call (starting one costs about 0.2 s); a child that read an untrusted file, crashed, hung or met an
unexpected error is ended before the call returns.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import BinaryIO, TypeVar

from encoder.errors import VideoError
from encoder.video.descriptors import PASSES_DESCRIPTORS
from encoder.video.protocol import CutPart, Request
from encoder.video.replies import Answer, Decoded, LibraryNotLoaded, read_frames, read_part, read_sound
from encoder.video.worker import IDLE_S

T = TypeVar("T")

MAX_IDLE = max(2, min(64, os.cpu_count() or 2))  # children kept between calls: one per parallel reader
PIPE_BYTES = 1 << 20  # frames are megabytes: fewer switches between the processes
# What the system's loader may need to start Python at all; no secret is ever in these.
_LOADER_ENV = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


class DecodeTimeout(VideoError):
    """The child did not finish within its wall-clock limit."""


class WorkerCrashed(VideoError):
    """The child ended before its answer was complete."""


class Worker:
    """One decoding child process, the socket that brings it requests and the pipe that its answers take.

    reusable: it may serve another request, because it ended every answer as the protocol says.
    """

    def __init__(self) -> None:
        root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
        # -S and an explicit path: no site start-up; the parent's __main__ is never imported. Garbage is not
        # looked for during the imports: that would take a tenth of the start.
        code = (
            "import gc, sys; gc.disable(); sys.path[:] = sys.argv[1:]; "
            "from encoder.video.worker import main; main()"
        )
        self.reusable = True
        ours, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code, root, *filter(None, sys.path)],
                stdin=theirs.fileno() if PASSES_DESCRIPTORS else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _LOADER_ENV if name in os.environ},
                pipesize=PIPE_BYTES,
                close_fds=True,
                start_new_session=True,  # a group of its own, to be ended as a whole
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._channel = ours

    def alive(self) -> bool:
        """Whether the child has not ended itself."""
        return self.process.poll() is None

    def kill(self) -> None:
        """End the child and its group at once (a hung decoder ignores SIGTERM)."""
        if self.process.returncode is None:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()

    def end(self) -> None:
        """Kill the child and collect it."""
        self.kill()
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Close this process's ends of its socket and pipe."""
        self._channel.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def ask(self, request: Request, file: int, read: Callable[[Answer, Request], T]) -> T:
        """Send one request about an open file; what `read` makes of the answer. Raises VideoError."""
        assert self.process.stdout is not None
        answer = Answer(self.process.stdout)
        self.reusable = False
        self._send(request.to_line(), file)
        try:
            found = read(answer, request)
        except VideoError:
            self.reusable = answer.refused
            raise
        self.reusable = True
        return found

    def _send(self, line: bytes, file: int) -> None:
        if self.process.stdin is None:
            sent = socket.send_fds(self._channel, [line], [file])
            if rest := line[sent:]:  # the child closes its end once it has all: sending nothing may fail
                self._channel.sendall(rest)
        else:
            self.process.stdin.write(line)
            self.process.stdin.flush()


class WorkerPool:
    """Decoding children that serve one request at a time; safe to use from many threads and after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Worker]] = []
        if hasattr(os, "register_at_fork"):
            reset = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (method := reset()) and method())

    def decode(self, request: Request, file: int, *, keep: bool) -> Decoded:
        """One request about an open file in one child. keep: the child may serve later calls.

        Raises VideoError for what is wrong with the file, WorkerCrashed when the child ended itself,
        DecodeTimeout when `request.seconds` passed first.
        """
        started = time.monotonic()
        try:
            return self._serve(request, file, keep, read_frames)
        except LibraryNotLoaded:
            seconds = request.seconds - (time.monotonic() - started)
            return self._serve(replace(request, seconds=seconds, load_all=True), file, keep, read_frames)

    def cut(self, request: Request, file: int, out: BinaryIO, *, keep: bool) -> CutPart:
        """The part of a video that a request asks for, written to `out`; raises as `decode`."""
        return self._serve(request, file, keep, partial(read_part, out=out))

    def listen(self, request: Request, file: int, *, keep: bool) -> bytearray:
        """The samples of the sound that a request asks for; raises as `decode`."""
        return self._serve(request, file, keep, read_sound)

    def _serve(self, request: Request, file: int, keep: bool, read: Callable[[Answer, Request], T]) -> T:
        started = time.monotonic()
        worker = self.acquire() if keep else Worker()
        late = threading.Event()

        def stop() -> None:
            late.set()
            worker.kill()

        clock = threading.Timer(max(0.0, request.seconds - (time.monotonic() - started)), stop)
        clock.daemon = True
        clock.start()
        try:
            return worker.ask(replace(request, parent=os.getpid()), file, read)
        except (EOFError, OSError, ValueError) as error:
            if late.is_set():
                raise DecodeTimeout(
                    f"it could not be read within {request.seconds:.3g} s; "
                    "try a shorter or smaller video, or allow more seconds"
                ) from error
            raise WorkerCrashed(_how_it_ended(worker, request)) from error
        finally:
            clock.cancel()
            clock.join()  # so that it never kills a process number that is somebody else's by then
            if worker.reusable and keep and not late.is_set():
                self.release(worker)
            else:
                worker.end()

    def close(self) -> None:
        """End the idle children now instead of a few seconds later."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, worker in idle:
            worker.end()

    @property
    def idle(self) -> list[Worker]:
        """The children that wait for a request, the latest last."""
        with self._lock:
            return [worker for _, worker in self._idle]

    def acquire(self) -> Worker:
        """An idle child, or a new one."""
        worker = self._sweep(take=True)
        return worker if worker is not None else Worker()

    def release(self, worker: Worker) -> None:
        """Keep a child for a later request, or end it where enough are kept."""
        with self._lock:
            kept = len(self._idle) < MAX_IDLE
            if kept:
                self._idle.append((time.monotonic(), worker))
        if not kept:
            worker.end()
        self._sweep()

    def _sweep(self, *, take: bool = False) -> Worker | None:
        """End the children that are about to end themselves; returns the latest of the others with `take`."""
        with self._lock:
            now = time.monotonic()
            fresh = [(t, w) for t, w in self._idle if now - t < 0.5 * IDLE_S and w.alive()]
            stale = [w for t, w in self._idle if all(w is not other for _, other in fresh)]
            taken = fresh.pop()[1] if take and fresh else None
            self._idle = fresh
        for worker in stale:
            worker.end()
        return taken

    def _after_fork(self) -> None:
        """In a forked process: the children belong to the other one, and its lock may have been held."""
        self._lock = threading.Lock()
        idle, self._idle = self._idle, []
        for _, worker in idle:
            worker.forget()


def _how_it_ended(worker: Worker, request: Request) -> str:
    """One sentence about a child that ended before its answer was complete."""
    worker.kill()
    if worker.process.wait() == -getattr(signal, "SIGSYS", 31):
        return "its decoder tried what no decoder has to do and was ended; the file is not safe to use"
    return (
        f"its decoder stopped or used more than {request.memory_mib} MiB; "
        "the file may be damaged, convert it to h264 in mp4"
    )
