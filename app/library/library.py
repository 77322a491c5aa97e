"""Library: many videos in one folder's index, found by what they show.

library = Library("index")
library.index(["~/Videos"])
for hit in library.search("a dog catches a disc").hits: print(hit.path, hit.start_s, hit.score)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from app.library.clip_table import ClipTable, cannot_write, lancedb
from app.library.embedders import Embedder, open_embedder
from app.library.indexing import Indexer, IndexReport, LocalIndexer, index_files
from app.library.listening import HeardReport, Hearer, LocalHearer, listen_to
from app.library.said_table import NAME as SAID
from app.library.said_table import SaidTable
from app.library.video_files import FileIdentity, find_videos, is_gone, is_unicode
from app.speech.listener import Listener
from encoder.checkpoint import atomic_path, save_json
from encoder.errors import ConfigError, DataError
from encoder.json_files import read_object
from encoder.video.sources import reason
from llm_bridge.assets.cache_dir import cache_dir
from llm_bridge.assets.write_lock import WriteLock
from llm_bridge.prompt import check_text

if TYPE_CHECKING:
    from app.library.ray_pool import RayPool

LOCK = "writing.lock"
SETTINGS, PROBLEMS, THUMBNAILS = "library.json", "problems.json", "thumbnails"
FORMAT, VERSION = "fluxchat library", 1
SECONDS, SHORTEST = 10.0, 0.5  # of a clip
MOST_HITS = 10_000
LARGEST_REPORT = 2**28  # bytes
# gone, changed: since it was indexed. incomplete: rows are missing. unreadable: it could not be read.
# other model: it is in the rows of another model only.
What = Literal["gone", "changed", "incomplete", "unreadable", "other model"]


@dataclass(frozen=True)
class Hit:
    """A clip that was found. start_s, end_s: seconds. score: cosine with the text. thumbnail: a JPEG file,
    None where the library's folder cannot be written. said, language: of `search_said`, the line that was
    found."""

    path: str
    start_s: float
    end_s: float
    score: float
    thumbnail: str | None
    said: str | None = None
    language: str | None = None


@dataclass(frozen=True)
class Found:
    """hits: best first. left_out: files that would have been among them, but are gone or have changed."""

    hits: tuple[Hit, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stale:
    """A file whose rows are not what it is. why: a sentence where there is one."""

    path: str
    what: What
    why: str = ""


@dataclass(frozen=True)
class _Settings:
    seconds: float
    embedder: str
    fingerprint: str


def default_folder() -> Path:
    """Where `fluxchat index` and `search` keep the library: `$FLUXCHAT_LIBRARY`, or in the cache folder."""
    override = os.environ.get("FLUXCHAT_LIBRARY")
    return Path(override).expanduser() if override else cache_dir() / "library"


class Library:
    """An index of videos in a folder of its own.

    folder: of the index, not of the videos (default: `default_folder`). embedder: what makes vectors: None
    for the one that the library was made with, or the shipped model; a saved model's folder, a CLIP or
    SigLIP, or an Embedder. seconds: length of a clip, of a new library. pool: workers that index.
    Raises ConfigError, DataError and ModelError: one sentence, what was wrong and what to do.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        embedder: str | Embedder | None = None,
        seconds: float | None = None,
        device: str | None = None,
        pool: RayPool | None = None,
    ) -> None:
        lancedb()
        if seconds is not None and not SHORTEST <= seconds <= 3600:
            raise ConfigError(f"Clips of {seconds:g} s cannot be: give {SHORTEST} to 3600 seconds.")
        self.folder = default_folder() if folder is None else Path(folder).expanduser()
        self._given, self._seconds, self._device = embedder, seconds, device
        self._pool = pool
        self._embedder: Embedder | None = None

    def index(
        self, sources: Sequence[str | os.PathLike[str]], *, progress: TextIO | None = None
    ) -> IndexReport:
        """Index the new and changed videos of folders, globs, lists (.txt) and files.

        Each video appears with all its clips or not at all, so that a stopped run is simply run again.
        """
        paths = find_videos(sources)
        self._make_folder()
        with self._alone():
            settings = self._settings() or self._begin()
            return self._index(self._table(settings), paths, settings, progress)

    def listen(
        self,
        sources: Sequence[str | os.PathLike[str]],
        listener: Listener,
        *,
        language: str | None = None,
        progress: TextIO | None = None,
    ) -> HeardReport:
        """Listen to the new and changed videos of these places, for `search_said`; sources as in `index`.

        With a pool its workers listen, each with a Listener of its own like this one.
        """
        paths = find_videos(sources)
        self._make_folder()
        with self._alone():
            return listen_to(
                SaidTable(self.folder), self._hearer(listener, language), paths, progress=progress
            )

    def check_listener(self, listener: Listener, language: str | None = None) -> None:
        """Raise what `listen` would for a speech model that is not there, or lacks the language."""
        self._hearer(listener, language).ready()

    def search_said(self, text: str, top: int = 10) -> Found:
        """The lines with most words of a text; score: the share of its words. Stale files are left out."""
        _check_search(text, top, "lines")
        if not (self.folder / f"{SAID}.lance").is_dir():
            raise ConfigError(
                f"The videos of {self.folder} were not listened to yet: run `fluxchat index FOLDER --speech`."
            )
        fresh: dict[str, bool] = {}
        hits: list[Hit] = []
        for row, score in SaidTable(self.folder).find(text, MOST_HITS):
            if row.path not in fresh:
                fresh[row.path] = _changed(row.path, row.identity) is None
            if fresh[row.path] and len(hits) < top:
                hits.append(Hit(row.path, row.start_s, row.end_s, score, None, row.text, row.language))
        return Found(tuple(hits), tuple(sorted(path for path, is_fresh in fresh.items() if not is_fresh)))

    def ready(self) -> None:
        """Load what searching needs, so that the first search is fast; raises what `search` would."""
        self.embedder().embed_texts(["a video"])

    def embedder(self) -> Embedder:
        """What its clips were made with; raises ConfigError where that is another one now."""
        self._table(self._existing())
        assert self._embedder is not None
        return self._embedder

    def holds(self, path: str) -> bool:
        """Whether that is the path of a video of the library, whose content is what was indexed."""
        file = self._table(self._existing()).file(path) if is_unicode(path) else None
        return file is not None and _changed(path, file.identity) is None

    def check(self) -> list[Stale]:
        """What of the library is no longer so, by path. Reads no video."""
        settings = self._existing()
        table = ClipTable(self.folder, settings.fingerprint)
        stale = {path: Stale(path, "unreadable", why) for path, why in self._problems().items()}
        known = table.files()
        for path, file in known.items():
            if file.rows != file.count:
                stale[path] = Stale(path, "incomplete", f"It has {file.rows} of {file.count} clips.")
            elif (what := _changed(path, file.identity)) == "gone" or (what and path not in stale):
                stale[path] = Stale(path, what)
        if self._open_embedder(settings).fingerprint != settings.fingerprint:
            stale |= {path: Stale(path, "other model") for path in known if path not in stale}
        for path in self._files_of_others(table):
            if path not in known:
                stale.setdefault(path, Stale(path, "other model"))
        return [stale[path] for path in sorted(stale)]

    def repair(self, *, progress: TextIO | None = None) -> IndexReport:
        """Index anew what `check` finds, and drop what is gone; with the embedder as it is now."""
        settings = self._existing()
        with self._alone():
            before = ClipTable(self.folder, settings.fingerprint)
            paths = {*before.files(), *self._files_of_others(before), *self._problems()}
            embedder = self._open_embedder(settings)
            if embedder.fingerprint != settings.fingerprint:
                settings = self._begin(settings.seconds)
            table = ClipTable(self.folder, embedder.fingerprint)
            gone = {path for path in paths if is_gone(path) and not os.path.exists(path)}
            said = SaidTable(self.folder)
            for path in said.files():
                if is_gone(path):
                    said.remove(path)
            dropped = {path for path in table.files() if is_gone(path)}  # also what is a folder or a pipe now
            for path in dropped:
                table.remove(path)
            report = self._index(table, sorted(paths - gone), settings, progress, forgotten=gone)
            report.removed = len(gone | dropped)
            table.drop_others()
            return report

    def search(self, text: str, top: int = 10) -> Found:
        """The clips that fit a text best. Clips of files that are gone or have changed are left out."""
        _check_search(text, top, "clips")
        settings = self._existing()
        table = self._table(settings)
        assert self._embedder is not None
        vector = self._embedder.embed_texts([text])[0].tolist()
        fresh: dict[str, bool] = {}
        count, total = top, len(table)
        while True:
            rows = table.nearest(vector, count)
            for row, _ in rows:
                if row.path not in fresh:
                    known = FileIdentity(row.size, row.mtime_ns, row.ends)
                    fresh[row.path] = _changed(row.path, known) is None
            good = [(row, score) for row, score in rows if fresh[row.path]]
            if len(good) >= top or count >= total:
                break
            count *= 4
        hits = tuple(
            Hit(row.path, row.start_s, row.end_s, score, self._thumbnail(row.thumbnail))
            for row, score in good[:top]
        )
        return Found(hits, tuple(sorted(path for path, is_fresh in fresh.items() if not is_fresh)))

    # -- its files ------------------------------------------------------------------------------------------

    def _alone(self) -> WriteLock:
        return WriteLock(self.folder / LOCK, f"the library {self.folder}")

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"Cannot make the library {self.folder}: {reason(error)}; name another folder."
            ) from error

    def _settings(self) -> _Settings | None:
        """What the library was made with; None where there is none yet. Raises DataError."""
        try:
            values = read_object(self.folder / SETTINGS)
            if values["format"] != FORMAT or values["version"] != VERSION:
                raise DataError(
                    f"{self.folder} is a library of another version of FluxChat: name another one."
                )
            settings = _Settings(
                float(values["seconds"]), str(values["embedder"]), str(values["fingerprint"])
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.folder / SETTINGS} is damaged: delete {self.folder}.") from error
        if self._seconds is not None and self._seconds != settings.seconds:
            raise ConfigError(
                f"The library {self.folder} has clips of {settings.seconds:g} s, not {self._seconds:g}: "
                "leave the seconds out, or name another library."
            )
        return settings

    def _existing(self) -> _Settings:
        settings = self._settings() if self.folder.is_dir() else None
        if settings is None:
            raise ConfigError(f"There is no library in {self.folder} yet: run `fluxchat index FOLDER`.")
        return settings

    def _begin(self, seconds: float | None = None) -> _Settings:
        """Note what the library is made with from now on."""
        embedder = self._open_embedder(None)
        settings = _Settings(seconds or self._seconds or SECONDS, embedder.name, embedder.fingerprint)
        self._save({"format": FORMAT, "version": VERSION, **asdict(settings)}, SETTINGS)
        return settings

    def _open_embedder(self, settings: _Settings | None) -> Embedder:
        if self._embedder is None:
            given = self._given
            if given is None or isinstance(given, str):
                source = given if given is not None else settings.embedder if settings else None
                given = open_embedder(source, self._device)
            self._embedder = given
        return self._embedder

    def _table(self, settings: _Settings) -> ClipTable:
        """The table of this embedder; raises ConfigError when the library was made with another one."""
        if self._open_embedder(settings).fingerprint != settings.fingerprint:
            name = settings.embedder or "the shipped model"
            raise ConfigError(
                f"The library {self.folder} was made with another model or version ({name}): run `fluxchat "
                "index --repair` with this one to index it anew, or name another library."
            )
        return ClipTable(self.folder, settings.fingerprint)

    def _files_of_others(self, table: ClipTable) -> set[str]:
        names = [name.removeprefix("clips-") for name in table.others()]
        return {path for name in names for path in ClipTable(self.folder, name).files()}

    def _index(
        self,
        table: ClipTable,
        paths: Sequence[str],
        settings: _Settings,
        progress: TextIO | None,
        forgotten: Set[str] = frozenset(),
    ) -> IndexReport:
        report = index_files(table, self._indexer(settings), paths, progress)
        asked = {*paths, *forgotten}
        others = {path: why for path, why in self._problems().items() if path not in asked}
        self._save(others | report.failed, PROBLEMS)
        return report

    def _indexer(self, settings: _Settings) -> Indexer:
        embedder = self._open_embedder(settings)
        if self._pool is None:
            return LocalIndexer(embedder, settings.seconds)
        from app.library.ray_work import RayIndexer

        given = self._given
        source = given if given is not None else settings.embedder or None
        again = partial(open_embedder, source, self._device) if isinstance(source, str | None) else source
        return RayIndexer(self._pool, partial(_opened, again), settings.seconds)

    def _hearer(self, listener: Listener, language: str | None) -> Hearer:
        if self._pool is None:
            return LocalHearer(listener, language)
        from app.library.ray_work import RayHearer

        return RayHearer(self._pool, listener.again, language)

    def _save(self, values: Any, name: str) -> None:
        try:
            save_json(values, self.folder / name)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def _problems(self) -> dict[str, str]:
        """Why files could not be indexed, by path."""
        try:
            values = read_object(self.folder / PROBLEMS, limit=LARGEST_REPORT)
        except (OSError, ValueError):  # a report, made anew by every run
            return {}
        return {str(path): str(why) for path, why in values.items()}

    def _thumbnail(self, jpeg: bytes) -> str | None:
        """A file with this picture."""
        file = self.folder / THUMBNAILS / f"{hashlib.sha256(jpeg).hexdigest()[:24]}.jpg"
        try:
            if not file.exists():
                with atomic_path(file) as temporary:
                    temporary.write_bytes(jpeg)
        except OSError:
            return None
        return str(file)


def _opened(embedder: Any) -> Any:
    """An embedder, in a worker: made there, or one that travelled."""
    return embedder() if isinstance(embedder, partial) else embedder


def _check_search(text: str, top: int, what: str) -> None:
    """Raises ConfigError for a search that can find nothing. what: is looked for."""
    if not check_text(text, "The search").strip():
        raise ConfigError("Say what to look for.")
    if not 1 <= top <= MOST_HITS:
        raise ConfigError(f"Cannot find {top} {what}: ask for 1 to {MOST_HITS}.")


def _changed(path: str, identity: FileIdentity) -> What | None:
    """What became of a file since; None when its content is the same."""
    if identity.unchanged(path):
        return None
    try:
        now = FileIdentity.of(path)
    except OSError:
        return "gone" if is_gone(path) else "unreadable"
    return None if now.same_content(identity) else "changed"
