"""Clips that the synthetic world would never draw: photographs in motion, screens, drawings, noise.

photos = Photos.open("photos.zip")
frames = foreign_clip(photos, random.Random("clip 7"), count=4)     # uint8 (4, 160, 160, 3)
"""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from encoder.errors import DataError

SIDE = 160  # pixels of a clip
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LEAST_PHOTOS = 8
TEST_SHARE = 0.25  # of the photographs, which no training clip shows
# How often each kind is drawn, of 100.
SHARES = {
    "moved": 20,
    "slides": 9,
    "pasted": 10,
    "cartoon": 11,
    "close": 10,
    "rendered": 10,
    "screen": 7,
    "diagram": 6,
    "card": 8,
    "drawing": 5,
    "plain": 4,
}
WORDS = (
    *("the", "of", "a", "video", "live", "news", "12:30", "rate", "total", "server"),
    *("cat", "market", "click", "file", "menu", "http", "lorem"),
)
BOX = tuple[float, float, float, float]


@dataclass(frozen=True)
class Photos:
    """Photographs of a folder or a zip file, those of one split, by a hash of their names."""

    source: Path
    names: tuple[str, ...]

    @staticmethod
    def open(source: str | Path, split: Literal["train", "test"] = "train") -> Photos:
        """Raises DataError when there are too few."""
        source = Path(source)
        try:
            if source.is_dir():
                found = [str(path.relative_to(source)) for path in source.rglob("*")]
            else:
                with zipfile.ZipFile(source) as file:
                    found = file.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{source} is neither a folder nor a zip file of photographs.") from error
        names = sorted(name for name in found if name.lower().endswith(SUFFIXES))
        chosen = tuple(name for name in names if (_share(name) < TEST_SHARE) == (split == "test"))
        if len(chosen) < LEAST_PHOTOS:
            raise DataError(
                f"{source} has only {len(chosen)} photographs to {split} with: give a folder or zip file "
                f"with at least {5 * LEAST_PHOTOS} pictures ({', '.join(SUFFIXES)})."
            )
        return Photos(source, chosen)

    def draw(self, rng: random.Random) -> Image.Image:
        """One of them, RGB; raises DataError when it cannot be read."""
        name = rng.choice(self.names)
        try:
            if self.source.is_dir():
                return Image.open(self.source / name).convert("RGB")
            with zipfile.ZipFile(self.source) as file:
                return Image.open(io.BytesIO(file.read(name))).convert("RGB")
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"Cannot read the photograph {name} of {self.source}: remove it.") from error


def _share(name: str) -> float:
    """A number from 0 to 1 that the name alone decides."""
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big") / 2**32


def foreign_clip(photos: Photos, rng: random.Random, count: int) -> np.ndarray:
    """uint8 (count, SIDE, SIDE, 3) of a random kind."""
    kinds: dict[str, Callable[[Photos, random.Random, int], list[Image.Image]]] = {
        "moved": lambda p, r, n: moved(p.draw(r), r, n),
        "slides": slides,
        "pasted": pasted,
        "cartoon": cartoon,
        "close": close,
        "rendered": rendered,
        "screen": screen,
        "diagram": diagram,
        "card": card,
        "drawing": drawing,
        "plain": plain,
    }
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    frames = kinds[kind](photos, rng, count)
    if rng.random() < 0.2:
        frames = _graded(frames, rng)
    if rng.random() < 0.15:
        frames = _captioned(frames, rng)
    if rng.random() < 0.12:
        frames = _letterboxed(frames, rng)
    return np.stack([np.asarray(frame) for frame in frames])


def moved(
    photo: Image.Image,
    rng: random.Random,
    count: int,
    side: int = SIDE,
    zooms: tuple[float, float] = (0.4, 1.0),
) -> list[Image.Image]:
    """A photograph under a camera that stands, pans, zooms, turns or shakes.

    zooms: the least and the largest share of the shorter side that is seen.
    """
    width, height = photo.size
    zoom = [rng.uniform(*zooms) for _ in range(2)]
    corner = [(rng.random(), rng.random()) for _ in range(2)]
    turn = [rng.uniform(-10, 10) for _ in range(2)] if rng.random() < 0.2 else [0.0, 0.0]
    if rng.random() < 0.3:
        zoom[1] = zoom[0]
    if rng.random() < 0.3:
        corner[1] = corner[0]
    still, whole, shake = rng.random() < 0.25, rng.random() < 0.25, rng.choice((0, 0, 0.01, 0.03))
    frames = []
    for index in range(count):
        part = 0.0 if still else index / max(count - 1, 1)
        size = (zoom[0] + (zoom[1] - zoom[0]) * part) * min(width, height)
        x = _between(corner[0][0], corner[1][0], part) * (width - size) + rng.gauss(0, shake) * size
        y = _between(corner[0][1], corner[1][1], part) * (height - size) + rng.gauss(0, shake) * size
        x, y = min(max(x, 0), width - size), min(max(y, 0), height - size)
        box: BOX = (0, 0, width, height) if whole else (x, y, x + size, y + size)
        angle = _between(turn[0], turn[1], part)
        turned = photo.rotate(angle, Image.Resampling.BILINEAR) if angle else photo
        frames.append(turned.resize((side, side), Image.Resampling.BILINEAR, box=box))
    return frames


def _between(first: float, last: float, part: float) -> float:
    return first + (last - first) * part


def slides(photos: Photos, rng: random.Random, count: int) -> list[Image.Image]:
    """Two to four photographs with cuts between them."""
    cuts = sorted(rng.sample(range(1, count), min(rng.randrange(1, 4), count - 1))) if count > 1 else []
    frames: list[Image.Image] = []
    for start, end in zip([0, *cuts], [*cuts, count], strict=True):
        frames += moved(photos.draw(rng), rng, end - start)
    return frames


def pasted(photos: Photos, rng: random.Random, count: int) -> list[Image.Image]:
    """Pieces of photographs that move over another: a person before a street, a picture in a picture."""
    frames = [frame.copy() for frame in moved(photos.draw(rng), rng, count)]
    for _ in range(rng.randrange(1, 4)):
        width, height = (int(rng.uniform(0.15, 0.6) * SIDE) for _ in range(2))
        piece = moved(photos.draw(rng), rng, count, max(width, height))
        mask = Image.new("L", (width, height), 255 if rng.random() < 0.4 else 0)
        ImageDraw.Draw(mask).ellipse((0, 0, width - 1, height - 1), fill=255)
        x, y = (rng.uniform(-0.1, 0.8) * SIDE for _ in range(2))
        dx, dy = (rng.uniform(-0.25, 0.25) * SIDE * (rng.random() < 0.7) for _ in range(2))
        for index, (frame, patch) in enumerate(zip(frames, piece, strict=True)):
            part = index / max(count - 1, 1)
            frame.paste(patch.crop((0, 0, width, height)), (int(x + dx * part), int(y + dy * part)), mask)
    return frames


def cartoon(photos: Photos, rng: random.Random, count: int) -> list[Image.Image]:
    """Photographs without their fine detail, in few or in strong colours: painted, drawn, rendered."""
    frames = pasted(photos, rng, count) if rng.random() < 0.5 else moved(photos.draw(rng), rng, count)
    size, colours, strength = rng.choice((3, 5, 7)), rng.choice((0, 6, 12, 24)), rng.uniform(0.9, 2.2)
    out = []
    for frame in frames:
        flat = frame.filter(ImageFilter.MedianFilter(size)).filter(ImageFilter.ModeFilter(size))
        flat = ImageEnhance.Color(flat).enhance(strength)
        out.append(flat.quantize(colours).convert("RGB") if colours else flat)
    return out


def close(photos: Photos, rng: random.Random, count: int) -> list[Image.Image]:
    """A small part of a photograph that fills the frame: soft, with little in it."""
    frames = moved(photos.draw(rng), rng, count, zooms=(0.1, 0.35))
    blur = rng.choice((0.0, 0.0, 1.0, 2.5))
    return [frame.filter(ImageFilter.GaussianBlur(blur)) for frame in frames] if blur else frames


def rendered(photos: Photos, rng: random.Random, count: int) -> list[Image.Image]:
    """Shaded balls, bricks and figures of several balls that fill much of a soft or dark room."""
    if rng.random() < 0.5:
        radius = rng.uniform(2, 8)
        places = [
            frame.filter(ImageFilter.GaussianBlur(radius)) for frame in moved(photos.draw(rng), rng, count)
        ]
    else:
        places = [_gradient(_colour(rng), _colour(rng))] * count
    way = np.array([rng.gauss(0, 1), rng.gauss(-0.5, 1), rng.uniform(0.3, 1.5)])
    light, ambient, shine = way / np.linalg.norm(way), rng.uniform(0.05, 0.5), rng.choice((0, 0, 90, 200))
    bodies: list[tuple[np.ndarray, np.ndarray, bool]] = []  # centre, radii and step; colour; a brick
    for _ in range(rng.randrange(1, 4)):
        at = np.array([rng.uniform(0.15, 0.85), rng.uniform(0.3, 1.0)])
        step = np.array([rng.gauss(0, 0.15), rng.gauss(0, 0.06)]) * (rng.random() < 0.7)
        skin, brick = np.array(_colour(rng), np.float64), rng.random() < 0.2
        for _ in range(rng.choice((1, 3, 5, 8))):
            shift = np.array([rng.gauss(0, 0.12), rng.gauss(0, 0.16)])
            radii = np.array([rng.uniform(0.03, 0.3), rng.uniform(0.03, 0.35)])
            colour = skin if rng.random() < 0.6 else np.array(_colour(rng), np.float64)
            bodies.append((np.concatenate([at + shift, radii, step]), colour, brick))
    axis = (np.arange(SIDE) + 0.5) / SIDE
    frames = []
    for index, place in enumerate(places):
        values, part = np.asarray(place).astype(np.float64), index / max(count - 1, 1)
        for (x, y, wide, high, dx, dy), colour, brick in bodies:
            across = (axis[None, :] - x - dx * part) / wide
            down = (axis[:, None] - y - dy * part) / high
            power = 6 if brick else 2
            depth = 1 - np.abs(across) ** power - np.abs(down) ** power
            facing = across * light[0] + down * light[1] + np.sqrt(depth.clip(0)) * light[2]
            lit = ambient + (1 - ambient) * facing.clip(0)
            body = colour * lit[..., None] + shine * facing.clip(0)[..., None] ** 24
            values = np.where(depth[..., None] > 0, body, values)
        frames.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    return frames


def diagram(photos: Photos, rng: random.Random, count: int) -> list[Image.Image]:
    """Thin lines, grids, curves and labels on a plain ground, some of which come one after the other."""
    ground = rng.choice(((255, 255, 255), (255, 255, 255), (250, 248, 240), (15, 15, 20), (30, 40, 70)))
    ink = (20, 20, 20) if sum(ground) > 380 else (235, 235, 235)
    marks: list[tuple[str, list[tuple[float, float]], tuple[int, int, int], int]] = []
    if rng.random() < 0.6:
        step = rng.uniform(0.06, 0.2) * SIDE
        faint = tuple(int(0.6 * a + 0.4 * b) for a, b in zip(ground, ink, strict=True))
        for place in np.arange(rng.uniform(0, step), SIDE, step):
            marks.append(("line", [(place, 0), (place, SIDE)], faint, 1))  # type: ignore[arg-type]
            marks.append(("line", [(0, place), (SIDE, place)], faint, 1))  # type: ignore[arg-type]
    fixed = len(marks)
    for _ in range(rng.randrange(3, 16)):
        at = [(rng.random() * SIDE, rng.random() * SIDE) for _ in range(rng.randrange(2, 6))]
        kind = rng.choice(("line", "line", "box", "circle", "words"))
        marks.append((kind, at, ink if rng.random() < 0.6 else _colour(rng), rng.choice((1, 1, 2, 3))))
    grows, font, frames = rng.random() < 0.5, ImageFont.load_default(rng.choice((8, 11, 15))), []
    for index in range(count):
        frame = Image.new("RGB", (SIDE, SIDE), ground)
        draw = ImageDraw.Draw(frame)
        last = fixed + (len(marks) - fixed) * (index + 1) // count if grows else len(marks)
        for kind, points, colour, width in marks[:last]:
            (x, y), (u, v) = points[:2]
            box = (min(x, u), min(y, v), max(x, u), max(y, v))
            if kind == "line":
                draw.line(points, colour, width)
            elif kind == "words":
                draw.text(points[0], rng.choice(WORDS) if grows else WORDS[len(points)], colour, font)
            else:
                (draw.rectangle if kind == "box" else draw.ellipse)(box, outline=colour, width=width)
        frames.append(frame)
    return frames


def card(photos: Photos, rng: random.Random, count: int) -> list[Image.Image]:
    """A title or end card: words, marks, small pictures on a plain ground; may fade or come late."""
    first, last = (np.array(_colour(rng), np.float32) for _ in range(2))
    if rng.random() < 0.5:
        first = last = np.array(rng.choice(((0, 0, 0), (255, 255, 255), (20, 30, 50))), np.float32)
    page = _gradient(first, last)
    bare, sparse = page.copy(), rng.random() < 0.5
    draw, ink = ImageDraw.Draw(page), (250, 250, 250) if np.mean(first + last) < 256 else (20, 20, 20)
    for _ in range(0 if sparse else rng.choice((0, 0, 1, 2, 3))):
        side = rng.randrange(25, 70)
        photo = photos.draw(rng).resize((side, rng.randrange(25, 70)))
        page.paste(photo, (rng.randrange(SIDE - 40), rng.randrange(SIDE - 40)))
    for _ in range(rng.choice((0, 1, 1, 2))):
        x, y = rng.randrange(SIDE - 40), rng.randrange(SIDE - 40)
        size = rng.randrange(3, 20) if sparse else rng.randrange(15, 70)
        shape = rng.choice((draw.ellipse, draw.rectangle))
        shape((x, y, x + size, y + size), fill=_colour(rng))
    for _ in range(rng.randrange(2) if sparse else rng.randrange(1, 4)):
        text = " ".join(rng.sample(WORDS, rng.randrange(1, 4)))
        font = ImageFont.load_default(rng.randrange(6, 16) if sparse else rng.randrange(9, 40))
        at = (rng.randrange(SIDE // 2), rng.randrange(SIDE - 25))
        draw.text(at, text, ink if rng.random() < 0.7 else _colour(rng), font)
    start, late = rng.choice((Image.new("RGB", (SIDE, SIDE)), bare)), rng.randrange(count)
    way = rng.choice(("stands", "stands", "fades", "late"))
    if way == "fades":
        return [Image.blend(start, page, (index + 1) / count) for index in range(count)]
    return [start if way == "late" and index < late else page for index in range(count)]


def screen(photos: Photos, rng: random.Random, count: int) -> list[Image.Image]:
    """A page of text with boxes that stands or scrolls."""
    plain = rng.choice(((255, 255, 255), (20, 20, 20), (240, 240, 245)))
    ground = plain if rng.random() < 0.6 else _colour(rng)
    ink = (0, 0, 0) if sum(ground) > 380 else (255, 255, 255)
    page = Image.new("RGB", (256, 512), ground)
    draw, size, y = ImageDraw.Draw(page), rng.choice((10, 12, 16, 24, 44)), rng.choice((4, 4, 40, 100))
    font, most = ImageFont.load_default(size), rng.choice((1, 3, 60))
    while y < 500 and most:
        most -= 1
        if rng.random() < 0.85:
            text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 9)))
            draw.text((rng.choice((4, 4, 30)), y), text, ink if rng.random() < 0.85 else _colour(rng), font)
        y += int(size * 1.3)
    for _ in range(rng.choice((0, 0, 2, 5))):
        x, y = rng.randrange(200), rng.randrange(400)
        draw.rectangle((x, y, x + rng.randrange(20, 120), y + rng.randrange(10, 100)), _colour(rng), ink)
    scroll = rng.choice((0, 0, 40, 200))
    tops = [int(scroll * index / max(count - 1, 1)) for index in range(count)]
    return [
        page.crop((0, top, 256, top + 256)).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for top in tops
    ]


def drawing(photos: Photos, rng: random.Random, count: int) -> list[Image.Image]:
    """Flat shapes that stand or move over one colour."""
    ground = rng.choice(((255, 255, 255), (0, 0, 0))) if rng.random() < 0.4 else _colour(rng)
    shapes = [
        (
            rng.choice(("rectangle", "ellipse", "line", "polygon")),
            [rng.uniform(-0.2, 1) for _ in range(2)],
            [rng.uniform(0.03, 0.6) for _ in range(2)],
            [rng.uniform(-0.5, 0.5) * (rng.random() < 0.5) for _ in range(2)],
            _colour(rng),
            rng.randrange(1, 8),
        )
        for _ in range(rng.randrange(1, 12))
    ]
    frames = []
    for index in range(count):
        part = index / max(count - 1, 1)
        frame = Image.new("RGB", (SIDE, SIDE), ground)
        draw = ImageDraw.Draw(frame)
        for kind, at, size, way, colour, width in shapes:
            x, y = ((start + step * part) * SIDE for start, step in zip(at, way, strict=True))
            right, bottom = x + size[0] * SIDE, y + size[1] * SIDE
            if kind == "line":
                draw.line((x, y, right, bottom), colour, width)
            elif kind == "polygon":
                draw.polygon([(x, y), (right, y + 5), (x + 9, bottom)], colour)
            else:
                getattr(draw, kind)((x, y, right, bottom), fill=colour)
        frames.append(frame)
    return frames


def plain(photos: Photos, rng: random.Random, count: int) -> list[Image.Image]:
    """Nothing to see: one colour, a gradient, test bars, noise, or soft clouds that flicker."""
    noise = np.random.default_rng(rng.getrandbits(32))
    kind = rng.choice(("colour", "gradient", "bars", "noise", "grain", "clouds"))
    first, last = (np.array(_colour(rng), np.float32) for _ in range(2))
    base, frames = noise.normal(size=(8, 8, 3)), []
    slope = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None, None]
    for index in range(count):
        if kind == "noise":
            values = noise.uniform(0, 255, (SIDE, SIDE, 3))
        elif kind == "grain":
            values = first + noise.normal(size=(SIDE, SIDE, 1)) * 30
        elif kind == "bars":
            levels = np.arange(SIDE) * 8 // SIDE
            values = np.stack([(levels >> bit & 1) * 255 for bit in (2, 1, 0)], -1)[None].repeat(SIDE, 0)
        elif kind == "clouds":
            soft = np.clip((base + 0.2 * noise.normal(size=base.shape)) * 60 + 128, 0, 255).astype(np.uint8)
            values = np.asarray(Image.fromarray(soft).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        else:
            mixed = first * (1 - slope) + last * slope if kind == "gradient" else first * (1 - 0.1 * index)
            values = np.broadcast_to(mixed, (SIDE, SIDE, 3))
        frames.append(Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)))
    return frames


def _captioned(frames: Sequence[Image.Image], rng: random.Random) -> list[Image.Image]:
    """With a line of text over them."""
    text, at = " ".join(rng.choice(WORDS) for _ in range(3)), (6, rng.choice((4, SIDE - 22)))
    font, out = ImageFont.load_default(rng.choice((9, 12, 16))), []
    for frame in frames:
        written = frame.copy()
        ImageDraw.Draw(written).text(at, text, (255, 255, 255), font)
        out.append(written)
    return out


def _graded(frames: Sequence[Image.Image], rng: random.Random) -> list[Image.Image]:
    """As film and poor cameras show it: dark, tinted, without colour, grainy, dimmer at the corners."""
    noise = np.random.default_rng(rng.getrandbits(32))
    gamma, light = rng.choice((1.0, rng.uniform(1.2, 2.5))), rng.uniform(0.25, 1.1)
    tint = np.array([rng.uniform(0.7, 1.2) for _ in range(3)])
    grey, grain, flicker = rng.random() < 0.25, rng.choice((0, 0, 6, 18)), rng.choice((0, 0, 0.1))
    axis = np.linspace(-1, 1, SIDE)
    corners = 1 - rng.choice((0, 0.25, 0.45)) * (axis[:, None] ** 2 + axis[None, :] ** 2)[..., None] / 2
    out = []
    for frame in frames:
        values = np.asarray(frame.convert("L").convert("RGB") if grey else frame) / 255
        values = values**gamma * light * (1 + rng.uniform(-flicker, flicker)) * tint * corners * 255
        values = values + grain * noise.normal(size=(SIDE, SIDE, 1))
        out.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    return out


def _gradient(first: Sequence[float] | np.ndarray, last: Sequence[float] | np.ndarray) -> Image.Image:
    """From one colour at the top to another at the bottom."""
    slope = np.linspace(0, 1, SIDE)[:, None, None]
    values = np.broadcast_to(np.asarray(first) * (1 - slope) + np.asarray(last) * slope, (SIDE, SIDE, 3))
    return Image.fromarray(np.ascontiguousarray(values.astype(np.uint8)))


def _letterboxed(frames: Sequence[Image.Image], rng: random.Random) -> list[Image.Image]:
    """With black bars above and below, or at the sides."""
    bar, upright, out = int(rng.uniform(0.08, 0.3) * SIDE), rng.random() < 0.4, []
    size = (SIDE - 2 * bar, SIDE) if upright else (SIDE, SIDE - 2 * bar)
    for frame in frames:
        boxed = Image.new("RGB", (SIDE, SIDE))
        boxed.paste(frame.resize(size, Image.Resampling.BILINEAR), (bar, 0) if upright else (0, bar))
        out.append(boxed)
    return out


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)
