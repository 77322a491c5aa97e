"""The child process that decodes: reads requests from stdin, writes frames to stdout, never more.

Protocol, all lengths known beforehand, nothing pickled (a broken decoder must not reach its parent):
  request  one JSON line and, beside it, the descriptor of the file
  reply    one JSON line {"header": ..., "count", "height", "width"} or {"error": "one sentence"},
           then `count` times: one JSON line {"time": seconds} and height x width x 3 bytes,
           or {"error": ...} where the frames stop; "known" there says that all is in order but the file.

Imports come first, then the request, then this process confines itself for good, then the file is read. After
an untrusted file the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

from encoder.errors import VideoError
from encoder.video import backends, images
from encoder.video.confine import Confinement, confine
from encoder.video.containers import Header, Rules, inspect
from encoder.video.descriptors import descriptor_name, open_file
from encoder.video.frame_times import fit_within, spread_times

try:  # here, since nothing can be loaded when the limits are set
    import resource
except ImportError:  # not a Unix system: the parent's clock remains
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from _socket import socket as Socket

IDLE_S = 10.0  # a worker that nobody asks for this long ends itself
MAX_FILES = 64  # descriptors of a process that can open nothing
PASSES_DESCRIPTORS = sys.platform != "win32"  # there files travel by name

# What reading an untrusted file imports: nothing can be loaded once the process is confined. The rest is for
# few files (transparent videos, pictures of 16 bits), which are read again by a process that has all of it.
_ENCODINGS = tuple(f"encodings.{name}" for name in ("ascii", "latin_1", "utf_8", "utf_16"))
_FOR_VIDEOS = ("av", "av.error", "av.logging", "av.subtitles.stream", "av.video.reformatter", *_ENCODINGS)
_FOR_IMAGES = (
    *("PIL.Image", "PIL.ImageOps", "PIL.PpmImagePlugin", *_ENCODINGS),
    *(f"PIL.{name}ImagePlugin" for name in ("Png", "Jpeg", "Mpo", "WebP", "Avif", "Bmp", "Gif", "Tiff")),
)
_FOR_FEW = (
    *_FOR_VIDEOS,
    *_FOR_IMAGES,
    *("PIL.ImageCms", "PIL.ImageSequence", "PIL.ImageFile", "numpy", "encodings.idna", "encodings.cp437"),
)


def choose_times(header: Header, request: dict[str, Any]) -> list[float]:
    """Wanted times in seconds, ascending. Raises VideoError for times the video does not have."""
    if header.kind == "image":
        return [0.0]
    end = header.duration_s
    if request["at_s"] is not None:
        times = sorted(request["at_s"])
    else:
        first = request["start_s"] or 0.0
        last = request["end_s"] if request["end_s"] is not None else max(header.claimed_s, end)
        if not header.lies:
            last = min(last, end)
        if first < 0 or last < first or (first >= end > 0):
            raise VideoError(f"the part from {first:g} to {last:g} s is not in it; it lasts {end:.2f} s")
        times = spread_times(first, last, request["frames"], request["moments"])
    if times[-1] > end and header.lies:
        raise VideoError(
            f"its header says {header.claimed_s:.1f} s but it can be read only up to {end:.2f} s "
            f"(cut off or damaged); export it again or read a part of it with end_s={end:.2f}"
        )
    if times[0] < 0 or times[-1] > end + 1e-3:
        wrong = times[0] if times[0] < 0 else times[-1]
        raise VideoError(f"there is no frame at {wrong:g} s; it lasts {end:.2f} s")
    return times


def frames_of(
    path: str, header: Header, times_s: Sequence[float], size: tuple[int, int], rules: Rules, decoder: str
) -> Iterator[tuple[float, bytes | memoryview, int, bool]]:
    """(time, RGB bytes, turns, mirror) of each wanted frame, by the decoder that suits.

    `size` is upright; turns and mirror are what is still to be done (DisplayGeometry). With decoder "auto", frames that
    decord cannot deliver come from PyAV.
    """
    if header.pillow:
        yield from ((t, rgb, 0, False) for t, rgb in images.decode_image(path, header, times_s, size, rules))
        return
    if decoder == "auto" and not backends.decord_suits(path, header, times_s, rules):
        decoder = "pyav"
    done = 0
    if decoder != "pyav":
        try:
            for t, rgb in backends.decode_decord(path, header, times_s, size, rules):
                yield t, rgb, 0, False
                done += 1
            return
        except VideoError:
            if decoder == "decord":
                raise
        except Exception as error:  # decord raises bare RuntimeError, EOF and its own kinds
            if decoder == "decord":
                raise VideoError(
                    f"decord cannot read its {header.codec} frames; use decoder='auto'"
                ) from error
    raw = size if header.turns % 2 == 0 else size[::-1]
    for t, rgb in backends.decode_pyav(path, header, times_s[done:], raw, rules):
        yield t, rgb, header.turns, header.mirror


def answer(request: dict[str, Any], out: BinaryIO) -> None:
    """Serve one request. Every failure becomes one sentence in an "error" line."""
    try:
        rules = Rules(**request["rules"])
        path = request["path"]
        with open_file(path) as file:
            image = images.is_image(file.read(images.HEAD_BYTES))
        header = (images.inspect_image if image else inspect)(path, rules)
        size = fit_within(header.width, header.height, request["max_side"])
        times = choose_times(header, request) if request["frames"] else []
        if len(times) * size[0] * size[1] * 3 > request["max_bytes_out"]:
            mib = len(times) * size[0] * size[1] * 3 / 2**20
            raise VideoError(f"{len(times)} frames of {size[0]} x {size[1]} need {mib:.0f} MiB; set max_side")
        reply = {"header": asdict(header), "count": len(times), "width": size[0], "height": size[1]}
        _line(out, reply)
        if times:
            for t, rgb, turns, mirror in frames_of(path, header, times, size, rules, request["decoder"]):
                _line(out, {"time": round(t, 6), "turns": turns, "mirror": mirror})
                out.write(rgb)
    except VideoError as error:
        _line(out, {"error": str(error), "known": True})
    except ImportError as error:
        _line(out, {"error": f"reading it needs {error.name}, which is not installed", "unprepared": True})
    except MemoryError:
        _line(out, {"error": f"decoding it needs more than {request['memory_mib']} MiB; scale it down first"})
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises is one sentence for the user
        _line(out, {"error": _plain(error)})
    out.flush()


def _plain(error: Exception) -> str:
    reason = str(error).strip() or type(error).__name__
    if getattr(error, "errno", None) in (errno.ENOMEM, errno.EAGAIN) or "failed to map" in reason:
        return "decoding it needs more memory than allowed; scale it down first"
    if "truncated" in reason or isinstance(error, EOFError) or getattr(error, "errno", None) == errno.EIO:
        return "it is cut off; export or download it again"
    if type(error).__name__ in ("ArgumentError", "PermissionError", "ProtocolNotFoundError"):
        return "its container format is not allowed here or points to other files; convert it to mp4"
    if "nvalid data" in reason or "cannot identify" in reason:
        return "it is not a video or image, or is cut off before its index; export it again"
    detail = reason.splitlines()[0][:160]
    return f"it cannot be decoded ({type(error).__name__}: {detail}); convert it to h264 in mp4"


def _line(out: BinaryIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message).encode() + b"\n")


def _limit(request: dict[str, Any]) -> None:
    """Limits that the kernel enforces even if this process hangs: wall clock, memory, files written.

    A process for an untrusted file cannot raise them again, and is limited in CPU time and descriptors, too.
    None on processes: the kernel counts a user's threads with them, those of all programs together.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 1.0)  # default action: the process ends
    if resource is None:
        return
    untrusted = not request["rules"]["trusted"]
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    size = request["memory_mib"] * 2**20
    size = size if hard < 0 else min(size, hard)
    resource.setrlimit(resource.RLIMIT_AS, (size, size if untrusted else hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # decoding writes no files
    if untrusted:
        seconds = int(request["seconds"] * (os.cpu_count() or 1)) + 2
        _lower(resource.RLIMIT_CPU, seconds)
        _lower(resource.RLIMIT_NOFILE, MAX_FILES)


def _lower(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    value = value if hard < 0 else min(value, hard)
    resource.setrlimit(what, (value, value))


def _die_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _set_up_libraries() -> None:
    """What is usually said in the environment, which is empty here."""
    os.environ.clear()  # Python has added its own
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PATH="")  # decord wants some PATH
    with contextlib.suppress(AttributeError, OSError):
        arena_max = -8
        ctypes.CDLL(None).mallopt(arena_max, 2)  # glibc's: threads share memory that the limit counts


def _load(names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(ImportError):  # Pillow of another version, or without a format
            importlib.import_module(name)


def _next_request(channel: Socket | None) -> tuple[dict[str, Any], int | None] | None:
    """The next request and its file; None when the parent is gone or has asked for nothing in IDLE_S."""
    if channel is None:
        line = sys.stdin.buffer.readline()
        return (json.loads(line), None) if line else None
    if not select.select([channel], [], [], IDLE_S)[0]:
        return None
    line, beside, _, _ = channel.recvmsg(1 << 16, 64)
    while line and not line.endswith(b"\n"):
        more = channel.recv(1 << 16)
        line = line + more if more else b""
    return (json.loads(line), int.from_bytes(beside[0][2][:4], sys.byteorder)) if line else None


def _confine(request: dict[str, Any]) -> Confinement:
    """Load what reading the file needs, then confine this process for good."""
    trusted = request["rules"]["trusted"]
    if not trusted:
        with open_file(request["path"]) as file:
            image = images.is_image(file.read(images.HEAD_BYTES))
        _load(_FOR_FEW if request["load_all"] else _FOR_IMAGES if image else _FOR_VIDEOS)
    applied = confine(untrusted=not trusted, last=lambda: _limit(request))
    if os.getppid() != request["parent"] and sys.platform != "win32":
        os._exit(1)
    if trusted or not applied.seccomp:  # else the kernel ends this process with its parent
        threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    return applied


def _serve(channel: Socket | None, out: BinaryIO) -> None:
    """Answer requests; after one about an untrusted file, return."""
    applied: Confinement | None = None
    while (asked := _next_request(channel)) is not None:
        request, file = asked
        trusted = request["rules"]["trusted"]
        if channel is not None and not trusted:
            channel.close()
        if file is not None:
            request["path"] = descriptor_name(file, request["path"])
        if applied is None:
            applied = _confine(request)
        else:
            _limit(request)
        if request["contained"] and not applied.contained:
            reason = f"this machine cannot confine its decoder ({applied}); convert it elsewhere or trust it"
            _line(out, {"error": reason})
            out.flush()
        else:
            answer(request, out)
        if file is not None:
            os.close(file)
        if not trusted:
            return
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Serve requests until the parent has no more, nobody asks for IDLE_S, or the parent is gone."""
    out = os.fdopen(os.dup(1), "wb", buffering=1 << 20)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # decoders print; only frames may travel
    channel = None
    if PASSES_DESCRIPTORS:
        from _socket import AF_UNIX, SOCK_STREAM  # its Python half takes milliseconds to import
        from _socket import socket as Socket

        channel = Socket(AF_UNIX, SOCK_STREAM, 0, os.dup(0))
        os.dup2(null, 0)
    os.close(null)
    _set_up_libraries()
    with contextlib.suppress(BrokenPipeError, ConnectionError):
        _serve(channel, out)
    os._exit(0)  # decord's threads may still run: do not wait for them
