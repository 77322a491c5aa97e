"""What Flux-CLIP trains on: images and videos in turn, or the synthetic world with its attributes.

Media types alternate by optimiser step, never inside one, so that all ranks and accumulated micro-batches of
a step hold the same type (as InternVideo2's loader for joint training does by broadcasting its order).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from encoder.errors import DataError
from encoder.preprocess import preprocess
from training.data.examples import Example
from training.data.flexible_grids import FlexibleGrid
from training.data.synthetic_source import WorldSource, render_clip
from training.data.video_batches import VideoBatches
from training.synthetic.dataset import Sample, World
from training.synthetic.labels import WorldLabels

MOST = 1 << 30  # no bound on an image's patches


@dataclass(frozen=True)
class Captioned:
    """pixels (B, 3, F, R, R), a caption each, labels (B,) or (B, classes) per attribute, ids (B,), the kind
    of media, patch labels (B, F, rows, columns) per attribute."""

    pixels: Tensor
    captions: tuple[str, ...]
    labels: dict[str, Tensor]
    ids: Tensor
    kind: str | None = None
    patches: dict[str, Tensor] = field(default_factory=dict)


class Alternation:
    """Which media type each step takes: per epoch, each as often as it has steps, in shuffled order.

    steps: optimiser steps in one epoch by type. A pure function of seed and number, hence equal on all ranks.
    """

    def __init__(self, steps: Mapping[str, int], per_step: int, seed: int) -> None:
        self._steps, self._per_step, self._seed = dict(steps), per_step, seed
        self._epoch: tuple[int, list[tuple[str, int]]] | None = None

    @property
    def micro_batches(self) -> int:
        """Micro-batches of all types in one epoch."""
        return sum(self._steps.values()) * self._per_step

    def turn(self, index: int) -> tuple[str, int]:
        """(type, number among that type's micro-batches) of micro-batch `index`, counted over epochs."""
        step, part = divmod(index, self._per_step)
        epoch, within = divmod(step, sum(self._steps.values()))
        kind, number = self._order(epoch)[within]
        return kind, (epoch * self._steps[kind] + number) * self._per_step + part

    def _order(self, epoch: int) -> list[tuple[str, int]]:
        if self._epoch is None or self._epoch[0] != epoch:
            kinds = [kind for kind, count in self._steps.items() for _ in range(count)]
            random.Random(f"{self._seed}/{epoch}/types").shuffle(kinds)
            counters = {kind: iter(range(count)) for kind, count in self._steps.items()}
            self._epoch = (epoch, [(kind, next(counters[kind])) for kind in kinds])
        return self._epoch[1]


def still_grid(grid: FlexibleGrid) -> FlexibleGrid:
    """The grid's resolutions with a single frame; its bounds on tokens are for videos."""
    return FlexibleGrid((1, 2, 1), grid.resolutions, (1, MOST), grid.patch_size)


class MixtureBatches:
    """Captioned images and videos; an example with several captions takes one of them by chance."""

    def __init__(self, batches: Mapping[str, VideoBatches], per_step: int, seed: int) -> None:
        self._batches, self._seed = dict(batches), seed
        steps = {kind: max(1, of_kind.micro_batches // per_step) for kind, of_kind in batches.items()}
        self._alternation = Alternation(steps, per_step, seed)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return self._alternation.micro_batches

    def get(self, index: int) -> Captioned:
        """Micro-batch `index`; raises DataError for an example without a caption."""
        kind, number = self._alternation.turn(index)
        batch = self._batches[kind].get(number)
        rng = random.Random(f"{self._seed}/{index}/captions")
        captions = tuple(rng.choice(captions_of(example)) for example in batch.examples)
        # Rows about one file are one positive, whatever their ids.
        ids = as_numbers(example.media.key for example in batch.examples)
        return Captioned(batch.pixels, captions, {}, ids, kind)


def captions_of(example: Example) -> tuple[str, ...]:
    """An example's captions; raises DataError when it has none."""
    if not example.captions:
        raise DataError(f"The example {example.id!r} has no caption: Flux-CLIP needs one for each.")
    return example.captions


def as_numbers(names: Iterable[str]) -> Tensor:
    """int64 (B,), equal for equal names, by a hash that is the same in every process."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


class WorldBatches:
    """The synthetic world in order, with its labels.

    siblings: clips per object that differ in motion alone, side by side.
    """

    def __init__(self, source: WorldSource, grid: FlexibleGrid, micro_batch: int, siblings: int, seed: int):
        self.source, self.world = source, source.open()
        self._grid, self._micro_batch, self._siblings, self._seed = grid, micro_batch, siblings, seed
        self.labels = WorldLabels(self.world)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return max(1, self.source.count // self._micro_batch)

    def get(self, index: int) -> Captioned:
        """Micro-batch `index`."""
        groups = self._micro_batch // self._siblings
        first = self.source.first + (index % self.micro_batches) * groups
        samples = [
            sample for number in range(first, first + groups) for sample in self._group(self.world, number)
        ]
        return self.collate(self.world, samples, *self._grid.draw(self._seed, index))

    def _group(self, world: World, number: int) -> list[Sample]:
        return world.siblings(number, self._siblings) if self._siblings > 1 else [world.sample(number)]

    def collate(self, world: World, samples: Sequence[Sample], frames: int, resolution: int) -> Captioned:
        """Rendered samples."""
        clips = [render_clip(world, sample, "", frames, resolution) for sample in samples]
        pixels = torch.stack([preprocess(clip, resolution, resolution) for clip in clips])
        side = resolution // self._grid.patch_size
        patch_labels = [
            self.labels.patches(sample.scene, clip.times_s, side)
            for sample, clip in zip(samples, clips, strict=True)
        ]
        patches = {
            name: torch.stack([one[name] for one in patch_labels]) for name in self.labels.patch_classes
        }
        captions = tuple(sample.caption for sample in samples)
        labels = self.labels.clips(samples)
        return Captioned(pixels, captions, labels, as_numbers(captions), patches=patches)
