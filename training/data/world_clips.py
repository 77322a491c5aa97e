"""Clips of the synthetic world as a judge of familiarity should know them: also over places it never drew.

Half of the training clips have other photographs and textures in the place of the world's few, so that what
is learnt is the way the world draws, not its backgrounds.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
from PIL import Image

from training.data.foreign_clips import Photos
from training.synthetic.backgrounds import TEXTURES
from training.synthetic.dataset import World
from training.synthetic.render import render
from training.synthetic.sprites import SpriteBank

SIDES = (128, 192, 256)  # pixels
TEXTURE_SIDE = 160


def world_clip(
    world: World, index: int, rng: random.Random, count: int, photos: Photos | None = None
) -> np.ndarray:
    """uint8 (count, side, side, 3): sample `index`, evenly spaced in time.

    photos: half of the clips get their backgrounds from these; None leaves all as they are.
    """
    scene, side = world.sample(index).scene, rng.choice(SIDES)
    times = [(frame + 0.5) * scene.duration_s / count for frame in range(count)]
    bank = world.bank
    if photos is not None and rng.random() < 0.5:
        bank = with_other_places(bank, photos, rng)
    return render(scene, times, side, side, bank)


def with_other_places(bank: SpriteBank, photos: Photos, rng: random.Random) -> SpriteBank:
    """The bank with another picture under the name of each of its photographs."""
    other = {}
    for name in sorted(bank.photos):
        if name not in TEXTURES:
            other[name] = np.asarray(photos.draw(rng))
        elif rng.random() < 0.4:
            other[name] = np.asarray(photos.draw(rng).convert("L").convert("RGB"))
        else:
            other[name] = texture(rng)
    return replace(bank, photos=other, source=None)


def texture(rng: random.Random) -> np.ndarray:
    """uint8 (TEXTURE_SIDE, TEXTURE_SIDE, 3), grey: stones, or noise at several scales."""
    noise = np.random.default_rng(rng.getrandbits(32))
    grain = np.zeros((TEXTURE_SIDE, TEXTURE_SIDE), np.float32)
    for cells in (10, 20, 40, 80, TEXTURE_SIDE):
        grain += rng.random() * np.asarray(_enlarged(noise.normal(size=(cells, cells)).astype(np.float32)))
    grain /= np.std(grain)
    values = _stones(noise, rng) + rng.uniform(0.1, 0.6) * grain if rng.random() < 0.7 else grain
    grey = np.clip(rng.uniform(90, 160) + rng.uniform(25, 60) * values / np.std(values), 0, 255)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def _stones(noise: np.random.Generator, rng: random.Random) -> np.ndarray:
    """Float (TEXTURE_SIDE, TEXTURE_SIDE): cells around random points, each lit from one side."""
    points = noise.uniform(0, TEXTURE_SIDE, size=(rng.randrange(30, 160), 2)).astype(np.float32)
    axis = np.arange(TEXTURE_SIDE, dtype=np.float32)
    away_y, away_x = axis[:, None, None] - points[:, 0], axis[None, :, None] - points[:, 1]
    distance = away_y**2 + away_x**2
    nearest = distance.argmin(axis=2)
    two = np.sqrt(np.partition(distance, 1, axis=2)[..., :2])
    gap = np.minimum((two[..., 1] - two[..., 0]) / rng.uniform(2, 8), 1)
    angle = rng.uniform(0, 2 * np.pi)
    light = (axis[:, None] - points[nearest, 0]) * np.sin(angle) + (axis - points[nearest, 1]) * np.cos(angle)
    shade = noise.normal(size=len(points))[nearest]
    return shade + rng.uniform(0.5, 2) * gap + rng.uniform(0, 0.15) * light


def _enlarged(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values).resize((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.BICUBIC)
