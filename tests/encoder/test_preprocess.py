"""Frames to normalised pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from encoder.errors import VideoError
from encoder.preprocess import IMAGENET_MEAN, IMAGENET_STD, preprocess
from encoder.video.reader import read_clip


def photo(height: int = 90, width: int = 160, count: int = 3) -> torch.Tensor:
    rows = torch.linspace(0, 255, height)[None, :, None, None]
    columns = torch.linspace(255, 0, width)[None, None, :, None]
    mix = (rows + columns) / 2 + torch.tensor([0.0, 10.0, -10.0])
    return mix.clamp(0, 255).expand(count, -1, -1, -1).to(torch.uint8)


def back(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels.float() * std + mean) * 255).permute(1, 2, 3, 0)


def test_same_size_is_exact_normalisation():
    frames = photo()
    out = preprocess(frames, 90, 160)
    assert out.shape == (3, 3, 90, 160)
    assert out.dtype == torch.float32
    assert torch.allclose(back(out), frames.float(), atol=1e-3)


def test_the_normalisation_is_that_of_imagenet():
    white = preprocess(torch.full((1, 14, 14, 3), 255, dtype=torch.uint8), 14, 14)[:, 0, 0, 0]
    black = preprocess(torch.zeros((1, 14, 14, 3), dtype=torch.uint8), 14, 14)[:, 0, 0, 0]
    assert white.tolist() == pytest.approx([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rel=1e-5)
    assert black.tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rel=1e-5)


def test_squash_agrees_with_an_antialiased_pillow_resize():
    frames = photo()
    got = back(preprocess(frames, 28, 56))[0]
    want = np.asarray(Image.fromarray(frames[0].numpy()).resize((56, 28), Image.Resampling.BICUBIC))
    assert np.abs(got.numpy() - want).max() < 2


def test_shrinking_noise_gives_grey_not_noise():
    noise = torch.randint(0, 256, (1, 224, 224, 3), generator=torch.Generator().manual_seed(0))
    small = back(preprocess(noise.to(torch.uint8), 28, 28))
    assert small.std().item() < 20  # 74 before, and as much after picking single pixels
    assert small.mean().item() == pytest.approx(127.5, abs=2)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 32), (32, 64), (90, 160), (14, 14)])
def test_crop_keeps_the_aspect_and_the_centre(height, width):
    frames = torch.zeros((1, 120, 200, 3), dtype=torch.uint8)
    frames[:, 50:70, 90:110] = 255  # a square in the middle stays a square in the middle
    bright = back(preprocess(frames, height, width, fit="crop"))[0, :, :, 0] > 127
    rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
    assert abs(len(rows) - len(columns)) <= 1
    assert abs(float(rows.float().mean()) - (height - 1) / 2) <= 1
    assert abs(float(columns.float().mean()) - (width - 1) / 2) <= 1


def test_chunks_do_not_change_the_result(monkeypatch):
    import encoder.preprocess as module

    frames = torch.randint(0, 256, (7, 40, 60, 3), dtype=torch.uint8)
    whole = preprocess(frames, 28, 28)
    monkeypatch.setattr(module, "CHUNK_PIXELS", 1)
    assert torch.equal(preprocess(frames, 28, 28), whole)


def test_clip_dtype_and_device():
    clip = read_clip(photo().numpy(), 2)
    out = preprocess(clip, 28, 42, dtype=torch.bfloat16, device="cpu")
    assert out.shape == (3, 2, 28, 42)
    assert out.dtype == torch.bfloat16
    assert out.device.type == "cpu"


@pytest.mark.parametrize(
    ("frames", "size", "fit"),
    [
        (torch.zeros(2, 8, 8, 3), (4, 4), "squash"),
        (torch.zeros((2, 3, 8, 8), dtype=torch.uint8), (4, 4), "squash"),
        (torch.zeros((0, 8, 8, 3), dtype=torch.uint8), (4, 4), "squash"),
        (torch.zeros((1, 8, 8, 3), dtype=torch.uint8), (0, 4), "squash"),
        (torch.zeros((1, 8, 8, 3), dtype=torch.uint8), (4, 4), "stretch"),
    ],
)
def test_wrong_input(frames, size, fit):
    with pytest.raises(VideoError):
        preprocess(frames, *size, fit=fit)
