"""Views: which frames and which part of the picture a test looks at, and loading them for a block of items.

Of several clips each takes one frame in each of F equal parts, at (clip + 1) / (clips + 1) of the part; one
clip takes the middles. Of several crops each is a square along the longer side, at its start, middle and end.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from encoder.errors import ConfigError, VideoError
from encoder.preprocess import preprocess
from training.data.examples import Example
from training.evaluation.encoder_input import Setting


@dataclass(frozen=True)
class Views:
    """clips x crops of each video. fit: without crops, how a frame becomes square."""

    clips: int = 1
    crops: int = 1
    fit: str = "squash"

    def __post_init__(self) -> None:
        if self.clips < 1 or self.crops not in (1, 3):
            raise ConfigError(f"Views are at least 1 clip and 1 or 3 crops, not {self.clips} x {self.crops}.")
        if self.fit not in ("squash", "crop"):
            raise ConfigError(f"fit must be 'squash' or 'crop', not {self.fit!r}.")

    def __str__(self) -> str:
        return f"{self.clips}x{self.crops}"

    def moments(self, clip: int, frames: int) -> list[float]:
        """Where the frames of a clip lie, from 0 to 1 of the video."""
        return [(part + (clip + 1) / (self.clips + 1)) / frames for part in range(frames)]

    def load(self, example: Example, setting: Setting) -> list[Tensor]:
        """All views of a video, each (3, T, R, R), clips outermost. Raises VideoError."""
        side, out = setting.resolution, []
        for clip in range(self.clips):
            moments = self.moments(clip, setting.frames) if self.clips > 1 else None
            frames = example.media.load(setting.frames, side, moments=moments).frames
            if self.crops == 1:
                out.append(preprocess(frames, side, side, fit=self.fit))  # type: ignore[arg-type]
            else:
                out += [preprocess(crop, side, side) for crop in squares(frames)]
        return out


def squares(frames: Tensor) -> list[Tensor]:
    """(T, H, W, 3) -> three squares of the shorter side: at the start, middle and end of the longer one."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    out = []
    for part in range(3):
        top, left = (height - side) * part // 2, (width - side) * part // 2
        out.append(frames[:, top : top + side, left : left + side])
    return out


@dataclass(frozen=True)
class Loaded:
    """What could be read of a block. places: which of its items; views: pixels of each; missing: why not."""

    places: list[int] = field(default_factory=list)
    views: list[list[Tensor]] = field(default_factory=list)
    missing: dict[int, str] = field(default_factory=dict)


def load_block(examples: Sequence[Example], setting: Setting, views: Views, workers: int = 1) -> Loaded:
    """The views of some examples; what cannot be read is named instead."""

    def one(example: Example) -> list[Tensor] | str:
        try:
            return views.load(example, setting)
        except VideoError as error:
            return str(error)

    loaded = Loaded()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for place, found in enumerate(pool.map(one, examples)):
            if isinstance(found, str):
                loaded.missing[place] = found
            else:
                loaded.places.append(place)
                loaded.views.append(found)
    return loaded
