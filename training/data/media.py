"""Media: a file, several images, a member of a tar shard or a rendered scene, all of which become a `Clip`.

    FileMedia((Path("cat.mp4"),)).load(frames=16, resolution=224)

Nothing is opened before `load`. Whatever is wrong with the media is a VideoError, so that a training run can
skip and name it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.nn.functional import interpolate

from encoder.errors import VideoError
from encoder.video.reader import Clip, read_clip
from training.data.synthetic_source import render_clip
from training.synthetic.dataset import Sample, World

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
VIDEOS = frozenset({".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".gif"})
# Decoded frames keep this many times the wanted side, so that a crop still has something to show.
SPARE = 4


class Media(Protocol):
    """Something that becomes a clip."""

    @property
    def key(self) -> str:
        """Names the content, for the feature cache."""
        ...

    def load(self, frames: int, resolution: int, *, moments: Sequence[float] | None = None) -> Clip:
        """Sampled frames, uint8 (T, H, W, 3); T is 1 for an image. resolution: what will be used of them.

        moments: places 0..1 of the media's span; None takes the middles of `frames` equal parts. Raises
        VideoError when it cannot be read.
        """
        ...


@dataclass(frozen=True)
class FileMedia:
    """A video or image file, or several images; start_s and end_s bound a video."""

    paths: tuple[Path, ...]
    start_s: float | None = None
    end_s: float | None = None

    @property
    def key(self) -> str:
        """Path, time span and modification time."""
        stamps = [path.stat().st_mtime_ns if path.exists() else 0 for path in self.paths]
        return f"{[str(p) for p in self.paths]}|{self.start_s}|{self.end_s}|{stamps}"

    def load(self, frames: int, resolution: int, *, moments: Sequence[float] | None = None) -> Clip:
        """Sampled frames, shrunk while decoding to about what the resolution can use.

        Of several images at most as many as there are; all take the size of the first.
        """
        side = SPARE * resolution
        if bad := [path for path in self.paths if "\0" in str(path)]:
            raise VideoError(f"No file can have the name {str(bad[0])!r}.")
        if len(self.paths) > 1:
            return _series([read_clip(path, 1, max_side=side) for path in self.paths], frames)
        return _read(self.paths[0], frames, side, moments, start_s=self.start_s, end_s=self.end_s)


@dataclass(frozen=True)
class ShardMedia:
    """A video or image that lies in an uncompressed tar, `size` bytes from `offset` on."""

    shard: Path
    member: str
    offset: int
    size: int
    start_s: float | None = None
    end_s: float | None = None

    @property
    def key(self) -> str:
        """Shard, member, time span, size and the shard's modification time."""
        stamp = self.shard.stat().st_mtime_ns if self.shard.exists() else 0
        return f"{self.shard}!{self.member}|{self.start_s}|{self.end_s}|{self.size}|{stamp}"

    def load(self, frames: int, resolution: int, *, moments: Sequence[float] | None = None) -> Clip:
        """Sampled frames of the member's bytes."""
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise VideoError(f"Cannot read {self.member!r} in {self.shard}: {error.strerror}.") from error
        if len(content) < self.size:
            raise VideoError(f"Cannot read {self.member!r}: {self.shard} is cut off; download it again.")
        try:
            return _read(content, frames, SPARE * resolution, moments, start_s=self.start_s, end_s=self.end_s)
        except VideoError as error:
            raise VideoError(f"{self.shard}, {self.member!r}: {error}") from error


@dataclass(frozen=True)
class WorldMedia:
    """A sample of the synthetic world."""

    world: World
    sample: Sample
    number: int

    @property
    def key(self) -> str:
        """Split, seed and number, and what decides how the world looks."""
        return f"world/{self.world.split}/{self.world.seed}/{self.number}/{self.world.level}"

    def load(self, frames: int, resolution: int, *, moments: Sequence[float] | None = None) -> Clip:
        """Rendered frames."""
        return render_clip(self.world, self.sample, str(self.number), frames, resolution, moments)


@dataclass(frozen=True)
class NoMedia:
    """Stands for the media of an example that is text alone."""

    key: str = ""

    def load(self, frames: int, resolution: int, *, moments: Sequence[float] | None = None) -> Clip:
        """Raises VideoError."""
        raise VideoError("It has no video or image.")


def reason(error: Exception) -> str:
    """Why a file could not be read, for a sentence."""
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def _read(source: Any, frames: int, side: int, moments: Sequence[float] | None, **span: float | None) -> Clip:
    return read_clip(source, frames, moments=moments, max_side=side, **span)  # type: ignore[arg-type]


def _series(pictures: Sequence[Clip], frames: int) -> Clip:
    """Images as one clip of one second each, in the size of the first."""
    height, width = pictures[0].frames.shape[1:3]
    return read_clip([_fit(one.frames, height, width)[0] for one in pictures], min(frames, len(pictures)))


def _fit(frames: Tensor, height: int, width: int) -> Tensor:
    if tuple(frames.shape[1:3]) == (height, width):
        return frames
    moved = interpolate(frames.permute(0, 3, 1, 2), (height, width), mode="bicubic", antialias=True)
    return moved.permute(0, 2, 3, 1).contiguous()
