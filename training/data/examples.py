"""Examples: one video, image or text, and what is known of it; every stage learns from these.

source = DatasetConfig(csv="annotations/k400_train.csv", data_root="data/k400").open()
source[0].media.load(frames=8, resolution=224)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from encoder.errors import DataError
from training.data.media import Media, NoMedia

Kind = Literal["video", "image"]
Turn = tuple[str, str]  # (question, answer)
Conversation = tuple[Turn, ...]
# What a stage learns from, besides pixels.
Need = Literal["label", "caption", "answer"]


@dataclass(frozen=True)
class Example:
    """A video, image or text. conversations: about it; none sees another. system: what stands before each.
    flip: chance of a mirror image in training, None for the recipe's."""

    id: str
    media: Media
    label: int | None = None
    captions: tuple[str, ...] = ()
    kind: Kind = "video"
    conversations: tuple[Conversation, ...] = ()
    system: str = ""
    flip: float | None = None

    @property
    def has_media(self) -> bool:
        """Whether it is more than text."""
        return not isinstance(self.media, NoMedia)

    @property
    def talks(self) -> tuple[Conversation, ...]:
        """The conversations; without any, the first caption answers an empty question."""
        if self.conversations or not self.captions:
            return self.conversations
        return ((("", self.captions[0]),),)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of all talks."""
        return tuple(turn for talk in self.talks for turn in talk)

    def lacks(self, need: Need | None) -> str | None:
        """A sentence when it has not what a stage needs; every answer must say something."""
        if need == "label" and self.label is None:
            return "It has no label."
        if need == "caption" and not self.captions:
            return "It has no caption."
        if need == "answer" and not self.turns:
            return "It has neither a conversation nor a caption."
        if need == "answer" and not all(answer.strip() for _, answer in self.turns):
            return "It has an empty answer."
        return None


class ExampleSource(Protocol):
    """A dataset: examples by number. classes: names of the labels, empty when there are none.

    An example that cannot be used is a VideoError, so that a run skips and names it.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


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

    @property
    def window(self) -> int | None:
        """Of examples that lie together: the source's, where neighbours stay neighbours."""
        return getattr(self.source, "window", None) if isinstance(self.numbers, range) else None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.numbers[index]]


@dataclass(frozen=True)
class Changed:
    """The examples of a source, each changed in some way by a subclass."""

    source: ExampleSource

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def window(self) -> int | None:
        """Of examples that lie together: the source's."""
        return getattr(self.source, "window", None)

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Flipped(Changed):
    """Examples of a source with a chance of a mirror image of their own: `flip`, and 0 for those whose file
    has one of `never` in its path."""

    flip: float | None
    never: tuple[str, ...] = ()

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        never = any(part in example.media.key for part in self.never)
        return replace(example, flip=0.0 if never else self.flip)


@dataclass(frozen=True)
class IndependentTurns(Changed):
    """Examples of a source, each turn a conversation of its own."""

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        return replace(example, conversations=tuple((turn,) for turn in example.turns))


@dataclass(frozen=True)
class Joined:
    """Several sources one after the other. Raises DataError when their labels mean different things."""

    sources: tuple[ExampleSource, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("No dataset is named.")
        if len({source.classes for source in self.sources if source.classes}) > 1:
            raise DataError("The datasets name different classes: give all of them the same classes file.")

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
