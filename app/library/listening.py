"""Listening to the videos of a library, so that what is said in them is found.

report = listen_to(SaidTable(folder), LocalHearer(Listener()), paths)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, TextIO

from app.library.said_table import SaidTable
from app.library.video_files import FileIdentity, check_name, unreadable
from app.speech.listener import Listener, Progress
from app.speech.transcript import Transcript
from encoder.errors import VideoError

TIDY_EVERY = 200  # videos: each one's commit is a piece of its own until then


@dataclass
class HeardReport:
    """heard: new and changed files; lines: of those, and by language; failed: sentence by path."""

    heard: int = 0
    unchanged: int = 0
    lines: int = 0
    languages: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HeardVideo:
    """What is said in a file, or what was wrong with it."""

    path: str
    identity: FileIdentity | None = None
    transcript: Transcript | None = None
    error: str | None = None

    @property
    def line(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def of(line: str) -> HeardVideo:
        """The reverse of `line`."""
        values = json.loads(line)
        if values["error"] is not None:
            return HeardVideo(values["path"], error=values["error"])
        return HeardVideo(
            values["path"], FileIdentity(**values["identity"]), Transcript.of(values["transcript"])
        )


class Hearer(Protocol):
    """Listens to videos, each of them once, in any order."""

    def ready(self) -> object:
        """Raises ConfigError or ModelError where nobody can listen, or not in that language."""
        ...

    def videos(self, paths: Sequence[str], progress: Progress) -> Iterator[HeardVideo]:
        """progress: told how much of the present one was heard, where that is known."""
        ...


class LocalHearer:
    """Listens in this process. language: of all videos; None recognises it."""

    def __init__(self, listener: Listener, language: str | None = None) -> None:
        self._listener, self._language = listener, language

    def ready(self) -> object:
        return self._listener.ready(self._language)

    def videos(self, paths: Sequence[str], progress: Progress = lambda _: None) -> Iterator[HeardVideo]:
        for path in paths:
            try:
                check_name(path)
                identity = FileIdentity.of(path)
                transcript = self._listener.listen(path, language=self._language, progress=progress)
                identity.check_unchanged(path)
            except (VideoError, OSError) as error:
                yield HeardVideo(path, error=unreadable(path, error))
            else:
                yield HeardVideo(path, identity, transcript)


def listen_to(
    table: SaidTable, hearer: Hearer, paths: Sequence[str], *, progress: TextIO | None = None
) -> HeardReport:
    """Bring the lines of these files up to date; a file that cannot be read is a row of the report.

    Raises ConfigError or ModelError where the speech model is not there, DataError when nothing can be
    written.
    """
    from tqdm import tqdm

    report, known = HeardReport(), table.files()
    wanted = [path for path in paths if path not in known or not known[path].still(path, table.touch)]
    report.unchanged = len(paths) - len(wanted)
    if not wanted:
        return report
    hearer.ready()
    languages: Counter[str] = Counter()
    bar = tqdm(
        total=len(wanted), unit="video", desc="listening", file=progress, disable=progress is None,
        dynamic_ncols=True,
    )  # fmt: skip
    with bar:
        for video in hearer.videos(wanted, lambda share: bar.set_postfix_str(f"{share:.0%} of it")):
            if video.identity is None or video.transcript is None:
                report.failed[video.path] = video.error or ""
            else:
                table.put(video.path, video.identity, video.transcript)
                languages[video.transcript.language] += len(video.transcript.lines)
                report.heard, report.lines = report.heard + 1, report.lines + len(video.transcript.lines)
                if report.heard % TIDY_EVERY == 0:
                    table.tidy()
            bar.update()
    if report.heard:
        table.tidy()
    report.languages = {language: count for language, count in languages.most_common() if count}
    return report
