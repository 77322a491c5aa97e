"""Flux-CLIP: draw the pooled video feature to the embedding of its caption (paper supplement Table 7).

    python -m training.clip --config training/recipes/cpu/clip.yaml

Symmetric InfoNCE against a text tower, over the batches of all ranks, at flexible grids and at a number of
kept tokens drawn anew for each step. Stage 1 trains the vision projector alone, stage 2 everything. On the
synthetic world `attribute_weight` adds a classification of what the clip shows, and `patch_weight` one of
what each kept patch shows, help for a small encoder that starts from nothing; 0, the paper's way, leaves them
out.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from encoder.checkpoint import save_tensors
from encoder.config import ImagePositions
from encoder.errors import ConfigError
from encoder.selection import Selector
from llm_bridge.clip_head import TrainedPools
from llm_bridge.text_encoders.text_towers import CACHED_TEXTS, open_tower
from training.data.augment import AugmentConfig
from training.data.clip_batches import Captioned, MixtureBatches, WorldBatches, captions_of, still_grid
from training.data.datasets import NEEDS, DatasetConfig, check_read, open_datasets
from training.data.flexible_grids import FlexibleGrid
from training.data.synthetic_source import WorldSource
from training.data.video_batches import VideoBatches
from training.evaluation.metrics import paired_recalls
from training.models.clip_model import (
    ClipBatch,
    ClipModel,
    ClipSettings,
    Trained,
    hits,
    load_clip_head,
    set_image_positions,
)
from training.models.encoder_source import EncoderSource
from training.synthetic.dataset import World
from training.trainer.command import run_stage
from training.trainer.recipe import LoopConfig, OptimConfig, check_least, check_share

COMPARED: tuple[Selector, ...] = ("flux", "random")
EVALUATED_AT_ONCE = 32
MISSING_SHARE = 0.01
TEMPERATURE = 0.07  # where a run starts that has no other


@dataclass(frozen=True)
class ClipRecipe:
    """Everything a Flux-CLIP run depends on.

    Data: `images` and `videos`, which alternate by step, or `world` (the default, alone). grid: frames and
    resolution of videos, drawn per micro-batch (None: `frames` and `resolution`); images take its
    resolutions.
    siblings: clips of the world per object that differ in motion alone, hard negatives of each other.
    attribute_weight, patch_weight: of the world's labels of clips and of patches (see WorldLabels).
    patch_background: how much a kept patch without an object counts among those with one.
    image_positions: how the position table serves images (None: as the encoder says).
    What is compared at once: optim.micro_batch times the ranks; accumulated micro-batches stay apart.
    num_tokens: kept of a clip, one number drawn per step with equal chance (repeat one to draw it more).
    UNVERIFIED: the paper does not say which Flux-CLIP was trained at. pool: the pooling head; pools: one for
    each of `num_tokens` instead, as the released fine-tuning has them; UNVERIFIED, InternVideo2's CLIP has a
    single one.
    train: "projector" is stage 1 (the pooling heads in use, `align` and the temperature), "all" stage 2.
    train_text: the text tower too; UNVERIFIED whether stage 2 does, InternVideo2's code keeps it frozen.
    align_norm: a LayerNorm in front of the CLIP head's linear map to the text space, as in the released code.
    align_init: the CLIP head of an earlier run, its `alignment.safetensors`.
    temperature: where it starts (None: where align_init's head ended, 0.07 without one); temperature_min: it
    cannot fall below. positives: pairs that are equally
    right: equal "text", or the same media file ("id", as in the released code).
    text_tower: see `open_tower`; text_tokenizer: of a MobileCLIP file; text_length: most tokens per text;
    text_cache: texts whose embeddings are remembered; with 0, for captions that hardly repeat, a CPU embeds
    several at once.
    held_out: captioned data whose first `evaluate_clips` are retrieved in evaluation.
    """

    stage: ClassVar[str] = "clip"
    renamed: ClassVar[dict[str, str]] = {"keeps": "num_tokens"}
    optim: OptimConfig
    loop: LoopConfig
    encoder: EncoderSource = field(default_factory=EncoderSource)
    world: WorldSource | None = None
    images: tuple[DatasetConfig, ...] = ()
    videos: tuple[DatasetConfig, ...] = ()
    grid: FlexibleGrid | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    max_missing: float = MISSING_SHARE
    threads: int | None = None
    frames: int = 8
    resolution: int = 112
    image_positions: ImagePositions | None = None
    num_tokens: tuple[int, ...] = (128,)
    siblings: int = 1
    train: Trained = "all"
    train_text: bool = False
    gradient_checkpointing: bool = False
    align_norm: bool = False
    align_init: str | None = None
    text_tower: str | None = None
    text_tokenizer: str | None = None
    text_length: int | None = None
    text_cache: int = CACHED_TEXTS
    temperature: float | None = None
    temperature_min: float = 0.01
    positives: Literal["text", "id"] = "text"
    attribute_weight: float = 0.0
    patch_weight: float = 0.0
    patch_background: float = 1.0
    pool: int = 1
    pools: tuple[int, ...] | None = None
    held_out: tuple[DatasetConfig, ...] = ()
    evaluate_clips: int = 192

    def __post_init__(self) -> None:
        mixture = bool(self.images or self.videos)
        if mixture and self.world is not None:
            raise ConfigError("Train on images and videos, or on the world: not on both.")
        if mixture and (self.siblings > 1 or self.attribute_weight or self.patch_weight):
            raise ConfigError(
                "siblings, attribute_weight and patch_weight go with the world, not with images and videos."
            )
        if not mixture and self.world is None:
            object.__setattr__(self, "world", WorldSource())
        if not mixture and (self.augment, self.max_missing) != (AugmentConfig(), MISSING_SHARE):
            raise ConfigError("augment and max_missing go with images and videos, not with the world.")
        if self.threads is not None and not (mixture or self.held_out):
            raise ConfigError("threads are for reading files, not for the world.")
        if mixture and self.loop.evaluate_every and not self.held_out:
            raise ConfigError("loop.evaluate_every needs held_out: name clips that are not trained on.")
        if self.held_out and not self.loop.evaluate_every:
            raise ConfigError("held_out needs loop.evaluate_every: say after how many steps it is looked at.")
        check_read((*self.images, *self.videos), self.stage)
        check_read(self.held_out, self.stage, held_out=True)
        check_least(self, 1, "threads", "frames", "resolution", "text_length")
        check_share(self, "max_missing")
        if self.loop.evaluate_every:
            check_least(self, 1, "evaluate_clips")
        if self.siblings < 1 or self.optim.micro_batch % self.siblings:
            raise ConfigError("optim.micro_batch must be a multiple of siblings.")
        if not self.num_tokens or min(self.num_tokens) < 1:
            raise ConfigError("num_tokens must name at least one token count.")
        if self.pools is not None and len(self.pools) != len(self.num_tokens):
            raise ConfigError(f"pools must hold one head for each of {len(self.num_tokens)} token counts.")
        start = TEMPERATURE if self.temperature is None and self.align_init is None else self.temperature
        if not 0 < self.temperature_min <= (math.inf if start is None else start):
            raise ConfigError("temperature_min must lie above 0, and temperature not below it.")
        if not 0 < self.patch_background <= 1:
            raise ConfigError("patch_background must lie above 0 and be at most 1.")
        if self.text_cache < 0:
            raise ConfigError("text_cache must not be negative.")

    @property
    def video_grid(self) -> FlexibleGrid:
        """Of each micro-batch of videos."""
        return self.grid or FlexibleGrid.fixed(self.frames, self.resolution)

    def settings(self) -> ClipSettings:
        """What the model depends on."""
        by_count = dict(zip(self.num_tokens, self.pools, strict=True)) if self.pools else {}
        return ClipSettings(
            train=self.train,
            pools=TrainedPools(self.pool, by_count),
            align_norm=self.align_norm,
            temperature=TEMPERATURE if self.temperature is None else self.temperature,
            temperature_min=self.temperature_min,
            attribute_weight=self.attribute_weight,
            patch_weight=self.patch_weight,
            patch_background=self.patch_background,
            train_text=self.train_text,
        )


class ClipStage:
    """Flux-CLIP on the recipe's captioned clips."""

    def __init__(self, recipe: ClipRecipe) -> None:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ConfigError("The temperature cannot be sharded: use ddp.yaml or deepspeed_zero1.yaml.")
        self.recipe = recipe
        self._per_step = recipe.optim.batch_size // recipe.optim.micro_batch
        self.data = self._open_data()
        torch.manual_seed(recipe.loop.seed)
        self.text = open_tower(
            recipe.text_tower,
            tokenizer=recipe.text_tokenizer,
            length=recipe.text_length,
            cache_size=recipe.text_cache,
        )
        # Accelerators differ by rank and are not known yet: there the model embeds texts itself.
        self._embeds_ahead = not recipe.train_text and not torch.accelerator.is_available()
        labels = self.data.labels if isinstance(self.data, WorldBatches) else None
        attributes = labels.clip_classes if labels and recipe.attribute_weight else {}
        patches = labels.patch_classes if labels and recipe.patch_weight else {}
        encoder = recipe.encoder.build()
        recipe.video_grid.check_patch(encoder.config.patch_size)
        set_image_positions(encoder, recipe.image_positions)
        encoder.recompute = "blocks" if recipe.gradient_checkpointing else "nothing"
        self.model = ClipModel(encoder, self.text, attributes, recipe.settings(), patches)
        if recipe.align_init is not None:
            load_clip_head(self.model, recipe.align_init)
            if recipe.temperature is not None:
                self.model.set_temperature(recipe.temperature)

    def _open_data(self) -> WorldBatches | MixtureBatches:
        recipe, size, seed = self.recipe, self.recipe.optim.micro_batch, self.recipe.loop.seed
        if recipe.world is not None:
            return WorldBatches(recipe.world, recipe.video_grid, size, recipe.siblings, seed)
        grids = {"image": still_grid(recipe.video_grid), "video": recipe.video_grid}
        need = NEEDS[recipe.stage]
        batches = {
            kind: VideoBatches(
                open_datasets(data, need),
                grids[kind],
                recipe.augment,
                size,
                seed,
                out=recipe.loop.out,
                max_missing=recipe.max_missing,
                threads=recipe.threads,
                need=need,
            )
            for kind, data in (("image", recipe.images), ("video", recipe.videos))
            if data
        }
        return MixtureBatches(batches, self._per_step, seed)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return self.data.micro_batches

    def batch(self, index: int) -> ClipBatch:
        """Micro-batch `index`: clips, their captions' embeddings and attributes, and a token count."""
        recipe = self.recipe
        step = index // self._per_step  # one count for all ranks, so that none waits for another
        num_tokens = random.Random(f"{recipe.loop.seed}/{step}/keep").choice(recipe.num_tokens)
        return self._with_text(self.data.get(index), num_tokens)

    def _with_text(self, clips: Captioned, num_tokens: int) -> ClipBatch:
        text = self.text.embed(clips.captions) if self._embeds_ahead else None
        ids = clips.ids if self.recipe.positives == "id" else None
        return ClipBatch(
            clips.pixels, text, clips.labels, num_tokens, clips.captions, ids, clips.kind, clips.patches
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Attribute accuracy on the world's test clips, by the selector and by chance selection.

        Also recall of captions and clips of held-out data; all of it at each token count.
        """
        figures: dict[str, float] = {}
        if isinstance(self.data, WorldBatches) and self.model.attributes:
            figures |= self._attributes(self.data)
        if self.recipe.held_out:
            figures |= self._retrieval()
        return figures

    def _attributes(self, data: WorldBatches) -> dict[str, float]:
        recipe, clips = self.recipe, self.recipe.evaluate_clips
        test = World("test", data.source.seed, data.world.level)
        counts = sorted(set(recipe.num_tokens))
        right: dict[str, int] = {}
        labelled: dict[str, int] = {}
        for start in range(0, clips, EVALUATED_AT_ONCE):
            samples = [test.sample(number) for number in range(start, min(start + EVALUATED_AT_ONCE, clips))]
            batch = data.collate(test, samples, recipe.frames, recipe.resolution)
            for count in counts:
                for selector in COMPARED:
                    pooled = self.model.features(batch.pixels.to(self._device), count, selector).float()
                    for name, head in self.model.attributes.items():
                        correct, known = hits(head(pooled).cpu(), batch.labels[name])
                        key = f"{name}_{selector}_{count}"
                        right[key] = right.get(key, 0) + correct
                        labelled[key] = labelled.get(key, 0) + known
        return {key: right[key] / max(1, labelled[key]) for key in right}

    def _retrieval(self) -> dict[str, float]:
        recipe = self.recipe
        source = open_datasets(recipe.held_out, NEEDS[recipe.stage])
        total = min(recipe.evaluate_clips, len(source))
        grid = FlexibleGrid.fixed(recipe.frames, recipe.resolution, recipe.video_grid.patch_size)
        batches = VideoBatches(
            source,
            grid,
            AugmentConfig(),
            min(total, EVALUATED_AT_ONCE),
            0,
            out=Path(recipe.loop.out) / "held_out",
            sampling="middle",
            need=NEEDS[recipe.stage],
            threads=recipe.threads,
        )
        counts = sorted(set(recipe.num_tokens))
        videos: dict[int, list[Tensor]] = {count: [] for count in counts}
        texts: list[Tensor] = []
        for index in range(total // batches.micro_batch):
            batch = batches.get(index)
            texts.append(self.text.to(self._device).embed([captions_of(e)[0] for e in batch.examples]))
            for count in counts:
                videos[count].append(self.model.embed(batch.pixels.to(self._device), count))
        text = torch.cat(texts)
        return {
            f"{name}_{count}": value
            for count in counts
            for name, value in paired_recalls(torch.cat(videos[count]), text).items()
        }

    @property
    def _device(self) -> torch.device:
        return self.model.log_scale.device

    def finish(self, out: Path) -> None:
        """The encoder, as FluxViT.from_pretrained reads it, the CLIP head, and a trained text tower."""
        self.model.encoder.save_pretrained(out / "encoder")
        save_tensors(self.model.head_state(), out / "alignment.safetensors")
        if self.recipe.train_text:
            save_tensors(self.text.state_dict(), out / "text_tower.safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_stage(ClipRecipe, ClipStage, "training.clip", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
