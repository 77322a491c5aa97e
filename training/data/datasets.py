"""Datasets of a recipe: which files or part of the synthetic world, how much of it, and how it is asked.

open_datasets([DatasetConfig(json_path="annotations/talks.json", data_root="data")], need="answer")
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from encoder.errors import ConfigError, DataError
from training.data.annotations import read_classes, read_csv, read_json
from training.data.corpora import compare, corpora
from training.data.examples import ExampleSource, Flipped, IndependentTurns, Joined, Kind, Need, PartOf
from training.data.media import reason
from training.data.shards import ShardExamples, Shards
from training.data.synthetic_examples import Asking, WorldExamples, WorldLabel
from training.data.synthetic_source import WorldSource
from training.trainer.recipe import build

# What the examples of each stage need to be learned from.
NEEDS: Mapping[str, Need | None] = {
    "umt": None,
    "finetune": "label",
    "clip": "caption",
    "projector_warmup": "answer",
    "chat_stage1": "answer",
    "chat_lora": "answer",
}
_ASKED = tuple(field.name for field in fields(Asking) if field.name != "independent")
_FILES = ("csv", "json_path", "jsonl", "shards")
# Settings that some kinds of dataset alone read, and that are read for some needs alone.
READ_BY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((*_ASKED, "world_label"), ("world",)),
    **dict.fromkeys(("data_root", "classes"), _FILES),
    **dict.fromkeys(("index_root", "order"), ("shards",)),
}
READ_FOR: Mapping[str, tuple[Need | None, ...]] = {
    **dict.fromkeys((*_ASKED, "independent"), ("answer",)),
    "world_label": ("label", None),  # Flux-UMT's evaluation looks at labels too
    **dict.fromkeys(("flip", "no_flip"), ("label", "caption", None)),
}
# What a mixture's videos may be: files, which are read by what they hold.
READ_TYPES = (None, "decord", "gif")


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


@dataclass(frozen=True)
class DatasetConfig(Asking):
    """One dataset of a recipe: exactly one of csv, json_path, jsonl, yaml_path, shards and world.

    csv: Kinetics style, `path label` or `path,label` per line, or the official file with a header (label,
    youtube_id, time_start, time_end, split). json_path, jsonl: two names for rows with {"video" or "image",
    and "caption", "captions", "label" or LLaVA-style "conversations"}, as a list or one per line. yaml_path:
    a VideoChat-Flash-style mixture of datasets. shards: webdataset tars, as a glob or with {000..123}, whose
    samples hold a caption, a label or "conversations". world: a part of the synthetic world, labelled by its
    object or its motion (`world_label`).
    data_root: folder of relative paths. classes: file with one class name per line, whose numbers are the
    labels. sampling_strategy: all, first:N, first:x%, end:N, end:x%, random:N or random:x% (VideoChat-Flash's
    words). index_root: folder for the shards' indices, None for beside them. order: "shards" shuffles whole
    shards and then inside each, so that tars on a slow disk are read one after the other; "all" takes samples
    from anywhere. corpus: name in corpora.yaml, so that `python -m training.data check` can compare counts.
    flip: chance of a mirror image in place of augment.flip. no_flip: parts of paths of files that are never
    mirrored, in a list of several data sets (Something-Something, whose labels name sides).
    The rest: see Asking; all but `independent` is for the world. A setting that this kind of dataset does not
    read is refused.
    """

    csv: str | None = None
    json_path: str | None = None
    jsonl: str | None = None
    yaml_path: str | None = None
    shards: str | None = None
    world: WorldSource | None = None
    data_root: str = ""
    classes: str | None = None
    world_label: WorldLabel = "noun"
    sampling_strategy: str = "all"
    index_root: str | None = None
    order: Literal["all", "shards"] = "all"
    corpus: str | None = None
    flip: float | None = None
    no_flip: tuple[str, ...] = ()

    renamed: ClassVar[dict[str, str]] = {"favour": "task_weights (a table: {task: 1 + times named})"}

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("csv", "json_path", "jsonl", "yaml_path", "shards", "world")
        if sum(getattr(self, kind) is not None for kind in kinds) != 1:
            raise ConfigError(f"A dataset needs exactly one of {', '.join(kinds[:-1])} and {kinds[-1]}.")
        if self.flip is not None and not 0 <= self.flip <= 1:
            raise ConfigError(f"{self.name}: flip must be a chance from 0 to 1, not {self.flip}.")
        choose_numbers(0, self.sampling_strategy, self.name)
        if self.order == "shards" and self.sampling_strategy.startswith("random"):
            raise ConfigError(f"{self.name}: order shards does not go with a random sampling_strategy.")
        kind = next(kind for kind in kinds if getattr(self, kind) is not None)
        for name in self.changed:
            if kind not in (readers := READ_BY.get(name, kinds)):
                raise ConfigError(
                    f"{self.name}: {name} is for {', '.join(readers)}, not for {kind}: leave it out."
                )

    @property
    def changed(self) -> list[str]:
        """Names of the settings that are not at their default."""
        return [field.name for field in fields(self) if getattr(self, field.name) != _default(field)]

    @property
    def name(self) -> str:
        """What it reads, for messages."""
        if self.world is not None:
            return f"synthetic world, {self.world.split}"
        return str(self.csv or self.json_path or self.jsonl or self.yaml_path or self.shards)

    def open(self, need: Need | None = None, within: tuple[Path, ...] = ()) -> ExampleSource:
        """Its examples; raises DataError when an annotation file or shard is missing or malformed, or when
        none of its first rows has what a stage needs.

        within: mixtures that name this dataset, outermost first.
        """
        if self.world is not None:
            source: ExampleSource = WorldExamples(self.world, self.world_label, self)
        elif self.yaml_path is not None:
            mixture = Path(self.yaml_path).resolve()
            if mixture in within:
                raise DataError(f"The mixture {self.yaml_path} names itself.")
            source = open_datasets(read_mixture(mixture), need, (*within, mixture))
        else:
            source = self._open_files(need)
        if not len(source):
            raise DataError(f"{self.name} holds no examples.")
        if self.sampling_strategy != "all":
            source = PartOf(source, choose_numbers(len(source), self.sampling_strategy, self.name))
        if self.flip is not None or self.no_flip:
            source = Flipped(source, self.flip, self.no_flip)
        return IndependentTurns(source) if self.independent and self.world is None else source

    def _open_files(self, need: Need | None) -> ExampleSource:
        root = Path(self.data_root)
        if self.csv is not None:
            return read_csv(Path(self.csv), root, self.classes)
        if self.shards is not None:
            names = read_classes(Path(self.classes)) if self.classes else ()
            index_root = Path(self.index_root) if self.index_root else None
            shards = Shards.open(str(root / self.shards), index_root)
            return ShardExamples(shards, names, shards.longest if self.order == "shards" else None)
        return read_json(Path(self.json_path or self.jsonl or ""), root, self.classes, need)


def open_datasets(
    data: Sequence[DatasetConfig], need: Need | None = None, within: tuple[Path, ...] = ()
) -> ExampleSource:
    """Several datasets as one source; raises DataError as `DatasetConfig.open` and `Joined`."""
    sources = tuple(part.open(need, within) for part in data)
    return sources[0] if len(sources) == 1 else Joined(sources)


def check_read(data: Sequence[DatasetConfig], stage: str, *, held_out: bool = False) -> None:
    """Raises ConfigError for a setting that a stage does not read; held-out clips are never mirrored."""
    for dataset in data:
        for name in dataset.changed:
            unread = NEEDS[stage] not in READ_FOR.get(name, (NEEDS[stage],))
            if unread or (held_out and name in ("flip", "no_flip")):
                where = "held_out data" if held_out else f"the stage {stage}"
                raise ConfigError(f"{dataset.name}: {where} does not read {name}: leave it out.")


def read_mixture(path: Path) -> list[DatasetConfig]:
    """Datasets of a VideoChat-Flash-style YAML file (`datasets:`, each with json_path and data_root).

    Their video_read_type may be "decord" or "gif"; folders of pictures ("img") are refused.
    """
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8-sig"))["datasets"]
        rows = list(rows)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"Cannot read the mixture {path}: {reason(error)}.") from error
    return [_of_mixture(row, f"{path}, dataset {number}") for number, row in enumerate(rows)]


def _of_mixture(row: Any, where: str) -> DatasetConfig:
    if isinstance(row, dict) and (kind := row.get("video_read_type")) not in READ_TYPES:
        raise ConfigError(
            f"{where}: video_read_type {kind!r} is not known: videos must be files (decord, gif)."
        )
    if isinstance(row, dict):
        row = {name: value for name, value in row.items() if name != "video_read_type"}
    return build(DatasetConfig, row, where)


def choose_numbers(total: int, strategy: str, where: str) -> Sequence[int]:
    """Which of `total` examples a sampling strategy takes; raises ConfigError for another word."""
    if strategy == "all":
        return range(total)
    kind, _, amount = strategy.partition(":")
    try:
        count = int(total * float(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
        if kind not in ("first", "end", "random") or count < 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{where}: sampling_strategy must be all, first:N, end:N or random:N (or N%), not {strategy!r}."
        ) from None
    if kind == "random":
        return random.Random(42).sample(range(total), total)[:count]
    return range(min(count, total)) if kind == "first" else range(total - min(count, total), total)


def count_samples(data: Sequence[DatasetConfig], assumed: int | None) -> dict[Kind, int]:
    """Samples of an epoch by kind, without opening the data: from the corpus that a dataset names, the
    world's count, or `assumed`, which replaces all of them and keeps their shares.

    Raises ConfigError when they cannot be known.
    """
    samples: dict[Kind, float] = {}
    for dataset in data:
        kind: Kind = "video"
        if dataset.world is not None:
            number: float = dataset.world.count
        elif dataset.corpus is not None:
            compare(dataset.corpus, 0)
            corpus = corpora()[dataset.corpus]
            kind = "image" if corpus.media == "image" else "video"
            clips = corpus.clips.get("train", max(corpus.clips.values()))
            number = len(choose_numbers(clips, dataset.sampling_strategy, dataset.name))
        elif assumed is not None:
            number = assumed / len(data)
        else:
            raise ConfigError(f"{dataset.name} names no corpus: say how many samples it has with --samples.")
        samples[kind] = samples.get(kind, 0) + number
    scale = 1.0 if assumed is None else assumed / sum(samples.values())
    return {kind: max(1, round(number * scale)) for kind, number in samples.items()}
