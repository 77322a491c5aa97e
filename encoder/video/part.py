"""A part of a video: from one time to another, a box on its pictures, or both.

    part = Part.of("1:02", "1:10", (0.5, 0, 1, 1))    # the right half, for eight seconds
    seen = part.seen(info)                            # what planning and pricing need to know of it

Times stay those of the whole video, and places those of the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from encoder.errors import VideoError
from encoder.video.clock import clock, interval, seconds
from encoder.video.geometry import Crop
from encoder.video.reader import Clip, VideoInfo, cropped

FRAME: Crop = (0.0, 0.0, 1.0, 1.0)
_REGION = "give x0, y0, x1, y1 as fractions of the upright picture from 0 to 1, left before right and top \
before bottom"


@dataclass(frozen=True)
class Part:
    """start_s, end_s: seconds; end None is the video's end. region: left, top, right, bottom as fractions of
    the upright, displayed picture; None is all of it."""

    start_s: float = 0.0
    end_s: float | None = None
    region: Crop | None = None

    @staticmethod
    def of(start: Any = None, end: Any = None, region: Any = None) -> Part:
        """From what people write; None leaves that out. Raises VideoError, one sentence.

        start, end: seconds, or "1:02" or "1:23:45.5". region: four fractions, or a text of them with commas.
        Pixels are refused: the same video is shown in many sizes.
        """
        start = 0.0 if start is None else start
        start_s, end_s = (seconds(start, "The start"), None) if end is None else interval(start, end)
        box = None if region is None else _box(region)
        return Part(start_s, end_s, None if box == FRAME else box)

    @property
    def timed(self) -> bool:
        """Whether it leaves out times."""
        return self.start_s > 0 or self.end_s is not None

    @property
    def whole(self) -> bool:
        """Whether it is all of a video."""
        return not self.timed and self.region is None

    @property
    def key(self) -> str:
        """What distinguishes it from other parts of one video; empty for the whole."""
        return "" if self.whole else repr((self.start_s, self.end_s, self.region))

    def range_s(self, info: VideoInfo) -> tuple[float, float]:
        """(start, end) in a video, seconds; up to a second beyond its end is its end, as clocks round up.

        Raises VideoError where the video has no such part.
        """
        if not self.timed:
            return 0.0, info.duration_s
        if info.kind == "image":
            raise VideoError("A picture has no times: leave start and end out.")
        end_s = info.duration_s if self.end_s is None else self.end_s
        missing = self.start_s if self.start_s >= info.duration_s else end_s
        if self.start_s >= info.duration_s or end_s > math.ceil(info.duration_s):
            raise VideoError(
                f"The part asked about lies beyond the video's end: there is nothing at {clock(missing)}, it "
                f"lasts {clock(info.duration_s)}."
            )
        return self.start_s, min(end_s, info.duration_s)

    def seen(self, info: VideoInfo) -> VideoInfo:
        """The part as if it were a video of its own, under a digest of its own; raises as `range_s`."""
        start_s, end_s = self.range_s(info)
        if self.whole:
            return info
        left, top, right, bottom = self.region or FRAME
        share = (end_s - start_s) / info.duration_s if info.duration_s else 1.0
        return PartInfo(
            **{
                **vars(info),
                "width": max(1, round(info.width * (right - left))),
                "height": max(1, round(info.height * (bottom - top))),
                "duration_s": end_s - start_s,
                "frames": None if info.frames is None else max(1, round(info.frames * share)),
                "digest": f"{info.digest}{self.key}",
            },
            decoded_pixels=info.width * info.height,
        )

    def of_clip(self, clip: Clip) -> Clip:
        """The part of a clip that is in memory: its frames shown from start to end, cut to the region."""
        start_s, end_s = self.range_s(clip.info)
        chosen = [index for index, time_s in enumerate(clip.times_s) if start_s <= time_s < end_s]
        if not chosen:  # the one on screen meanwhile
            chosen = [max((i for i, t in enumerate(clip.times_s) if t <= start_s), default=0)]
        frames = clip.frames if len(chosen) == len(clip.times_s) else clip.frames[chosen]
        return replace(
            clip, frames=cropped(frames, self.region), times_s=tuple(clip.times_s[i] for i in chosen)
        )


WHOLE = Part()


@dataclass(frozen=True)
class PartInfo(VideoInfo):
    """What is known of a part. decoded_pixels: of a whole frame, since that is what is decoded."""

    decoded_pixels: int = 0

    @property
    def pixels(self) -> int:
        return self.decoded_pixels


def _box(region: Any) -> Crop:
    values = region.split(",") if isinstance(region, str) else region
    if isinstance(values, (bytes, dict)) or not isinstance(values, Sequence) or len(values) != 4:
        raise VideoError(f"The region cannot be {repr(region)[:60]}; {_REGION}.")
    try:
        left, top, right, bottom = (float("nan") if isinstance(v, bool) else float(v) for v in values)
    except (TypeError, ValueError, OverflowError):
        raise VideoError(f"The region cannot be {repr(region)[:60]}; {_REGION}.") from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise VideoError(f"The region cannot be {repr(region)[:60]}; {_REGION}.")
    return left, top, right, bottom
