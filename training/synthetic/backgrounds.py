"""Paints backgrounds at any size: photographs, landscapes, gradients, clouds, lights."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from encoder.errors import DataError
from training.synthetic.scene import Background

Colour = tuple[int, int, int]

# Named places: sky (top, horizon), then the layers of ground from far to near.
LANDSCAPES: Mapping[str, tuple[Colour, Colour, tuple[Colour, ...]]] = {
    "meadow": ((92, 160, 235), (205, 230, 250), ((120, 170, 130), (95, 165, 80), (70, 140, 50))),
    "desert": ((110, 180, 235), (250, 225, 180), ((225, 175, 110), (235, 190, 120), (215, 160, 90))),
    "sea": ((120, 190, 245), (225, 240, 250), ((60, 140, 190), (35, 110, 170), (225, 205, 150))),
    "snow": ((140, 170, 205), (225, 235, 245), ((190, 205, 225), (225, 232, 242), (245, 248, 252))),
    "night": ((10, 12, 40), (40, 45, 95), ((25, 30, 60), (18, 24, 45), (10, 16, 30))),
    "sunset": ((70, 50, 120), (255, 160, 90), ((120, 60, 90), (85, 40, 75), (50, 25, 55))),
}
# Photographs of a texture stay sharp; the tint makes grey ones look like what they show.
TEXTURES: Mapping[str, Colour] = {"grass": (110, 190, 80), "brick": (215, 120, 90), "gravel": (185, 175, 165)}
PLAIN = ("gradient", "clouds", "lights")
KINDS = ("photo", *LANDSCAPES, *PLAIN)


def paint(background: Background, height: int, width: int, photos: Mapping[str, np.ndarray]) -> np.ndarray:
    """The background as uint8 (height, width, 3). DataError: unknown kind or photograph."""
    rng = random.Random(background.seed)
    if background.kind == "photo":
        if background.photo is None or background.photo not in photos:
            raise DataError(
                f"The sprite bank has no photograph {background.photo!r}: fetch the pictures again."
            )
        return _photo(background.photo, photos[background.photo], rng, height, width)
    if background.kind in LANDSCAPES:
        return _landscape(background.kind, rng, height, width)
    painters = {"gradient": _gradient, "clouds": _clouds, "lights": _lights}
    if background.kind not in painters:
        raise DataError(f"Unknown background kind {background.kind!r}: use one of {', '.join(KINDS)}.")
    return painters[background.kind](rng, height, width)


def _photo(name: str, photo: np.ndarray, rng: random.Random, height: int, width: int) -> np.ndarray:
    """A random crop; photographs with things in them are blurred so far that no thing can be named."""
    sharp = name in TEXTURES
    part = (rng.uniform(0.45, 0.95) if sharp else rng.uniform(0.2, 0.5)) * min(photo.shape[:2])
    top, left = rng.uniform(0, photo.shape[0] - part), rng.uniform(0, photo.shape[1] - part)
    crop = photo[int(top) : int(top + part), int(left) : int(left + part)]
    image = Image.fromarray(np.ascontiguousarray(crop))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if not sharp:
        small = rng.randint(7, 18)
        image = image.resize((small, small), Image.Resampling.BOX)
    image = image.resize((width, height), Image.Resampling.BILINEAR if sharp else Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    if sharp:
        tint = np.array([c * rng.uniform(0.9, 1.1) for c in TEXTURES[name]], np.float32) / 160
        pixels = np.clip(pixels * tint + 30, 0, 255).astype(np.uint8)
    return pixels


def _landscape(kind: str, rng: random.Random, height: int, width: int) -> np.ndarray:
    """A sky that brightens to the horizon and three layers of rolling ground, nearer ones lower."""
    top, horizon, grounds = LANDSCAPES[kind]
    shift = np.array([rng.uniform(-18, 18) for _ in range(3)], np.float32)
    line = rng.uniform(0.4, 0.65)
    rows = (np.arange(height, dtype=np.float32) + 0.5) / height
    columns = (np.arange(width, dtype=np.float32) + 0.5) / width
    u = np.clip(rows / line, 0, 1)[:, None]
    sky = np.array(top, np.float32) * (1 - u) + np.array(horizon, np.float32) * u
    picture = np.broadcast_to(sky[:, None], (height, width, 3)).copy()
    for depth, ground in enumerate(grounds):
        flat = kind == "sea" and depth < 2
        waves = 0.0 if flat else rng.uniform(0.01, 0.05)
        base = line + (1 - line) * (depth * rng.uniform(0.25, 0.38))
        edge = base + waves * np.sin(2 * np.pi * (rng.uniform(0.5, 1.6) * columns + rng.random()))
        edge += 0.4 * waves * np.sin(2 * np.pi * (rng.uniform(2, 4) * columns + rng.random()))
        mask = np.clip((rows[:, None] - edge) * height + 0.5, 0, 1)[..., None]
        shade = 1.08 - 0.3 * np.clip((rows - base) / (1 - line), 0, 1)[:, None, None]
        picture += mask * (np.array(ground, np.float32) * shade - picture)
    if kind == "night":
        for _ in range(rng.randint(15, 45)):
            y, x = int(rng.uniform(0, 0.9 * line) * height), int(rng.random() * width)
            picture[y, x] += rng.uniform(60, 160)
    return np.clip(picture + shift, 0, 255).astype(np.uint8)


def _colour(rng: random.Random, low: int = 40, high: int = 235) -> np.ndarray:
    return np.array([rng.uniform(low, high) for _ in range(3)], np.float32)


def _gradient(rng: random.Random, height: int, width: int) -> np.ndarray:
    """Two colours, one end to the other at a random angle."""
    first, second = _colour(rng), _colour(rng)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.linspace(-0.5, 0.5, height, dtype=np.float32), np.linspace(-0.5, 0.5, width, dtype=np.float32)
    u = np.clip(0.5 + np.sin(angle) * y[:, None] + np.cos(angle) * x[None, :], 0, 1)[..., None]
    return (first + u * (second - first)).astype(np.uint8)


def _clouds(rng: random.Random, height: int, width: int) -> np.ndarray:
    """Two colours mixed by noise at three scales."""
    first, second = _colour(rng), _colour(rng)
    values = np.random.default_rng(rng.getrandbits(32))
    mix = np.zeros((height, width), np.float32)
    for cells, weight in ((3, 0.55), (7, 0.3), (16, 0.15)):
        grid = Image.fromarray(values.random((cells, cells), np.float32), "F")
        mix += weight * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
    u = np.clip(1.7 * (mix - 0.5) + 0.5, 0, 1)[..., None]
    return (first + u * (second - first)).astype(np.uint8)


def _lights(rng: random.Random, height: int, width: int) -> np.ndarray:
    """Soft discs of light out of focus over a dark gradient, painted small and enlarged."""
    base, side = _colour(rng, 20, 110), 128
    image = Image.new("RGB", (side, side), tuple(int(c) for c in base))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.randint(6, 14)):
        x, y, radius = rng.uniform(0, side), rng.uniform(0, side), side * rng.uniform(0.04, 0.15)
        colour = tuple(int(c) for c in _colour(rng, 110, 255))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*colour, rng.randint(50, 130)))
    soft = image.resize((side // 3, side // 3), Image.Resampling.BOX)
    return np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC))
