"""Frames to pixels as the image processors of stock models make them: PIL's resizing, then normalisation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoder.errors import ModelError

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class PixelSettings:
    """How a model was trained to see. resample: PIL's number of the filter."""

    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    resample: int = int(Image.Resampling.BICUBIC)

    @staticmethod
    def read(folder: Path, default: PixelSettings) -> PixelSettings:
        """From a model folder's preprocessor_config.json, if it has one; raises ModelError for nonsense."""
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            return default
        values = json.loads(path.read_text())
        settings = PixelSettings(
            _three(values.get("image_mean"), default.mean, path),
            _three(values.get("image_std"), default.std, path),
            values.get("resample", default.resample),
        )
        if settings.resample not in set(Image.Resampling) or not all(settings.std):
            raise ModelError(f"{path} names no way to resize or normalise that there is.")
        return settings


def _three(value: Any, default: tuple[float, ...], path: Path) -> tuple[float, ...]:
    if value is None:
        return default
    if not isinstance(value, Sequence) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
        raise ModelError(f"{path} must give three numbers for the mean and the deviation of colours.")
    return tuple(map(float, value))


def resized(frames: Tensor, height: int, width: int, settings: PixelSettings) -> Tensor:
    """uint8 (T, H, W, 3) to uint8 (T, height, width, 3)."""
    pictures = (Image.fromarray(frame.numpy()) for frame in frames)
    return torch.from_numpy(
        np.stack([np.asarray(picture.resize((width, height), settings.resample)) for picture in pictures])
    )


def to_pixels(frames: Tensor, height: int, width: int, settings: PixelSettings) -> Tensor:
    """uint8 (T, H, W, 3) to float32 (3, T, height, width)."""
    pixels = resized(frames, height, width, settings).permute(3, 0, 1, 2).float().div_(255)
    mean = torch.tensor(settings.mean).view(3, 1, 1, 1)
    std = torch.tensor(settings.std).view(3, 1, 1, 1)
    return pixels.sub_(mean).div_(std)
