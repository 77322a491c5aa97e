"""What a decoding child answers, read from its pipe: frames, a part of the file, or sound.

The child may have been taken over by the file it read. Everything the parent takes from its answer (sizes,
counts, times, texts) is checked here; an answer that no honest decoder gives raises `ProtocolError`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from functools import lru_cache
from types import UnionType
from typing import IO, Any, BinaryIO, get_origin, get_type_hints

import torch
from torch import Tensor

from encoder.errors import VideoError
from encoder.video.containers import Header
from encoder.video.protocol import CutPart, Request
from encoder.video.sound_decoder import SAMPLE_BYTES

MAX_LINE = 1 << 16
MAX_TEXT = 300
_LARGEST = 1 << 53  # whole numbers up to here are exact in JSON
_WORD = re.compile(r"[\w.,+-]{0,64}", re.ASCII)
_PATH = re.compile(r"""(?<![\w./])(?:[A-Za-z]:|fd:\d|~)?[\\/](?:[^\s'"\\/]+[\\/])*[^\s'",;]*""")
BLOCK_BYTES = 1 << 20  # of a part that is written on at a time


class ProtocolError(VideoError):
    """The child's answer cannot be that of an honest decoder."""

    def __init__(self) -> None:
        super().__init__("its decoder gave an impossible answer; the file is not safe to use")


class LibraryNotLoaded(VideoError):
    """The child needed a library that it had not loaded before it confined itself."""


@dataclass(frozen=True)
class Decoded:
    """frames: uint8 (T, H, W, 3), upright; times_s: presentation times of these T frames, seconds."""

    header: Header
    frames: Tensor
    times_s: tuple[float, ...]


class Answer:
    """What comes out of a child's pipe after one request.

    refused: the child ended its answer with a sentence about the file, as the protocol says, and could serve
    another request.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self.refused = False

    def message(self) -> dict[str, Any]:
        """The next line as a dict. Raises VideoError for the child's own error, EOFError at the end."""
        line = self._pipe.readline(MAX_LINE)
        if not line:
            raise EOFError
        if not line.endswith(b"\n"):
            raise ProtocolError if len(line) == MAX_LINE else EOFError
        message = parse(line)
        if "error" in message:
            self.refused = message.get("known") is True
            kind = LibraryNotLoaded if message.get("not_loaded") is True else VideoError
            raise kind(error_text(message))
        return message

    def fill(self, target: Tensor) -> None:
        """The bytes that follow, as many as a tensor of uint8 holds. Raises EOFError where they end early."""
        view = memoryview(target.view(-1).numpy().data)
        while len(view):
            count = self._pipe.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            view = view[count:]


def read_frames(answer: Answer, request: Request) -> Decoded:
    """The frames that a request asks for. Raises VideoError."""
    reply = read_reply(answer.message(), request)
    frames = torch.empty((reply.count, reply.height, reply.width, 3), dtype=torch.uint8)
    times = []
    for frame in frames:
        message = answer.message()
        turns, mirror = read_rotation(message)
        if turns or mirror:  # PyAV does not turn frames, decord has done so
            shape = (reply.width, reply.height, 3) if turns % 2 else frame.shape
            stored = torch.empty(shape, dtype=torch.uint8)
            answer.fill(stored)
            frame.copy_((stored.flip(1) if mirror else stored).rot90(turns, (0, 1)))
        else:
            answer.fill(frame)
        times.append(read_time(message))
    return Decoded(reply.header, frames, tuple(times))


def read_part(answer: Answer, request: Request, out: BinaryIO) -> CutPart:
    """The file of a part that a request asks to cut, written to `out`. Raises VideoError."""
    part, size = part_of(answer.message(), request)
    block = torch.empty(min(size, BLOCK_BYTES), dtype=torch.uint8)
    while size:
        piece = block[: min(size, len(block))]
        answer.fill(piece)
        out.write(piece.numpy().data)
        size -= len(piece)
    return part


def read_sound(answer: Answer, request: Request) -> bytearray:
    """The samples of 16 bits that a request asks for. Raises VideoError."""
    sound = bytearray()
    while samples := _whole(answer.message().get("samples")):  # a piece of none ends them
        if len(sound) + samples * SAMPLE_BYTES > request.max_bytes:
            raise ProtocolError
        piece = torch.empty(samples * SAMPLE_BYTES, dtype=torch.uint8)
        answer.fill(piece)
        sound += piece.numpy().data
    return sound


# -- what is believed of a message --------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What precedes the frames: `count` of them follow, each height x width."""

    header: Header
    count: int
    height: int
    width: int


def parse(line: bytes) -> dict[str, Any]:
    """One line of the child as a dict. Raises ProtocolError."""
    try:
        message = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError from error
    if not isinstance(message, dict):
        raise ProtocolError
    return message


def error_text(message: dict[str, Any]) -> str:
    """The child's error as one printable line without paths. Raises ProtocolError when it is no text."""
    text = message["error"]
    if not isinstance(text, str):
        raise ProtocolError
    return clean(text)


def clean(text: str) -> str:
    """One printable line of at most MAX_TEXT characters that names no file of this machine."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 8 * MAX_TEXT]).split())
    line = _PATH.sub("the file", line)
    return line[:MAX_TEXT].rstrip(" .") or "its decoder gave no reason"


def read_reply(message: dict[str, Any], request: Request) -> Reply:
    """The answer that precedes the frames. Raises ProtocolError where it does not fit the request."""
    header = _header(message.get("header"), request)
    count, height, width = (_whole(message.get(key)) for key in ("count", "height", "width"))
    fits = (
        count <= request.max_frames
        and 0 < width <= header.width
        and 0 < height <= header.height
        and (request.max_side is None or max(width, height) <= request.max_side)
        and count * height * width * 3 <= request.max_bytes
    )
    if not fits:
        raise ProtocolError
    return Reply(header, count, height, width)


def part_of(message: dict[str, Any], request: Request) -> tuple[CutPart, int]:
    """The answer that precedes the bytes of a cut part: what it is, how many bytes follow.

    Raises ProtocolError where it does not fit the request.
    """
    _header(message.get("header"), request)
    size = _whole(message.get("size"))
    start_s, end_s, sound = (message.get(key) for key in ("start_s", "end_s", "sound"))
    part = CutPart(_number(start_s), _number(end_s), sound is True)
    if not 0 < size <= request.max_bytes or not 0 <= part.start_s <= part.end_s:
        raise ProtocolError
    return part, size


def read_time(message: dict[str, Any]) -> float:
    """Presentation time of the frame that follows, seconds from 0 up. Raises ProtocolError."""
    time = _number(message.get("time"))
    if time < 0:
        raise ProtocolError
    return time


def read_rotation(message: dict[str, Any]) -> tuple[int, bool]:
    """(turns, mirror) that the frame that follows still needs. Raises ProtocolError."""
    turns, mirror = _whole(message.get("turns")), message.get("mirror", False)
    if turns > 3 or not isinstance(mirror, bool):
        raise ProtocolError
    return turns, mirror


def _header(value: Any, request: Request) -> Header:
    """A Header from all of its fields and no others, each of its type."""
    kinds = _header_kinds()
    names = [field.name for field in fields(Header)]
    if not isinstance(value, dict) or set(value) != set(names):
        raise ProtocolError
    header = Header(**{name: _typed(value[name], kinds[name]) for name in names})
    possible = (
        header.kind in ("video", "image")
        and 0 < header.width * header.height <= request.rules.max_pixels
        and header.turns <= 3
        and header.duration_s >= 0
    )
    if not possible:
        raise ProtocolError
    return header


@lru_cache(maxsize=1)
def _header_kinds() -> dict[str, Any]:
    return get_type_hints(Header)


def _typed(value: Any, kind: Any) -> Any:
    """A JSON value as the field's type: bounded numbers, short words, short rows of numbers."""
    options = kind.__args__ if isinstance(kind, UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    if isinstance(value, bool) and bool in options:
        return value
    if isinstance(value, str) and str in options and _WORD.fullmatch(value):
        return value
    if isinstance(value, list) and len(value) <= 64 and any(get_origin(o) is tuple for o in options):
        return tuple(_number(item) for item in value)
    if float in options:
        return _number(value)
    if int in options:
        return _whole(value)
    raise ProtocolError


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise ProtocolError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ProtocolError
    if not math.isfinite(value) or abs(value) > _LARGEST:
        raise ProtocolError
    return float(value)


def _no_constant(name: str) -> float:
    raise ValueError(name)
