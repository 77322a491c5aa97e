"""RandAugment over the frames of a clip, with Pillow's operations.

    rand_augment(frames, magnitude=9, operations=2, deviation=0.5, rng=random.Random(3))

The variant that the field trains video models with: the magnitude is drawn anew for each operation with a
standard deviation, and stronger magnitudes always change more ("increasing"). Pillow rather than a tensor
library, since these are its own definitions of the operations, and since those libraries draw from torch's
global generator, which would tie a batch to the thread that made it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

GREY = (124, 116, 104)  # ImageNet's mean, what an empty corner shows
CHANCE = 0.5  # of each drawn operation to be applied
Picture = Image.Image
# From a strength 0..1 and a sign +-1 to the operation for one frame.
Operation = Callable[[float, int], Callable[[Picture], Picture]]


def _affine(matrix: tuple[float, ...]) -> Callable[[Picture], Picture]:
    def apply(image: Picture) -> Picture:
        # An affine that reads around (0, 0) would move the picture: shear and shift as they are drawn.
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=GREY
        )

    return apply


def _shift(share: float, axis: int) -> Callable[[Picture], Picture]:
    def apply(image: Picture) -> Picture:
        pixels = share * image.size[axis]
        matrix = (1, 0, pixels, 0, 1, 0) if axis == 0 else (1, 0, 0, 0, 1, pixels)
        return _affine(matrix)(image)

    return apply


def _enhance(kind: type, strength: float, sign: int) -> Callable[[Picture], Picture]:
    factor = max(0.1, 1.0 + sign * 0.9 * strength)
    return lambda image: kind(image).enhance(factor)


def _brighten(strength: float) -> Callable[[Picture], Picture]:
    """Add to the darker half of the values (SolarizeAdd)."""
    added = int(110 * strength)
    table = [min(255, value + added) if value < 128 else value for value in range(256)] * 3
    return lambda image: image.point(table)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda m, s: ImageOps.autocontrast,
    "Equalize": lambda m, s: ImageOps.equalize,
    "Invert": lambda m, s: ImageOps.invert,
    "Rotate": lambda m, s: lambda im: im.rotate(s * 30 * m, Image.Resampling.BICUBIC, fillcolor=GREY),
    "Posterize": lambda m, s: lambda im: ImageOps.posterize(im, max(1, 4 - int(4 * m)) if m > 0 else 4),
    "Solarize": lambda m, s: lambda im: ImageOps.solarize(im, min(256, 256 - int(256 * m))),
    "SolarizeAdd": lambda m, s: _brighten(m),
    "Color": lambda m, s: _enhance(ImageEnhance.Color, m, s),
    "Contrast": lambda m, s: _enhance(ImageEnhance.Contrast, m, s),
    "Brightness": lambda m, s: _enhance(ImageEnhance.Brightness, m, s),
    "Sharpness": lambda m, s: _enhance(ImageEnhance.Sharpness, m, s),
    "ShearX": lambda m, s: _affine((1, s * 0.3 * m, 0, 0, 1, 0)),
    "ShearY": lambda m, s: _affine((1, 0, 0, s * 0.3 * m, 1, 0)),
    "TranslateX": lambda m, s: _shift(s * 0.45 * m, 0),
    "TranslateY": lambda m, s: _shift(s * 0.45 * m, 1),
}


def rand_augment(
    frames: Tensor, magnitude: float, operations: int, deviation: float, rng: random.Random
) -> Tensor:
    """uint8 (T, H, W, 3) to the same shape: `operations` draws, each applied with chance 0.5.

    magnitude: 0 to 10. Every frame is changed alike.
    """
    chosen = []
    for name in rng.choices(list(OPERATIONS), k=operations):
        if rng.random() < CHANCE:
            strength = min(10.0, max(0.0, rng.gauss(magnitude, deviation))) / 10
            chosen.append(OPERATIONS[name](strength, rng.choice((-1, 1))))
    if not chosen:
        return frames
    changed = []
    for frame in frames.numpy():
        image = Image.fromarray(np.ascontiguousarray(frame))
        for operation in chosen:
            image = operation(image)
        changed.append(np.asarray(image))
    return torch.from_numpy(np.stack(changed))
