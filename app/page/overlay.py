"""Pictures of sampled frames in which the patches that token selection dropped are dimmed."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor

from app.answer import KeptTokens

DIM = 0.24  # light that is left on a dropped patch
SHADE = (18, 24, 32)  # what dropped patches fade to


def kept_mask(kept: KeptTokens) -> np.ndarray:
    """Which patches stayed: bool (T, rows, columns)."""
    mask = np.zeros(kept.grid.size, bool)
    mask[list(kept.indices)] = True
    return mask.reshape(kept.grid)


def paint(frames: Tensor, kept: KeptTokens) -> list[Image.Image]:
    """One picture per frame, dropped patches grey and dim.

    frames: uint8 (T, H, W, 3), covering exactly what the patch grid covers. Patches end at the nearest pixel.
    """
    masks = kept_mask(kept)
    count, height, width = frames.shape[:3]
    if count != len(masks):
        raise ValueError(f"{count} frames do not fit a grid of {len(masks)}")
    rows = np.arange(height) * masks.shape[1] // height
    columns = np.arange(width) * masks.shape[2] // width
    pictures = []
    for frame, mask in zip(frames.numpy(), masks, strict=True):
        stays = mask[rows][:, columns, None]
        grey = frame.mean(axis=2, keepdims=True)
        dimmed = DIM * grey + (1 - DIM) * np.asarray(SHADE, np.float32)
        pictures.append(Image.fromarray(np.where(stays, frame, dimmed).astype(np.uint8)))
    return pictures


def data_url(picture: Image.Image, side: int) -> str:
    """The picture as a JPEG data URL, at most `side` pixels wide and high."""
    small = picture.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=78)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
