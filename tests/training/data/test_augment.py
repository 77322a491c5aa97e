"""Augmentation: crops by hand, one change for all frames of a clip, RandAugment's operations."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoder.errors import ConfigError
from training.data.augment import AugmentConfig, augment, choose_box, resize, segment_moments
from training.data.media import _fit
from training.data.rand_augment import OPERATIONS, rand_augment
from training.trainer.recipe import build

EVERYTHING = AugmentConfig(crop="resized", flip=0.5, rand_augment=(9, 0.5), rand_operations=4, erase=0.25)


def picture(height: int = 60, width: int = 80) -> torch.Tensor:
    """A smooth picture without symmetry, uint8 (H, W, 3)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x * 255 // width, y * 255 // height, (x + 2 * y) % 256], dim=-1).to(torch.uint8)


def still(frames: int = 4, height: int = 60, width: int = 80) -> torch.Tensor:
    return picture(height, width).expand(frames, -1, -1, -1).clone()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    crop=st.sampled_from(["none", "center", "multiscale", "resized"]),
)
def test_boxes_lie_inside(seed: int, height: int, width: int, crop: str) -> None:
    config = build(AugmentConfig, {"crop": crop}, "augment")
    top, left, tall, wide = choose_box(height, width, config, random.Random(seed))
    assert tall >= 1
    assert wide >= 1
    assert 0 <= top <= top + tall <= height
    assert 0 <= left <= left + wide <= width
    if crop == "resized" and min(height, width) > 30:
        assert tall * wide >= 0.06 * height * width


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(14, 70))
def test_all_frames_of_a_clip_change_alike(seed: int, size: int) -> None:
    out = augment(still(), size, EVERYTHING, random.Random(seed))
    assert out.shape == (4, size, size, 3)
    assert out.dtype == torch.uint8
    assert all(torch.equal(frame, out[0]) for frame in out)
    assert torch.equal(out, augment(still(), size, EVERYTHING, random.Random(seed)))


def test_multiscale_crops_are_the_thirteen_places_of_ten_sizes() -> None:
    config = AugmentConfig(crop="multiscale")
    boxes = {choose_box(240, 320, config, random.Random(seed)) for seed in range(4000)}
    sides = (240, 210, 180, 158)
    sizes = {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
    assert {(tall, wide) for _, _, tall, wide in boxes} == sizes
    places = {(top, left) for top, left, tall, wide in boxes if (tall, wide) == (180, 180)}
    rows, columns = (240 - 180) // 4, (320 - 180) // 4
    expected = {(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (0, 2), (4, 2)}
    expected |= {(1, 1), (1, 3), (3, 1), (3, 3)}
    assert places == {(i * rows, j * columns) for i, j in expected}


def test_shrinking_noise_gives_grey_not_noise() -> None:
    noise = torch.randint(0, 256, (1, 224, 224, 3), generator=torch.Generator().manual_seed(0))
    for shrink in (resize, _fit):
        small = shrink(noise.to(torch.uint8), 28, 28).float()
        assert small.std().item() < 20  # 74 before, and as much after picking single pixels


def test_crops_show_what_they_say() -> None:
    frames = still(1, 60, 80)
    assert torch.equal(
        augment(frames, 60, AugmentConfig(crop="center"), random.Random(0)), frames[:, :, 10:70]
    )
    assert torch.equal(
        augment(frames[:, :, :60], 60, AugmentConfig(flip=1.0), random.Random(0)), frames[:, :, :60].flip(2)
    )
    squashed = augment(frames, 40, AugmentConfig(), random.Random(0))
    exact = np.asarray(Image.fromarray(frames[0].numpy()).resize((40, 40), Image.Resampling.BICUBIC))
    assert np.abs(squashed[0].numpy().astype(int) - exact).max() <= 2


@given(count=st.integers(1, 32), seed=st.integers(0, 99))
def test_moments_stay_in_their_segments(count: int, seed: int) -> None:
    for index, moment in enumerate(segment_moments(count, random.Random(seed))):
        assert index / count <= moment <= (index + 1) / count


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operations_keep_the_size_and_change_the_picture(name: str) -> None:
    image = Image.fromarray(np.clip(picture().numpy(), 40, 200))
    for sign in (-1, 1):
        out = OPERATIONS[name](0.9, sign)(image)
        assert out.size == image.size
        assert out.mode == "RGB"
        assert not np.array_equal(np.asarray(out), np.asarray(image))


def test_operations_by_hand() -> None:
    image = Image.fromarray(picture().numpy())
    pixels = picture().numpy()
    assert np.array_equal(np.asarray(OPERATIONS["Invert"](0.9, 1)(image)), 255 - pixels)
    moved = np.asarray(OPERATIONS["TranslateX"](0.25 / 0.45, 1)(image))  # a quarter: 20 of 80 columns
    assert np.array_equal(moved[:, :60], pixels[:, 20:])
    assert (moved[:, 61:] == (124, 116, 104)).all()
    assert np.array_equal(np.asarray(OPERATIONS["Posterize"](1.0, 1)(image)), pixels & 128)
    solarized = np.asarray(OPERATIONS["Solarize"](0.5, 1)(image))
    assert np.array_equal(solarized, np.where(pixels < 128, pixels, 255 - pixels))
    brighter = np.asarray(OPERATIONS["SolarizeAdd"](1.0, 1)(image))
    assert np.array_equal(brighter, np.where(pixels < 128, np.minimum(pixels.astype(int) + 110, 255), pixels))


def test_half_of_the_operations_are_applied() -> None:
    frames = still(1)
    unchanged = sum(rand_augment(frames, 9, 2, 0.5, random.Random(seed)) is frames for seed in range(400))
    assert 60 < unchanged < 140  # a quarter of 400


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flip": 1.5}, "augment.flip"),
        ({"scales": [0.0]}, "augment.scales"),
        ({"area": [0.5, 0.1]}, "augment.area"),
        ({"ratio": [0, 1]}, "augment.ratio"),
        ({"rand_augment": [11, 0.5]}, "augment.rand_augment"),
        ({"rand_operations": 0}, "rand_operations"),
        ({"crop": "best"}, "crop must be one of"),
    ],
)
def test_impossible_settings(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(AugmentConfig, values, "augment")
