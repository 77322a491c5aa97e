"""What is said in the videos of a library: a row per line, found by its words.

    table = SaidTable(folder)
    table.put(path, identity, transcript)
    table.find("rain in the city", count=10)     # lines with the share of these words that are in them

A file's lines appear together or not at all; one in which nothing is said has a row without words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.library.clip_table import cannot_write, lancedb, reading, rows_of, tidied
from app.library.video_files import FileIdentity
from app.speech.transcript import Line, Transcript

NAME = "said"
MOST_WORDS = 32  # of a search
# Scripts that leave no space between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]+"
)


@dataclass(frozen=True)
class SaidRow:
    """A line of a file; number: its place in it."""

    path: str
    size: int
    mtime_ns: int
    ends: str
    language: str
    number: int
    start_s: float
    end_s: float
    text: str

    @property
    def identity(self) -> FileIdentity:
        """The file as it was."""
        return FileIdentity(self.size, self.mtime_ns, self.ends)


class SaidTable:
    """The lines of a library's folder. Raises DataError when they cannot be read or written."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._base = folder, lancedb().connect(str(folder))
        self._table: Any = None
        if any((folder / f"{NAME}.lance" / "_versions").glob("*.manifest")):
            with reading(folder, NAME):
                self._table = self._base.open_table(NAME)
                self._table.count_rows()

    def files(self) -> dict[str, FileIdentity]:
        """Every file that was listened to, as it was then."""
        if self._table is None:
            return {}
        columns = ["path", "size", "mtime_ns", "ends"]
        with reading(self._folder, NAME):
            batches = list(self._table.search().select(columns).to_batches())
        return {
            path: FileIdentity(size, mtime_ns, ends)
            for batch in batches
            for path, size, mtime_ns, ends in zip(
                *(batch.column(name).to_pylist() for name in columns), strict=True
            )
        }

    def put(self, path: str, identity: FileIdentity, transcript: Transcript) -> None:
        """Put a file's lines in place of those that it had."""
        lines = transcript.lines or (Line(0.0, 0.0, ""),)
        rows = [
            asdict(
                SaidRow(
                    path=path,
                    size=identity.size,
                    mtime_ns=identity.mtime_ns,
                    ends=identity.ends,
                    language=transcript.language,
                    number=number,
                    start_s=float(line.start_s),
                    end_s=float(line.end_s),
                    text=line.text,
                )
            )
            for number, line in enumerate(lines)
        ]
        try:
            if self._table is None:
                self._table = self._base.create_table(NAME, rows, mode="overwrite")
                return
            # Killed in between, it leaves none of the file, which is listened to again.
            self._table.delete(rows_of(path))
            self._table.add(rows)
        except Exception as error:
            raise cannot_write(self._folder, error, "heard") from error

    def find(self, text: str, count: int) -> list[tuple[SaidRow, float]]:
        """Lines with words of a text, and the share of its words that they have; best first, then by time."""
        wanted = list(dict.fromkeys(_terms(text)))[:MOST_WORDS]
        if self._table is None or not wanted:
            return []
        where = " OR ".join(f"lower(text) LIKE '%{word}%'" for word in wanted)
        found: list[tuple[SaidRow, float]] = []
        with reading(self._folder, NAME):
            batches = list(self._table.search().where(where).to_batches())
        for batch in batches:
            for values in batch.to_pylist():
                row = SaidRow(**{name: values[name] for name in SaidRow.__dataclass_fields__})
                said = {*_terms(row.text), *"".join(_UNSPACED.findall(row.text))}
                if share := sum(word in said for word in wanted) / len(wanted):
                    found.append((row, share))
        found.sort(key=lambda one: (-one[1], one[0].path, one[0].start_s))
        return found[:count]

    def tidy(self) -> None:
        """Join small pieces, and drop what kills and old versions left behind."""
        try:
            tidied(self._table)
        except Exception as error:
            raise cannot_write(self._folder, error, "heard") from error

    def touch(self, path: str, mtime_ns: int) -> None:
        """Note that a file's content is the same at a later time."""
        try:
            self._table.update(where=rows_of(path), values={"mtime_ns": mtime_ns})
        except Exception as error:
            raise cannot_write(self._folder, error, "heard") from error

    def remove(self, path: str) -> None:
        """Drop a file's lines."""
        if self._table is None:
            return
        try:
            self._table.delete(rows_of(path))
        except Exception as error:
            raise cannot_write(self._folder, error) from error


def _terms(text: str) -> Iterator[str]:
    """The words of a text; of writing without spaces every two neighbouring characters, or one alone."""
    for word in _words(text):
        place = 0
        for run in _UNSPACED.finditer(word):
            yield from filter(None, [word[place : run.start()]])
            place, signs = run.end(), run.group()
            yield from (signs[i : i + 2] for i in range(max(1, len(signs) - 1)))
        yield from filter(None, [word[place:]])


def _words(text: str) -> list[str]:
    """What lies between spaces and punctuation; a vowel sign belongs to its letter."""
    plain = unicodedata.normalize("NFC", text).lower()
    return "".join(c if unicodedata.category(c)[0] in "LMN" or c == "_" else " " for c in plain).split()
