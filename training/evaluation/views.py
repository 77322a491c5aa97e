"""Multi-view testing: several clips and crops of each video, and the mean of their probabilities.

Of several clips each takes one frame in each of F equal parts of the video, at (clip + 1) / (clips + 1) of
the part; a single clip takes the middles. Crops are squares of the shorter side, spread along the longer one.
Released code: 4 clips x 3 crops for Kinetics, 2 x 3 for SSv2.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from encoder.errors import ConfigError, VideoError
from encoder.preprocess import preprocess
from training.data.examples import Example, ExampleSource
from training.evaluation.metrics import top_k


@dataclass(frozen=True)
class Views:
    """clips x crops of each video. fit: how a frame becomes square when there is one crop."""

    clips: int = 1
    crops: int = 1
    fit: str = "squash"

    def __post_init__(self) -> None:
        if self.clips < 1 or self.crops < 1:
            raise ConfigError(f"Views are at least 1 clip and 1 crop, not {self.clips} x {self.crops}.")
        if self.fit not in ("squash", "crop"):
            raise ConfigError(f"fit must be 'squash' or 'crop', not {self.fit!r}.")

    def __str__(self) -> str:
        return f"{self.clips}x{self.crops}"

    def moments(self, clip: int, frames: int) -> list[float]:
        """Where the frames of a clip lie, from 0 to 1 of the video."""
        return [(part + (clip + 1) / (self.clips + 1)) / frames for part in range(frames)]

    def load(self, example: Example, frames: int, side: int) -> list[Tensor]:
        """All views of a video, each (3, frames, side, side), clips outermost; a still is repeated.

        Raises VideoError as the example's media does.
        """
        views = []
        for clip in range(self.clips):
            moments = self.moments(clip, frames) if self.clips > 1 else None
            pictures = example.media.load(frames, side, moments=moments).frames
            if len(pictures) == 1:
                pictures = pictures.expand(frames, -1, -1, -1)
            if self.crops == 1:
                views.append(preprocess(pictures, side, side, fit=self.fit))  # type: ignore[arg-type]
            else:
                views += [preprocess(crop, side, side) for crop in square_crops(pictures, self.crops)]
        return views


def square_crops(frames: Tensor, crops: int) -> list[Tensor]:
    """`crops` squares of the shorter side S, spread from the start to the end of the longer: (T, S, S, 3)
    each. A single crop is the centre."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    spare = max(height, width) - side
    offsets = [spare * index // (crops - 1) for index in range(crops)] if crops > 1 else [spare // 2]
    if width >= height:
        return [frames[:, :, offset : offset + side] for offset in offsets]
    return [frames[:, offset : offset + side] for offset in offsets]


def mean_probabilities(logits: Tensor) -> Tensor:
    """(V, C) class scores of the views of one video -> (C,) mean of their softmaxes."""
    return logits.float().softmax(dim=-1).mean(dim=0)


@dataclass(frozen=True)
class LoadedViews:
    """What could be read of some examples. places: which of them; views: pixels of each; missing: reasons by
    place."""

    places: list[int] = field(default_factory=list)
    views: list[list[Tensor]] = field(default_factory=list)
    missing: dict[int, str] = field(default_factory=dict)


def load_views(
    examples: Sequence[Example], frames: int, side: int, views: Views, workers: int = 1
) -> LoadedViews:
    """The views of some examples, decoded by `workers` threads; what cannot be read is named instead."""

    def load(example: Example) -> list[Tensor] | str:
        try:
            return views.load(example, frames, side)
        except VideoError as error:
            return str(error)

    loaded = LoadedViews()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for place, pixels in enumerate(pool.map(load, examples)):
            if isinstance(pixels, str):
                loaded.missing[place] = pixels
            else:
                loaded.places.append(place)
                loaded.views.append(pixels)
    return loaded


# -- during and after training: shared out over ranks -------------------------------------------------------


@dataclass(frozen=True)
class ViewConfig:
    """The `test` part of a recipe: frames x resolution of each view, and how many clips and crops of them.

    num_tokens: kept tokens to test (none: those trained). examples: only the first so many, 0 for all.
    """

    renamed: ClassVar[dict[str, str]] = {"counts": "num_tokens"}

    frames: int = 12
    resolution: int = 224
    clips: int = 4
    crops: int = 3
    num_tokens: tuple[int, ...] = ()
    examples: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "resolution", "clips", "crops"):
            if getattr(self, name) < 1:
                raise ConfigError(f"test.{name} must be at least 1, not {getattr(self, name)}.")

    def load(self, example: Example) -> Tensor:
        """All views of a video, (clips * crops, 3, T, R, R); raises VideoError as its media does."""
        return torch.stack(Views(self.clips, self.crops, "crop").load(example, self.frames, self.resolution))


@dataclass
class Accuracy:
    """How many videos were right, by token count, and which could not be read."""

    videos: int
    top1: dict[int, int]
    top5: dict[int, int]
    unreadable: dict[str, str]

    def merged(self, others: Sequence[Accuracy]) -> Accuracy:
        """This and the counts of other ranks."""
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
        first = {f"top1_{count}": right / self.videos for count, right in self.top1.items()}
        return first | {f"top5_{count}": right / self.videos for count, right in self.top5.items()}


VIEWS_AT_ONCE = 32


@torch.no_grad()
def view_accuracy(
    classify: Callable[[Tensor], Mapping[int, Tensor]],
    source: ExampleSource,
    config: ViewConfig,
    *,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[range], Sequence[int] | range] = lambda numbers: numbers,
) -> Accuracy:
    """Accuracy over a source. classify: pixels (V, 3, T, R, R) -> logits (V, classes) by token count.

    Each rank takes every `ranks`-th video. Several go through the encoder together, up to VIEWS_AT_ONCE
    views. All ranks call `classify` equally often, since sharded weights need all of them: a place without a
    video is zeros, which do not count.
    """
    size = min(config.examples or len(source), len(source))
    views = config.clips * config.crops
    together = max(1, VIEWS_AT_ONCE // views)
    accuracy = Accuracy(0, {}, {}, {})
    shape = (views, 3, config.frames, config.resolution, config.resolution)

    def load(turn: int) -> tuple[Tensor, int | None]:
        number = turn * ranks + rank
        name = f"number {number}"
        try:
            if number < size:
                example = source[number]
                name = example.id
                if example.label is None:
                    raise VideoError("it has no label.")
                return config.load(example), example.label
        except VideoError as error:
            accuracy.unreadable[name] = str(error)
        return torch.zeros(shape), None

    turns = -(-size // ranks)
    with ThreadPoolExecutor(min(together, os.cpu_count() or 1)) as pool:
        for first in progress(range(0, turns, together)):
            loaded = list(pool.map(load, range(first, min(first + together, turns))))
            for count, logits in classify(torch.cat([pixels for pixels, _ in loaded])).items():
                for (_, label), of_video in zip(loaded, logits.split(views), strict=True):
                    if label is None:
                        continue
                    scores = mean_probabilities(of_video)[None].cpu()
                    for right, k in ((accuracy.top1, 1), (accuracy.top5, 5)):
                        right[count] = right.get(count, 0) + _is_right(scores, label, k)
            accuracy.videos += sum(label is not None for _, label in loaded)
    return accuracy


def _is_right(scores: Tensor, label: int, k: int) -> bool:
    """Whether a label is among the first k of scores (1, C); one that is no class of theirs never is."""
    return 0 <= label < scores.shape[1] and bool(top_k(scores, torch.tensor([label]), k))
