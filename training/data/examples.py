"""Examples: one video or image with its label or captions, from csv, JSONL, tar shards or the demo world.

source = VideoData(csv="annotations/k400_train.csv", data_root="data/k400").open()
source[0].media.load(frames=8, resolution=224)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from encoder.errors import ConfigError, DataError
from training.data.media import Media, WorldMedia
from training.data.world import WorldSource
from training.demo_world.world import World

Kind = Literal["video", "image"]


@dataclass(frozen=True)
class Example:
    """A video or image, and what is known of it."""

    id: str
    media: Media
    label: int | None = None
    captions: tuple[str, ...] = ()
    kind: Kind = "video"


class ExampleSource(Protocol):
    """A dataset: examples by number. classes: names of the labels, empty when there are none."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class VideoData:
    """One dataset of a recipe: exactly one of csv, jsonl, shards and world.

    csv: Kinetics style, `path label` or `path,label` per line, or the official file with a header (label,
    youtube_id, time_start, time_end, split). jsonl: per line {"video" or "image", and "caption", "captions"
    or "label"}. shards: webdataset tars, as a glob or with {000..123}. world: a part of the demo world,
    labelled by its object or its motion (`world_label`).
    data_root: folder of relative paths. classes: file with one class name per line, whose numbers are the
    labels. sampling_strategy: as in chat mixtures (all, first:N, end:N, random:N or N%). index_root: folder
    for the shards' indices, None for beside them. order: "shards" shuffles whole shards and then inside each,
    so that tars on a slow disk are read one after the other; "all" takes samples from anywhere. corpus: name
    in corpora.yaml, so that `python -m training.data check` can compare counts.
    """

    csv: str | None = None
    jsonl: str | None = None
    shards: str | None = None
    world: WorldSource | None = None
    data_root: str = ""
    classes: str | None = None
    world_label: Literal["noun", "motion"] = "noun"
    sampling_strategy: str = "all"
    index_root: str | None = None
    order: Literal["all", "shards"] = "all"
    corpus: str | None = None

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.csv, self.jsonl, self.shards, self.world)) != 1:
            raise ConfigError("A video dataset needs exactly one of csv, jsonl, shards and world.")

    @property
    def name(self) -> str:
        """What it reads, for messages."""
        if self.world is not None:
            return f"demo world, {self.world.split}"
        return str(self.csv or self.jsonl or self.shards)

    def open(self) -> ExampleSource:
        """Its examples; raises DataError when an annotation file or shard is missing or malformed."""
        from training.data import annotations
        from training.data.records import choose_numbers

        root = Path(self.data_root)
        source: ExampleSource
        if self.world is not None:
            source = WorldExamples(self.world, self.world_label)
        elif self.csv is not None:
            source = annotations.read_csv(Path(self.csv), root, self.classes)
        elif self.jsonl is not None:
            source = annotations.read_jsonl(Path(self.jsonl), root, self.classes)
        else:
            from training.data.shards import ShardExamples, Shards

            index_root = Path(self.index_root) if self.index_root else None
            names = annotations.read_classes(Path(self.classes)) if self.classes else ()
            shards = Shards.open(str(root / str(self.shards)), index_root)
            source = ShardExamples(shards, names, shards.longest if self.order == "shards" else None)
        if not len(source):
            raise DataError(f"{self.name} holds no examples.")
        if self.sampling_strategy == "all":
            return source
        return PartOf(source, choose_numbers(len(source), self.sampling_strategy, self.name))


@dataclass(frozen=True)
class ListExamples:
    """Examples in memory."""

    items: Sequence[Example]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]


@dataclass(frozen=True)
class PartOf:
    """Some examples of a source."""

    source: ExampleSource
    numbers: Sequence[int]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.numbers[index]]


@dataclass(frozen=True)
class Joined:
    """Several sources one after the other. Raises DataError when their labels mean different things."""

    sources: tuple[ExampleSource, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("No dataset is named.")
        if len({source.classes for source in self.sources if source.classes}) > 1:
            raise DataError("The datasets name different classes: give all of them the same classes file.")

    @staticmethod
    def open(data: Sequence[VideoData]) -> ExampleSource:
        """The datasets as one source."""
        sources = tuple(part.open() for part in data)
        return sources[0] if len(sources) == 1 else Joined(sources)

    @property
    def window(self) -> int | None:
        """The largest block that a source wants to be read in."""
        return max((getattr(source, "window", None) or 0 for source in self.sources), default=0) or None

    @property
    def classes(self) -> tuple[str, ...]:
        return max((source.classes for source in self.sources), key=len)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Example:
        for source in self.sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError(index)


@dataclass(frozen=True)
class WorldExamples:
    """The demo world with captions, and the first actor's noun or motion as label."""

    source: WorldSource
    label: Literal["noun", "motion"] = "noun"
    _world: list[World] = field(default_factory=list, compare=False)
    _labels: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def world(self) -> World:
        """The open world; raises DataError when its sprites were never fetched."""
        if not self._world:
            self._world.append(self.source.open())
        return self._world[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """Sprite codes in order, or motions."""
        if self.label == "noun":
            return tuple(sorted({noun.code for noun in self.world.pool}))
        return tuple(str(motion) for motion in self.world.level.motions)

    def __len__(self) -> int:
        return self.source.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self.source.first + index
        sample = self.world.sample(number)
        if not self._labels:
            self._labels.update({name: value for value, name in enumerate(self.classes)})
        actor = sample.scene.actors[0]
        name = actor.code if self.label == "noun" else str(actor.motions[0])
        media = WorldMedia(self.world, sample, number)
        return Example(
            f"world-{self.source.split}-{number}", media, self._labels.get(name), (sample.caption,)
        )
