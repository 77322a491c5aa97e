"""One question about each of many videos: rows that are kept as they come, and asked for once.

    with AnswerFile(Path("answers.jsonl")) as answers:
        report = ask_all(LocalAsker(chat, "What moves?", {"budget": 64}), paths, answers)

A video that cannot be read or answered is a row with its sentence and ends nothing; the next run asks again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from app.library.answers import AnswerFile, AnswerRow
from app.library.video_files import FileIdentity, unreadable
from app.messages import Media
from app.note import without_guess
from encoder.errors import ConfigError, FluxChatError, OutOfMemory
from encoder.video.part import WHOLE, Part

if TYPE_CHECKING:
    from app.chat import VideoChat

AT_ONCE = 4  # videos: while one is decoded another is answered
NOBODY = FileIdentity(0, 0, "")


@dataclass
class MapReport:
    """What a run did. answered: videos; guessed: those of them that the model does not know; unchanged: those
    that had an answer; failed: sentence by path."""

    answered: int = 0
    guessed: int = 0
    unchanged: int = 0
    failed: dict[str, str] = field(default_factory=dict)


class Asker(Protocol):
    """Asks one question about videos. asked: a hash of all that an answer depends on but the video."""

    question: str
    asked: str

    def rows(self, paths: Sequence[str]) -> Iterator[AnswerRow]:
        """A row for each path, in any order; raises FluxChatError when nothing more can be asked."""
        ...


class LocalAsker:
    """Asks a VideoChat of this process. at_once: videos. options: as of `VideoChat.ask`.

    Raises FluxChatError for a question or options that fit no video.
    """

    def __init__(
        self,
        chat: VideoChat,
        question: str,
        options: Mapping[str, Any] | None = None,
        *,
        part: Part = WHOLE,
        at_once: int = AT_ONCE,
    ) -> None:
        chat.check(question, **(options or {}))
        self.chat, self.question, self._part = chat, question, part
        self._options, self._at_once = dict(options or {}), at_once
        self.asked = _hash(
            question, part, sorted((k, repr(v)) for k, v in self._options.items()), *chat.fingerprint
        )

    def row(self, path: str, stop: threading.Event | None = None) -> AnswerRow | None:
        """The question about one video; None when it was stopped. Raises OutOfMemory."""
        identity, answer, error, familiar = NOBODY, None, None, None
        try:
            identity = FileIdentity.of(path)
            medium = Media(path, part=self._part)
            made = self.chat.ask(medium, self.question, parts=True, stop=stop, **self._options)
            if made.finish == "cancelled":
                return None
            answer = without_guess(made.text) if self._options.get("schema") is None else made.json()
            familiar = made.familiar
            identity.check_unchanged(path, "ask")
        except OutOfMemory:
            raise
        except (FluxChatError, OSError) as raised:
            error = unreadable(path, raised)
        if error is not None:
            answer = familiar = None
        file = identity.size, identity.mtime_ns, identity.ends
        return AnswerRow(path, self.question, answer, error, familiar, *file, self.asked)

    def rows(self, paths: Sequence[str]) -> Iterator[AnswerRow]:
        """A row for each path, as they come; who found no memory is asked again, alone."""
        stop, late = threading.Event(), []
        running: dict[Future[AnswerRow | None], str] = {}
        with ThreadPoolExecutor(self._at_once, "fluxchat-ask") as threads:
            try:
                waiting = iter(paths)
                while True:
                    while len(running) < self._at_once and (path := next(waiting, None)) is not None:
                        running[threads.submit(self.row, path, stop)] = path
                    if not running:
                        break
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        path = running.pop(done)
                        try:
                            row = done.result()
                        except OutOfMemory:
                            late.append(path)
                        else:
                            if row is not None:
                                yield row
            finally:
                stop.set()  # answers that nobody will read
        for path in late:
            yield self._alone(path)

    def _alone(self, path: str) -> AnswerRow:
        try:
            row = self.row(path)
        except OutOfMemory as error:
            why = " ".join(str(error).split())
            return AnswerRow(path, self.question, None, why, None, 0, 0, "", self.asked)
        assert row is not None
        return row


def _hash(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=12).hexdigest()


def ask_all(
    asker: Asker,
    paths: Sequence[str],
    answers: AnswerFile,
    *,
    force: bool = False,
    progress: TextIO | None = None,
) -> MapReport:
    """Bring the answers about these videos up to date: exactly one row for each.

    force: answers to another question go. progress: a terminal for a bar. Raises ConfigError when there are
    such answers, DataError when no more can be written; what was answered before is kept.
    """
    from tqdm import tqdm

    report, wanted = MapReport(), set(paths)
    done: set[str] = set()

    def stays(row: AnswerRow) -> bool:
        if row.asked != asker.asked:
            if force:
                return False
            raise ConfigError(
                "The output holds answers to another question, or by another model or other options: name "
                "another output, or add --force to ask anew."
            )
        good = row.file not in wanted or (row.error is None and _same(row))
        if not good or row.file in done:
            return False
        done.add(row.file)
        return True

    answers.keep_only(stays)
    left = [path for path in dict.fromkeys(paths) if path not in done]
    report.unchanged = len(wanted) - len(left)
    bar = tqdm(total=len(left), unit="video", file=progress, disable=progress is None, dynamic_ncols=True)
    with bar:
        for row in asker.rows(left):
            if row.file in done:  # of a worker that died after it had handed the row over
                continue
            done.add(row.file)
            answers.add(row)
            if row.error is None:
                report.answered += 1
                report.guessed += row.familiar is False
            else:
                report.failed[row.file] = row.error
            bar.update()
    answers.finish()
    return report


def _same(row: AnswerRow) -> bool:
    """Whether a file is as it was asked about; one that is gone keeps the answer that it had."""
    if row.identity.unchanged(row.file):
        return True
    try:
        now = FileIdentity.of(row.file)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return now.same_content(row.identity)
