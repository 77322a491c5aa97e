"""Pictures that are already in memory (PIL images, arrays, tensors) as uint8 frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from encoder.errors import VideoError


def is_pictures(source: Any) -> bool:
    """Whether a source is pictures in memory rather than the name or content of a file."""
    return isinstance(source, (list, tuple)) or _is_array(source) or _is_pil(source)


def read_pictures(source: Any, max_pixels: int) -> Tensor:
    """uint8 RGB (T, H, W, 3) from one image, a list of equal-sized images, or (T, H, W, 3) pixels.

    Raises VideoError for an empty list, mixed sizes, another dtype or shape, or frames over max_pixels.
    """
    if isinstance(source, (list, tuple)):
        if not source:
            raise VideoError("The list of images is empty; give at least one image.")
        images = [_one(image) for image in source]
        if len({image.shape for image in images}) > 1:
            raise VideoError("The images of the list differ in size; resize them to one size first.")
        frames = torch.stack(images)
    elif _is_array(source) and source.ndim == 4:
        frames = _pixels(source)
    else:
        frames = _one(source)[None]
    if frames.shape[-1] != 3 or frames.numel() == 0:
        raise VideoError(f"Pixels must be (T, H, W, 3), not {tuple(frames.shape)}; reorder its axes.")
    if frames.shape[1] * frames.shape[2] > max_pixels:
        raise VideoError(
            f"Images of {frames.shape[2]} x {frames.shape[1]} exceed the limit of {max_pixels} pixels; "
            "scale them down first."
        )
    return frames


def _one(image: Any) -> Tensor:
    """uint8 (H, W, 3) from one image; grey is repeated, transparency becomes white."""
    if _is_pil(image):
        import numpy as np
        from PIL import ImageOps

        from encoder.stills import flat_rgb

        return torch.from_numpy(np.array(flat_rgb(ImageOps.exif_transpose(image))))
    if not _is_array(image):
        raise VideoError(f"An image cannot be a {type(image).__name__}; give a PIL image, array or tensor.")
    pixels = _pixels(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise VideoError(f"An image must be (H, W, 3), not {tuple(pixels.shape)}; reorder its axes.")
    return pixels.contiguous()


def _pixels(array: Any) -> Tensor:
    pixels = array.detach().cpu() if isinstance(array, Tensor) else _from_numpy(array)
    if pixels.dtype != torch.uint8:
        raise VideoError(f"Pixels must be uint8 from 0 to 255, not {pixels.dtype}; convert them first.")
    return pixels


def _from_numpy(array: Any) -> Tensor:
    if array.dtype.name != "uint8":
        raise VideoError(f"Pixels must be uint8 from 0 to 255, not {array.dtype}; convert them first.")
    return torch.from_numpy(array.copy())


def _is_array(source: Any) -> bool:
    if isinstance(source, Tensor):
        return True
    return all(hasattr(source, name) for name in ("dtype", "ndim", "shape", "copy"))


def _is_pil(source: Any) -> bool:
    return all(hasattr(source, name) for name in ("convert", "getexif", "size"))


def shrink(frames: Tensor, size: Sequence[int]) -> Tensor:
    """uint8 (T, H, W, 3) resized to (width, height), antialiased."""
    width, height = size
    if (frames.shape[2], frames.shape[1]) == (width, height):
        return frames
    small = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2), (height, width), mode="bicubic", antialias=True
    )
    return small.permute(0, 2, 3, 1).contiguous()
