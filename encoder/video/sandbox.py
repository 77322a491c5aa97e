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
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from encoder.errors import VideoError
from encoder.video.containers import Header
from encoder.video.descriptors import PASSES_DESCRIPTORS
from encoder.video.protocol import (
    MAX_LINE,
    CutPart,
    ProtocolError,
    Request,
    read_error,
    read_message,
    read_part,
    read_reply,
    read_rotation,
    read_samples,
    read_time,
)
from encoder.video.sound_decoder import SAMPLE_BYTES
from encoder.video.worker import IDLE_S

T = TypeVar("T")

MAX_IDLE = max(2, min(64, os.cpu_count() or 2))  # children kept between calls: one per parallel reader
PIPE_BYTES = 1 << 20  # frames are megabytes: fewer switches between the processes
# What the system's loader may need to start Python at all; no secret is ever in these.
_LOADER_ENV = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


class DecodeTimeout(VideoError):
    """The child did not finish within its wall-clock limit."""


class LibraryNotLoaded(VideoError):
    """The child needed a library that it had not loaded before it confined itself."""


class WorkerCrashed(VideoError):
    """The child ended before its answer was complete."""


@dataclass(frozen=True)
class Decoded:
    """frames: uint8 (T, H, W, 3), upright; times_s: presentation times of these T frames, seconds."""

    header: Header
    frames: Tensor
    times_s: tuple[float, ...]


class Worker:
    """One decoding child process, the socket that brings it requests and the pipe that its answers take.

    reusable: it may serve another request, because it ended every answer as the protocol says.
    """

    def __init__(self) -> None:
        root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
        # -S and an explicit path: no site start-up; the parent's __main__ is never imported
        code = "import sys; sys.path[:] = sys.argv[1:]; from encoder.video.worker import main; main()"
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

    def ask(self, request: Request, file: int) -> Decoded:
        """Send one request about an open file, collect the frames. Raises VideoError."""
        self.reusable = False
        self._send(request.to_line(), file)
        reply = read_reply(self._message(), request)
        frames = torch.empty((reply.count, reply.height, reply.width, 3), dtype=torch.uint8)
        times = []
        for frame in frames:
            message = self._message()
            turns, mirror = read_rotation(message)
            if turns or mirror:  # PyAV does not turn frames, decord has done so
                shape = (reply.width, reply.height, 3) if turns % 2 else frame.shape
                stored = torch.empty(shape, dtype=torch.uint8)
                self._fill(stored)
                frame.copy_((stored.flip(1) if mirror else stored).rot90(turns, (0, 1)))
            else:
                self._fill(frame)
            times.append(read_time(message))
        self.reusable = True
        return Decoded(reply.header, frames, tuple(times))

    def cut(self, request: Request, file: int, out: BinaryIO) -> CutPart:
        """Send one request for a part of an open file, write the part's file to `out`. Raises VideoError."""
        self.reusable = False
        self._send(request.to_line(), file)
        _, part, size = read_part(self._message(), request)
        block = torch.empty(min(size, PIPE_BYTES), dtype=torch.uint8)
        while size:
            piece = block[: min(size, len(block))]
            self._fill(piece)
            out.write(piece.numpy().data)
            size -= len(piece)
        self.reusable = True
        return part

    def listen(self, request: Request, file: int) -> bytearray:
        """Send one request for the sound of an open file; its samples of 16 bits. Raises VideoError."""
        self.reusable = False
        self._send(request.to_line(), file)
        sound = bytearray()
        while samples := read_samples(self._message()):
            if len(sound) + samples * SAMPLE_BYTES > request.max_bytes:
                raise ProtocolError
            piece = torch.empty(samples * SAMPLE_BYTES, dtype=torch.uint8)
            self._fill(piece)
            sound += piece.numpy().data
        self.reusable = True
        return sound

    def _send(self, line: bytes, file: int) -> None:
        if self.process.stdin is None:
            sent = socket.send_fds(self._channel, [line], [file])
            if rest := line[sent:]:  # the child closes its end once it has all: sending nothing may fail
                self._channel.sendall(rest)
        else:
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def _message(self) -> dict[str, Any]:
        stdout = self.process.stdout
        assert stdout is not None
        line = stdout.readline(MAX_LINE)
        if not line:
            raise EOFError
        if not line.endswith(b"\n"):
            raise ProtocolError if len(line) == MAX_LINE else EOFError
        message = read_message(line)
        if "error" in message:
            self.reusable = message.get("known") is True
            kind = LibraryNotLoaded if message.get("not_loaded") is True else VideoError
            raise kind(read_error(message))
        return message

    def _fill(self, target: Tensor) -> None:
        stdout = self.process.stdout
        assert stdout is not None
        view = memoryview(target.view(-1).numpy().data)
        while len(view):
            count = stdout.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            view = view[count:]


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
            return self._serve(request, keep, lambda worker, asked: worker.ask(asked, file))
        except LibraryNotLoaded:
            seconds = request.seconds - (time.monotonic() - started)
            request = replace(request, seconds=seconds, load_all=True)
            return self._serve(request, keep, lambda worker, asked: worker.ask(asked, file))

    def cut(self, request: Request, file: int, out: BinaryIO, *, keep: bool) -> CutPart:
        """The part of a video that a request asks for, written to `out`; raises as `decode`."""
        return self._serve(request, keep, lambda worker, asked: worker.cut(asked, file, out))

    def listen(self, request: Request, file: int, *, keep: bool) -> bytearray:
        """The samples of the sound that a request asks for; raises as `decode`."""
        return self._serve(request, keep, lambda worker, asked: worker.listen(asked, file))

    def _serve(self, request: Request, keep: bool, ask: Callable[[Worker, Request], T]) -> T:
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
            return ask(worker, replace(request, parent=os.getpid()))
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
