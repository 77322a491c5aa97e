"""Messages between the reader and a decoding child: one JSON line each, beside the bytes of what was decoded.

Nothing is pickled. What the parent makes of the child's answers is in replies.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from encoder.video.geometry import Crop
from encoder.video.limits import Rules


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
class CutPart:
    """What was cut. start_s, end_s: in seconds of the whole video. sound: whether its sound came along."""

    start_s: float
    end_s: float
    sound: bool


def write_message(out: BinaryIO, message: dict[str, Any]) -> None:
    """Send one message, in the child."""
    out.write(json.dumps(message).encode() + b"\n")
