"""Work on a cluster: what `LocalIndexer`, `LocalHearer` and `LocalAsker` do, by actors of a RayPool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from app.library.answers import AnswerRow
from app.library.ask_all import AT_ONCE, LocalAsker
from app.library.indexing import IndexedVideo, LocalIndexer
from app.library.listening import HeardVideo, LocalHearer
from app.library.ray_pool import RayPool, Work, lost
from encoder.video.part import WHOLE, Part

if TYPE_CHECKING:
    from app.chat import VideoChat
    from app.library.embedders import Embedder
    from app.speech.listener import Listener, Progress

OpenChat = Callable[[], "VideoChat"]
OpenEmbedder = Callable[[], "Embedder"]
OpenListener = Callable[[], "Listener"]


class RayAsker:
    """An Asker whose VideoChats are made by `open_chat` in the actors. The rest: as of a LocalAsker."""

    def __init__(
        self,
        pool: RayPool,
        open_chat: OpenChat,
        question: str,
        options: Mapping[str, Any] | None = None,
        *,
        part: Part = WHOLE,
        at_once: int = AT_ONCE,
    ) -> None:
        self._pool, self.question, self._at_once = pool, question, at_once
        self._make = partial(_local_asker, open_chat, question, dict(options or {}), part, at_once)
        self.asked = str(pool.call(partial(_asked, self._make)))

    def rows(self, paths: Sequence[str]) -> Iterator[AnswerRow]:
        """A row for each path; one whose worker died again and again says so."""
        lines = _lines_twice(self._pool, partial(_asking, self._make), paths, self._at_once, _path_of_row)
        for path, line in lines:
            if line is not None:
                yield AnswerRow.of(line)
            else:
                yield AnswerRow(path, self.question, None, lost(path), None, 0, 0, "", self.asked)


class RayIndexer:
    """An Indexer whose embedders are made by `open_embedder` in the actors. seconds: length of a clip."""

    def __init__(self, pool: RayPool, open_embedder: OpenEmbedder, seconds: float) -> None:
        self._pool, self._make = pool, partial(_indexing, open_embedder, seconds)

    def videos(self, paths: Sequence[str]) -> Iterator[IndexedVideo]:
        """Each video's rows; one whose worker died again and again says so."""
        for path, line in _lines_twice(self._pool, self._make, paths, 1, _path_of_video):
            yield IndexedVideo(path, error=lost(path)) if line is None else IndexedVideo.of(line)


class RayHearer:
    """A Hearer whose Listeners are made by `open_listener` in the actors. language: as of a LocalHearer."""

    def __init__(self, pool: RayPool, open_listener: OpenListener, language: str | None = None) -> None:
        self._pool, self._make = pool, partial(_hearer, open_listener, language)

    def ready(self) -> object:
        """Raises what a worker would."""
        return self._pool.call(partial(_heard_ready, self._make))

    def videos(self, paths: Sequence[str], progress: Progress = lambda _: None) -> Iterator[HeardVideo]:
        """What is said in each video; one whose worker died again and again says so."""
        for path, line in _lines_twice(self._pool, partial(_hearing, self._make), paths, 1, _path_of_heard):
            yield HeardVideo(path, error=lost(path)) if line is None else HeardVideo.of(line)


def _lines_twice(
    pool: RayPool,
    make: Callable[[], Work],
    paths: Sequence[str],
    batch: int,
    path_of: Callable[[str], str],
) -> Iterator[tuple[str, str | None]]:
    """(path, line) of every path, once; those of lost batches are tried again alone, then None."""
    left = dict.fromkeys(paths)
    for size in (batch, 1):
        for line in pool.lines(make, list(left), size) if left else ():
            if (path := path_of(line)) in left:
                del left[path]
                yield path, line
    for path in left:
        yield path, None


def _path_of_row(line: str) -> str:
    return AnswerRow.of(line).file


def _path_of_video(line: str) -> str:
    return IndexedVideo.of(line).path


def _path_of_heard(line: str) -> str:
    return HeardVideo.of(line).path


# -- in the actors ------------------------------------------------------------------------------------------


def _local_asker(
    open_chat: OpenChat, question: str, options: dict[str, Any], part: Part, at_once: int
) -> LocalAsker:
    return LocalAsker(open_chat(), question, options, part=part, at_once=at_once)


def _asked(make: Callable[[], LocalAsker]) -> str:
    asker = make()
    asker.chat.close()
    return asker.asked


def _asking(make: Callable[[], LocalAsker]) -> Work:
    asker = make()
    return lambda paths: (row.line for row in asker.rows(paths))


def _indexing(open_embedder: OpenEmbedder, seconds: float) -> Work:
    indexer = LocalIndexer(open_embedder(), seconds)
    return lambda paths: (video.line for video in indexer.videos(paths))


def _hearer(open_listener: OpenListener, language: str | None) -> LocalHearer:
    return LocalHearer(open_listener(), language)


def _heard_ready(make: Callable[[], LocalHearer]) -> None:
    make().ready()


def _hearing(make: Callable[[], LocalHearer]) -> Work:
    hearer = make()
    return lambda paths: (video.line for video in hearer.videos(paths))
