"""Chat stage 1: the projector learns to speak to a frozen language model (paper supplement section 2).

    python -m training.chat_stage1 --config training/recipes/chat_stage1.yaml

Encoder and language model are frozen; AdamW at 1e-3, global batch 512, one epoch, cosine, warm-up ratio 0.03.
The result, in `loop.out`, is a folder that `VideoChat(model=...)` opens.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from encoder.checkpoint import load_encoder, save_json
from encoder.errors import ConfigError, DataError, FluxChatError, VideoError
from encoder.preprocess import preprocess
from encoder.tokens import VisionTokens
from encoder.video import Clip
from llm_bridge.model import VideoLanguageModel, VLMConfig, assemble
from llm_bridge.projector import ProjectorConfig
from llm_bridge.prompt import (
    Message,
    Prompt,
    TimeSentence,
    Visual,
    render_chat_training,
    render_plain_training,
)
from training.config import LoopConfig, OptimConfig, parse_command
from training.data.features import FeatureCache, Features, stack
from training.data.records import DatasetConfig, Record, RecordSource
from training.loop import train


@dataclass(frozen=True)
class ProjectorSettings:
    """As ProjectorConfig, whose widths follow from encoder and language model."""

    kind: Literal["mlp", "merge"] = "mlp"
    layers: int = 2
    norm: bool = False
    tokens_per_frame: int = 16


@dataclass(frozen=True)
class ModelSource:
    """encoder: official .pth file or saved folder. llm: hub id, folder or GGUF. The rest: see VLMConfig."""

    encoder: str
    llm: str
    projector: ProjectorSettings = field(default_factory=ProjectorSettings)
    vision_depth: int | None = None
    time_sentence: TimeSentence = "short"
    gradient_checkpointing: bool = False
    default_tokens: int = 1024


@dataclass(frozen=True)
class Stage1Recipe:
    """Everything a stage-1 run depends on.

    frames, resolution: what the encoder sees. keeps: token counts, one drawn per micro-batch. template:
    "plain" (caption right after the video, as the field's stage 1 does) or "chat" (the language model's own
    template). max_length: longer samples lose their end. max_missing: share of unreadable media that stops
    the run.
    feature_cache: folder for encoder outputs, so that no clip is encoded twice.
    """

    model: ModelSource
    datasets: tuple[DatasetConfig, ...]
    optim: OptimConfig
    loop: LoopConfig
    frames: int = 16
    resolution: int = 224
    keeps: tuple[int, ...] = (1024,)
    template: Literal["plain", "chat"] = "plain"
    max_length: int = 8192
    max_missing: float = 0.01
    feature_cache: str | None = None
    evaluate_records: int = 0

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigError("datasets must name at least one dataset.")
        if not self.keeps:
            raise ConfigError("keeps must name at least one token count.")


@dataclass(frozen=True)
class Stage1Batch:
    """Prompts with labels, and the clips of those that have one."""

    prompts: list[Prompt]
    vision: VisionTokens | None


class Stage1Model(nn.Module):
    """The whole model, of which only the projector has gradients."""

    def __init__(self, model: VideoLanguageModel) -> None:
        super().__init__()
        self.model = model
        model.projector.requires_grad_(True)

    def forward(self, batch: Stage1Batch) -> tuple[Tensor, dict[str, float]]:
        """(loss, figures)."""
        labelled = sum(label >= 0 for prompt in batch.prompts for label in prompt.labels)
        return self.model.loss(batch.prompts, batch.vision), {"label_tokens": labelled}


class Stage1:
    """Data and model of stage 1 for the loop."""

    def __init__(self, recipe: Stage1Recipe) -> None:
        self.recipe = recipe
        self._sources = [source for dataset in recipe.datasets for source in dataset.open()]
        self._count = sum(map(len, self._sources))
        if self._count == 0:
            raise DataError("The datasets hold no records.")
        self.vlm = self._assemble()
        self.model = Stage1Model(self.vlm)
        self._cache = FeatureCache(Path(recipe.feature_cache) if recipe.feature_cache else None)
        self._encoder = self.vlm.revision(language=False)
        self._missing: dict[str, str] = {}
        self._seen = 0

    def _assemble(self) -> VideoLanguageModel:
        source = self.recipe.model
        encoder = load_encoder(source.encoder)
        settings = source.projector
        config = VLMConfig(
            llm=source.llm,
            encoder=encoder.config,
            projector=ProjectorConfig(
                in_dim=encoder.config.embed_dim,
                out_dim=encoder.config.embed_dim,  # replaced by the language model's width
                kind=settings.kind,
                layers=settings.layers,
                norm=settings.norm,
                tokens_per_frame=settings.tokens_per_frame,
                merge_heads=encoder.config.num_heads,
            ),
            vision_depth=source.vision_depth,
            time_sentence=source.time_sentence,
            default_tokens=source.default_tokens,
        )
        torch.manual_seed(self.recipe.loop.seed)
        model = assemble(config, encoder, None)
        if source.gradient_checkpointing:
            model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
            model.language_model.train()  # transformers checkpoints in train mode only
        return model

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return max(1, self._count // self.recipe.optim.micro_batch)

    def batch(self, index: int) -> Stage1Batch:
        """Micro-batch `index`: records in an order drawn anew for each epoch."""
        size = self.recipe.optim.micro_batch
        epoch, within = divmod(index, self.micro_batches)
        keep = random.Random(f"{self.recipe.loop.seed}/{index}/keep").choice(self.recipe.keeps)
        positions = range(within * size, (within + 1) * size)
        return self.collate([self._readable(epoch, position, keep) for position in positions], keep)

    def _readable(self, epoch: int, position: int, keep: int) -> tuple[Record, Clip | None]:
        """The record at a position of the epoch's order, or the next whose media can be read; its clip unless
        there is none or its features are known."""
        order = self._order(epoch)
        for attempt in range(self._count):
            record = self._record(order[(position + attempt * self.recipe.optim.micro_batch) % self._count])
            self._seen += 1
            if record.media is None or self._key(record, keep) in self._cache:
                return record, None
            try:
                return record, record.media.load(self.recipe.frames, self.recipe.resolution)
            except VideoError as error:
                self._report_missing(record, error)
        raise DataError("None of the records' media can be read.")

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_ordered", (None, None))[0] != epoch:
            generator = torch.Generator().manual_seed(self.recipe.loop.seed * 7919 + epoch)
            self._ordered = (epoch, torch.randperm(self._count, generator=generator).tolist())
        return self._ordered[1]

    def _record(self, index: int) -> Record:
        source: RecordSource
        for source in self._sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError(index)

    def _report_missing(self, record: Record, error: VideoError) -> None:
        self._missing[record.id] = str(error)
        out = Path(self.recipe.loop.out)
        save_json(self._missing, out / "missing.json")
        if len(self._missing) > max(10, self.recipe.max_missing * self._seen):
            raise DataError(
                f"{len(self._missing)} of {self._seen} records cannot be read, more than max_missing allows: "
                f"see {out / 'missing.json'}."
            )

    def _features(self, pairs: Sequence[tuple[Record, Clip | None]], keep: int) -> list[Features | None]:
        """Encoder outputs in order; what the cache lacks goes through the encoder as one batch."""
        found = {number: self._cache.get(self._key(record, keep)) for number, (record, _) in enumerate(pairs)}
        new = [number for number, (_, clip) in enumerate(pairs) if clip is not None and found[number] is None]
        if new:
            clips = [clip for number in new if (clip := pairs[number][1]) is not None]
            pixels = [preprocess(clip, self.recipe.resolution, self.recipe.resolution) for clip in clips]
            vision = self.vlm.encode(pixels, [keep] * len(new), [clip.times_s for clip in clips])
            for index, number in enumerate(new):
                features = Features.of(vision, index, clips[index].duration_s, torch.bfloat16)
                self._cache.put(self._key(pairs[number][0], keep), features)
                found[number] = features
        return [found[number] for number in range(len(pairs))]

    def _key(self, record: Record, keep: int) -> str:
        recipe = self.recipe
        media = record.media.key if record.media is not None else ""
        return (
            f"{media}|{recipe.frames}|{recipe.resolution}|{keep}|{recipe.model.vision_depth}|{self._encoder}"
        )

    def collate(self, pairs: Sequence[tuple[Record, Clip | None]], keep: int) -> Stage1Batch:
        """Prompts and stacked features."""
        seen = self._features(pairs, keep)
        present = [features for features in seen if features is not None]
        prompts = [self._prompt(record, features) for (record, _), features in zip(pairs, seen, strict=True)]
        return Stage1Batch(prompts, stack(present) if present else None)

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
            messages: list[Message] = []
            for question, answer in record.turns:
                front = visuals if not messages else ()
                messages += [Message("user", (*front, question)), Message.of("assistant", answer)]
            prompt = render_chat_training(tokenizer, messages, time_form=recipe.model.time_sentence)
        return shorten(prompt, recipe.max_length)

    def evaluate(self) -> dict[str, float]:
        """Mean loss on the first records of the first dataset's order of another epoch."""
        if not self.recipe.evaluate_records:
            return {}
        keep = max(self.recipe.keeps)
        pairs = [self._readable(-1, position, keep) for position in range(self.recipe.evaluate_records)]
        with torch.no_grad():
            batch = self.collate(pairs, keep)
            return {"loss": float(self.vlm.loss(batch.prompts, batch.vision))}

    def finish(self, out: Path) -> None:
        """Write the model folder: projector and encoder weights, and the language model's name."""
        self._cache.flush()
        self.vlm.save_pretrained(out / "model")


def shorten(prompt: Prompt, limit: int) -> Prompt:
    """The first `limit` positions; raises DataError when that would cut into a visual."""
    if len(prompt) <= limit:
        return prompt
    if any(start + count > limit for start, count in prompt.spans):
        raise DataError(
            f"A video takes more than max_length {limit} positions: raise it or keep fewer tokens."
        )
    return replace(prompt, ids=prompt.ids[:limit], labels=prompt.labels[:limit])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        recipe, resume = parse_command(Stage1Recipe, argv, "training.chat_stage1", __doc__)
        train(Stage1(recipe), recipe.optim, recipe.loop, resume=resume)
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
