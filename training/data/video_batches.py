"""Micro-batches of clips for the stages, by number.

    batches = VideoBatches(source, FlexibleGrid(), AugmentConfig(flip=0.5), 8, seed=0, out="runs/mine")
    batches.get(0).pixels    # (8, 3, F, R, R)

Decoding runs in child processes, one per thread, so that the clips of a batch are read side by side.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from encoder.errors import ConfigError, DataError
from encoder.preprocess import preprocess
from encoder.video.reader import share_cores
from training.data.augment import AugmentConfig, augment, segment_moments
from training.data.examples import Example, ExampleSource, Need
from training.data.flexible_grids import FlexibleGrid
from training.data.loader import Loader

Sampling = Literal["segments", "middle"]


@dataclass(frozen=True)
class VideoBatch:
    """examples; pixels (B, 3, F, R, R), ImageNet-normalised float32; the micro-batch's number."""

    examples: tuple[Example, ...]
    pixels: Tensor
    index: int

    @property
    def labels(self) -> Tensor:
        """int64 (B,); raises DataError when an example has none."""
        labels = [example.label for example in self.examples]
        for example in self.examples:
            if example.label is None:
                raise DataError(f"The example {example.id!r} has no label.")
        return torch.tensor(labels)


class VideoBatches:
    """Micro-batches of a source by number.

    `get(index)` depends on its number, the seed and which files can be read, on nothing else: ranks, threads
    and a resumed run agree. Each epoch has an order of its own. sampling: "segments" takes a random moment
    inside each of F equal segments (TSN), "middle" their middles. window: see `epoch_order`; None asks the
    source. threads: clips of a batch that are decoded at a time, None for one per core. repeats:
    clips of each example in a batch, drawn differently ("repeated augmentation"). Images become F equal
    frames. need: see `Loader`.
    """

    def __init__(
        self,
        source: ExampleSource,
        grid: FlexibleGrid,
        augment: AugmentConfig,
        micro_batch: int,
        seed: int,
        *,
        out: str | Path,
        max_missing: float = 0.01,
        sampling: Sampling = "segments",
        window: int | None = None,
        threads: int | None = None,
        repeats: int = 1,
        need: Need | None = None,
    ) -> None:
        if micro_batch < 1 or repeats < 1 or micro_batch % repeats:
            raise ConfigError(f"A micro-batch of {micro_batch} does not hold {repeats} clips per example.")
        self.grid, self.augment = grid, augment
        self.micro_batch, self.seed, self.sampling, self.repeats = micro_batch, seed, sampling, repeats
        # Steps that skip the batch's other examples, and yet meet every example in the end.
        least, count = micro_batch // repeats, max(1, len(source))
        stride = next(step for step in itertools.count(least) if math.gcd(step, count) == 1)
        self.loader = Loader(
            source, seed, out=out, stride=stride, max_missing=max_missing, window=window, need=need
        )
        self.threads = threads or min(micro_batch, own_cores())
        self._pool: ThreadPoolExecutor | None = None

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch; what is left over at the end of an epoch is not used."""
        return max(1, len(self.loader) * self.repeats // self.micro_batch)

    def get(self, index: int) -> VideoBatch:
        """Micro-batch `index`, counted over epochs; its grid is `grid.draw(seed, index)`.

        Raises DataError when too many media cannot be read.
        """
        frames, resolution = self.grid.draw(self.seed, index)
        return self.get_at(index, frames, resolution)

    def get_at(self, index: int, frames: int, resolution: int) -> VideoBatch:
        """As `get`, with frames and resolution that the caller chose."""
        epoch, within = divmod(index, self.micro_batches)
        distinct = self.micro_batch // self.repeats

        def load(slot: int) -> tuple[Example, Tensor]:
            position = within * distinct + slot % distinct
            rng = random.Random(f"{self.seed}/{index}/{slot}/clip")
            return self._load(epoch, position, frames, resolution, rng)

        if self._pool is None:  # also for one thread: every clip is decoded in the same way
            self._pool = ThreadPoolExecutor(self.threads, "clips", initializer=share_cores)
        loaded = list(self._pool.map(load, range(self.micro_batch)))
        pixels = torch.stack([clip for _, clip in loaded])
        return VideoBatch(tuple(example for example, _ in loaded), pixels, index)

    def _load(
        self, epoch: int, position: int, frames: int, resolution: int, rng: random.Random
    ) -> tuple[Example, Tensor]:
        """A usable example and its pixels."""
        moments = segment_moments(frames, rng) if self.sampling == "segments" else None
        seed = rng.getrandbits(64)  # the same augmentation whichever example takes the place

        def use(example: Example) -> Tensor:
            clip = example.media.load(frames, resolution, moments=moments)
            return self._pixels(clip.frames, frames, resolution, random.Random(seed), example.flip)

        return self.loader.usable(epoch, position, use)

    def _pixels(
        self, clip: Tensor, frames: int, resolution: int, rng: random.Random, flip: float | None
    ) -> Tensor:
        clip = augment(clip, resolution, self.augment, rng, flip)
        if len(clip) != frames:
            clip = clip[spread(len(clip), frames)]
        return preprocess(clip, resolution, resolution)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def own_cores() -> int:
    """This process's share of the cores, where a launcher started several on this machine."""
    try:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError:
        processes = 1
    return max(1, usable_cores() // max(1, processes))


def spread(have: int, want: int) -> Sequence[int]:
    """`want` ascending indices that cover range(have) evenly."""
    return [(2 * index + 1) * have // (2 * want) for index in range(want)]
