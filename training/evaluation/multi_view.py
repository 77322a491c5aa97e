"""Testing a classifier on several clips and crops of each video, as the field reports Kinetics accuracy.

Clips lie at other moments of the same segments, crops at the start, middle and end of the longer side; the
probabilities of all views are averaged (released code: 4 clips x 3 crops for Kinetics, 2 x 3 for SSv2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.errors import ConfigError, VideoError
from encoder.preprocess import preprocess
from training.data.examples import Example, ExampleSource

# Logits (B, classes) by token count, of pixels (B, 3, T, R, R).
Classify = Callable[[Tensor], Mapping[int, Tensor]]


@dataclass(frozen=True)
class ViewConfig:
    """frames x resolution of each view, and how many clips and crops of them; counts: token counts to test
    (none: those that are trained); examples: only the first so many, 0 for all."""

    frames: int = 12
    resolution: int = 224
    clips: int = 4
    crops: int = 3
    counts: tuple[int, ...] = ()
    examples: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "resolution", "clips", "crops"):
            if getattr(self, name) < 1:
                raise ConfigError(f"test.{name} must be at least 1, not {getattr(self, name)}.")


def clip_moments(frames: int, clip: int, clips: int) -> tuple[float, ...]:
    """Places 0..1 of the video: in each of `frames` equal segments at (clip + 1) / (clips + 1) of it."""
    return tuple((segment + (clip + 1) / (clips + 1)) / frames for segment in range(frames))


def square_crops(frames: Tensor, crops: int) -> list[Tensor]:
    """`crops` squares of the shorter side, spread from the start to the end of the longer: (T, S, S, 3) each.

    One crop is the centre.
    """
    height, width = frames.shape[1:3]
    side = min(height, width)
    spare = max(height, width) - side
    offsets = [spare * index // (crops - 1) for index in range(crops)] if crops > 1 else [spare // 2]
    if width >= height:
        return [frames[:, :, offset : offset + side] for offset in offsets]
    return [frames[:, offset : offset + side] for offset in offsets]


def views_of(example: Example, config: ViewConfig) -> Tensor:
    """All views of a video, (clips * crops, 3, T, R, R) normalised; raises VideoError as its media does."""
    views = []
    for clip in range(config.clips):
        moments = clip_moments(config.frames, clip, config.clips)
        loaded = example.media.load(config.frames, config.resolution, moments=moments).frames
        if len(loaded) == 1:  # an image
            loaded = loaded.expand(config.frames, -1, -1, -1)
        views += [
            preprocess(crop, config.resolution, config.resolution)
            for crop in square_crops(loaded, config.crops)
        ]
    return torch.stack(views)


@dataclass
class Accuracy:
    """How many videos were right, by token count, and which could not be read."""

    videos: int
    top1: dict[int, int]
    top5: dict[int, int]
    unreadable: dict[str, str]

    def merged(self, others: Sequence[Accuracy]) -> Accuracy:
        """This and what other ranks found."""
        total = Accuracy(self.videos, dict(self.top1), dict(self.top5), dict(self.unreadable))
        for other in others:
            total.videos += other.videos
            for mine, theirs in ((total.top1, other.top1), (total.top5, other.top5)):
                for count, right in theirs.items():
                    mine[count] = mine.get(count, 0) + right
            total.unreadable |= other.unreadable
        return total

    def shares(self) -> dict[str, float]:
        """top1_COUNT and top5_COUNT of the videos that could be read; empty when none could."""
        if not self.videos:
            return {}
        found = {f"top1_{count}": right / self.videos for count, right in self.top1.items()}
        return found | {f"top5_{count}": right / self.videos for count, right in self.top5.items()}


@torch.no_grad()
def view_accuracy(
    classify: Classify,
    source: ExampleSource,
    config: ViewConfig,
    *,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[range], Sequence[int] | range] = lambda numbers: numbers,
) -> Accuracy:
    """Accuracy over a source: per view softmax, mean over views, argmax.

    Each rank takes every `ranks`-th video. All ranks call `classify` equally often, since sharded weights
    need all of them: a rank without a video of its own runs on the last it had and does not count it.
    """
    size = min(config.examples or len(source), len(source))
    found = Accuracy(0, {}, {}, {})
    last: Tensor | None = None
    for turn in progress(range(-(-size // ranks))):
        number = turn * ranks + rank
        label = None
        if number < size:
            name = f"number {number}"
            try:
                example = source[number]
                name = example.id
                last, label = views_of(example, config), example.label
                if label is None:
                    raise VideoError("it has no label.")
            except VideoError as error:
                found.unreadable[name] = str(error)
        if last is None:
            last = torch.zeros(config.clips * config.crops, 3, config.frames, *(2 * (config.resolution,)))
        for count, logits in classify(last).items():
            if label is None:
                continue
            order = logits.float().softmax(dim=-1).mean(dim=0).argsort(descending=True)
            found.top1[count] = found.top1.get(count, 0) + int(order[0] == label)
            found.top5[count] = found.top5.get(count, 0) + int((order[:5] == label).any())
        found.videos += label is not None
    return found
