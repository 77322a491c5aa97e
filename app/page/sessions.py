"""Sessions of the page: a browser tab's media and conversation, freed when the tab closes or idles."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import app.messages
from app.answer import Answer
from app.library.library import Hit
from app.long_video import Chapter
from app.page.settings import Settings
from app.server.errors import ApiError
from app.server.media.store import MediaStore
from app.server.media.uploads import file_name
from encoder.errors import ConfigError
from encoder.video.part import WHOLE, Part
from encoder.video.reader import VideoInfo

IDLE_S = 1800.0
UNUSED_UPLOAD_S = 3600.0  # for uploads that no session ever used
MAX_SESSIONS = 1000
MAX_MEDIA = 8  # videos and images in one conversation
MAX_SECONDS = 4 * 3600.0  # of video in one conversation


@dataclass(frozen=True)
class Media:
    """A video or image of a conversation.

    part: what of it the next question is about. turn: grows with each choice of it in the browser.
    """

    path: str
    name: str
    info: VideoInfo
    part: Part = WHOLE
    turn: int = 0

    @property
    def is_image(self) -> bool:
        """Shown as a picture, not in the player."""
        return self.info.kind == "image"

    @property
    def asked(self) -> app.messages.Media:
        """What a question about it shows to the model."""
        return app.messages.Media(self.path, self.name, self.part)


@dataclass
class Turn:
    """A question and its answer. thinking: what the model thought first. details: HTML under the answer.

    settings: the controls as they stood when it was asked. parts: what of each medium, by path. media: all
    that it was about, once it is answered. stop: ends its
    answer. predicted_s: seconds to the first word that were foretold, None where nobody knew. reopened: it
    was answered before, in a conversation that the browser kept. key: its name there.
    """

    question: str
    settings: Settings | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    media: tuple[Media, ...] = ()
    stop: threading.Event = field(default_factory=threading.Event)
    predicted_s: float | None = None
    answer: Answer | None = None
    text: str = ""
    thinking: str = ""
    phase: str = ""
    error: str = ""
    details: str = ""
    reopened: bool = False
    key: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def answered(self) -> bool:
        """Answered, now or before; a stopped answer counts."""
        return self.answer is not None or self.reopened

    @property
    def done(self) -> bool:
        """Answered, stopped or failed."""
        return self.answered or bool(self.error)


@dataclass
class Session:
    """One tab's conversation: all that is known of it, in one place.

    scope: unguessable name of its entries in VideoChat's caches. problem: the error that is shown until it is
    dismissed or solved, as HTML. stop: ends a comparison. answering: whether its waiting questions are being
    answered; `lock` guards that together with the end of `turns`. conversation: the name under which the
    browser keeps it. parent: of the conversation that it branched from. thumbnails: a small picture of each
    medium by path, a data URL. records: how many were sent to the browser. revision: of the shelf it shows.
    asked_for: how often the page asked for what it computes in the background. found: a search of the library
    by its number, and its hits. opened: copies of the library's videos that it got, by their paths there.
    opening: the last conversation that the browser asked for, by its number there; `reopening` lets one at a
    time be opened. cleared: how often a new one was begun. chapters: of each part of a video that they were
    asked for of, by its path. listing: ends the chapters that are being described.
    """

    id: str
    scope: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    media: list[Media] = field(default_factory=list)
    shown: int = 0
    turns: list[Turn] = field(default_factory=list)
    problem: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    answering: bool = False
    touched: float = field(default_factory=time.monotonic)
    busy: int = 0
    closed: bool = False
    conversation: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    parent: str = ""
    thumbnails: dict[str, str] = field(default_factory=dict)
    records: int = 0
    revision: int = 0
    asked_for: Counter[str] = field(default_factory=Counter)
    found: tuple[int, tuple[Hit, ...]] = (0, ())
    opened: dict[str, str] = field(default_factory=dict)
    opening: int = 0
    reopening: threading.Lock = field(default_factory=threading.Lock)
    cleared: int = 0
    chapters: dict[tuple[str, Part], tuple[Chapter, ...]] = field(default_factory=dict)
    listing: threading.Event | None = None

    @property
    def current(self) -> Media | None:
        """The video or image in the player."""
        media = list(self.media)  # another event may remove one meanwhile
        return media[min(self.shown, len(media) - 1)] if media else None

    @property
    def duration_s(self) -> float:
        """Of the longest video."""
        return max((medium.info.duration_s for medium in self.media), default=0.0)

    @property
    def history(self) -> list[Turn]:
        """Answered turns, for the model; a stopped answer counts as far as it got."""
        return [turn for turn in self.turns if turn.answered and turn.text]

    @property
    def waiting(self) -> Turn | None:
        """The first question without an answer: the one being answered, or the next to be."""
        return next((turn for turn in self.turns if not turn.done), None)

    def next_turn(self) -> Turn | None:
        """The next question to answer; without one, the answering has ended."""
        with self.lock:
            turn = self.waiting
            self.answering = turn is not None
            return turn

    def halt(self) -> None:
        """End all that it computes or would compute."""
        self.stop.set()
        if (listing := self.listing) is not None:
            listing.set()
        for turn in self.turns:
            turn.stop.set()

    def rename(self, parent: str = "") -> None:
        """What follows is another conversation, which may have branched from `parent`."""
        self.parent, self.conversation = parent, secrets.token_urlsafe(12)

    def next_revision(self) -> int:
        """A number for what is shown from now on: it grows, and goes on growing after a restart."""
        with self.lock:
            self.revision = max(self.revision + 1, time.time_ns() // 1000)
            return self.revision

    def index(self, path: str) -> int | None:
        """The place of the medium of that path; None when it is not in the conversation."""
        return next((index for index, medium in enumerate(self.media) if medium.path == path), None)

    def show(self, path: str) -> bool:
        """Put the medium of that path in the player; False when it is not in the conversation."""
        index = self.index(path)
        if index is not None:
            self.shown = index
        return index is not None

    def add(self, medium: Media) -> None:
        """Another video or image, now in the player; raises ConfigError when there are too many."""
        if len(self.media) >= MAX_MEDIA:
            raise ConfigError(f"A conversation holds {MAX_MEDIA} videos and images: remove one first.")
        if sum(m.info.duration_s for m in self.media) + medium.info.duration_s > MAX_SECONDS:
            raise ConfigError(
                f"A conversation holds {MAX_SECONDS / 3600:g} hours of video: remove one or cut it."
            )
        self.media.append(medium)
        self.shown = len(self.media) - 1


class Sessions:
    """All sessions by id. Thread-safe; a thread that lives while there are sessions frees the idle ones.

    forget: frees what a model keeps for a session's scope. uploads: only files below this folder are ever
    deleted (default: where Gradio puts uploads), each when no session uses it any more. store: what has the
    files that came over the server's own doors, and keeps them while a session uses them.
    """

    def __init__(
        self,
        forget: Callable[[str], None],
        *,
        idle_s: float = IDLE_S,
        uploads: str | Path | None = None,
        store: MediaStore | None = None,
    ) -> None:
        folder = uploads or os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio"
        self.uploads = Path(folder).resolve()
        self.store = store
        self._forget, self._idle_s = forget, idle_s
        self._sessions: dict[str, Session] = {}
        self._files: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._reaper: threading.Thread | None = None
        self._wake = threading.Event()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, session_id: str) -> Session:
        """The session, made on its first visit; counts as a sign of life.

        Past MAX_SESSIONS, the one that has idled longest makes room.
        """
        with self._lock:
            session = self._sessions.get(session_id)
            idle = [s for s in self._sessions.values() if not s.busy]
            oldest = min(idle, key=lambda s: s.touched) if idle else None
        if session is None and oldest is not None and len(self._sessions) >= MAX_SESSIONS:
            self.close(oldest.id)
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                session = self._sessions[session_id] = Session(session_id)
                if self._reaper is None:
                    self._reaper = threading.Thread(target=self._reap, name="fluxchat-sessions", daemon=True)
                    self._reaper.start()
            session.touched = time.monotonic()
            return session

    def uploaded(self, files: Any) -> list[str]:
        """Paths of uploads as the browser names them, [{"path": ...}, ...]; leaves out whatever is none.

        Whether they are that visitor's is the server's to check (app/server/gradio_mount.py).
        """
        paths = []
        for file in files if isinstance(files, list) else []:
            named = file.get("path") if isinstance(file, dict) else None
            if isinstance(named, str) and "\0" not in named:
                path = Path(named).resolve()
                if self.uploads in path.parents and path.is_file():
                    paths.append(str(path))
        return paths

    def copy(self, path: str | Path, client: str = "") -> str:
        """A copy of one of our own files, as if that client had uploaded it."""
        name = file_name(Path(path).name)
        if self.store is not None:
            with open(path, "rb") as source:
                return self.store.add(source, name, client, page=self.uploads).path
        self.uploads.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(path, Path(tempfile.mkdtemp(dir=self.uploads)) / name))

    def add(self, session: Session, medium: Media) -> None:
        """Add a video or image; raises ConfigError when the session has too many."""
        with self._lock:
            if session.closed:
                raise ConfigError("This conversation has ended: reload the page.")
            session.add(medium)
            try:
                if self.store is not None:
                    self.store.hold(medium.path)
            except ApiError as error:  # deleted a moment ago
                session.media.remove(medium)
                session.shown = max(0, len(session.media) - 1)
                raise ConfigError(str(error)) from None
            self._files[medium.path] += 1

    def discard(self, path: str) -> None:
        """Delete an upload that was refused, unless a session has it."""
        with self._lock:
            if path not in self._files and self.store is not None and self.store.hold(path):
                self.store.release(path)

    def remove(self, session: Session, path: str) -> None:
        """Remove a video or image if it is there, and delete its upload unless another session has it."""
        with self._lock:
            index = session.index(path)
            if index is None:
                return
            medium = session.media.pop(index)
            if session.shown > index or session.shown == len(session.media):
                session.shown = max(0, session.shown - 1)
            self._release(medium)

    def close(self, session_id: str) -> None:
        """Stop a session's generation and free its media; does nothing when there is none."""
        with self._lock:
            session = self._sessions.pop(session_id, None)
            if session is None:
                return
            session.closed = True
            session.halt()
            for medium in session.media:
                self._release(medium)
            session.media.clear()
            session.turns.clear()
        self._forget(session.scope)

    def close_all(self) -> None:
        """Free everything; for shutting down."""
        for session_id in list(self._sessions):
            self.close(session_id)
        self._wake.set()

    def sweep(self) -> None:
        """Close sessions that have been idle for longer than `idle_s`."""
        limit = time.monotonic() - self._idle_s
        with self._lock:
            idle = [s.id for s in self._sessions.values() if s.touched < limit and not s.busy]
        for session_id in idle:
            self.close(session_id)
        if self.store is None:  # which has its own sweep
            self._sweep_uploads()

    def _sweep_uploads(self) -> None:
        """Delete old files that no session uses, with folders that are empty then."""
        limit = time.time() - max(UNUSED_UPLOAD_S, self._idle_s)
        for path in self.uploads.glob("*/*") if self.uploads.is_dir() else ():
            with self._lock, contextlib.suppress(OSError):
                if str(path) not in self._files and path.is_file() and path.stat().st_mtime < limit:
                    path.unlink()
                    path.parent.rmdir()

    def _reap(self) -> None:
        while not self._wake.wait(min(60.0, self._idle_s / 2)):
            self.sweep()
            with self._lock:
                if not self._sessions:
                    self._reaper = None
                    return

    def _release(self, medium: Media) -> None:
        kept = self.store is not None and self.store.release(medium.path)
        self._files[medium.path] -= 1
        if self._files[medium.path] > 0:
            return
        del self._files[medium.path]
        path = Path(medium.path).resolve()
        if not kept and self.uploads in path.parents:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # if nothing else is in it
