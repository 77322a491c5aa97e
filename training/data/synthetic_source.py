"""The synthetic world as training data: samples rendered when they are needed, never written to disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from encoder.errors import ConfigError
from encoder.video.reader import Clip, VideoInfo
from training.synthetic.dataset import Sample, Split, World
from training.synthetic.world_config import WorldConfig


@dataclass(frozen=True)
class WorldSource:
    """Which part of the world, how many samples, and how rich.

    first: number of the first sample. plots: in place of the preset's (see `WorldConfig`); a plot named
    twice comes twice as often.
    """

    split: Split = "train"
    count: int = 100_000
    seed: int = 0
    first: int = 0
    preset: Literal["simple", "solo", "full"] = "full"
    nouns: int | None = None
    plots: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"world.count must be at least 1, not {self.count}.")

    def open(self) -> World:
        """The world; raises DataError when its sprites were never fetched."""
        presets = {"simple": WorldConfig.simple, "solo": WorldConfig.solo, "full": WorldConfig}
        level = presets[self.preset]()
        if self.nouns is not None:
            level = replace(level, nouns=self.nouns)
        if self.plots is not None:
            level = replace(level, plots=self.plots)
        return World(self.split, self.seed, level)


def render_clip(
    world: World,
    sample: Sample,
    key: str,
    frames: int,
    resolution: int,
    moments: Sequence[float] | None = None,
) -> Clip:
    """`frames` frames from the middles of equal parts of a sample, as `read_clip` would give them.

    key: names the sample; the digest is derived from it and the world. moments: places from 0 to 1 of the
    sample's length instead of the middles.
    """
    duration = sample.scene.duration_s
    if moments is None:
        times = tuple((index + 0.5) * duration / frames for index in range(frames))
    else:
        times = tuple(sorted(moment * duration for moment in moments))
    pixels = torch.from_numpy(world.render(sample.scene, times, resolution, resolution))
    info = VideoInfo(
        kind="video",
        width=resolution,
        height=resolution,
        duration_s=duration,
        frames=len(times),
        codec="raw",
        container="world",
        rotation=0,
        digest=f"world/{world.split}/{world.seed}/{key}",
    )
    return Clip(pixels, times, info)
