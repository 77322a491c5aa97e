"""The rows of a library in LanceDB: a clip each, in one folder. A file's clips appear together or not at all.

    table = ClipTable(folder, fingerprint)        # by one process at a time: see llm_bridge.assets.write_lock
    table.replace(path, rows)

The table belongs to one embedder and is named by its fingerprint, so that vectors of two models never mix.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from app.library.video_files import FileIdentity
from encoder.errors import ConfigError, DataError
from llm_bridge.model_files.checks import first_line

KEPT_VERSIONS_S = 600  # a search that runs meanwhile reads an older one


@dataclass(frozen=True)
class ClipRow:
    """A clip of a file. number of count: its place in it. thumbnail: JPEG. vector: unit length; an array
    where there may be many, since a list takes eight times its memory."""

    path: str
    size: int
    mtime_ns: int
    ends: str
    number: int
    count: int
    start_s: float
    end_s: float
    model: str
    thumbnail: bytes
    vector: Sequence[float]


@dataclass(frozen=True)
class IndexedFile:
    """A file as it was when it was indexed. rows: of it in the table; count: clips that it has."""

    path: str
    identity: FileIdentity
    rows: int
    count: int


def lancedb() -> Any:
    """The library LanceDB; raises ConfigError when it is not installed."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # its notices are for developers
    try:
        import lancedb as found
        import pyarrow  # noqa: F401 - what rows are made of
    except ImportError:
        raise ConfigError("A library of videos needs LanceDB: pip install 'fluxchat[library]'.") from None
    return found


class ClipTable:
    """The clips of one embedder. fingerprint: the embedder's. Raises DataError when it cannot be read.

    A table is made with its first row; before, it is empty.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._base = lancedb().connect(str(folder))
        self._name = f"clips-{fingerprint}"
        self._table: Any = None
        # Killed while the table was made, a process leaves a folder without a version: no table yet.
        if any((folder / f"{self._name}.lance" / "_versions").glob("*.manifest")):
            with reading(folder, self._name):
                self._table = self._base.open_table(self._name)
                self._table.count_rows()

    def __len__(self) -> int:
        with reading(self._folder, self._name):
            return 0 if self._table is None else int(self._table.count_rows())

    def files(self) -> dict[str, IndexedFile]:
        """Every file that has rows, by path."""
        return self._files(None)

    def file(self, path: str) -> IndexedFile | None:
        """The file of that path; None when it has no rows."""
        return self._files(rows_of(path)).get(path)

    def _files(self, where: str | None) -> dict[str, IndexedFile]:
        """The files of the rows for which a condition holds."""
        if self._table is None:
            return {}
        columns = ["path", "size", "mtime_ns", "ends", "count"]
        found: dict[str, IndexedFile] = {}
        chosen = self._table.search().select(columns)
        with reading(self._folder, self._name):
            batches = list((chosen if where is None else chosen.where(where)).to_batches())
        for batch in batches:
            for path, size, mtime_ns, ends, count in zip(
                *(batch.column(name).to_pylist() for name in columns), strict=True
            ):
                rows = found[path].rows + 1 if path in found else 1
                found[path] = IndexedFile(path, FileIdentity(size, mtime_ns, ends), rows, count)
        return found

    def add(self, rows: Sequence[ClipRow]) -> None:
        """Append the clips of a file that has none: one commit."""
        with self._writing():
            if self._table is None:
                self._table = self._base.create_table(self._name, _arrow(rows), mode="overwrite")
            else:
                self._table.add(_arrow(rows))

    def replace(self, path: str, rows: Sequence[ClipRow]) -> None:
        """Put a file's clips in place of those that it had: one commit."""
        if self._table is None:
            self.add(rows)
            return
        with self._writing():
            # A row that matches is renewed, a number that the file has no more goes.
            merge = self._table.merge_insert(["path", "number"]).when_matched_update_all()
            merge = merge.when_not_matched_insert_all().when_not_matched_by_source_delete(rows_of(path))
            merge.execute(_arrow(rows))

    def touch(self, path: str, mtime_ns: int) -> None:
        """Note that a file's content is the same at a later time."""
        with self._writing():
            self._table.update(where=rows_of(path), values={"mtime_ns": mtime_ns})

    def remove(self, path: str) -> None:
        """Drop a file's clips."""
        if self._table is not None:
            with self._writing():
                self._table.delete(rows_of(path))

    def nearest(self, vector: Sequence[float], count: int) -> list[tuple[ClipRow, float]]:
        """The clips nearest to a unit vector, with their cosines, best first."""
        if self._table is None:
            return []
        with reading(self._folder, self._name):
            found = self._table.search(list(vector)).distance_type("cosine").limit(count).to_list()
        rows = []
        for row in found:
            distance = row.pop("_distance")
            rows.append((ClipRow(**row), 1.0 - float(distance)))
        return rows

    def tidy(self) -> None:
        """Join small pieces, and drop what kills and old versions left behind."""
        with self._writing():
            tidied(self._table)

    def drop_others(self) -> None:
        """Drop the tables of other embedders."""
        for name in self._tables():
            if name != self._name:
                self._base.drop_table(name)

    def others(self) -> list[str]:
        """Names of tables of other embedders."""
        return [name for name in self._tables() if name != self._name]

    def _tables(self) -> list[str]:
        return [name for name in self._base.list_tables(limit=1000).tables if name.startswith("clips-")]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what LanceDB raises into one sentence; what was committed before is whole."""
        try:
            yield
        except Exception as error:
            raise cannot_write(self._folder, error) from error


@contextlib.contextmanager
def reading(folder: Path, name: str) -> Iterator[None]:
    """Turns what LanceDB raises while a library's table is read into one sentence."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"The library {folder} is damaged: delete {name}.lance in it and index again."
        ) from error


def tidied(table: Any) -> None:
    """Join a table's small pieces; versions that a search may still read stay."""
    if table is not None:
        table.optimize(cleanup_older_than=timedelta(seconds=KEPT_VERSIONS_S))


def cannot_write(folder: Path, error: Exception, done: str = "indexed") -> DataError:
    """What a failed writing into a library is told as. done: what was done to the videos before."""
    why = "the disk is full" if "No space left" in str(error) else first_line(error)
    return DataError(f"Cannot write into the library {folder}: {why}; what was {done} before is kept.")


def _arrow(rows: Sequence[ClipRow]) -> Any:
    import pyarrow

    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bytes: pyarrow.binary()}
    columns = {}
    for field in fields(ClipRow):
        values = [getattr(row, field.name) for row in rows]
        if field.name == "vector":
            numbers = np.array(values, np.float32)
            columns["vector"] = pyarrow.FixedSizeListArray.from_arrays(numbers.ravel(), numbers.shape[1])
        else:
            columns[field.name] = pyarrow.array(values, kinds[type(values[0])])
    return pyarrow.table(columns)


def rows_of(path: str) -> str:
    """The condition for a file's rows."""
    return "path = '" + path.replace("'", "''") + "'"
