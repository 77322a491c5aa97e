"""The decoding child process: reads requests from stdin, writes frames to stdout, nothing else.

Protocol (protocol.py, read in replies.py), all lengths known beforehand, nothing pickled:
  request  one JSON line and, beside it, the descriptor of the file
  reply    one JSON line {"header": ..., "count", "height", "width"} or {"error": "one sentence"},
           then `count` times: one JSON line {"time": seconds, ...} and height x width x 3 bytes,
           or {"error": ...} where the frames stop; "known" there says that only the file is at fault.
  of sound: as often as it takes {"samples": n} and n samples of 16 bits; 0 of them are its end.
  of a part to cut: {"header": ..., "start_s", "end_s", "sound", "size"}, then `size` bytes: its file.

Imports come first, then the request, then this process confines itself for good, then the file is read. After
an untrusted file the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, BinaryIO

from encoder.errors import VideoError
from encoder.video import images
from encoder.video.backends import decode_frames
from encoder.video.confine import Confinement, confine
from encoder.video.containers import Header, inspect
from encoder.video.descriptors import PASSES_DESCRIPTORS, descriptor_name
from encoder.video.frame_times import requested_times
from encoder.video.geometry import cut_to, fit_within
from encoder.video.protocol import Request, write_message
from encoder.video.remux import copy_part
from encoder.video.sound_decoder import SAMPLE_BYTES, decode_sound

try:  # here, since nothing can be loaded when the limits are set
    import resource
except ImportError:  # not a Unix system: the parent's clock remains
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from _socket import socket as Socket

IDLE_S = 10.0  # a worker that nobody asks for this long ends itself
MAX_FILES = 64  # descriptors of a process that can open nothing

# What reading an untrusted file imports: nothing can be loaded once the process is confined. A file that
# needs more (transparent videos, images of 16 bits) is read again by a process that has imported all of it.
_ENCODINGS = tuple(f"encodings.{name}" for name in ("ascii", "latin_1", "utf_8", "utf_16"))
_VIDEO_MODULES = ("av", "av.error", "av.logging", "av.subtitles.stream", "av.video.reformatter", *_ENCODINGS)
_IMAGE_MODULES = (
    *("PIL.Image", "PIL.ImageOps", "PIL.PpmImagePlugin", *_ENCODINGS),
    *(f"PIL.{name}ImagePlugin" for name in ("Png", "Jpeg", "Mpo", "WebP", "Avif", "Bmp", "Gif", "Tiff")),
)
_ALL_MODULES = (
    *_VIDEO_MODULES,
    *_IMAGE_MODULES,
    *("PIL.ImageCms", "PIL.ImageSequence", "PIL.ImageFile", "numpy", "encodings.idna", "encodings.cp437"),
)


def answer(request: Request, out: BinaryIO) -> None:
    """Serve one request. Every failure becomes one sentence in an "error" line."""
    try:
        path, rules = request.path, request.rules
        header = (images.inspect_image if images.is_image_file(path) else inspect)(path, rules)
        if request.cut:
            _answer_part(request, header, out)
            return
        if request.sound:
            _answer_sound(request, header, out)
            return
        shown = header if request.region is None else cut_to(header, request.region)
        size = fit_within(shown.width, shown.height, request.max_side)
        times = requested_times(header, request) if request.frames else []
        if len(times) * size[0] * size[1] * 3 > request.max_bytes:
            mib = len(times) * size[0] * size[1] * 3 / 2**20
            raise VideoError(f"{len(times)} frames of {size[0]} x {size[1]} need {mib:.0f} MiB; set max_side")
        reply = {"header": asdict(header), "count": len(times), "width": size[0], "height": size[1]}
        write_message(out, reply)
        if times:
            for t, rgb, turns, mirror in decode_frames(path, shown, times, size, rules, request.decoder):
                write_message(out, {"time": round(t, 6), "turns": turns, "mirror": mirror})
                out.write(rgb)
    except VideoError as error:
        write_message(out, {"error": str(error), "known": True})
    except ImportError as error:
        write_message(
            out, {"error": f"reading it needs {error.name}, which is not installed", "not_loaded": True}
        )
    except MemoryError:
        write_message(
            out, {"error": f"decoding it needs more than {request.memory_mib} MiB; scale it down first"}
        )
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises is one sentence for the user
        write_message(out, {"error": _sentence(error)})
    finally:
        out.flush()


def _answer_part(request: Request, header: Header, out: BinaryIO) -> None:
    """Copy a part of a video into a file and send that."""
    start_s, end_s = request.start_s or 0.0, header.duration_s if request.end_s is None else request.end_s
    part, content = copy_part(
        request.path, header, start_s, end_s, request.cut, request.max_bytes // 3, request.rules
    )
    write_message(out, {"header": asdict(header), **asdict(part), "size": len(content)})
    out.write(content)


def _answer_sound(request: Request, header: Header, out: BinaryIO) -> None:
    """Send the samples as they are decoded; a piece of none ends them."""
    start_s, end_s = request.start_s or 0.0, header.duration_s if request.end_s is None else request.end_s
    for piece in decode_sound(request.path, header, start_s, min(end_s, header.duration_s), request.rules):
        write_message(out, {"samples": len(piece) // SAMPLE_BYTES})
        out.write(piece)
    write_message(out, {"samples": 0})


def _sentence(error: Exception) -> str:
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


def _limit(request: Request) -> None:
    """Limits that the kernel enforces even if this process hangs: wall clock, memory, files written.

    A process for an untrusted file cannot raise them again, and is limited in CPU time and descriptors, too.
    None on processes: the kernel counts a user's threads with them, those of all programs together.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, request.seconds + 1.0)  # default action: the process ends
    if resource is None:
        return
    untrusted = not request.rules.trusted
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    size = request.memory_mib * 2**20
    size = size if hard < 0 else min(size, hard)
    resource.setrlimit(resource.RLIMIT_AS, (size, size if untrusted else hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # decoding writes no files
    if untrusted:
        seconds = int(request.seconds * (os.cpu_count() or 1)) + 2
        _lower(resource.RLIMIT_CPU, seconds)
        _lower(resource.RLIMIT_NOFILE, MAX_FILES)


def _lower(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard < 0 else min(value, hard)
    resource.setrlimit(limit, (value, value))


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


def _next_request(channel: Socket | None) -> tuple[Request, int | None] | None:
    """The next request and its file; None when the parent is gone or has asked for nothing in IDLE_S."""
    if channel is None:
        line = sys.stdin.buffer.readline()
        return (Request.from_line(line), None) if line else None
    if not select.select([channel], [], [], IDLE_S)[0]:
        return None
    line, ancillary, _, _ = channel.recvmsg(1 << 16, 64)
    while line and not line.endswith(b"\n"):
        more = channel.recv(1 << 16)
        line = line + more if more else b""
    return (Request.from_line(line), int.from_bytes(ancillary[0][2][:4], sys.byteorder)) if line else None


def _confine(request: Request) -> Confinement:
    """Load what reading the file needs, then confine this process for good."""
    trusted = request.rules.trusted
    if not trusted:
        modules = _IMAGE_MODULES if images.is_image_file(request.path) else _VIDEO_MODULES
        _load(_ALL_MODULES if request.load_all else modules)
    gc.freeze()
    gc.enable()  # it is off from the start, for faster imports
    applied = confine(untrusted=not trusted, last=lambda: _limit(request))
    if os.getppid() != request.parent and sys.platform != "win32":
        os._exit(1)
    if trusted or not applied.seccomp:  # else the kernel ends this process with its parent
        threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    return applied


def _serve(channel: Socket | None, out: BinaryIO) -> None:
    """Answer requests; after one about an untrusted file, return."""
    applied: Confinement | None = None
    while (received := _next_request(channel)) is not None:
        request, file = received
        trusted = request.rules.trusted
        if channel is not None and not trusted:
            channel.close()
        if file is not None:
            request = replace(request, path=descriptor_name(file, request.path))
        if applied is None:
            applied = _confine(request)
        else:
            _limit(request)
        if request.contained and not applied.contained:
            reason = f"this machine cannot confine its decoder ({applied}); convert it elsewhere or trust it"
            write_message(out, {"error": reason})
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
