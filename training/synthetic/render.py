"""Turns scenes into pixels: any times, any resolution, deterministic."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from encoder.errors import DataError
from training.synthetic.backgrounds import paint
from training.synthetic.scene import Actor, Scene, Shot, opacity_at, pose_at
from training.synthetic.sprites import SpriteBank


def render(scene: Scene, times_s: Sequence[float], height: int, width: int, bank: SpriteBank) -> np.ndarray:
    """The frames of a scene at the given times: uint8 (T, height, width, 3), RGB.

    The same scene, times, size and bank always give the same bytes. Raises DataError for a size below 16
    pixels or a sprite that the bank lacks.
    """
    if min(height, width) < 16:
        raise DataError(
            f"Frames of {width} x {height} pixels are too small to show anything: use at least 16."
        )
    frames = np.empty((len(times_s), height, width, 3), np.uint8)
    painted: dict[int, np.ndarray] = {}
    for frame, time_s in zip(frames, times_s, strict=True):
        shot = scene.shot_at(time_s)
        if id(shot) not in painted:
            painted[id(shot)] = _backdrop(shot, height, width, bank)
        frame[...] = _window(painted[id(shot)], shot, time_s, height, width)
        for actor in shot.actors:
            _draw(frame, shot, actor, time_s, bank)
    if scene.noise:
        _add_noise(frames, scene)
    if scene.jpeg is not None:
        for frame in frames:
            frame[...] = _through_jpeg(frame, scene.jpeg)
    return frames


def _backdrop(shot: Shot, height: int, width: int, bank: SpriteBank) -> np.ndarray:
    """The lit background of a shot, larger than the frame by what the pan uncovers."""
    extra_y, extra_x = math.ceil(abs(shot.pan[1]) * height), math.ceil(abs(shot.pan[0]) * width)
    picture = paint(shot.background, height + extra_y, width + extra_x, bank.photos)
    return _lit(picture, shot)


def _lit(picture: np.ndarray, shot: Shot) -> np.ndarray:
    """Colours multiplied by the shot's light (each factor 0..1), uint8 in and out."""
    if shot.light == (1.0, 1.0, 1.0):
        return picture
    factors = np.array([round(256 * factor) for factor in shot.light], np.uint16)
    return ((picture * factors) >> 8).astype(np.uint8)


def _window(backdrop: np.ndarray, shot: Shot, time_s: float, height: int, width: int) -> np.ndarray:
    """The part of the backdrop in view at a time: it crosses the extra border during the shot."""
    u = min(max((time_s - shot.start_s) / max(shot.end_s - shot.start_s, 1e-9), 0.0), 1.0)
    spare = (backdrop.shape[1] - width, backdrop.shape[0] - height)
    x, y = (round(s * (1 - u if pan > 0 else u)) for s, pan in zip(spare, shot.pan, strict=True))
    return backdrop[y : y + height, x : x + width]


def _draw(frame: np.ndarray, shot: Shot, actor: Actor, time_s: float, bank: SpriteBank) -> None:
    """Draws one actor over a frame in place, with sub-pixel position, rotation and soft edges."""
    opacity = opacity_at(actor, time_s)
    if opacity <= 0.0:
        return
    height, width = frame.shape[:2]
    pose = pose_at(actor, time_s, width / height)
    size = pose.size * min(height, width)
    cx, cy = pose.x * width, pose.y * height
    turn = math.radians(pose.angle)
    # A rotated square needs a larger box; an upright one fits its own size.
    half = 0.5 * size * (abs(math.cos(turn)) + abs(math.sin(turn)))
    left, top = max(0, math.floor(cx - half)), max(0, math.floor(cy - half))
    right, bottom = min(width, math.ceil(cx + half)), min(height, math.ceil(cy + half))
    if right - left < 1 or bottom - top < 1:
        return
    sprite = bank.frame(actor.code_at(time_s), time_s, size)
    side = sprite.shape[0]
    scale = side / size
    a, b = scale * math.cos(turn), -scale * math.sin(turn)
    d, e = scale * math.sin(turn), scale * math.cos(turn)
    c, f = side / 2 - a * (cx - left) - b * (cy - top), side / 2 - d * (cx - left) - e * (cy - top)
    if actor.flip:
        a, b, c = -a, -b, side - c
    image = Image.frombuffer("RGBa", (side, side), np.ascontiguousarray(sprite), "raw", "RGBa", 0, 1)
    patch: np.ndarray = np.asarray(
        image.transform(
            (right - left, bottom - top),
            Image.Transform.AFFINE,
            (a, b, c, d, e, f),
            Image.Resampling.BILINEAR,
        )
    ).astype(np.uint16)
    if opacity < 1.0:
        patch = (patch * round(256 * opacity)) >> 8
    colour = _lit(patch[..., :3], shot)
    region = frame[top:bottom, left:right]
    under = region * (255 - patch[..., 3:])
    # x / 255 in integers, exact to one grey level.
    np.add(colour, (under + 128 + (under >> 8)) >> 8, out=region, casting="unsafe")


def _add_noise(frames: np.ndarray, scene: Scene) -> None:
    """Adds noise of the scene's amplitude in place: one random tile, shifted differently for every frame."""
    rng = np.random.default_rng(scene.seed)
    height, width = frames.shape[1:3]
    tile = rng.integers(-scene.noise, scene.noise + 1, (height, width, 3), np.int16)
    for frame, shift in zip(frames, rng.integers(0, height * width, len(frames)), strict=True):
        noisy = np.roll(tile, int(shift) * 3)
        noisy += frame
        np.clip(noisy, 0, 255, out=noisy)
        frame[...] = noisy


def _through_jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    """One frame as a JPEG decoder gives it back: the blocks and smears of compression."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as image:
        return np.asarray(image)
