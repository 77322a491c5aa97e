"""Annotation files of labelled and captioned videos: Kinetics-style csv and caption JSONL.

Only paths, labels and line positions are kept in memory, so that a corpus of tens of millions of captions
opens in seconds; a JSONL row is parsed when it is asked for.
"""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.errors import DataError, VideoError
from training.data.examples import Example, Kind
from training.data.media import IMAGES, FileMedia, reason

PARSED_AT_OPEN = 100  # JSONL rows that are checked at once; the others when they are used


def kind_of(path: str | Path) -> Kind:
    """By the file's suffix."""
    return "image" if Path(path).suffix.lower() in IMAGES else "video"


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, one per line, whose numbers are the labels. Raises DataError."""
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the class names {path}: {reason(error)}.") from error
    if len(set(names)) < len(names) or not names:
        raise DataError(f"The class names {path} must be at least one, all different.")
    return names


def to_label(value: Any, classes: Sequence[str], where: str) -> int | None:
    """A label's number: an integer, or the place of a name in `classes`. Raises DataError."""
    if value is None or value == "":
        return None
    text = str(value).strip()
    try:
        number = int(text)
    except ValueError:
        if text in classes:
            return classes.index(text)
        hint = f"it is none of the {len(classes)} classes" if classes else "name a classes file"
        raise DataError(f"{where} has the label {text!r}: {hint}.") from None
    if number < 0 or (classes and number >= len(classes)):
        raise DataError(f"{where} has the label {number}, but there are {len(classes)} classes.")
    return number


@dataclass(frozen=True)
class CsvExamples:
    """Videos or images of a csv file. labels: -1 stands for none; folders: where else a path may lie."""

    root: Path
    paths: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...] = ()
    folders: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        name, label = self.paths[index], self.labels[index]
        path = self.root / name
        if self.folders and not path.exists():
            path = self.root / self.folders[index] / name
        return Example(name, FileMedia((path,)), None if label < 0 else label, kind=kind_of(path))


def read_csv(path: Path, root: Path, classes: str | None = None) -> CsvExamples:
    """`path label` or `path,label` per line (label: number or name), or the official Kinetics file.

    Without a classes file, names are numbered in alphabetical order. Official rows are looked for as
    `ID_START_END.mp4` in the root or in a folder with the label's name. Raises DataError naming the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the annotations {path}: {reason(error)}.") from error
    names = read_classes(Path(classes)) if classes else ()
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and "youtube_id" in lines[0][1].split(","):
        rows = _official(text, path)
    else:
        rows = [(number, *_row(line), "") for number, line in lines]
    if not names and any(not label.lstrip("-").isdigit() for _, _, label, _ in rows if label):
        names = tuple(sorted({label for _, _, label, _ in rows if label}))
    numbers = {name: place for place, name in enumerate(names)}
    labels = array("i")
    for number, _, label, _ in rows:
        found = numbers[label] if label in numbers else to_label(label, names, f"{path}, line {number}")
        labels.append(-1 if found is None else found)
    folders = [folder for *_, folder in rows] if rows and rows[0][3] else ()
    return CsvExamples(root, [name for _, name, _, _ in rows], labels, names, folders)


def _row(line: str) -> tuple[str, str]:
    """(path, label) of one line; the label may be missing."""
    if "," in line:
        *parts, label = next(csv.reader([line]))
        return ",".join(parts), label.strip()
    parts = line.rsplit(None, 1)
    return (parts[0], parts[1]) if len(parts) == 2 else (line, "")


def _official(text: str, path: Path) -> list[tuple[int, str, str, str]]:
    """(line, file name, label, folder) of the files that the Kinetics project publishes."""
    rows = []
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
        try:
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            label = (row.get("label") or "").strip()
            rows.append((number, f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4", label, label))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number} is not an official Kinetics row: {error}.") from error
    return rows


@dataclass(frozen=True)
class JsonlExamples:
    """Rows of a JSONL file, found by their positions in it (`starts`, one more than there are rows)."""

    path: Path
    root: Path
    starts: Sequence[int]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        """The example of a row; raises VideoError when it is malformed, so that it is skipped and named."""
        where = f"{self.path}, row {index + 1}"
        try:
            with open(self.path, "rb") as file:
                file.seek(self.starts[index])
                row = json.loads(file.readline())
            return parse_row(row, self.root, self.classes, where)
        except (OSError, ValueError, DataError) as error:
            raise VideoError(f"{where} cannot be used: {error}") from error


def read_jsonl(path: Path, root: Path, classes: str | None = None) -> JsonlExamples:
    """{"video" or "image", "caption" or "captions", "label", "id", "start", "end"} per line.

    Raises DataError when the file is missing or one of its first rows is malformed.
    """
    names = read_classes(Path(classes)) if classes else ()
    starts, position = array("q"), 0
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    starts.append(position)
                    if len(starts) <= PARSED_AT_OPEN:
                        parse_row(json.loads(line), root, names, f"{path}, row {len(starts)}")
                position += len(line)
    except (OSError, ValueError) as error:
        raise DataError(
            f"Cannot read the annotations {path} (row {len(starts)}): {reason(error)}."
        ) from error
    return JsonlExamples(path, root, starts, names)


def parse_row(row: Any, root: Path, classes: Sequence[str], where: str) -> Example:
    """One JSON object as an example; raises DataError."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object.")
    name = row.get("video") or row.get("image") or row.get("path")
    if not isinstance(name, str):
        raise DataError(f"{where} names no video or image.")
    kind: Kind = "video" if row.get("video") else "image" if row.get("image") else kind_of(name)
    captions = parse_captions(row, where)
    label = to_label(row.get("label"), classes, where)
    media = FileMedia((root / name,), *parse_span(row, where))
    return Example(str(row.get("id", name)), media, label, captions, kind)


def parse_span(row: dict[str, Any], where: str) -> tuple[float | None, float | None]:
    """`start` and `end` in seconds, None where they are not given; raises DataError for anything else."""
    try:
        start, end = (None if row.get(key) is None else float(row[key]) for key in ("start", "end"))
    except (TypeError, ValueError):
        raise DataError(f"{where} has a start or end that is no number of seconds.") from None
    return start, end


def parse_captions(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The texts of `caption` (one or a list) and `captions`; raises DataError for anything else."""
    found: list[Any] = []
    for key in ("caption", "captions"):
        value = row.get(key)
        found += value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in found):
        raise DataError(f"{where} has a caption that is no text.")
    return tuple(text.strip() for text in found if text.strip())
