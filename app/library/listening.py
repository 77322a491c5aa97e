"""Listening to the videos of a library, so that what is said in them is found.

report = listen_to(SaidTable(folder), Listener(), paths)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from app.library.said_table import SaidTable
from app.library.video_files import FileIdentity, check_name
from app.speech.listener import Listener
from encoder.errors import VideoError
from encoder.video.sources import reason


@dataclass
class HeardReport:
    """heard: new and changed files; lines: of those; failed: sentence by path."""

    heard: int = 0
    unchanged: int = 0
    lines: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def listen_to(
    table: SaidTable,
    listener: Listener,
    paths: Sequence[str],
    *,
    language: str | None = None,
    progress: TextIO | None = None,
) -> HeardReport:
    """Bring the lines of these files up to date; a file that cannot be read is a row of the report.

    Raises ConfigError or ModelError where the speech model is not there, DataError when nothing can be
    written.
    """
    from tqdm import tqdm

    report, known = HeardReport(), table.files()
    wanted = [path for path in paths if path not in known or not known[path].still(path, table.touch)]
    report.unchanged = len(paths) - len(wanted)
    if wanted:
        listener.ready(language)
    bar = tqdm(
        total=len(wanted), unit="video", desc="listening", file=progress, disable=progress is None,
        dynamic_ncols=True,
    )  # fmt: skip
    with bar:
        for path in wanted:
            try:
                check_name(path)
                identity = FileIdentity.of(path)
                transcript = listener.listen(
                    path, language=language, progress=lambda share: bar.set_postfix_str(f"{share:.0%} of it")
                )
                if not identity.unchanged(path):
                    raise VideoError(f"Cannot read {path!r}: it was changed meanwhile; index it again.")
            except VideoError as error:
                report.failed[path] = " ".join(str(error).split())
            except OSError as error:
                report.failed[path] = f"Cannot read {path!r}: {reason(error)}; check the path."
            else:
                table.put(path, identity, transcript)
                report.heard, report.lines = report.heard + 1, report.lines + len(transcript.lines)
            bar.update()
    return report
