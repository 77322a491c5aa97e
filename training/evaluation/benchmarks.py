"""Benchmarks: the public test sets as examples, read in the layouts in which they are published.

Every benchmark can be the synthetic world instead: its test clips with captions, nouns and motions.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from encoder.errors import ConfigError, DataError
from training.data.annotations import parse_captions, read_classes, read_csv
from training.data.examples import Example, ExampleSource
from training.data.media import VIDEOS, FileMedia

Captions = dict[str, list[str]]


@dataclass(frozen=True)
class RetrievalSet:
    """paragraph: the captions of a video are one text. end_s: only so much of a video is used."""

    paragraph: bool = False
    end_s: float | None = None


# Test protocol of the released evaluation (method of IV2m `tasks_clip`).
RETRIEVAL: Mapping[str, RetrievalSet] = {
    "msrvtt": RetrievalSet(),
    "didemo": RetrievalSet(paragraph=True, end_s=30.0),
    "activitynet": RetrievalSet(paragraph=True),
    "lsmdc": RetrievalSet(),
    "msvd": RetrievalSet(),
}


@dataclass(frozen=True)
class ClassSet:
    """views: clips and crops of the published test."""

    clips: int = 1
    crops: int = 1


ACTIONS: Mapping[str, ClassSet] = {name: ClassSet() for name in ("k400", "k600", "ucf101", "mitv1")}
# COIN's views are UNVERIFIED: those of K400 are taken.
CLASSIFY: Mapping[str, ClassSet] = {"k400": ClassSet(4, 3), "ssv2": ClassSet(2, 3), "coin": ClassSet(4, 3)}


@dataclass(frozen=True)
class Labelled:
    """Examples with labels, and the names of the classes."""

    examples: Sequence[Example]
    classes: tuple[str, ...]


def find_video(root: Path, name: str) -> Path:
    """Where a video lies; names without suffix, or with another one, are tried with all of them."""
    path = root / name
    if path.suffix.lower() in VIDEOS and path.exists():
        return path
    stem = path.with_suffix("") if path.suffix.lower() in VIDEOS else path
    for suffix in sorted(VIDEOS):
        if (other := stem.with_name(stem.name + suffix)).exists():
            return other
    return path if path.suffix.lower() in VIDEOS else path.with_name(path.name + ".mp4")


# -- captions -----------------------------------------------------------------------------------------------


def read_retrieval(annotations: Path, videos: Path, settings: RetrievalSet) -> list[Example]:
    """Videos with their captions, in file order. Rows of one video are put together.

    Layouts: JSON list of {"video", "caption" (text or list)} (also "sentence", "description" and "video_id"),
    JSON {video: {"sentences": [...]}} (ActivityNet Captions), csv with a header that has such columns
    (MSR-VTT), tab-separated without one, video first and text last (LSMDC). Raises DataError.
    """
    captions: Captions = {}
    for name, texts in _caption_rows(annotations):
        if not texts:
            raise DataError(f"{annotations} has no caption for {name!r}.")
        captions.setdefault(name, []).extend(texts)
    if not captions:
        raise DataError(f"{annotations} holds no captions.")
    examples = []
    for name, texts in captions.items():
        joined = (" ".join(texts),) if settings.paragraph else tuple(texts)
        media = FileMedia((find_video(videos, name),), end_s=settings.end_s)
        examples.append(Example(name, media, captions=joined))
    return examples


def _caption_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    text = _text_of(path)
    if path.suffix == ".json":
        values = _json_of(text, path)
        if isinstance(values, dict):
            for name, value in values.items():
                sentences = value.get("sentences") if isinstance(value, dict) else None
                if not isinstance(sentences, list):
                    raise DataError(f"{path}: {name!r} has no list of sentences.")
                yield name, [str(sentence).strip() for sentence in sentences]
            return
        for number, row in enumerate(values, 1):
            yield _caption_row(row, f"{path}, row {number}")
        return
    lines = [line for line in text.splitlines() if line.strip()]
    header = lines[0].lower().split(",") if lines else []
    if "\t" in (lines[0] if lines else ""):
        for line in lines:
            cells = line.split("\t")
            yield cells[0].strip(), [cells[-1].strip()]
        return
    if not {"video", "video_id"} & set(header):
        raise DataError(f"{path} is no csv with a column video or video_id, and not tab-separated.")
    for number, row in enumerate(csv.DictReader(lines), 2):
        yield _caption_row({k.lower(): v for k, v in row.items() if k}, f"{path}, line {number}")


def _caption_row(row: Any, where: str) -> tuple[str, list[str]]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object.")
    name = row.get("video") or row.get("video_id")
    if not isinstance(name, str):
        raise DataError(f"{where} names no video.")
    texts: Any = next(
        (row[key] for key in ("caption", "captions", "sentence", "description") if row.get(key)), []
    )
    return name, list(parse_captions({"caption": texts}, where))


# -- classes ------------------------------------------------------------------------------------------------


def class_words(name: str) -> str:
    """A class name as words: "ApplyEyeMakeup" -> "apply eye makeup", "adult+male+singing" likewise."""
    if "_" not in name and " " not in name:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return " ".join(re.sub(r"[+_]", " ", name).lower().split())


def read_labelled(dataset: str, annotations: Path, videos: Path, classes: Path | None) -> Labelled:
    """A labelled set by its name: k400, k600, ucf101, mitv1, ssv2 or coin; raises DataError or ConfigError.

    k400, k600: `path label` or the official csv. ucf101: testlist01.txt with classInd.txt. mitv1:
    validationSet.csv (`folder/file,label,...`) with moments_categories.txt. ssv2: the validation JSON with
    labels.json. coin: COIN.json, its testing subset.
    """
    readers: dict[str, Callable[[Path, Path, Path | None], Labelled]] = {
        "ucf101": _ucf101,
        "mitv1": _moments,
        "ssv2": _something,
        "coin": _coin,
    }
    return readers.get(dataset, _plain)(annotations, videos, classes)


def _plain(annotations: Path, videos: Path, classes: Path | None) -> Labelled:
    source: ExampleSource = read_csv(annotations, videos, str(classes) if classes else None)
    examples = [source[index] for index in range(len(source))]
    return _checked(examples, source.classes, annotations)


def _ucf101(annotations: Path, videos: Path, classes: Path | None) -> Labelled:
    names = tuple(line.split(None, 1)[1] for line in read_classes(_needed(classes, "classInd.txt")))
    examples = []
    for line in _text_of(annotations).splitlines():
        if line.strip():
            name = line.split()[0]
            examples.append(_example(videos, name, name.split("/")[0], names, annotations))
    return _checked(examples, names, annotations)


def _moments(annotations: Path, videos: Path, classes: Path | None) -> Labelled:
    lines = read_classes(_needed(classes, "moments_categories.txt"))
    pairs = sorted((int(line.rsplit(",", 1)[1]), line.rsplit(",", 1)[0]) for line in lines if "," in line)
    names = tuple(name for _, name in pairs) or lines
    rows = csv.reader(_text_of(annotations).splitlines())
    examples = [_example(videos, row[0], row[1], names, annotations) for row in rows if len(row) > 1]
    return _checked(examples, names, annotations)


def _something(annotations: Path, videos: Path, classes: Path | None) -> Labelled:
    path = _needed(classes, "labels.json")
    table = _json_of(_text_of(path), path)
    try:
        names = tuple(sorted(table, key=lambda name: int(table[name])))
        rows = [
            (str(row["id"]), str(row["template"]).replace("[", "").replace("]", ""))
            for row in _json_of(_text_of(annotations), annotations)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{annotations} or {path} is not in SSv2's layout: {error!r}.") from error
    examples = [_example(videos, name, label, names, annotations) for name, label in rows]
    return _checked(examples, names, annotations)


def _coin(annotations: Path, videos: Path, classes: Path | None) -> Labelled:
    try:
        rows = _json_of(_text_of(annotations), annotations)["database"]
        numbers = {int(row["recipe_type"]): str(row["class"]) for row in rows.values()}
        tested = [(name, row) for name, row in rows.items() if row["subset"] == "testing"]
        names = tuple(numbers.get(number, str(number)) for number in range(max(numbers) + 1))
        examples = []
        for name, row in tested:
            # Downloads lie in one folder, or in one per class with its number or name.
            places = (name, f"{row['recipe_type']}/{name}", f"{row['class']}/{name}")
            path = next((p for p in (find_video(videos, place) for place in places) if p.exists()), None)
            media = FileMedia((path or find_video(videos, name),))
            examples.append(Example(name, media, int(row["recipe_type"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{annotations} is not in COIN's layout: {error!r}.") from error
    return _checked(examples, names, annotations)


def _example(videos: Path, name: str, label: str, names: Sequence[str], where: Path) -> Example:
    if label not in names:
        raise DataError(
            f"{where}: {name} has the label {label!r}, which is none of the {len(names)} classes."
        )
    return Example(name, FileMedia((find_video(videos, name),)), names.index(label))


def _checked(examples: list[Example], names: tuple[str, ...], where: Path) -> Labelled:
    if not examples:
        raise DataError(f"{where} holds no examples.")
    if unlabelled := next((e.id for e in examples if e.label is None), None):
        raise DataError(f"{where} gives no label for {unlabelled}.")
    top = max(example.label or 0 for example in examples)
    return Labelled(examples, names or tuple(str(number) for number in range(top + 1)))


def _needed(path: Path | None, usual: str) -> Path:
    if path is None:
        raise ConfigError(f"Name the file of class names with --classes; it is usually called {usual}.")
    return path


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the annotations {path}: {error}.") from error


def _json_of(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.") from error


def with_unique_ids(examples: Sequence[Example]) -> list[Example]:
    """The same examples with ids that differ: what is listed twice gets a number."""
    counts: dict[str, int] = {}
    out = []
    for example in examples:
        count = counts[example.id] = counts.get(example.id, 0) + 1
        out.append(example if count == 1 else replace(example, id=f"{example.id}#{count}"))
    return out
