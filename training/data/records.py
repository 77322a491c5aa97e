"""Records: one conversation about one video, image or set of images, wherever it is kept.

Reads LLaVA-style JSON (the format of VideoChat-Flash's stage 1), its YAML mixtures, caption JSONL, webdataset
shards, and the demo world. A record knows how to load its media; nothing is opened before that.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import yaml

from encoder.errors import ConfigError, DataError, VideoError
from training.data.annotations import parse_span
from training.data.media import BrokenMedia, FileMedia, Media, WorldMedia, reason
from training.data.world import WorldSource
from training.demo_world.asking import Question
from training.demo_world.questions import TASKS
from training.demo_world.templates import QUESTIONS
from training.demo_world.wording import sentence
from training.demo_world.world import Sample, World

if TYPE_CHECKING:
    from training.data.shards import Shards

__all__ = [
    "DatasetConfig",
    "FileMedia",
    "Media",
    "Record",
    "RecordSource",
    "ShardRecords",
    "WorldMedia",
    "WorldRecords",
    "read_annotations",
    "read_mixture",
    "sample_records",
]

Turn = tuple[str, str]  # (question, answer)


@dataclass(frozen=True)
class Record:
    """Conversations about the same media (None for text alone), mostly a single one; none sees another."""

    id: str
    media: Media | None
    conversations: tuple[tuple[Turn, ...], ...]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of all of them."""
        return tuple(turn for turns in self.conversations for turn in turns)


class RecordSource(Protocol):
    """A dataset: records by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of a mixture: an annotation file, a YAML mixture of such, tar shards, or a part of the demo
    world.

    shards: webdataset tars (see shards.py) whose samples hold "conversations" in their json, or a caption.
    index_root: folder for the shards' indices. corpus: name in corpora.yaml, for
    `python -m training.data check`.
    sampling_strategy: all, first:N, first:x%, end:N, end:x%, random:N or random:x% (VideoChat-Flash's words).
    turns: questions per sample of the world, asked in one conversation; captions: chance that one of them is
    for a description; choices: share of multiple-choice questions; choose_by: how these are answered, by
    "letter" as MVBench asks, "(B) left", or with the "words" of the option alone, "Left." rounds: how often
    everything is asked anew, in other words and with other options, before `turns` questions are picked.
    favour: tasks whose questions are likelier to be picked: named once, twice as likely, and so on.
    independent: the turns of a record are conversations of their own about its media: no answer sees another
    (see llm_bridge.branches).
    """

    json_path: str | None = None
    yaml_path: str | None = None
    shards: str | None = None
    data_root: str = ""
    sampling_strategy: str = "all"
    video_read_type: str | None = None
    world: WorldSource | None = None
    turns: int = 1
    captions: float = 0.5
    choices: float = 0.3
    rounds: int = 1
    favour: tuple[str, ...] = ()
    choose_by: Literal["letter", "words"] = "letter"
    independent: bool = False
    index_root: str | None = None
    corpus: str | None = None

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.json_path, self.yaml_path, self.shards, self.world)) != 1:
            raise ConfigError("A dataset needs exactly one of json_path, yaml_path, shards and world.")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, not {self.rounds}.")
        if unknown := sorted(set(self.favour) - set(TASKS)):
            raise ConfigError(f"favour names the unknown task {unknown[0]!r}: known are {', '.join(TASKS)}.")

    @property
    def name(self) -> str:
        """What it reads, for messages."""
        if self.world is not None:
            return f"demo world, {self.world.split}"
        return str(self.json_path or self.yaml_path or self.shards)

    def open(self) -> list[RecordSource]:
        """Its sources; raises DataError when a file is missing or malformed."""
        if self.world is not None:
            return [WorldRecords(self.world, self)]
        sources = self._open()
        return [IndependentTurns(source) for source in sources] if self.independent else sources

    def _open(self) -> list[RecordSource]:
        if self.json_path is not None:
            records = read_annotations(Path(self.json_path), Path(self.data_root))
            return [sample_records(records, self.sampling_strategy, self.json_path)]
        if self.shards is not None:
            from training.data.shards import Shards

            index_root = Path(self.index_root) if self.index_root else None
            shards = Shards.open(str(Path(self.data_root) / self.shards), index_root)
            return [ShardRecords(shards, choose_numbers(len(shards), self.sampling_strategy, self.shards))]
        assert self.yaml_path is not None
        return [source for entry in read_mixture(Path(self.yaml_path)) for source in entry.open()]


@dataclass(frozen=True)
class IndependentTurns:
    """Records of a source, each turn a conversation of its own."""

    source: RecordSource

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        return replace(record, conversations=tuple((turn,) for turn in record.turns))


@dataclass(frozen=True)
class WorldRecords:
    """The demo world as conversations, asked as `config` says."""

    source: WorldSource
    config: DatasetConfig
    _world: list[World] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return self.source.count

    def __getitem__(self, index: int) -> Record:
        if not self._world:
            self._world.append(self.source.open())
        world, number = self._world[0], self.source.first + index
        sample = world.sample(number)
        rng = random.Random(f"{self.source.seed}/{number}/turns")
        turns = self._turns(self._questions(world, sample, number), rng)
        asked = QUESTIONS["caption"]["train" if self.source.split == "train" else "test"]
        if rng.random() < self.config.captions:
            turns[rng.randrange(len(turns))] = (rng.choice(asked), sample.caption)
        conversations = [(turn,) for turn in turns] if self.config.independent else [tuple(turns)]
        return Record(f"world-{number}", WorldMedia(world, sample, number), tuple(conversations))

    def _questions(self, world: World, sample: Sample, number: int) -> list[Question]:
        """All that may be asked, the same thing in the same words once."""
        again = (world.ask_again(sample, number, turn) for turn in range(1, self.config.rounds))
        found = {(q.question, q.answer): q for asked in (sample.questions, *again) for q in asked}
        return list(found.values())

    def _turns(self, asked: Sequence[Question], rng: random.Random) -> list[Turn]:
        """Questions picked at random."""
        drawn = self._shuffled(asked, rng)
        open_forms = [(q.question, q.answer) for q in drawn if not q.options]
        choices = [(q.question, self._chosen(q)) for q in drawn if q.options]
        picked = []
        for _ in range(min(self.config.turns, len(open_forms) + len(choices))):
            choose = rng.random() < self.config.choices and choices
            picked.append((choices if choose or not open_forms else open_forms).pop())
        return picked

    def _shuffled(self, asked: Sequence[Question], rng: random.Random) -> list[Question]:
        """In random order, favoured ones rather later, as weighted sampling without replacement draws them
        from the end (Efraimidis and Spirakis 2006)."""
        named = self.config.favour.count
        return sorted(asked, key=lambda question: rng.random() ** (1 / (1 + named(question.task))))

    def _chosen(self, question: Question) -> str:
        """The answer to a multiple-choice question."""
        if self.config.choose_by == "letter":
            return question.answer
        return sentence(question.options[question.answer_index or 0])


@dataclass(frozen=True)
class ShardRecords:
    """Samples of tar shards as conversations: `numbers` says which."""

    shards: Shards
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        """A sample with neither a conversation nor a caption has media that cannot be loaded: it is skipped
        and named like a broken video."""
        name = f"number {self.numbers[index]}"
        try:
            sample = self.shards.sample(self.numbers[index])
            name = f"{sample.shard.name}/{sample.key}"
            facts, text = sample.json(), sample.text("txt")
            row = {key: value for key, value in facts.items() if key not in ("video", "image")}
            if text and "conversations" not in row:
                row["caption"] = text
            where = f"{sample.shard}, sample {sample.key!r}"
            record = _record({**row, "id": name}, Path(), where)
            found = sample.media(*parse_span(facts, where))
        except (DataError, VideoError) as error:
            return Record(name, BrokenMedia(name, str(error)), ((("", ""),),))
        return replace(record, media=None if found is None else found[0])


def read_annotations(path: Path, root: Path) -> list[Record]:
    """Records of a LLaVA-style JSON file or of a JSONL file (the same, or {"video", "caption"}, per line).

    Raises DataError naming the file and the first malformed record.
    """
    try:
        text = path.read_text()
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the annotations {path}: {reason(error)}.") from error
    if not isinstance(rows, list):
        raise DataError(f"The annotations {path} must be a list of records.")
    return [_record(row, root, f"{path}, record {number}") for number, row in enumerate(rows)]


def _record(row: Any, root: Path, where: str) -> Record:
    try:
        media = row.get("video") or row.get("image")
        paths = tuple(root / part for part in ([media] if isinstance(media, str) else media or ()))
        found = FileMedia(paths, *parse_span(row, where)) if paths else None
        talk = row.get("conversations")
        turns = (("", str(row["caption"])),) if talk is None else _turns(talk)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is not LLaVA-style: {type(error).__name__} {error}.") from error
    return Record(str(row.get("id", where)), found, (turns,))


def _turns(conversation: Sequence[dict[str, str]]) -> tuple[Turn, ...]:
    """(question, answer) pairs; the media token is dropped, since the media always comes first."""
    if len(conversation) % 2 or not conversation:
        raise ValueError("a conversation must alternate human and gpt")
    turns = []
    for asked, answered in zip(conversation[::2], conversation[1::2], strict=True):
        if asked["from"] != "human" or answered["from"] != "gpt":
            raise ValueError("a conversation must alternate human and gpt")
        question = asked["value"].replace("<image>", "").replace("<video>", "").strip()
        turns.append((question, answered["value"].strip()))
    return tuple(turns)


def read_mixture(path: Path) -> list[DatasetConfig]:
    """Datasets of a VideoChat-Flash-style YAML file (`datasets:`, each with json_path and data_root)."""
    from training.config import build

    try:
        content = yaml.safe_load(path.read_text())
        rows = content["datasets"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"Cannot read the mixture {path}: {reason(error)}.") from error
    return [build(DatasetConfig, row, f"{path}, dataset {number}") for number, row in enumerate(rows)]


def sample_records(records: list[Record], strategy: str, where: str) -> list[Record]:
    """Part of a dataset by VideoChat-Flash's sampling strategies; raises ConfigError for another word."""
    return [records[number] for number in choose_numbers(len(records), strategy, where)]


def choose_numbers(total: int, strategy: str, where: str) -> Sequence[int]:
    """Which of `total` records a sampling strategy takes; raises ConfigError for another word."""
    if strategy == "all":
        return range(total)
    kind, _, amount = strategy.partition(":")
    try:
        count = int(total * float(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
        if kind not in ("first", "end", "random") or count < 0:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{where}: sampling_strategy must be all, first:N, end:N or random:N (or N%), not {strategy!r}."
        ) from None
    if kind == "random":
        return random.Random(42).sample(range(total), total)[:count]
    return range(min(count, total)) if kind == "first" else range(total - min(count, total), total)
