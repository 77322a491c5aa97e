"""What happens to a clip on its way to a viewer: scaled, compressed, a little brighter or darker."""

from __future__ import annotations

import io
import random
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from training.synthetic.export import write_video

SIDES = (96, 128, 180, 240, 320, 480)  # pixels of the height after scaling
ASPECTS = (0.5625, 0.75, 1.0, 1.0, 1.0, 1.333, 1.7778)


def reencoded(frames: np.ndarray, rng: random.Random) -> np.ndarray:
    """uint8 (T, H, W, 3) as someone might pass it on, size and all; often unchanged."""
    if rng.random() < 0.5:
        frames = _scaled(frames, rng)
    if rng.random() < 0.12:
        radius = rng.choice((0.5, 0.8, 1.3))
        frames = _each(frames, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))
    if rng.random() < 0.2:
        light, contrast = rng.uniform(0.75, 1.25), rng.uniform(0.8, 1.2)
        frames = _each(frames, lambda image: _relit(image, light, contrast))
    if rng.random() < 0.04:
        frames = _each(frames, lambda image: image.convert("L").convert("RGB"))
    method = rng.random()
    if method < 0.3:
        return _h264(frames, rng.randrange(18, 40))
    if method < 0.6:
        quality = rng.randrange(20, 95)
        frames = _each(frames, lambda image: _jpeg(image, quality))
    return frames


def _each(frames: np.ndarray, change: object) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(frame))) for frame in frames])  # type: ignore[operator]


def _relit(image: Image.Image, light: float, contrast: float) -> Image.Image:
    return ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(light)).enhance(contrast)


def _scaled(frames: np.ndarray, rng: random.Random) -> np.ndarray:
    height = rng.choice(SIDES)
    width = int(height * rng.choice(ASPECTS)) // 2 * 2
    method = rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
    return _each(frames, lambda image: image.resize((width, height), method))


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _h264(frames: np.ndarray, crf: int) -> np.ndarray:
    """Encoded and decoded again, each frame shown thrice so that later frames are predicted from earlier."""
    import av

    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    shown = np.repeat(frames[:, :height, :width], 3, axis=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, np.ascontiguousarray(shown), 12.0, crf=crf)
        with av.open(str(path)) as file:
            decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return np.stack(decoded)[1::3]
