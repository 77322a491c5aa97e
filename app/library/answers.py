"""The answers of `fluxchat map`: a row per video in a file of JSON lines, or of Parquet.

    with AnswerFile(Path("answers.jsonl")) as answers:
        answers.keep_only(lambda row: ...)
        answers.add(row)

Rows are appended as they come. Killed at any moment, the process leaves whole rows and at most the beginning
of one, which the next run drops. Parquet cannot be appended to: its rows lie in a hidden file of JSON lines
beside it until the run ends.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from app.library.video_files import FileIdentity, is_unicode
from encoder.checkpoint import atomic_path
from encoder.errors import ConfigError, DataError
from encoder.video.sources import reason
from llm_bridge.assets.write_lock import WriteLock

SUFFIXES = (".jsonl", ".parquet")
BATCH = 10_000  # rows of Parquet that are converted at once
ANSWERS, VALUES = b"fluxchat.answers", b"values"  # of Parquet's metadata
_ESCAPED = re.compile(r"\\u(d[89a-f][0-9a-f]{2})")
TEXTS, NUMBERS = ("file", "question", "answer", "error", "ends", "asked"), ("size", "mtime_ns")


@dataclass(frozen=True)
class AnswerRow:
    """What became of a question about a video.

    answer: the text, or with a schema its value; None where error says why there is none. familiar: as of
    `Answer`. size, mtime_ns, ends: of the file that was asked about (see FileIdentity), 0 and "" where it
    could not be read. asked: a hash of question, model and options.
    """

    file: str
    question: str
    answer: Any
    error: str | None
    familiar: bool | None
    size: int
    mtime_ns: int
    ends: str
    asked: str

    @property
    def identity(self) -> FileIdentity:
        """The file as it was."""
        return FileIdentity(self.size, self.mtime_ns, self.ends)

    @property
    def line(self) -> str:
        """As a line of JSON, with its end."""
        line = json.dumps(asdict(self), ensure_ascii=False)
        # A name that is no UTF-8, as Linux allows, is written with escapes.
        return (line if is_unicode(line) else json.dumps(asdict(self))) + "\n"

    @staticmethod
    def of(line: str) -> AnswerRow:
        """Raises ValueError for a line that is none."""
        return AnswerRow.checked(_value(line))

    @staticmethod
    def checked(values: Any) -> AnswerRow:
        """A row with these values by name; raises ValueError for what are none."""
        if not isinstance(values, dict) or set(values) != set(AnswerRow.__dataclass_fields__):
            raise ValueError("other fields")
        known = all(isinstance(values[name], str) for name in ("file", "question", "ends", "asked"))
        known = known and all(type(values[name]) is int for name in NUMBERS)
        known = known and isinstance(values["familiar"], bool | None)
        if not known or not isinstance(values["error"], str | None):
            raise ValueError("fields of another kind")
        return AnswerRow(**values)


def _value(text: str) -> Any:
    """Of JSON; raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def check_out(out: Path) -> None:
    """Raises ConfigError for a file that answers cannot be written to, before anything is computed."""
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"Answers go into a file {' or '.join(SUFFIXES)}, not {out.name!r}.")
    other = out.exists() and not out.is_file()  # a folder, a pipe
    if other or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"Cannot write {out}: name a file in a folder that is there and can be written.")
    if out.suffix == ".parquet":
        _pyarrow()


class AnswerFile:
    """The rows of one output, which one process writes at a time.

    as_values: answers are values of a schema, which Parquet holds as JSON. Raises ConfigError when another
    process writes, DataError for a file that holds something else, or that cannot be written any more.
    """

    def __init__(self, out: Path, *, as_values: bool = False) -> None:
        self._out, self._as_values = out, as_values
        self._lock = WriteLock(out.parent / f".{out.name}.lock", str(out), passing=True)
        parquet = out.suffix == ".parquet"
        self._rows = out.parent / f".{out.name}.rows.jsonl" if parquet else out
        self._parquet = parquet
        self._file: IO[bytes] | None = None

    def __enter__(self) -> AnswerFile:
        self._lock.__enter__()
        try:
            next(self.rows(), None)  # a file of something else is refused before a model is loaded
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.__exit__()

    def rows(self) -> Iterator[AnswerRow]:
        """What is there; the beginning of a row at the end is left out."""
        if not self._rows.exists():
            if self._parquet and self._out.exists():
                yield from _from_parquet(self._out)
            return
        with open(self._rows, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and _begins_row(line):
                    return
                try:
                    yield AnswerRow.of(line.decode())
                except ValueError as error:
                    raise DataError(
                        f"Line {number} of {self._rows} is no answer of `fluxchat map` ({error}): name "
                        "another output, or move this file away."
                    ) from None

    def keep_only(self, wanted: Callable[[AnswerRow], bool]) -> None:
        """Drop the other rows, and what is only the beginning of one; each row is judged once, in order."""
        verdicts = [wanted(row) for row in self.rows()]
        as_they_are = all(verdicts) and not self._torn() if self._rows.exists() else not verdicts
        if as_they_are:
            return
        with atomic_path(self._rows) as temporary, open(temporary, "w", encoding="utf-8") as file:
            kept = (row for row, stays in zip(self.rows(), verdicts, strict=True) if stays)
            file.writelines(row.line for row in kept)

    def add(self, row: AnswerRow) -> None:
        """Append a row; raises DataError when the disk refuses it."""
        data = row.line.encode()
        try:
            if self._file is None:
                self._file = open(self._rows, "ab", buffering=0)  # noqa: SIM115 - closed with this object
            if self._file.write(data) != len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise DataError(
                f"Cannot write into {self._rows}: {reason(error)}; the answers before are kept, run it again."
            ) from error

    def finish(self) -> None:
        """All rows that are to come have come."""
        if not self._parquet or not self._rows.exists():
            return
        _write_parquet(self._out, self.rows(), self._as_values)
        self._rows.unlink()

    def _torn(self) -> bool:
        if not self._rows.exists() or not (size := self._rows.stat().st_size):
            return False
        with open(self._rows, "rb") as file:
            file.seek(size - 1)
            return file.read() != b"\n"


def _begins_row(line: bytes) -> bool:
    start = b'{"file": "'
    return line.startswith(start) or start.startswith(line)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "Parquet needs pyarrow: pip install 'fluxchat[library]', or write to a .jsonl file."
        ) from None
    return pyarrow


def _schema(arrow: Any) -> Any:
    kinds = {**dict.fromkeys(TEXTS, arrow.string()), **dict.fromkeys(NUMBERS, arrow.int64())}
    kinds["familiar"] = arrow.bool_()
    return arrow.schema([(name, kinds[name]) for name in AnswerRow.__dataclass_fields__])


def _write_parquet(out: Path, rows: Iterator[AnswerRow], as_values: bool) -> None:
    arrow = _pyarrow()
    schema = _schema(arrow).with_metadata({ANSWERS: VALUES if as_values else b"texts"})
    with atomic_path(out) as temporary, arrow.parquet.ParquetWriter(temporary, schema) as writer:
        while batch := list(islice(rows, BATCH)):
            values = [asdict(row) | {"file": _shown(row.file)} for row in batch]
            for value in values:
                if as_values and value["error"] is None:
                    value["answer"] = json.dumps(value["answer"], ensure_ascii=False)
            writer.write_table(arrow.Table.from_pylist(values, schema=schema))


def _shown(path: str) -> str:
    r"""A path as Unicode, whatever its name is: a byte that is none is written as \udcff."""
    return path.encode(errors="backslashreplace").decode()


def _named(shown: str) -> str:
    """The reverse of `_shown`."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), shown)


def _from_parquet(out: Path) -> Iterator[AnswerRow]:
    arrow = _pyarrow()
    try:
        with arrow.parquet.ParquetFile(out) as file:
            if file.schema_arrow.names != list(AnswerRow.__dataclass_fields__):
                raise DataError(f"{out} holds no answers of `fluxchat map`: name another output.")
            as_values = (file.schema_arrow.metadata or {}).get(ANSWERS) == VALUES
            for batch in file.iter_batches(BATCH):
                for values in batch.to_pylist():
                    if as_values and values["answer"] is not None:
                        values["answer"] = _value(values["answer"])
                    row = AnswerRow.checked(values)
                    yield replace(row, file=_named(row.file))
    except (OSError, ValueError, TypeError, arrow.ArrowException) as error:
        raise DataError(f"Cannot read {out} ({error}): name another output.") from error
