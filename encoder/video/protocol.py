"""What a decoding child says, read as what a stranger says: it may have been taken over by the file it read.

Everything the parent believes of a child's answer passes here: sizes, counts, times, texts. A child that lies
ends in one sentence (`ProtocolError`).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from functools import lru_cache
from types import UnionType
from typing import Any, get_origin, get_type_hints

from encoder.errors import VideoError
from encoder.video.containers import Header

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
class Reply:
    """header: the fields of a Header, each of its type; count frames of height x width follow."""

    header: dict[str, Any]
    count: int
    height: int
    width: int


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


def read_reply(message: dict[str, Any], request: dict[str, Any]) -> Reply:
    """The answer that precedes the frames. Raises ProtocolError where it does not fit the request."""
    header = _header(message.get("header"), request)
    count, height, width = (_whole(message.get(key)) for key in ("count", "height", "width"))
    fits = (
        count <= request["max_count"]
        and 0 < width <= header["width"]
        and 0 < height <= header["height"]
        and (request["max_side"] is None or max(width, height) <= request["max_side"])
        and count * height * width * 3 <= request["max_bytes_out"]
    )
    if not fits:
        raise ProtocolError
    return Reply(header, count, height, width)


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


def _header(found: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Header, no more and no less, each of its type."""
    kinds = _header_kinds()
    names = [field.name for field in fields(Header)]
    if not isinstance(found, dict) or set(found) != set(names):
        raise ProtocolError
    header = {name: _typed(found[name], kinds[name]) for name in names}
    pixels = header["width"] * header["height"]
    possible = (
        header["kind"] in ("video", "image")
        and 0 < pixels <= request["rules"]["max_pixels"]
        and header["turns"] <= 3
        and header["duration_s"] >= 0
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
