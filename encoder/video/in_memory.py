"""Images in memory (PIL images, NumPy arrays, tensors) as uint8 RGB frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoder.errors import VideoError
from encoder.video.images import (
    animation_frames,
    end_times,
    restoring_frame,
    seek_frame,
    to_eight_bits,
    upright_rgb,
)


def is_images(source: Any) -> bool:
    """Whether a source is images in memory rather than the name or content of a file."""
    return isinstance(source, (list, tuple)) or _is_array(source) or _is_pil(source)


def is_animation(source: Any) -> bool:
    """Whether a source is an animated Pillow image: an opened GIF, APNG, WebP or AVIF of several frames."""
    if not _is_pil(source):
        return False
    with _damage_as_video_error():
        return len(animation_frames(source)) > 1


def read_animation(image: Any, max_pixels: int, max_bytes: int) -> tuple[Tensor, list[float]]:
    """All frames, uint8 RGB (T, H, W, 3), of an animated Pillow image, and the time at which each ends.

    The image is left at the frame at which it was. Raises VideoError for frames over max_pixels, together
    over max_bytes, or damaged.
    """
    moving = animation_frames(image)
    _check_size(image.width, image.height, max_pixels)
    if len(moving) * image.width * image.height * 3 > max_bytes:
        raise VideoError(
            f"The {len(moving)} frames of {image.width} x {image.height} need more than "
            f"{max_bytes >> 20} MiB; give the animation as a file."
        )
    with _damage_as_video_error(), restoring_frame(image):
        ends, frames = end_times(image), []
        for index in moving:
            seek_frame(image, index)
            frames.append(_rgb(image))
    return torch.stack(frames), ends


def read_images(source: Any, max_pixels: int) -> Tensor:
    """uint8 RGB (T, H, W, 3) from one image, a list of equal-sized images, or pixels of several.

    Pixels are uint8, or uint16 from 0 to 65535; (H, W), (H, W, 1), (H, W, 3), (H, W, 4) for one image,
    (T, H, W, 1 to 4) for several; a fourth channel is transparency, composed as in files.
    Raises VideoError for an empty list, mixed sizes, another dtype or shape, or frames over max_pixels.
    """
    if isinstance(source, (list, tuple)):
        if not source:
            raise VideoError("The list of images is empty; give at least one image.")
        images = [_one(image, max_pixels) for image in source]
        if len({image.shape for image in images}) > 1:
            raise VideoError("The images of the list differ in size; resize them to one size first.")
        return torch.stack(images)
    if _is_array(source) and source.ndim == 4:
        pixels = _pixels(source)
        if not _channels_last(pixels):
            raise VideoError(f"Pixels must be (T, H, W, 3), not {tuple(pixels.shape)}; reorder its axes.")
        _check_size(pixels.shape[2], pixels.shape[1], max_pixels)
        return pixels if pixels.shape[-1] == 3 else torch.stack([_three_channels(one) for one in pixels])
    return _one(source, max_pixels)[None]


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise VideoError(
            f"Images of {width} x {height} exceed the limit of {max_pixels} pixels; scale them down first."
        )


def _one(image: Any, max_pixels: int) -> Tensor:
    """uint8 (H, W, 3) from one image; grey is repeated, transparency is composed."""
    if _is_pil(image):
        _check_size(image.width, image.height, max_pixels)
        with _damage_as_video_error():
            return _rgb(image)
    if not _is_array(image):
        raise VideoError(f"An image cannot be a {type(image).__name__}; give a PIL image, array or tensor.")
    pixels = _pixels(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or not _channels_last(pixels):
        raise VideoError(f"An image must be (H, W, 3), not {tuple(pixels.shape)}; reorder its axes.")
    _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    return _three_channels(pixels)


def _channels_last(pixels: Tensor) -> bool:
    """Whether (..., H, W, C) is grey, RGB or RGBA and cannot be read as (..., C, H, W) as well."""
    rows, channels = pixels.shape[-3], pixels.shape[-1]
    return pixels.numel() > 0 and (channels == 3 or (channels in (1, 4) and rows not in (1, 3, 4)))


def _rgb(image: Any) -> Tensor:
    """uint8 (H, W, 3) of the current frame of a Pillow image, upright and opaque."""
    return torch.from_numpy(np.array(upright_rgb(image)))


def _three_channels(pixels: Tensor) -> Tensor:
    """uint8 (H, W, 3) from (H, W, 1), (H, W, 3) or (H, W, 4) RGBA."""
    if pixels.shape[-1] == 4:
        return _rgb(Image.fromarray(pixels.contiguous().numpy(), "RGBA"))
    return pixels.expand(-1, -1, 3).contiguous()


@contextmanager
def _damage_as_video_error() -> Iterator[None]:
    """Any error of Pillow while it reads an image becomes a VideoError."""
    try:
        yield
    except VideoError as error:
        raise VideoError(f"Cannot use this image: {error}.") from None
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
        raise VideoError("Cannot use this image: it is damaged, cut off or closed; load it again.") from error


def _pixels(array: Any) -> Tensor:
    """A uint8 tensor of its own from an array or tensor of uint8 or uint16."""
    values = array.detach().cpu() if isinstance(array, Tensor) else array
    name = str(values.dtype).removeprefix("torch.")
    if name not in ("uint8", "uint16"):
        hint = "multiply floats from 0 to 1 by 255 and" if "float" in name else ""
        raise VideoError(f"Pixels must be uint8 (or uint16), not {name}; {hint} convert them first.")
    if name == "uint16":
        return torch.from_numpy(to_eight_bits(np.asarray(values)))
    return values.clone() if isinstance(values, Tensor) else torch.from_numpy(values.copy())


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
