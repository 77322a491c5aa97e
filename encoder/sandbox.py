"""Decoding in a child process with a wall clock, a memory limit and no way back but frames.

Why a child: decoders hang, crash and carry security holes; a thread that hangs cannot be ended. A child
for trusted files is kept a few seconds for the next call (starting one costs about 0.2 s); a child that
saw an untrusted file, an error or a time-out is ended before the call returns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoder.decode_worker import IDLE_S
from encoder.errors import VideoError

MAX_IDLE = max(2, min(16, os.cpu_count() or 2))  # children kept between calls: one per parallel reader
MAX_LINE = 1 << 16
PIPE_BYTES = 1 << 20  # frames are megabytes: fewer switches between the processes
_KEPT_ENV = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "LANG")


class OutOfTime(VideoError):
    """The child did not finish within its wall-clock limit."""


class Crashed(VideoError):
    """The child ended before its answer was complete."""


@dataclass(frozen=True)
class Decoded:
    """header: the child's Header as a dict; frames: uint8 (T, H, W, 3), upright; times_s: T seconds."""

    header: dict[str, Any]
    frames: Tensor
    times_s: tuple[float, ...]


class _Worker:
    """One decoding child process and its two pipes."""

    def __init__(self) -> None:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        # -S and an explicit path: no site start-up; the parent's __main__ is never imported
        code = "import sys; sys.path[:] = sys.argv[1:]; from encoder.decode_worker import main; main()"
        env = {k: v for k, v in os.environ.items() if k in _KEPT_ENV}  # no secrets for a hijacked decoder
        env.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MALLOC_ARENA_MAX="2")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, root, *filter(None, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            pipesize=PIPE_BYTES,
        )

    def end(self) -> None:
        """Kill the child at once (a hung decoder ignores SIGTERM) and collect it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue

    def ask(self, request: dict[str, Any]) -> Decoded:
        """Send one request, collect the frames. Raises VideoError; the caller then ends this worker."""
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()
        reply = self._message()
        count, height, width = (int(reply[k]) for k in ("count", "height", "width"))
        if count > request["max_count"] or count * height * width * 3 > request["max_bytes_out"]:
            raise VideoError("its decoder promised more than it may send; the file is not safe to use")
        frames = torch.empty((count, height, width, 3), dtype=torch.uint8)
        times = []
        for frame in frames:
            message = self._message()
            turns, mirror = int(message["turns"]), bool(message["mirror"])
            if turns or mirror:  # PyAV does not turn frames, decord has done so
                stored = torch.empty((width, height, 3) if turns % 2 else frame.shape, dtype=torch.uint8)
                self._fill(stored)
                frame.copy_((stored.flip(1) if mirror else stored).rot90(turns, (0, 1)))
            else:
                self._fill(frame)
            times.append(float(message["time"]))
        return Decoded(reply["header"], frames, tuple(times))

    def _message(self) -> dict[str, Any]:
        stdout = self.process.stdout
        assert stdout is not None
        line = stdout.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise EOFError
        message = json.loads(line)
        if "error" in message:
            raise VideoError(str(message["error"]))
        return dict(message)

    def _fill(self, target: Tensor) -> None:
        stdout = self.process.stdout
        assert stdout is not None
        view = memoryview(target.view(-1).numpy().data)
        while len(view):
            got = stdout.readinto(view)  # type: ignore[attr-defined]
            if not got:
                raise EOFError
            view = view[got:]


class Sandbox:
    """Hands requests to decoding children; safe to use from many threads and after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[float, _Worker]] = []
        self._owner = os.getpid()

    def decode(self, request: dict[str, Any], *, keep: bool) -> Decoded:
        """One request in one child. keep: the child may serve later calls if all goes well.

        Raises VideoError for what is wrong with the file, Crashed when the child ended itself, OutOfTime
        when request["seconds"] passed first.
        """
        started = time.monotonic()
        worker = self._take() if keep else _Worker()
        late = threading.Event()

        def stop() -> None:
            late.set()
            worker.process.kill()

        clock = threading.Timer(request["seconds"] - (time.monotonic() - started), stop)
        clock.daemon = True
        clock.start()
        healthy = False
        try:
            result = worker.ask(request)
            healthy = True
            return result
        except (EOFError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if late.is_set():
                raise OutOfTime(
                    f"it could not be read within {request['seconds']:.3g} s; "
                    "try a shorter or smaller video, or allow more seconds"
                ) from error
            raise Crashed(
                f"its decoder stopped or used more than {request['memory_mib']} MiB; "
                "the file may be damaged, convert it to h264 in mp4"
            ) from error
        finally:
            clock.cancel()
            if healthy and keep and not late.is_set():
                self._give(worker)
            else:
                worker.end()
                self.close()

    def close(self) -> None:
        """End the idle children now instead of a few seconds later; an error does so too."""
        with self._lock:
            idle, self._idle = self._idle, []
            if self._owner != os.getpid():
                idle = []
        for _, worker in idle:
            worker.end()

    def _take(self) -> _Worker:
        with self._lock:
            if self._owner != os.getpid():  # after a fork the children belong to the other process
                self._idle, self._owner = [], os.getpid()
            while self._idle:
                since, worker = self._idle.pop()
                if worker.process.poll() is None and time.monotonic() - since < 0.5 * IDLE_S:
                    return worker
                worker.end()
        return _Worker()

    def _give(self, worker: _Worker) -> None:
        with self._lock:
            if self._owner == os.getpid() and len(self._idle) < MAX_IDLE:
                self._idle.append((time.monotonic(), worker))
                return
        worker.end()
