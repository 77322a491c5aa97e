"""Annotation files: Kinetics-style csv, and JSON or JSONL rows with captions, labels or conversations.

Only paths, labels and line positions are kept in memory, so that a corpus of tens of millions of captions
opens in seconds; a row is parsed when it is asked for. Files may be gzipped, begin with a byte-order mark,
and end their lines with or without a carriage return.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import math
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.errors import DataError, VideoError
from training.data.conversations import FORMS, Talk, absent, is_text, parse_talk
from training.data.examples import Conversation, Example, Kind, Need
from training.data.media import IMAGES, FileMedia, Media, NoMedia, reason

TRIED_AT_OPEN = 100  # JSONL rows of which one must be usable at once; the others are met when they are used
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
# Keys that people write for "video" and "image", besides those that merely look like them.
MISSPELT = frozenset(
    {f"{kind}{end}" for kind in ("video", "image", "vid", "img") for end in ("", "s", "_path", "_file")}
    | {"media"}
)
DESCRIBES = ("video_read_type", "video_id", "image_id")  # near, but no media


def kind_of(path: str | Path) -> Kind:
    """By the file's suffix."""
    return "image" if Path(path).suffix.lower() in IMAGES else "video"


def read_bytes(path: Path) -> bytes:
    """A file's content, unpacked if it is gzipped, without a byte-order mark. Raises DataError."""
    try:
        content = path.read_bytes()
        if content.startswith(GZIP):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read the annotations {path}: {reason(error)}.") from error
    return content.removeprefix(BOM)


def read_text(path: Path) -> str:
    """The same as text. Raises DataError when it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"Cannot read the annotations {path}: {reason(error)}.") from error


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, one per line, whose numbers are the labels. Raises DataError."""
    names = tuple(line.strip() for line in read_text(path).split("\n") if line.strip())
    if len(set(names)) < len(names) or not names:
        raise DataError(f"The class names {path} must be at least one, all different.")
    return names


def to_label(value: Any, classes: Sequence[str], where: str) -> int | None:
    """A label's number: an integer, or the place of a name in `classes`. Raises DataError."""
    if absent(value) or value == "":
        return None
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
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


# -- csv ----------------------------------------------------------------------------------------------------


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
    text = read_text(path)
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
        class_number = (
            numbers[label] if label in numbers else to_label(label, names, f"{path}, line {number}")
        )
        labels.append(-1 if class_number is None else class_number)
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


# -- JSON and JSONL -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lines:
    """Rows of a JSONL file, found by their positions in it; content: of a gzipped one, unpacked."""

    path: Path
    starts: Sequence[int]
    content: bytes | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Any:
        """A row; raises OSError or ValueError."""
        return json.loads(self.line(index))

    def line(self, index: int) -> bytes:
        """A row as it is written; raises OSError."""
        with open(self.path, "rb") if self.content is None else io.BytesIO(self.content) as file:
            file.seek(self.starts[index])
            return file.readline()


@dataclass(frozen=True)
class JsonExamples:
    """Rows of a JSON or JSONL file."""

    rows: Lines | Sequence[Any]
    path: Path
    root: Path
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """The example of a row; raises VideoError when it cannot be used, so that it is skipped and named."""
        where = f"{self.path}, row {index + 1}"
        try:
            return parse_row(self.rows[index], self.root, self.classes, where)
        except DataError as error:
            raise VideoError(str(error)) from error
        except (OSError, ValueError, RecursionError) as error:
            raise VideoError(f"{where} cannot be used: {error}") from error


def read_json(path: Path, root: Path, classes: str | None = None, need: Need | None = None) -> JsonExamples:
    """A list of rows, one row, or one per line: {"video" or "image", "caption" or "captions", "label",
    "conversations" or "messages", "id", "start", "end"}.

    Raises DataError when the file is missing, holds no rows, or none of its first ones can be used for what a
    stage needs.
    """
    source = JsonExamples(_rows(path), path, root, read_classes(Path(classes)) if classes else ())
    if not len(source):
        raise DataError(f"{path} holds no examples.")
    problem = ""
    for index in range(min(len(source), TRIED_AT_OPEN)):
        try:
            lacking = source[index].lacks(need)
        except VideoError as error:  # which names the row
            problem = problem or str(error)
            continue
        if lacking is None:
            return source
        problem = problem or f"{path}, row {index + 1}: {lacking}"
    raise DataError(f"None of the first rows of {path} can be used; the first of them: {problem}")


def _rows(path: Path) -> Lines | Sequence[Any]:
    """The rows of a file, by what it holds and not by its name."""
    content: bytes | None = None
    try:
        with open(path, "rb") as file:
            head = file.read(len(BOM))
        if head.startswith(GZIP):
            content = read_bytes(path)
        begin = 0 if content is not None or head != BOM else len(BOM)
        with open(path, "rb") if content is None else io.BytesIO(content) as lines:
            lines.seek(begin)
            starts, position, first = array("q"), begin, b""
            for line in lines:
                if line.strip():
                    first = first or line.strip()
                    starts.append(position)
                position += len(line)
    except OSError as error:
        raise DataError(f"Cannot read the annotations {path}: {reason(error)}.") from error
    if first and not _is_row(first):
        try:
            whole = json.loads(read_bytes(path))
            return whole if isinstance(whole, list) else [whole]
        except (ValueError, RecursionError) as error:
            lines_of = Lines(path, starts, content)
            if not any(_is_row(lines_of.line(index)) for index in range(min(len(starts), TRIED_AT_OPEN))):
                raise DataError(f"Cannot read the annotations {path}: {reason(error)}.") from error
    return Lines(path, starts, content)


def _is_row(line: bytes) -> bool:
    """Whether a line is a whole JSON object, as all of JSONL are but the damaged ones."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def parse_row(row: Any, root: Path, classes: Sequence[str], where: str) -> Example:
    """One JSON object as an example; raises DataError naming `where`."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object.")
    try:
        talk = _talk(row)
        kind, names = _files(row, talk)
        if not names and (key := _misspelt(row)):
            raise DataError(f"it has no video or image, but the key {key!r}: name it 'video' or 'image'")
        if not names and talk is None:
            raise DataError("it names no video or image")
        conversations = _conversations(talk, len(names))
    except DataError as error:
        raise DataError(f"{where} cannot be used: {error}.") from None
    media: Media = NoMedia()
    if names:
        media = FileMedia(tuple(root / name for name in names), *parse_span(row, where))
    name = row.get("id")
    if absent(name):
        name = names[0] if names and talk is None else where
    return Example(
        str(name),
        media,
        to_label(row.get("label"), classes, where),
        parse_captions(row, where),
        kind,
        conversations,
        talk.system if talk is not None else "",
    )


def parse_conversations(
    row: Mapping[str, Any], has_media: bool, where: str
) -> tuple[tuple[Conversation, ...], str]:
    """The conversations of a row whose media lie elsewhere, and what stands before them; raises DataError."""
    try:
        talk = _talk(row)
        return _conversations(talk, int(has_media)), talk.system if talk is not None else ""
    except DataError as error:
        raise DataError(f"{where} cannot be used: {error}.") from None


def _talk(row: Mapping[str, Any]) -> Talk | None:
    """The row's conversation, None when it has none."""
    messages = next((row[form] for form in FORMS if not absent(row.get(form)) and row[form] != []), None)
    return None if messages is None else parse_talk(messages)


def _conversations(talk: Talk | None, files: int) -> tuple[Conversation, ...]:
    """Raises DataError when the placeholders and the files of a talk do not agree."""
    if talk is None:
        return ()
    if talk.placeholders > files:
        times = f"{talk.placeholders} times <image> or <video>"
        raise DataError(f"its text holds {times}, but it has {files} videos or images")
    if files and not talk.placeholders:
        raise DataError("it has a video or image, but its text holds no <video> or <image>")
    if not files and not talk.turns[0][0]:
        raise DataError("it has neither a question nor a video or image")
    return (talk.turns,)


def _files(row: Mapping[str, Any], talk: Talk | None) -> tuple[Kind, tuple[str, ...]]:
    """Kind and names of the row's media; raises DataError for what names none."""
    # In the form of messages the field's other tools name them in the plural.
    plural = "s" if row.get("messages") is not None else ""
    for kind, keys in (("video", ("video", f"video{plural}")), ("image", ("image", f"image{plural}"))):
        for key in keys:
            if not absent(value := row.get(key)) and value != []:
                return kind, _names(value, kind)  # type: ignore[return-value]
    if not absent(name := row.get("path")):
        (only,) = _names(name, "path")[:1]
        return kind_of(only), (only,)
    files = talk.files if talk is not None else ()
    if len({kind for kind, _ in files}) > 1:
        raise DataError("its conversation names both videos and images")
    return (files[0][0], _names([name for _, name in files], files[0][0])) if files else ("video", ())


def _names(value: Any, what: str) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"its {what} is no file name")
    if not all(is_text(name) and "\0" not in name for name in names):
        raise DataError(f"its {what} has a name that no file can have")
    if not all(name.strip() for name in names):
        raise DataError(f"its {what} has an empty name")
    if any(name.startswith(("http://", "https://", "data:")) for name in names):
        raise DataError(f"its {what} is no local file: download it and name the file")
    if what == "video" and len(names) > 1:
        raise DataError(f"it has {len(names)} videos: an example has one")
    return tuple(name.removeprefix("file://") for name in names)


def _misspelt(row: Mapping[str, Any]) -> str | None:
    """A key of a row without media that seems to be meant for them."""
    for key, value in row.items():
        name = str(key).lower()
        if absent(value) or value in ("", [], {}) or name in DESCRIBES:
            continue
        near = difflib.get_close_matches(name, ("video", "image"), cutoff=0.75)
        if name not in ("video", "image") and (near or name in MISSPELT):
            return str(key)
        if name != str(key) and name in ("video", "image"):
            return str(key)
    return None


def parse_span(row: Mapping[str, Any], where: str) -> tuple[float | None, float | None]:
    """`start` and `end` in seconds, None where they are not given; raises DataError for anything else."""
    try:
        start, end = (None if absent(row.get(key)) else float(row[key]) for key in ("start", "end"))
    except (TypeError, ValueError):
        raise DataError(f"{where} has a start or end that is no number of seconds.") from None
    if not all(value is None or (math.isfinite(value) and value >= 0) for value in (start, end)):
        raise DataError(f"{where} has a start or end that is no number of seconds.")
    if end is not None and end <= (start or 0.0):
        raise DataError(f"{where} ends at {end:g} s, not after its start.")
    return start, end


def parse_captions(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The texts of `caption` (one or a list) and `captions`, without empty ones; raises DataError for
    anything else."""
    found: list[Any] = []
    for key in ("caption", "captions"):
        value = row.get(key)
        found += value if isinstance(value, list) else [value]
    found = [text for text in found if not absent(text)]
    if not all(isinstance(text, str) and is_text(text) for text in found):
        raise DataError(f"{where} has a caption that is no text.")
    return tuple(text.strip() for text in found if text.strip())
