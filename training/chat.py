"""What the chat stages share: conversations about videos become batches with labels.

A micro-batch is a pure function of its number: records are shuffled anew for each epoch, those of like length
share a micro-batch (`bucket`), and what the frozen encoder gave for a clip is kept on disk when
`feature_cache` names a folder. The micro-batches of a step have one token count and like lengths, so that no
process waits long for another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from encoder.errors import ConfigError, DataError, VideoError
from encoder.preprocess import preprocess
from encoder.tokens import VisionTokens
from encoder.video import Clip
from llm_bridge.branches import share_beginning
from llm_bridge.label_weights import Weighting
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Message, Prompt, Visual, render_chat_training, render_plain_training
from training.config import LoopConfig, OptimConfig
from training.data.features import FeatureCache, Features, stack
from training.data.missing import MissingMedia
from training.data.records import DatasetConfig, Record, RecordSource, Turn

CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class ChatInput:
    """What the encoder sees of a clip, and the tokens that it keeps."""

    frames: int
    resolution: int
    keep: int


@dataclass(frozen=True, kw_only=True)
class ChatRecipe:
    """The data of a chat stage.

    frames, resolution: what the encoder sees. keeps: token counts, one drawn per step. inputs: what to
    draw from instead, where frames and resolution vary too; one named twice is drawn twice as often.
    template: "plain" (caption right after the video, as the field's stage 1 does) or "chat" (the language
    model's own template). max_length: longer samples lose their end. bucket: micro-batches among which
    records are sorted by length, so that little is padded; 1 leaves them in random order. weighting: of long
    and short answers in the loss (see llm_bridge.label_weights). max_missing: share of unreadable media that
    stops the run. feature_cache: folder for encoder outputs, so that no clip is encoded twice.
    """

    datasets: tuple[DatasetConfig, ...]
    optim: OptimConfig
    loop: LoopConfig
    frames: int = 16
    resolution: int = 224
    keeps: tuple[int, ...] = (1024,)
    inputs: tuple[ChatInput, ...] = ()
    template: Literal["plain", "chat"] = "plain"
    max_length: int = 8192
    bucket: int = 1
    weighting: Weighting = "token"
    max_missing: float = 0.01
    feature_cache: str | None = None
    evaluate_records: int = 0

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigError("datasets must name at least one dataset.")
        if not self.keeps:
            raise ConfigError("keeps must name at least one token count.")
        if any(min(i.frames, i.resolution, i.keep) < 1 for i in self.inputs):
            raise ConfigError("inputs must have frames, resolution and keep of at least 1 each.")
        if self.bucket < 1:
            raise ConfigError(f"bucket must be at least 1 micro-batch, not {self.bucket}.")

    @property
    def drawn(self) -> tuple[ChatInput, ...]:
        """What one is drawn of for each micro-batch."""
        return self.inputs or tuple(ChatInput(self.frames, self.resolution, keep) for keep in self.keeps)

    @property
    def longest(self) -> ChatInput:
        """The one with the most tokens."""
        return max(self.drawn, key=lambda one: one.keep)


@dataclass(frozen=True)
class ChatBatch:
    """Prompts with labels, and the clips of those that have one."""

    prompts: list[Prompt]
    vision: VisionTokens | None

    @property
    def figures(self) -> dict[str, float]:
        """Labelled positions, positions in all, and the share of the padded rectangle that is padding."""
        lengths = [len(prompt) for prompt in self.prompts]
        labelled = sum(label >= 0 for prompt in self.prompts for label in prompt.labels)
        padding = 1 - sum(lengths) / (max(lengths) * len(lengths))
        return {"label_tokens": labelled, "tokens": sum(lengths), "padding": padding}


class ChatData:
    """Micro-batches of a recipe for a model. Raises DataError when the datasets hold nothing."""

    def __init__(self, recipe: ChatRecipe, vlm: VideoLanguageModel) -> None:
        self.recipe, self.vlm = recipe, vlm
        self._sources = [source for dataset in recipe.datasets for source in dataset.open()]
        self._count = sum(map(len, self._sources))
        if self._count == 0:
            raise DataError("The datasets hold no records.")
        self._cache = FeatureCache(Path(recipe.feature_cache) if recipe.feature_cache else None)
        self._encoder = vlm.revision(language=False)
        self._missing = MissingMedia(Path(recipe.loop.out), recipe.max_missing)
        self._ordered: tuple[int, list[int]] = (-2, [])
        self._window: tuple[tuple[int, int], list[list[int]]] = ((-2, 0), [])

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return max(1, self._count // self.recipe.optim.micro_batch)

    @property
    def _per_step(self) -> int:
        return self.recipe.optim.batch_size // self.recipe.optim.micro_batch

    def batch(self, index: int) -> ChatBatch:
        """Micro-batch number `index`, counted over epochs."""
        return self.prompted(*self.seen(index))

    def seen(self, index: int) -> tuple[list[Record], list[Features | None]]:
        """The records of micro-batch `index` and what the encoder gave for the media of each."""
        epoch, within = divmod(index, self.micro_batches)
        step = index // self._per_step
        view = random.Random(f"{self.recipe.loop.seed}/{step}/keep").choice(self.recipe.drawn)
        members = self._members(epoch, within)
        pairs = [
            self._readable(epoch, within * len(members) + slot, number, view)
            for slot, number in enumerate(members)
        ]
        return [record for record, _ in pairs], self._features(pairs, view)

    def held_out(self, count: int) -> ChatBatch:
        """The first records of the order of another epoch, at the largest token count."""
        view, order = self.recipe.longest, self._order(-1)
        pairs = [self._readable(-1, i, order[i % self._count], view) for i in range(count)]
        return self.prompted([record for record, _ in pairs], self._features(pairs, view))

    def flush(self) -> None:
        """Write features that are still in memory."""
        self._cache.flush()

    # -- which records -------------------------------------------------------------------------------------

    def _order(self, epoch: int) -> list[int]:
        if self._ordered[0] != epoch:
            generator = torch.Generator().manual_seed(self.recipe.loop.seed * 7919 + epoch)
            self._ordered = (epoch, torch.randperm(self._count, generator=generator).tolist())
        return self._ordered[1]

    def _members(self, epoch: int, within: int) -> list[int]:
        """Record numbers of a micro-batch: from the epoch's order, sorted by length inside a window."""
        size, bucket = self.recipe.optim.micro_batch, self.recipe.bucket
        number, place = divmod(within, bucket)
        if self._window[0] != (epoch, number):
            order = self._order(epoch)
            first = number * bucket * size
            last = min(first + bucket * size, self.micro_batches * size)
            members = [order[position % self._count] for position in range(first, last)]
            if bucket > 1:
                members.sort(key=lambda record: (self._length(record), record))
            width = size * self._per_step
            steps = [members[start : start + width] for start in range(0, len(members), width)]
            random.Random(f"{self.recipe.loop.seed}/{epoch}/{number}/bucket").shuffle(steps)
            batches = [step[start : start + size] for step in steps for start in range(0, len(step), size)]
            self._window = ((epoch, number), batches)
        return self._window[1][place]

    def _length(self, number: int) -> int:
        """About how many positions a record takes."""
        record = self._record(number)
        visual = self.recipe.longest.keep if record.media is not None else 0
        return visual + sum(len(part) for turn in record.turns for part in turn) // CHARACTERS_PER_TOKEN

    def _record(self, index: int) -> Record:
        source: RecordSource
        for source in self._sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError(index)

    def _readable(
        self, epoch: int, position: int, number: int, view: ChatInput
    ) -> tuple[Record, Clip | None]:
        """A record, or the next of the order whose media can be read; its clip unless there is none or its
        features are known."""
        order = self._order(epoch)
        for attempt in range(self._count):
            if attempt:
                number = order[(position + attempt * self.recipe.optim.micro_batch) % self._count]
            record = self._record(number)
            self._missing.count()
            if record.media is None or self._key(record, view) in self._cache:
                return record, None
            try:
                return record, record.media.load(view.frames, view.resolution)
            except VideoError as error:
                self._missing.report(record.id, str(error))
        raise DataError("None of the records' media can be read.")

    # -- what becomes of them ------------------------------------------------------------------------------

    def prompted(self, records: Sequence[Record], seen: Sequence[Features | None]) -> ChatBatch:
        """Prompts and stacked features."""
        present = [features for features in seen if features is not None]
        prompts = [self._prompt(record, features) for record, features in zip(records, seen, strict=True)]
        return ChatBatch(prompts, stack(present) if present else None)

    def _features(
        self, pairs: Sequence[tuple[Record, Clip | None]], view: ChatInput
    ) -> list[Features | None]:
        """Encoder outputs in order; what the cache lacks goes through the encoder as one batch."""
        found = {number: self._cache.get(self._key(record, view)) for number, (record, _) in enumerate(pairs)}
        new = [number for number, (_, clip) in enumerate(pairs) if clip is not None and found[number] is None]
        if new:
            clips = [clip for number in new if (clip := pairs[number][1]) is not None]
            pixels = [preprocess(clip, view.resolution, view.resolution) for clip in clips]
            vision = self.vlm.encode(pixels, [view.keep] * len(new), [clip.times_s for clip in clips])
            for index, number in enumerate(new):
                features = Features.of(vision, index, clips[index].duration_s, torch.bfloat16)
                self._cache.put(self._key(pairs[number][0], view), features)
                found[number] = features
        return [found[number] for number in range(len(pairs))]

    def _key(self, record: Record, view: ChatInput) -> str:
        media = record.media.key if record.media is not None else ""
        config = self.vlm.config
        # Features without the pooled one must not serve a projector that reads it.
        read = f"{config.vision_depth}|{config.summary_pool if config.projector.summary_tokens else None}"
        return f"{media}|{view.frames}|{view.resolution}|{view.keep}|{read}|{self._encoder}"

    def _prompt(self, record: Record, features: Features | None) -> Prompt:
        recipe, tokenizer = self.recipe, self.vlm.llm.tokenizer
        visuals: tuple[Visual, ...] = ()
        if features is not None:
            count = self.vlm.projector.planned_tokens(len(features.kept), features.grid.frames)
            times = features.times_s if features.duration_s > 0 else ()
            visuals = (Visual(count, duration_s=features.duration_s, times_s=times),)
        if recipe.template == "plain" and visuals:
            prompt = render_plain_training(tokenizer, visuals[0], record.turns[0][1])
        else:
            talks = [self._conversation(visuals, turns) for turns in record.conversations]
            prompt = talks[0] if len(talks) == 1 else share_beginning(talks)
        return shorten(prompt, recipe.max_length)

    def _conversation(self, visuals: tuple[Visual, ...], turns: Sequence[Turn]) -> Prompt:
        messages: list[Message] = []
        for question, answer in turns:
            front = visuals if not messages else ()
            messages += [Message("user", (*front, question)), Message.of("assistant", answer)]
        return render_chat_training(self.vlm.llm.tokenizer, messages, time_form=self.vlm.config.time_sentence)


def shorten(prompt: Prompt, limit: int) -> Prompt:
    """The first `limit` positions; raises DataError when that would cut into a visual."""
    if len(prompt) <= limit:
        return prompt
    if any(start + count > limit for start, count in prompt.spans):
        raise DataError(
            f"A video takes more than max_length {limit} positions: raise it or keep fewer tokens."
        )
    branches = tuple((start, min(end, limit)) for start, end in prompt.branches if start < limit)
    return replace(prompt, ids=prompt.ids[:limit], labels=prompt.labels[:limit], branches=branches)
