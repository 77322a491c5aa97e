"""Webdataset tar shards: samples by number, straight from uncompressed tars, without unpacking them.

    shards = Shards.open("data/cc3m/{00000..00331}.tar")
    shards.sample(12345).text("txt")

Files of one sample share their name up to the first dot and follow each other. A first pass over the tar's
headers notes where each sample starts (8 bytes per sample), and the note is kept as `NAME.tar.index` beside
the shard, so that a later run opens at once, and any rank reads any sample.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from encoder.errors import DataError, VideoError
from training.data.annotations import parse_captions, parse_conversations, parse_span, to_label
from training.data.examples import Example, Kind
from training.data.media import IMAGES, VIDEOS, Media, NoMedia, ShardMedia

INDEX_VERSION = 1
BLOCK = 512  # bytes of a tar header


@dataclass(frozen=True)
class Member:
    """One file of a sample: what follows the name's first dot, and where its bytes lie."""

    name: str
    extension: str
    offset: int
    size: int


@dataclass(frozen=True)
class ShardSample:
    """The files of one sample of a shard."""

    shard: Path
    key: str
    members: tuple[Member, ...]

    def read(self, extension: str) -> bytes | None:
        """A member's bytes, None when there is none; raises VideoError when the shard is cut off."""
        member = next((member for member in self.members if member.extension == extension), None)
        if member is None:
            return None
        try:
            with open(self.shard, "rb") as file:
                file.seek(member.offset)
                content = file.read(member.size)
        except OSError as error:
            raise VideoError(f"Cannot read {member.name!r} in {self.shard}: {error.strerror}.") from error
        if len(content) < member.size:
            raise VideoError(f"Cannot read {member.name!r}: {self.shard} is cut off; download it again.")
        return content

    def text(self, extension: str) -> str | None:
        """A member as text; raises VideoError when it is none."""
        content = self.read(extension)
        try:
            return None if content is None else content.decode().strip()
        except UnicodeDecodeError as error:
            raise VideoError(f"{self.shard}, sample {self.key!r}: {extension} is not UTF-8 text.") from error

    def json(self) -> dict[str, Any]:
        """The sample's json member, empty when there is none; raises VideoError when it is malformed."""
        try:
            found = json.loads(self.text("json") or "{}")
        except ValueError as error:
            raise VideoError(f"{self.shard}, sample {self.key!r}: its json is malformed: {error}.") from error
        if not isinstance(found, dict):
            raise VideoError(f"{self.shard}, sample {self.key!r}: its json is no object.")
        return found

    def media(
        self, start_s: float | None = None, end_s: float | None = None
    ) -> tuple[ShardMedia, Kind] | None:
        """The sample's video or else image, None when it has neither."""
        for suffixes, kind in ((VIDEOS, "video"), (IMAGES, "image")):
            for member in self.members:
                if "." + member.extension.rpartition(".")[2].lower() in suffixes:
                    media = ShardMedia(self.shard, member.name, member.offset, member.size, start_s, end_s)
                    return media, "video" if kind == "video" else "image"
        return None


@dataclass(frozen=True)
class Shards:
    """Several tars as one sequence of samples. starts: where each sample of a shard begins, and its end."""

    paths: tuple[Path, ...]
    starts: tuple[np.ndarray, ...]
    ends: tuple[int, ...]  # samples up to and including each shard

    @staticmethod
    def open(pattern: str, index_root: Path | None = None) -> Shards:
        """All shards of a pattern (`*`, `?`, {000..123}, {a,b}), in order.

        Raises DataError when there are none, one is missing, compressed, damaged or empty.
        """
        paths = find_shards(pattern)
        starts = tuple(_starts(path, index_root) for path in paths)
        return Shards(paths, starts, tuple(accumulate(len(found) - 1 for found in starts)))

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def longest(self) -> int:
        """Samples of the largest shard."""
        return max(len(found) - 1 for found in self.starts)

    def sample(self, index: int) -> ShardSample:
        """Sample number `index`: reads its headers only. Raises IndexError, VideoError for damage."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self.ends, index)
        place = index - (self.ends[shard - 1] if shard else 0)
        first, last = (int(value) for value in self.starts[shard][place : place + 2])
        members, key = [], ""
        for name, offset, size in _members(self.paths[shard], first, last):
            key, extension = _split(name)
            members.append(Member(name, extension, offset, size))
        if not members:
            raise VideoError(f"The shard {self.paths[shard]} is cut off; download it again.")
        return ShardSample(self.paths[shard], key, tuple(members))


@dataclass(frozen=True)
class ShardExamples:
    """Samples as examples: captions from txt or json, labels from cls or json, conversations from json.

    window: see `epoch_order`; None lets an epoch jump between all shards.
    """

    shards: Shards
    classes: tuple[str, ...] = ()
    window: int | None = None

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Example:
        """Raises VideoError for a sample that cannot be used, so that it is skipped."""
        sample = self.shards.sample(index)
        where = f"{sample.shard}, sample {sample.key!r}"
        facts = sample.json()
        text = sample.text("txt")
        try:
            found = sample.media(*parse_span(facts, where))
            captions = (text,) if text else parse_captions(facts, where)
            label = to_label(sample.text("cls") or facts.get("label"), self.classes, where)
            conversations, system = parse_conversations(facts, found is not None, where)
        except DataError as error:
            raise VideoError(str(error)) from error
        if found is None and not conversations:
            raise VideoError(f"{where} holds no video or image.")
        media: Media = NoMedia() if found is None else found[0]
        kind: Kind = "video" if found is None else found[1]
        name = f"{sample.shard.name}/{sample.key}"
        return Example(name, media, label, captions, kind, conversations, system)


def find_shards(pattern: str) -> tuple[Path, ...]:
    """The files that a pattern names; raises DataError when one is missing."""
    paths = []
    for part in expand(pattern):
        found = sorted(glob.glob(part)) if any(sign in part for sign in "*?[") else [part]
        if not found or not os.path.isfile(found[0]):
            raise DataError(f"There is no shard {part}.")
        paths += [Path(path) for path in found]
    return tuple(paths)


def expand(pattern: str) -> Iterator[str]:
    """{000..003} as 000, 001, 002, 003 and {a,b} as a, b."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    inner = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if inner is None:
        choices: Sequence[str] = match[1].split(",")
    else:
        width = len(inner[1])
        choices = [f"{number:0{width}d}" for number in range(int(inner[1]), int(inner[2]) + 1)]
    for choice in choices:
        yield from expand(pattern[: match.start()] + choice + pattern[match.end() :])


def _split(name: str) -> tuple[str, str]:
    """("folder/key", "extension") at the first dot of the file's own name, as webdataset does."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension


def _members(path: Path, first: int, last: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files from a header at `first` to before `last`."""
    try:
        with open(path, "rb") as file:
            file.seek(first)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None and (last is None or info.offset < last):
                    if info.isfile():
                        yield info.name, info.offset_data, info.size
    except (tarfile.TarError, OSError, EOFError) as error:
        raise VideoError(f"The shard {path} cannot be read: {error}; download it again.") from error


def _starts(path: Path, index_root: Path | None) -> np.ndarray:
    """Where each sample of a shard begins and where the last ends, int64; from its index if that fits."""
    try:
        with open(path, "rb") as file:
            magic = file.read(2)
    except OSError as error:
        raise DataError(f"The shard {path} cannot be read: {error.strerror}.") from error
    if magic in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
        raise DataError(f"The shard {path} is compressed: unpack it to a plain tar.")
    stat = path.stat()
    stamp = [INDEX_VERSION, stat.st_size, stat.st_mtime_ns]
    index = (index_root or path.parent) / f"{path.name}.index"
    try:
        with np.load(index, allow_pickle=False) as kept:
            if kept["stamp"].tolist() == stamp:
                return np.asarray(kept["starts"], dtype=np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # there is none, or it is not one: look again
    starts = _scan(path, stat.st_size)
    content = io.BytesIO()
    np.savez(content, stamp=np.array(stamp), starts=starts)
    scratch = index.with_name(f".{index.name}.{os.getpid()}")
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content.getvalue())
        os.replace(scratch, index)
    except OSError:
        pass  # a read-only data folder: the next run looks again
    return starts


def _scan(path: Path, size: int) -> np.ndarray:
    starts, last_key, end = [], None, 0
    try:
        for name, offset, length in _members(path, 0):
            key = _split(name)[0]
            if key != last_key:
                starts.append(end)
                last_key = key
            end = offset + -(-length // BLOCK) * BLOCK
            if end > size:
                raise DataError(f"The shard {path} is cut off inside {name!r}: download it again.")
    except VideoError as error:
        raise DataError(str(error)) from error
    if not starts:
        raise DataError(f"The shard {path} holds no files.")
    return np.array([*starts, end], dtype=np.int64)
