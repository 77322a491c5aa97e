"""What of a recipe's data is missing or unreadable, found before training starts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from encoder.errors import FluxChatError, VideoError
from training.command_line import table
from training.data.corpora import compare
from training.data.datasets import NEEDS, DatasetConfig
from training.data.examples import ExampleSource
from training.data.media import FileMedia, Media
from training.data.synthetic_source import WorldSource
from training.data.video_batches import usable_cores
from training.trainer.recipe import build

FRAMES, SIDE = 2, 112  # of a trial reading
NAMED = 3  # examples that a line names
PART = 1024  # files that are looked for between two steps of the progress bar
KINDS = ("csv", "jsonl", "json_path", "yaml_path", "shards", "world")


@dataclass
class Findings:
    """What was found in one dataset. missing, unreadable: (name, reason), in order.

    looked_at: how many of `total` were looked for; sampled: how many of them were decoded. error: why the
    dataset cannot be opened at all.
    """

    where: str
    name: str
    total: int = 0
    looked_at: int = 0
    sampled: int = 0
    classes: int = 0
    missing: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    remark: str = ""
    error: str | None = None

    @property
    def share(self) -> float:
        """Estimated share of the dataset that cannot be used."""
        if self.error is not None or not self.total:
            return 1.0
        missing = len(self.missing) / max(1, self.looked_at)
        return missing + (1 - missing) * len(self.unreadable) / max(1, self.sampled)


def find_datasets(values: Any, where: str = "") -> Iterator[tuple[str, DatasetConfig]]:
    """All datasets in the plain values of a recipe, with the keys that lead to each.

    Raises ConfigError for a dataset with an unknown setting or a wrong type.
    """
    if isinstance(values, list):
        for number, value in enumerate(values):
            yield from find_datasets(value, f"{where}[{number}]")
        return
    if not isinstance(values, dict):
        return
    if where and any(values.get(key) is not None for key in KINDS):
        yield where, build(DatasetConfig, values, where)
        return
    for key, value in values.items():
        place = f"{where}.{key}" if where else str(key)
        if key == "world" and isinstance(value, dict):
            yield place, DatasetConfig(world=build(WorldSource, value, place))
        else:
            yield from find_datasets(value, place)


def check_dataset(
    where: str,
    dataset: DatasetConfig,
    sample: int,
    most: int | None = None,
    progress: Any = None,
    stage: str | None = None,
) -> Findings:
    """Look for every file of a dataset (or `most` of them, spread evenly) and decode `sample` at random.

    stage: examples without what it needs are missing, as in its run. progress: called with (done, total,
    what) now and then.
    """
    findings = Findings(where, dataset.name)
    tell = progress or (lambda done, total, what: None)
    try:
        if dataset.corpus is not None:
            compare(dataset.corpus, 0)
        source = dataset.open(NEEDS.get(stage or ""))
        findings.total, findings.classes = len(source), len(source.classes)
        if dataset.corpus is not None:
            findings.remark = compare(dataset.corpus, findings.total)
        if not findings.total:
            findings.error = "It holds no examples."
            return findings
        present = list(range(findings.total))
        if dataset.world is None:
            present = _look(findings, source, most, tell, stage)
        _decode(findings, source, present, sample, tell)
    except FluxChatError as error:
        findings.error = str(error)
    return findings


def _look(
    findings: Findings, source: ExampleSource, most: int | None, tell: Any, stage: str | None
) -> list[int]:
    """Notes examples without a usable row or file; returns the numbers of the others."""
    total, need = findings.total, NEEDS.get(stage or "")
    pixels = stage is not None and need != "answer"  # conversations may be of text alone
    count = total if most is None else min(most, total)
    numbers = [index * total // count for index in range(count)]

    def look(number: int) -> tuple[str, str] | None:
        try:
            example = source[number]
        except FluxChatError as error:
            return f"number {number}", str(error)
        if lacking := example.lacks(need):
            return example.id, lacking
        if pixels and not example.has_media:
            return example.id, "It has no video or image."
        gone = _gone(example.media)
        return None if gone is None else (example.id, f"there is no file {gone}")

    present = []
    # Threads, since on a network disk each look waits for an answer; a part at a time, since lists are long.
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, count, PART):
            part = numbers[start : start + PART]
            for number, problem in zip(part, pool.map(look, part), strict=True):
                if problem is None:
                    present.append(number)
                else:
                    findings.missing.append(problem)
            tell(start + len(part), count, "looking for files")
    findings.looked_at = count
    return present


def _gone(media: Media) -> str | None:
    """The first of a medium's files that does not exist or is empty."""
    if isinstance(media, FileMedia):
        for path in media.paths:
            try:
                if path.stat().st_size == 0:
                    return f"{path} (it is empty)"
            except (OSError, ValueError):
                return str(path)
    return None


def _decode(findings: Findings, source: ExampleSource, present: list[int], sample: int, tell: Any) -> None:
    """Tries a few frames of some examples, chosen at random but always the same."""
    chosen = random.Random(0).sample(present, min(sample, len(present)))

    def read(number: int) -> tuple[str, str] | None:
        name = f"number {number}"
        try:
            example = source[number]
            name = example.id
            if example.has_media:
                example.media.load(FRAMES, SIDE)
        except (VideoError, OSError) as error:
            return name, str(error)
        return None

    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        for done, problem in enumerate(pool.map(read, chosen), 1):
            if problem is not None:
                findings.unreadable.append(problem)
            tell(done, len(chosen), "decoding a sample")
    findings.sampled = len(chosen)
    if findings.looked_at == 0:
        findings.looked_at = findings.total


def report(findings: Sequence[Findings], allowed: float) -> str:
    """A table of the datasets, and below it what is wrong with each."""
    head = ("dataset", "samples", "missing", "decoded", "unreadable", "verdict")
    rows = [
        (
            one.where,
            f"{one.total:,}" if one.error is None else "-",
            f"{len(one.missing):,} of {one.looked_at:,}" if one.error is None else "-",
            f"{one.sampled:,}",
            f"{len(one.unreadable):,}",
            verdict(one, allowed),
        )
        for one in findings
    ]
    lines = [line.rstrip() for line in table(head, rows, left=len(head), rule=True).splitlines()]
    for one in findings:
        lines.append("")
        lines.append(f"{one.where}: {one.name}" + (f", {one.classes} classes" if one.classes else ""))
        if one.remark:
            lines.append(f"  count: {one.remark}")
        if one.error is not None:
            lines.append(f"  cannot be opened: {one.error}")
        for title, problems in (("missing", one.missing), ("unreadable", one.unreadable)):
            lines += [f"  {title}: {name}: {reason}" for name, reason in problems[:NAMED]]
            if len(problems) > NAMED:
                lines.append(f"  {title}: and {len(problems) - NAMED:,} more")
    return "\n".join(lines)


def verdict(findings: Findings, allowed: float) -> str:
    """One or a few words about a dataset."""
    if findings.error is not None:
        return "cannot be opened"
    if not findings.missing and not findings.unreadable:
        return "ok"
    return "tolerable" if findings.share <= allowed else "too much is missing"
