"""SpriteBank: the pictures of the world, as memory-mapped arrays at several sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from encoder.errors import DataError
from training.synthetic.nouns import Noun, load_nouns

# Pixels; a sprite is drawn from the level just above its size, so that bilinear never aliases.
LEVELS = (128, 90, 64, 45, 32, 22)
FORMAT = 2
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 45, 45),
    "green": (50, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "bar")


@dataclass(frozen=True)
class Strip:
    """Where a noun's frames lie in the level arrays, and the seconds of one turn (0.0: still)."""

    offset: int
    frames: int
    period_s: float


@dataclass(frozen=True)
class SpriteBank:
    """All sprites and photographs that a world may draw.

    `levels`: side length -> uint8 (N, side, side, 4), colours premultiplied by alpha; `strips`: noun code
    -> frames; `photos`: name -> uint8 (H, W, 3).
    """

    nouns: tuple[Noun, ...]
    levels: Mapping[int, np.ndarray]
    strips: Mapping[str, Strip]
    photos: Mapping[str, np.ndarray] = field(default_factory=dict)
    source: tuple[Path, bool] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A bank from a folder travels to worker processes as its path, not as 150 MB of pixels."""
        if self.source is not None:
            return _reopen, self.source
        return SpriteBank, (self.nouns, self.levels, self.strips, self.photos)

    def frame(self, code: str, time_s: float, size: float) -> np.ndarray:
        """The sprite at an animation time, from the smallest level not below `size`: (side, side, 4)."""
        strip = self.strips[code]
        turn = time_s / strip.period_s % 1.0 if strip.period_s else 0.0
        index = strip.offset + min(int(turn * strip.frames), strip.frames - 1)
        side = next((level for level in sorted(self.levels) if level >= size), max(self.levels))
        return self.levels[side][index]

    def noun(self, code: str) -> Noun:
        """The noun of a sprite code; DataError when the bank has none."""
        for noun in self.nouns:
            if noun.code == code:
                return noun
        raise DataError(
            f"The sprite bank has no noun with code {code!r}; was the scene made with another bank?"
        )


def pyramid(sprites: Sequence[np.ndarray], levels: Sequence[int] = LEVELS) -> dict[int, np.ndarray]:
    """Square RGBA sprites (any side, straight alpha) -> side -> uint8 (N, side, side, 4), premultiplied."""
    stacks: dict[int, list[np.ndarray]] = {side: [] for side in levels}
    for sprite in sprites:
        image = Image.fromarray(sprite, "RGBA").convert("RGBa")
        for side in levels:
            stacks[side].append(np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)))
    return {side: np.stack(stack) for side, stack in stacks.items()}


def write_bank(
    folder: Path, strips: Mapping[str, tuple[Strip, Strip]], levels: Mapping[int, np.ndarray]
) -> None:
    """Writes levels and index; `strips`: noun code -> (animated, still)."""
    for side, array in levels.items():
        np.save(folder / f"sprites_{side}.npy", array)
    index = {
        "format": FORMAT,
        "strips": {
            code: [[strip.offset, strip.frames, strip.period_s] for strip in pair]
            for code, pair in strips.items()
        },
    }
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def load_bank(folder: Path, *, stills_only: bool = False) -> SpriteBank:
    """Opens a converted cache folder without reading pixels; DataError says what to run if missing."""
    advice = "run `python -m training.synthetic fetch` once (needs npm and network)."
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"No sprites in {folder}: {advice}") from None
    except ValueError as error:
        raise DataError(f"The sprite index in {folder} is damaged ({error}): {advice}") from None
    if index.get("format") != FORMAT:
        raise DataError(f"The sprites in {folder} were converted by another version: {advice}")
    nouns = tuple(noun for noun in load_nouns() if noun.code in index["strips"])
    strips = {code: Strip(*pair[1 if stills_only else 0]) for code, pair in index["strips"].items()}
    try:
        levels = {side: np.load(folder / f"sprites_{side}.npy", mmap_mode="r") for side in LEVELS}
    except (OSError, ValueError) as error:
        raise DataError(f"The sprites in {folder} cannot be read ({error}): {advice}") from None
    photos = {path.stem: np.load(path, mmap_mode="r") for path in sorted((folder / "photos").glob("*.npy"))}
    return SpriteBank(nouns, levels, strips, photos, (folder, stills_only))


def _reopen(folder: Path, stills_only: bool) -> SpriteBank:
    return load_bank(folder, stills_only=stills_only)


def procedural_bank() -> SpriteBank:
    """Coloured shapes (8 x 5 colours, still, the last colour unseen), no photographs: needs no files."""
    nouns: list[Noun] = []
    sprites: list[np.ndarray] = []
    strips: dict[str, Strip] = {}
    for shape in SHAPES:
        for colour, rgb in COLOURS.items():
            name = f"{colour} {shape}"
            code = name.replace(" ", "_")
            plural = name + ("es" if name.endswith("s") else "s")
            split = "unseen" if colour == "purple" else "train"
            nouns.append(Noun(code, name, plural, shape, split))  # type: ignore[arg-type]
            strips[code] = Strip(len(sprites), 1, 0.0)
            sprites.append(draw_shape(shape, rgb))
    return SpriteBank(tuple(nouns), pyramid(sprites, (64, 45, 32, 22)), strips)


def draw_shape(shape: str, rgb: tuple[int, int, int], side: int = 128) -> np.ndarray:
    """One shape in the middle of a transparent square: uint8 (side, side, 4), straight alpha."""
    image = Image.new("RGBA", (side, side), (*rgb, 0))
    draw = ImageDraw.Draw(image)
    low, mid, high = 6, side // 2, side - 7
    third = side // 3
    angles = np.pi * np.arange(10) / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, mid - low, (mid - low) * 0.45)
    corners = {
        "square": [(low, low), (high, low), (high, high), (low, high)],
        "triangle": [(mid, low), (high, high), (low, high)],
        "diamond": [(mid, low), (high, mid), (mid, high), (low, mid)],
        "star": [(mid + r * np.cos(a), mid + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)],
    }
    if shape in corners:
        draw.polygon(corners[shape], fill=(*rgb, 255))
    elif shape == "circle":
        draw.ellipse((low, low, high, high), fill=(*rgb, 255))
    elif shape == "ring":
        draw.ellipse((low, low, high, high), outline=(*rgb, 255), width=side // 5)
    elif shape == "bar":
        draw.rectangle((low, third, high, 2 * third), fill=(*rgb, 255))
    else:
        draw.rectangle((low, third, high, 2 * third), fill=(*rgb, 255))
        draw.rectangle((third, low, 2 * third, high), fill=(*rgb, 255))
    return np.asarray(image)
