"""What the chat stages share: conversations about videos become batches with labels.

A micro-batch is a pure function of its number: examples are shuffled anew for each epoch, those of like
length within a step share a micro-batch (`bucket`), and what the frozen encoder gave for a clip is kept on
disk when `feature_cache` names a folder. The micro-batches of a step have one token count.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from encoder.errors import ConfigError, DataError, VideoError
from encoder.preprocess import preprocess
from encoder.tokens import VisionTokens
from encoder.video.reader import Clip
from llm_bridge.model import VideoLanguageModel
from llm_bridge.packing import Weighting, label_weights, share_beginning
from llm_bridge.prompt import IGNORE, Message, Prompt, Visual, render_chat_turns, render_plain_training
from training.data.datasets import NEEDS, DatasetConfig, check_read, open_datasets
from training.data.examples import Conversation, Example
from training.data.feature_cache import FeatureCache, Features, stack
from training.data.loader import Loader
from training.trainer.recipe import LoopConfig, OptimConfig, check_least, check_share

CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class ChatInput:
    """What the encoder sees of a clip, and the tokens that it keeps."""

    frames: int
    resolution: int
    num_tokens: int

    renamed: ClassVar[dict[str, str]] = {"keep": "num_tokens"}


@dataclass(frozen=True, kw_only=True)
class ChatRecipe:
    """The data of a chat stage.

    frames, resolution: what the encoder sees. num_tokens: kept of a clip, one number drawn per step. inputs:
    what to draw from instead, where frames and resolution vary too; one named twice is drawn twice as often.
    template: "plain" (caption right after the video, as the field's stage 1 does) or "chat" (the language
    model's own template). max_length: longer samples lose their end. bucket: micro-batches of a step
    among which its records are sorted by length, so that little is padded; 1 leaves them in random order, and
    which records a step has does not depend on it. weighting: of long and short answers in the loss of a step
    (see llm_bridge.packing). max_missing: share of unreadable media that stops the run. feature_cache: folder
    for encoder outputs, so that no clip is encoded twice. held_out: other datasets, on whose first
    `evaluate_records` records the loss is evaluated.
    """

    stage: ClassVar[str]
    renamed: ClassVar[dict[str, str]] = {"keeps": "num_tokens"}
    datasets: tuple[DatasetConfig, ...]
    optim: OptimConfig
    loop: LoopConfig
    frames: int = 16
    resolution: int = 224
    num_tokens: tuple[int, ...] = (1024,)
    inputs: tuple[ChatInput, ...] = ()
    template: Literal["plain", "chat"] = "plain"
    max_length: int = 8192
    bucket: int = 1
    weighting: Weighting = "token"
    max_missing: float = 0.01
    feature_cache: str | None = None
    held_out: tuple[DatasetConfig, ...] = ()
    evaluate_records: int = 0

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigError("datasets must name at least one dataset.")
        if not self.num_tokens:
            raise ConfigError("num_tokens must name at least one token count.")
        check_least(self, 1, "frames", "resolution", "num_tokens", "max_length")
        check_share(self, "max_missing")
        if any(min(i.frames, i.resolution, i.num_tokens) < 1 for i in self.inputs):
            raise ConfigError("inputs must have frames, resolution and num_tokens of at least 1 each.")
        if bool(self.held_out) != (self.evaluate_records > 0):
            raise ConfigError("held_out and evaluate_records go together: name other records, and how many.")
        if self.held_out and not self.loop.evaluate_every:
            raise ConfigError("held_out needs loop.evaluate_every: say after how many steps it is looked at.")
        if self.loop.evaluate_every and not self.held_out:
            raise ConfigError("loop.evaluate_every needs held_out: name records that are not trained on.")
        check_read(self.datasets, self.stage)
        check_read(self.held_out, self.stage, held_out=True)
        if self.inputs and (self.frames, self.resolution, self.num_tokens) != (16, 224, (1024,)):
            raise ConfigError(
                "inputs stand in place of frames, resolution and num_tokens: leave these out, or at 16, 224 "
                "and [1024]."
            )
        if any(part in self.datasets for part in self.held_out):
            raise ConfigError("held_out names records that are trained on: choose others.")
        if self.bucket < 1:
            raise ConfigError(f"bucket must be at least 1 micro-batch, not {self.bucket}.")

    @property
    def drawn(self) -> tuple[ChatInput, ...]:
        """What one is drawn of for each micro-batch."""
        return self.inputs or tuple(
            ChatInput(self.frames, self.resolution, number) for number in self.num_tokens
        )

    @property
    def longest(self) -> ChatInput:
        """The one with the most tokens."""
        return max(self.drawn, key=lambda one: one.num_tokens)


@dataclass(frozen=True)
class ChatBatch:
    """Prompts with labels, and the clips of those that have one.

    weight: of all its labels in the loss. share: of its step, what its loss is multiplied by (see the loop).
    """

    prompts: list[Prompt]
    vision: VisionTokens | None
    weight: float = field(default=0.0, kw_only=True)
    share: float = field(default=1.0, kw_only=True)

    @property
    def figures(self) -> dict[str, float]:
        """Labelled positions, positions in all, and the share of the padded rectangle that is padding."""
        lengths = [len(prompt) for prompt in self.prompts]
        labelled = sum(label >= 0 for prompt in self.prompts for label in prompt.labels[1:])
        padding = 1 - sum(lengths) / (max(lengths) * len(lengths))
        return {"label_tokens": labelled, "tokens": sum(lengths), "padding": padding}


class Place(NamedTuple):
    """Where an example stands: the epoch, the position in its order, and the example's number."""

    epoch: int
    position: int
    number: int


class ChatData:
    """Micro-batches of a recipe for a model. Raises DataError when the datasets hold nothing."""

    def __init__(self, recipe: ChatRecipe, vlm: VideoLanguageModel) -> None:
        self.recipe, self.vlm = recipe, vlm
        need = NEEDS[recipe.stage]
        self._loader = Loader(
            open_datasets(recipe.datasets, need),
            recipe.loop.seed,
            out=recipe.loop.out,
            stride=recipe.optim.micro_batch,
            max_missing=recipe.max_missing,
            need=need,
        )
        self._count = len(self._loader)
        self._cache = FeatureCache(Path(recipe.feature_cache) if recipe.feature_cache else None)
        self._encoder = vlm.revision(language=False)
        self._step: tuple[int, list[list[Place]]] = (-1, [])

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return max(1, self._count // self.recipe.optim.micro_batch)

    @property
    def _per_step(self) -> int:
        return self.recipe.optim.batch_size // self.recipe.optim.micro_batch

    def batch(self, index: int) -> ChatBatch:
        """Micro-batch number `index`, counted over epochs."""
        return self.prompted(*self.encoded(index))

    def encoded(self, index: int) -> tuple[list[Example], list[Features | None]]:
        """The examples of micro-batch `index` and what the encoder gave for the media of each."""
        step = index // self._per_step
        view = random.Random(f"{self.recipe.loop.seed}/{step}/keep").choice(self.recipe.drawn)
        pairs = [self._usable(self._loader, place, view) for place in self._places(index)]
        return [example for example, _ in pairs], self._features(pairs, view)

    def held_out(self) -> Iterator[ChatBatch]:
        """The first held-out records, at the largest token count."""
        recipe = self.recipe
        if not recipe.held_out:
            return
        need, size = NEEDS[recipe.stage], recipe.optim.micro_batch
        source = open_datasets(recipe.held_out, need)
        out = Path(recipe.loop.out) / "held_out"
        loader = Loader(source, recipe.loop.seed, out=out, stride=1, max_missing=1.0, need=need)
        count = min(recipe.evaluate_records, len(source))
        for first in range(0, count, size):
            places = [Place(0, number, number) for number in range(first, min(first + size, count))]
            pairs = [self._usable(loader, place, recipe.longest) for place in places]
            yield self.prompted([example for example, _ in pairs], self._features(pairs, recipe.longest))

    def flush(self) -> None:
        """Write features that are still in memory."""
        self._cache.flush()

    # -- which examples ------------------------------------------------------------------------------------

    def _places(self, index: int) -> list[Place]:
        """Those of a micro-batch's examples: a step's are the next of the epoch's order, and among them those
        of like length lie side by side."""
        size, bucket = self.recipe.optim.micro_batch, self.recipe.bucket
        step, slot = divmod(index, self._per_step)
        if self._step[0] != step:
            first = step * self._per_step
            drawn = [place for offset in range(self._per_step) for place in self._drawn(first + offset)]
            if bucket > 1:
                runs = [drawn[start : start + bucket * size] for start in range(0, len(drawn), bucket * size)]
                drawn = [
                    place
                    for run in runs
                    for place in sorted(run, key=lambda place: (self._length(place.number), place))
                ]
            self._step = (step, [drawn[start : start + size] for start in range(0, len(drawn), size)])
        return self._step[1][slot]

    def _drawn(self, index: int) -> list[Place]:
        """The next places of the order of an epoch."""
        epoch, within = divmod(index, self.micro_batches)
        order, size = self._loader.order(epoch), self.recipe.optim.micro_batch
        positions = range(within * size, (within + 1) * size)
        return [Place(epoch, position, int(order[position % self._count])) for position in positions]

    def _length(self, number: int) -> int:
        """About how many positions an example takes; none when it cannot be used."""
        try:
            example = self._loader.source[number]
        except (VideoError, OSError):
            return 0
        visual = 0
        if example.has_media:
            view, patch = self.recipe.longest, self.vlm.encoder.config.patch_size
            pictures = len(getattr(example.media, "paths", ())) or 1
            frames = min(pictures, view.frames) if example.kind == "image" else view.frames
            kept = min(view.num_tokens, frames * (view.resolution // patch) ** 2)
            visual = self.vlm.projector.planned_tokens(kept, frames)
        return visual + sum(len(part) for turn in example.turns for part in turn) // CHARACTERS_PER_TOKEN

    def _usable(self, loader: Loader, place: Place, view: ChatInput) -> tuple[Example, Clip | None]:
        """An example, or the next of the order that can be used; its clip unless it has none or its features
        are known."""

        def load(example: Example) -> Clip | None:
            if not example.has_media or self._key(example, view) in self._cache:
                return None
            return example.media.load(view.frames, view.resolution)

        return loader.usable(place.epoch, place.position, load, place.number)

    # -- what becomes of them ------------------------------------------------------------------------------

    def prompted(self, examples: Sequence[Example], features: Sequence[Features | None]) -> ChatBatch:
        """Prompts and stacked features."""
        present = [one for one in features if one is not None]
        prompts = [self._prompt(example, one) for example, one in zip(examples, features, strict=True)]
        weight = float(label_weights(prompts, self.recipe.weighting).sum())
        return ChatBatch(prompts, stack(present) if present else None, weight=weight)

    def _features(
        self, pairs: Sequence[tuple[Example, Clip | None]], view: ChatInput
    ) -> list[Features | None]:
        """Encoder outputs in order; what the cache lacks goes through the encoder as one batch."""
        features_of = {
            number: self._cache.get(self._key(example, view)) for number, (example, _) in enumerate(pairs)
        }
        new = [
            number
            for number, (_, clip) in enumerate(pairs)
            if clip is not None and features_of[number] is None
        ]
        if new:
            clips = [clip for number in new if (clip := pairs[number][1]) is not None]
            pixels = [preprocess(clip, view.resolution, view.resolution) for clip in clips]
            vision = self.vlm.encode(pixels, [view.num_tokens] * len(new), [clip.times_s for clip in clips])
            for index, number in enumerate(new):
                features = Features.of(vision, index, clips[index].duration_s, torch.bfloat16)
                self._cache.put(self._key(pairs[number][0], view), features)
                features_of[number] = features
        return [features_of[number] for number in range(len(pairs))]

    def _key(self, example: Example, view: ChatInput) -> str:
        config = self.vlm.config
        # Features without the pooled one must not serve a projector that reads it.
        read = f"{config.vision_depth}|{config.summary_pool if config.projector.summary_tokens else None}"
        return f"{example.media.key}|{view.frames}|{view.resolution}|{view.num_tokens}|{read}|{self._encoder}"

    def _prompt(self, example: Example, features: Features | None) -> Prompt:
        recipe, tokenizer = self.recipe, self.vlm.llm.tokenizer
        visuals: tuple[Visual, ...] = ()
        if features is not None:
            count = self.vlm.projector.planned_tokens(len(features.kept), features.grid.frames)
            times = features.times_s if features.duration_s > 0 else ()
            visuals = (Visual(count, duration_s=features.duration_s, times_s=times),)
        if recipe.template == "plain" and visuals:
            prompt = render_plain_training(tokenizer, visuals[0], example.turns[0][1])
        else:
            talks = [
                prompt
                for turns in example.talks
                for prompt in self._conversation(visuals, turns, example.system)
            ]
            prompt = talks[0] if len(talks) == 1 else share_beginning(talks)
        return shorten(prompt, recipe.max_length)

    def _conversation(self, visuals: tuple[Visual, ...], turns: Conversation, system: str) -> list[Prompt]:
        messages: list[Message[Visual]] = [Message.of("system", system)] if system else []
        for number, (question, answer) in enumerate(turns):
            front = visuals if number == 0 else ()
            messages += [Message("user", (*front, question)), Message.of("assistant", answer)]
        return render_chat_turns(self.vlm.llm.tokenizer, messages, time_form=self.vlm.config.time_sentence)


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


def scored_loss(
    model: VideoLanguageModel, prompts: Sequence[Prompt], vision: VisionTokens | None, weighting: Weighting
) -> Tensor:
    """The model's loss of a batch; 0 when no position has a label, since all answers lie beyond max_length.

    The model runs then too: other processes may wait for its part of a sharded layer.
    """
    if any(label != IGNORE for prompt in prompts for label in prompt.labels[1:]):
        return model.loss(prompts, vision, weighting)
    stand_ins = [replace(prompt, labels=(IGNORE,) * (len(prompt) - 1) + (0,)) for prompt in prompts]
    return 0.0 * model.loss(stand_ins, vision, weighting)
