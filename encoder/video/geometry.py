"""Display geometry: crop, pixel aspect ratio and orientation that turn a stored frame into the one shown.

As players do it: the crop of the container (clap in mp4, PixelCrop in Matroska), then square pixels with the
height kept, then the display matrix. The matrix is rounded to the nearest of the eight orientations that
quarter turns and a mirror can give; a frame at 45 degrees stays as it is stored, scale and shear do not
count. Runs in the decoding child; imports neither torch nor numpy.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

MAX_ASPECT = 16  # a pixel aspect ratio beyond this or its inverse is an error of the file: pixels are square
Crop = tuple[float, float, float, float]


@dataclass(frozen=True)
class DisplayGeometry:
    """Display size in square, upright pixels, and how a stored frame becomes so.

    A frame becomes upright by mirroring it left to right where `mirror` says so, then by `turns` quarter
    turns counter-clockwise. crop: left, top, right, bottom of the part shown as shares of the stored
    frame; None is all of it. plain: quarter turns are all that is needed, so that decord can read it.
    """

    width: int
    height: int
    turns: int = 0
    mirror: bool = False
    crop: Crop | None = None
    plain: bool = True


G = TypeVar("G", bound="DisplayGeometry")


def display_geometry(frame: Any, stream: Any, crop: Crop | None) -> DisplayGeometry:
    """DisplayGeometry of a decoded frame of a PyAV stream."""
    width, height = frame.width, frame.height
    if crop is not None:
        left, top, right, bottom = crop
        width, height = max(1, round(width * (right - left))), max(1, round(height * (bottom - top)))
    aspect = stream.sample_aspect_ratio
    if aspect and 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        width = max(1, round(width * aspect))
    turns, mirror, exact = _rotation(frame, stream)
    if turns % 2:
        width, height = height, width
    return DisplayGeometry(width, height, turns, mirror, crop, exact and not mirror and crop is None)


def cut_to(shape: G, region: Crop) -> G:
    """The geometry of a region of what `shape` shows, left, top, right, bottom as shares of it, upright."""
    left, top, right, bottom = region
    size = max(1, round(shape.width * (right - left))), max(1, round(shape.height * (bottom - top)))
    for _ in range(shape.turns):  # back to the frame as it is stored
        left, top, right, bottom = 1 - bottom, left, 1 - top, right
    if shape.mirror:
        left, right = 1 - right, 1 - left
    x0, y0, x1, y1 = shape.crop or (0.0, 0.0, 1.0, 1.0)
    across, down = x1 - x0, y1 - y0
    crop = x0 + left * across, y0 + top * down, x0 + right * across, y0 + bottom * down
    return replace(shape, width=size[0], height=size[1], crop=crop, plain=False)


def nearest_rotation(matrix: Sequence[float]) -> tuple[int, bool, bool]:
    """(turns, mirror, exact) that come nearest to a 3 x 3 display matrix; exact: nothing was rounded."""
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]  # steps right and down go to (a, b), (c, d)
    across, down = math.hypot(a, b), math.hypot(c, d)
    if not across or not down:
        return 0, False, False
    best, nearest = 0.0, (0, False)
    for mirror in (False, True):
        right, below = (-1, 0) if mirror else (1, 0), (0, 1)
        for turns in range(4):
            score = (a * right[0] + b * right[1]) / across + (c * below[0] + d * below[1]) / down
            if score > best + 1e-3:
                best, nearest = score, (turns, mirror)
            right, below = (right[1], -right[0]), (below[1], -below[0])
    return *nearest, best > 2 - 1e-3


def container_crop(container: Any, stream: Any) -> Crop | None:
    """The part of a stream's frames that its container says to show.

    PyAV does not expose this side data of FFmpeg's, but FFmpeg's description of the file names it.
    """
    import av.logging

    before = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        lines = container.dumps_format().splitlines()
    finally:
        av.logging.set_level(before)
    width, height, in_stream = stream.codec_context.width, stream.codec_context.height, False
    for line in lines:
        if head := re.match(r"  Stream #0:(\d+)", line):
            in_stream = int(head[1]) == stream.index
        elif in_stream and (match := re.fullmatch(r"      Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)", line)):
            left, right, top, bottom = map(int, match.groups())
            if left + right < width and top + bottom < height:
                return left / width, top / height, 1 - right / width, 1 - bottom / height
    return None


def _rotation(frame: Any, stream: Any) -> tuple[int, bool, bool]:
    """By the frame's display matrix, else by the `rotate` tag (degrees clockwise) of older files."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        return nearest_rotation(struct.unpack("=9i", bytes(matrix)[:36]))
    tag = next((value for key, value in stream.metadata.items() if key.lower() == "rotate"), "0")
    try:
        return -round(float(tag) / 90) % 4, False, True
    except (ValueError, OverflowError):
        return 0, False, True


def fit_within(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """Size with the longer side at most max_side, aspect kept, never enlarged."""
    longer = max(width, height)
    if max_side is None or longer <= max_side:
        return width, height
    return max(1, round(width * max_side / longer)), max(1, round(height * max_side / longer))
