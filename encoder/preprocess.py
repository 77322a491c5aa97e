"""Frames to the encoder's input: resized, normalised pixels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from encoder.errors import VideoError
from encoder.video.reader import Clip

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHUNK_PIXELS = 8 * 2**20  # source pixels turned to float at a time: bounds memory


def preprocess(
    frames: Tensor | Clip,
    height: int,
    width: int,
    *,
    fit: Literal["squash", "crop"] = "squash",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 (T, H, W, 3) or a Clip to (3, T, height, width), antialiased bicubic, ImageNet-normalised.

    fit: "squash" scales both sides freely; "crop" keeps the aspect and cuts the centre out.
    Raises VideoError for another shape or dtype, or a size below 1.
    """
    pixels = frames.frames if isinstance(frames, Clip) else frames
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.numel() == 0:
        raise VideoError(
            f"Frames must be uint8 (T, H, W, 3), not {pixels.dtype} {tuple(pixels.shape)}; use read_clip."
        )
    if height < 1 or width < 1:
        raise VideoError(f"Cannot resize to {width} x {height}; give at least 1 pixel each way.")
    if fit not in ("squash", "crop"):
        raise VideoError(f"There is no fit {fit!r}; use 'squash' or 'crop'.")
    if fit == "crop":
        pixels = centre(pixels, height, width)
    device = torch.device(device) if device is not None else pixels.device
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1, 1) * 255
    out = torch.empty((3, pixels.shape[0], height, width), dtype=dtype, device=device)
    step = max(1, CHUNK_PIXELS // (pixels.shape[1] * pixels.shape[2]))
    for first in range(0, pixels.shape[0], step):
        chunk = pixels[first : first + step].to(device).permute(3, 0, 1, 2).contiguous().float()
        out[:, first : first + step] = _resize(chunk, height, width).sub_(mean).div_(std)
    return out


def _resize(chunk: Tensor, height: int, width: int) -> Tensor:
    """Float (3, T, H, W) in 0..255 to (3, T, height, width)."""
    if chunk.shape[-2:] == (height, width):
        return chunk
    return interpolate(chunk, (height, width), mode="bicubic", antialias=True).clamp_(0, 255)


def centre(pixels: Tensor, height: int, width: int) -> Tensor:
    """The largest centred part of (T, H, W, 3) with the aspect of height x width."""
    full_height, full_width = pixels.shape[1:3]
    cut_height = min(full_height, max(1, round(full_width * height / width)))
    cut_width = min(full_width, max(1, round(full_height * width / height)))
    top, left = (full_height - cut_height) // 2, (full_width - cut_width) // 2
    return pixels[:, top : top + cut_height, left : left + cut_width]
