"""Messages between the reader and a decoding child: one JSON line each, and what the parent believes of them.

The child may have been taken over by the file it read. Everything the parent takes from its answer (sizes,
counts, times, texts) is checked here; an answer that no honest decoder gives raises `ProtocolError`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from types import UnionType
from typing import Any, BinaryIO, get_origin, get_type_hints

from encoder.errors import VideoError
from encoder.video.containers import Header
from encoder.video.geometry import Crop
from encoder.video.limits import Rules

MAX_LINE = 1 << 16
MAX_TEXT = 300
_LARGEST = 1 << 53  # whole numbers up to here are exact in JSON
_WORD = re.compile(r"[\w.,+-]{0,64}", re.ASCII)
_PATH = re.compile(r"""(?<![\w./])(?:[A-Za-z]:|fd:\d|~)?[\\/](?:[^\s'"\\/]+[\\/])*[^\s'",;]*""")


class ProtocolError(VideoError):
    """The child's answer cannot be that of an honest decoder."""

    def __init__(self) -> None:
        super().__init__("its decoder gave an impossible answer; the file is not safe to use")


@dataclass(frozen=True)
class Request:
    """What a child is asked about one file, whose descriptor travels beside it.

    path: the file's name, for its suffix; where descriptors cannot travel, its path. frames: 0 asks for the
    header alone. at_s, moments, start_s, end_s, region: as in `read_clip`. memory_mib: address space of the
    child and size of all frames. cut: FFmpeg's name of a container; asks for a copy of the packets from
    start_s to end_s in it, instead of frames. sound: asks for the sound of that span instead. contained:
    refuse where the child cannot confine itself. load_all: import every module that any file may need.
    parent: process number of the asking process.
    """

    path: str
    rules: Rules
    frames: int = 0
    start_s: float | None = None
    end_s: float | None = None
    at_s: tuple[float, ...] | None = None
    moments: tuple[float, ...] | None = None
    region: Crop | None = None
    max_side: int | None = None
    decoder: str = "auto"
    seconds: float = 20.0
    memory_mib: int = 3072
    contained: bool = False
    load_all: bool = False
    cut: str = ""
    sound: bool = False
    parent: int = 0

    @property
    def max_frames(self) -> int:
        """How many frames the answer may hold."""
        times = self.at_s if self.at_s is not None else self.moments
        return self.frames if times is None else len(times)

    @property
    def max_bytes(self) -> int:
        """How many bytes its frames may have."""
        return self.memory_mib * 2**20

    def to_line(self) -> bytes:
        """As it is sent."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes) -> Request:
        """The reverse of `to_line`, in the child."""
        values = json.loads(line)
        return Request(**{**values, "rules": Rules(**values["rules"])})


@dataclass(frozen=True)
class Reply:
    """What precedes the frames: `count` of them follow, each height x width."""

    header: Header
    count: int
    height: int
    width: int


@dataclass(frozen=True)
class CutPart:
    """What was cut. start_s, end_s: in seconds of the whole video. sound: whether its sound came along."""

    start_s: float
    end_s: float
    sound: bool


def write_message(out: BinaryIO, message: dict[str, Any]) -> None:
    """Send one message, in the child."""
    out.write(json.dumps(message).encode() + b"\n")


def read_message(line: bytes) -> dict[str, Any]:
    """One line of the child as a dict. Raises ProtocolError."""
    try:
        message = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError from error
    if not isinstance(message, dict):
        raise ProtocolError
    return message


def read_error(message: dict[str, Any]) -> str:
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


def read_part(message: dict[str, Any], request: Request) -> tuple[Header, CutPart, int]:
    """The answer that precedes the bytes of a cut part: header, what it is, how many bytes follow.

    Raises ProtocolError where it does not fit the request.
    """
    header, size = _header(message.get("header"), request), _whole(message.get("size"))
    start_s, end_s, sound = (message.get(key) for key in ("start_s", "end_s", "sound"))
    part = CutPart(_number(start_s), _number(end_s), sound is True)
    if not 0 < size <= request.max_bytes or not 0 <= part.start_s <= part.end_s:
        raise ProtocolError
    return header, part, size


def read_samples(message: dict[str, Any]) -> int:
    """How many samples of sound follow; 0 ends them. Raises ProtocolError."""
    return _whole(message.get("samples"))


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
