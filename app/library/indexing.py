"""From files to rows: decode ahead, embed, and commit each video's clips at once.

    report = index_files(table, LocalIndexer(embedder, seconds=10), paths)

A file that cannot be read is a row of the report and ends nothing.
"""

from __future__ import annotations

import base64
import io
import json
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TextIO, TypeVar

from PIL import Image
from torch import Tensor

from app.library.clip_reader import VideoClip, read_clips
from app.library.clip_table import ClipRow, ClipTable
from app.library.embedders import Embedder
from app.library.video_files import FileIdentity, check_name, unreadable
from encoder.errors import FluxChatError

TIDY_EVERY = 200  # videos: each one's commit is a piece of its own until then
THUMBNAIL, QUALITY = 192, 80  # pixels of the longer side, JPEG quality
T = TypeVar("T")


@dataclass
class IndexReport:
    """What an indexer did. indexed: new and changed files; clips: of those; failed: error by path."""

    indexed: int = 0
    unchanged: int = 0
    removed: int = 0
    clips: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Step:
    """A group of a file's clips; or its end, or what was wrong with it."""

    path: str
    identity: FileIdentity | None = None
    clips: Sequence[VideoClip] = ()
    error: str | None = None


@dataclass(frozen=True)
class IndexedVideo:
    """A video's rows, or what was wrong with it."""

    path: str
    rows: Sequence[ClipRow] = ()
    error: str | None = None

    @property
    def line(self) -> str:
        """As a line of JSON."""
        rows = [
            asdict(row)
            | {
                "path": self.path,
                "thumbnail": base64.b64encode(row.thumbnail).decode(),
                "vector": list(row.vector),
            }
            for row in self.rows
        ]
        return json.dumps({"path": self.path, "rows": rows, "error": self.error})

    @staticmethod
    def of(line: str) -> IndexedVideo:
        """The reverse of `line`."""
        values = json.loads(line)
        rows = [ClipRow(**row | {"thumbnail": base64.b64decode(row["thumbnail"])}) for row in values["rows"]]
        return IndexedVideo(values["path"], rows, values["error"])


class Indexer(Protocol):
    """Makes the rows of videos, each of them once, in any order."""

    def videos(self, paths: Sequence[str]) -> Iterator[IndexedVideo]: ...


class LocalIndexer:
    """Decodes and embeds in this process. seconds: length of a clip."""

    def __init__(self, embedder: Embedder, seconds: float) -> None:
        self._embedder, self._seconds = embedder, seconds

    def videos(self, paths: Sequence[str]) -> Iterator[IndexedVideo]:
        """Each video's rows, in order; the next clips are decoded meanwhile."""
        rows: list[ClipRow] = []
        for step in _ahead(_steps(paths, self._seconds, self._embedder.frames)):
            if step.clips:
                rows += _rows(step, self._embedder)
                continue
            yield IndexedVideo(step.path, rows if step.error is None else (), step.error)
            rows = []


def index_files(
    table: ClipTable, indexer: Indexer, paths: Sequence[str], progress: TextIO | None = None
) -> IndexReport:
    """Bring the rows of these files up to date. progress: a terminal for a bar.

    Raises DataError when the table cannot be written.
    """
    from tqdm import tqdm

    report, known = IndexReport(), table.files()
    wanted = []
    for path in paths:
        file = known.get(path)
        if file is not None and file.rows == file.count and file.identity.still(path, table.touch):
            report.unchanged += 1
        else:
            wanted.append(path)
    bar = tqdm(total=len(wanted), unit="video", file=progress, disable=progress is None, dynamic_ncols=True)
    with bar:
        for video in indexer.videos(wanted):
            if video.error is not None:
                report.failed[video.path] = video.error
            else:
                if video.path in known:
                    table.replace(video.path, video.rows)
                else:
                    table.add(video.rows)
                report.indexed, report.clips = report.indexed + 1, report.clips + len(video.rows)
                if report.indexed % TIDY_EVERY == 0:
                    table.tidy()
            bar.update()
    if report.indexed:
        table.tidy()
    return report


def _steps(paths: Sequence[str], seconds: float, frames: int) -> Iterator[_Step]:
    for path in paths:
        try:
            check_name(path)
            identity = FileIdentity.of(path)
            for clips in read_clips(path, seconds, frames):
                yield _Step(path, identity, clips)
            identity.check_unchanged(path)
        except (FluxChatError, OSError) as error:
            yield _Step(path, error=unreadable(path, error))
        else:
            yield _Step(path, identity)


def _ahead(steps: Iterator[T]) -> Iterator[T]:
    """The same, each made in a thread while the one before it is used."""
    end: Any = object()
    with ThreadPoolExecutor(1, "fluxchat-decode") as thread:
        coming = thread.submit(next, steps, end)
        while (step := coming.result()) is not end:
            coming = thread.submit(next, steps, end)
            yield step


def _rows(step: _Step, embedder: Embedder) -> list[ClipRow]:
    assert step.identity is not None
    vectors = embedder.embed_clips([clip.frames for clip in step.clips])
    return [
        ClipRow(
            path=step.path,
            size=step.identity.size,
            mtime_ns=step.identity.mtime_ns,
            ends=step.identity.ends,
            number=clip.number,
            count=clip.count,
            start_s=float(clip.start_s),
            end_s=float(clip.end_s),
            model=embedder.fingerprint,
            thumbnail=_thumbnail(clip.frames[len(clip.frames) // 2]),
            vector=array("f", vector.tolist()),
        )
        for clip, vector in zip(step.clips, vectors, strict=True)
    ]


def _thumbnail(frame: Tensor) -> bytes:
    """A frame, uint8 (H, W, 3), as a small JPEG."""
    out = io.BytesIO()
    picture = Image.fromarray(frame.numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
