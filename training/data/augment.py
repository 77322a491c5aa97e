"""Augmentation of clips: crop, flip and RandAugment, drawn once per clip and the same for all its frames.

    augment(frames, 224, AugmentConfig(crop="multiscale", flip=0.5), random.Random(7))

Frames stay uint8, and everything random comes from the generator that is handed in, so that a batch is a
function of its number alone whichever thread makes it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from encoder.errors import ConfigError
from training.data.rand_augment import rand_augment

Crop = Literal["none", "center", "multiscale", "resized"]
Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class AugmentConfig:
    """How clips are changed in training; the default only resizes.

    crop: "none" squashes the whole frame to a square; "center" cuts the largest centred square;
    "multiscale" is MultiScaleCrop: sides of the shorter side times `scales` (supplement Table 5: 1, 0.875,
    0.75, 0.66; Table 7: 1, 0.5), height and width at most `max_distort` scales apart, at one of 13 fixed
    places; "resized" is RandomResizedCrop: a share of the picture in `area` with an aspect in `ratio` (what
    the released code fine-tunes with; Flux-CLIP's forerunner trains with the area 0.5 to 1).
    flip: chance of a mirror image; a dataset may have its own (0 for SSv2, whose labels name sides).
    rand_augment: (magnitude 0..10, its standard deviation), None for none: (9, 0.5) in the supplement's
    Table 6, (7, 0.5) with 4 operations in the released code. rand_operations: how many per clip.
    erase: chance of random erasing: one rectangle of noise, the same place in all frames (0 in the
    supplement, 0.25 in the released code).
    """

    crop: Crop = "none"
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    max_distort: int = 1
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    rand_augment: tuple[int, float] | None = None
    rand_operations: int = 2
    erase: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} must be a chance from 0 to 1, not {getattr(self, name)}.")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ConfigError(f"augment.scales must lie above 0 and up to 1, not {self.scales}.")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"augment.area must be two ascending shares of the picture, not {self.area}.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"augment.ratio must be two ascending aspects, not {self.ratio}.")
        if self.max_distort < 0 or self.rand_operations < 1:
            raise ConfigError("augment.max_distort must be at least 0 and rand_operations at least 1.")
        magnitude, deviation = self.rand_augment or (0, 0.0)
        if not 0 <= magnitude <= 10 or deviation < 0:
            raise ConfigError(
                f"augment.rand_augment must be (magnitude 0..10, deviation), not {self.rand_augment}."
            )


def augment(
    frames: Tensor, size: int, config: AugmentConfig, rng: random.Random, flip: float | None = None
) -> Tensor:
    """uint8 (T, H, W, 3) to uint8 (T, size, size, 3), the same change for every frame.

    flip: the clip's own chance of a mirror image, None for the recipe's.
    """
    height, width = frames.shape[1:3]
    top, left, tall, wide = choose_box(height, width, config, rng)
    out = resize(frames[:, top : top + tall, left : left + wide], size, size)
    chance = config.flip if flip is None else flip
    if chance and rng.random() < chance:
        out = out.flip(2)
    if config.rand_augment is not None:
        magnitude, deviation = config.rand_augment
        out = rand_augment(out, magnitude, config.rand_operations, deviation, rng)
    if config.erase and rng.random() < config.erase:
        out = _erase(out, rng)
    return out.contiguous()


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 (T, H, W, 3), antialiased bicubic."""
    if tuple(frames.shape[1:3]) == (height, width):
        return frames
    moved = interpolate(frames.permute(0, 3, 1, 2), (height, width), mode="bicubic", antialias=True)
    return moved.permute(0, 2, 3, 1)


def choose_box(height: int, width: int, config: AugmentConfig, rng: random.Random) -> Box:
    """Which part of a picture is used: (top, left, height, width)."""
    if config.crop == "multiscale":
        return _multiscale(height, width, config, rng)
    if config.crop == "resized":
        return _resized(height, width, config, rng)
    if config.crop == "center":
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side
    return 0, 0, height, width


def _multiscale(height: int, width: int, config: AugmentConfig, rng: random.Random) -> Box:
    """MultiScaleCrop of temporal segment networks with its thirteen fixed places."""
    sides = [max(1, int(min(height, width) * scale)) for scale in config.scales]
    tall, wide = rng.choice(
        [(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= config.max_distort]
    )
    down, right = (height - tall) // 4, (width - wide) // 4
    places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]  # corners and centre, in quarters of what is spare
    places += [(2, 0), (2, 4), (0, 2), (4, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
    i, j = rng.choice(places)
    return i * down, j * right, tall, wide


def _resized(height: int, width: int, config: AugmentConfig, rng: random.Random) -> Box:
    """RandomResizedCrop: ten tries for a box that fits, then the largest centred one of a nearby aspect."""
    low, high = (math.log(value) for value in config.ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*config.area)
        aspect = math.exp(rng.uniform(low, high))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return rng.randint(0, height - tall), rng.randint(0, width - wide), tall, wide
    aspect = min(max(width / height, config.ratio[0]), config.ratio[1])
    wide, tall = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - tall) // 2, (width - wide) // 2, max(1, tall), max(1, wide)


def _erase(frames: Tensor, rng: random.Random) -> Tensor:
    """Noise in one rectangle of 2 to 33 % of the picture, the same in every frame."""
    height, width = frames.shape[1:3]
    box = _resized(height, width, AugmentConfig(area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)), rng)
    top, left, tall, wide = box
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    noise = torch.randint(0, 256, (tall, wide, 3), generator=generator, dtype=torch.uint8)
    out = frames.clone()
    out[:, top : top + tall, left : left + wide] = noise
    return out


def segment_moments(count: int, rng: random.Random) -> list[float]:
    """`count` places in 0..1, one anywhere inside each of as many equal segments (TSN)."""
    return [(index + rng.random()) / count for index in range(count)]
