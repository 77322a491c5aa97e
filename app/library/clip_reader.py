"""Clips of a video: equal windows of time, a few frames of each, decoded many windows at a time.

    for clip in read_clips("film.mp4", seconds=10, frames=8): clip.frames, clip.start_s, clip.end_s

Memory is bounded by a group of windows, however long the video is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from encoder.video.frame_times import middle_times
from encoder.video.part import Part
from encoder.video.reader import Decoder, probe, read_clip

WINDOWS_AT_ONCE = 16
DECODED_SIDE = 320  # pixels of the longer side


@dataclass(frozen=True)
class VideoClip:
    """A window of a video. frames: uint8 (T, H, W, 3). count: how many windows the video has."""

    number: int
    count: int
    start_s: float
    end_s: float
    frames: Tensor


def windows(duration_s: float, seconds: float) -> list[tuple[float, float]]:
    """Starts and ends in seconds: windows of `seconds`, the last one half as long to half again as long."""
    count = max(1, math.floor(duration_s / seconds + 0.5))
    edges = [seconds * number for number in range(count)]
    return list(zip(edges, [*edges[1:], duration_s], strict=True))


def read_one(source: Any, part: Part, frames: int, **how: Any) -> Tensor:
    """The frames of one clip, uint8 (frames, H, W, 3): all of a video, or a part; a picture stands still.

    source, how: as `read_clip` takes them. Raises VideoError.
    """
    found = read_clip(
        source,
        frames,
        start_s=part.start_s if part.timed else None,
        end_s=part.end_s,
        region=part.region,
        max_side=DECODED_SIDE,
        **how,
    ).frames
    return found if len(found) == frames else found[:1].expand(frames, -1, -1, -1)


def read_clips(path: str, seconds: float, frames: int) -> Iterator[list[VideoClip]]:
    """The clips of a video in groups; a picture is one clip of no length. Raises VideoError."""
    info = probe(path)
    if info.kind == "image":
        picture = read_clip(path, 1, max_side=DECODED_SIDE).frames
        yield [VideoClip(0, 1, 0.0, 0.0, picture.expand(frames, -1, -1, -1))]
        return
    spans = windows(info.duration_s, seconds)
    for first in range(0, len(spans), WINDOWS_AT_ONCE):
        group = spans[first : first + WINDOWS_AT_ONCE]
        times = [time_s for start_s, end_s in group for time_s in middle_times(start_s, end_s, frames)]
        # decord reads a file from its beginning.
        decoder: Decoder = "pyav" if first else "auto"
        decoded = read_clip(path, at_s=times, max_side=DECODED_SIDE, decoder=decoder).frames
        yield [
            VideoClip(first + place, len(spans), *span, decoded[place * frames : (place + 1) * frames])
            for place, span in enumerate(group)
        ]
