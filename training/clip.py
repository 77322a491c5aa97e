"""Flux-CLIP: draw the pooled video feature to the embedding of its caption (paper supplement Table 7).

    python -m training.clip --config training/recipes/cpu/clip.yaml

Symmetric InfoNCE against a frozen text tower, at a number of kept tokens drawn anew for each step (which
counts the paper used is UNVERIFIED: `keeps` names them). Equal captions in a batch count as equally right.
`attribute_weight` adds a classification of the main object and of its motion, which a small encoder that
starts from nothing needs in order to learn direction; 0 leaves it out.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.checkpoint import load_encoder
from encoder.config import SIZES
from encoder.errors import ConfigError, FluxChatError
from encoder.fluxvit import FluxViT
from encoder.preprocess import preprocess
from encoder.selection import Selector
from training.config import LoopConfig, OptimConfig, parse_command
from training.data.world import WorldSource, render_clip
from training.demo_world.world import Sample, World
from training.loop import train
from training.text_towers import SentenceTower, TextTower, sentence_tower_path

COMPARED: tuple[Selector, ...] = ("flux", "random")


@dataclass(frozen=True)
class EncoderSource:
    """A size with changed settings, or weights to start from (official file or saved folder)."""

    size: str = "micro"
    init: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self) -> FluxViT:
        """The encoder; raises ConfigError or CheckpointError."""
        if self.init is not None:
            return load_encoder(self.init)
        if self.size not in SIZES:
            raise ConfigError(f"encoder.size must be one of {', '.join(SIZES)}, not {self.size!r}.")
        return FluxViT(SIZES[self.size].from_dict({**SIZES[self.size].to_dict(), **self.settings}))


@dataclass(frozen=True)
class ClipRecipe:
    """Everything a Flux-CLIP run depends on.

    keeps: token counts, one drawn per step with equal chance (repeat one to favour it). siblings: clips per
    object that differ in motion alone, hard negatives of each other.
    """

    optim: OptimConfig
    loop: LoopConfig
    encoder: EncoderSource = EncoderSource()
    world: WorldSource = field(default_factory=WorldSource)
    frames: int = 8
    resolution: int = 112
    keeps: tuple[int, ...] = (128,)
    siblings: int = 1
    text_tower: str | None = None
    temperature: float = 0.07
    attribute_weight: float = 0.0
    pool: int = 1
    evaluate_clips: int = 192

    def __post_init__(self) -> None:
        if self.optim.micro_batch % self.siblings:
            raise ConfigError("optim.micro_batch must be a multiple of siblings.")
        if not self.keeps:
            raise ConfigError("keeps must name at least one token count.")


@dataclass(frozen=True)
class ClipBatch:
    """pixels (B, 3, T, H, W), text (B, D) unit vectors, labels (B,) per attribute, K."""

    pixels: Tensor
    text: Tensor
    labels: dict[str, Tensor]
    keep: int


class ClipModel(nn.Module):
    """Encoder, pooling, a linear alignment with the text tower, and attribute heads."""

    def __init__(
        self, encoder: FluxViT, text_dim: int, attributes: Mapping[str, int], recipe: ClipRecipe
    ) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.clip_embed_dim
        self.align = nn.Linear(width, text_dim)
        self.attributes = nn.ModuleDict({name: nn.Linear(width, count) for name, count in attributes.items()})
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / recipe.temperature)))
        self._weight, self._pool = recipe.attribute_weight, recipe.pool

    def features(self, pixels: Tensor, keep: int | None, selector: Selector = "flux") -> Tensor:
        """Pooled features (B, clip_embed_dim)."""
        return self.encoder.pool(self.encoder(pixels, keep, selector=selector), self._pool)

    def forward(self, batch: ClipBatch) -> tuple[Tensor, dict[str, float]]:
        """(loss, figures) of a batch."""
        device = self.log_scale.device
        pooled = self.features(batch.pixels.to(device), batch.keep).float()
        with torch.autocast(device.type, enabled=False):
            video = F.normalize(self.align(pooled), dim=-1)
            # A scale above 100 makes the softmax a lottery: CLIP's own bound.
            loss = contrastive_loss(video, batch.text.to(device), self.log_scale.exp().clamp(max=100.0))
            figures = {"contrastive": loss.item(), "scale": self.log_scale.exp().item()}
            for name, head in self.attributes.items():
                wrong = F.cross_entropy(head(pooled), batch.labels[name].to(device))
                figures[name] = wrong.item()
                loss = loss + self._weight * wrong
        return loss, figures


def contrastive_loss(video: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit vectors (B, D); equal texts count as equally right."""
    scores = scale * video @ text.T
    same = (text @ text.T > 0.999).float()
    target = same / same.sum(dim=1, keepdim=True)
    to_text = -(target * scores.log_softmax(dim=1)).sum(dim=1).mean()
    to_video = -(target * scores.T.log_softmax(dim=1)).sum(dim=1).mean()
    return (to_text + to_video) / 2


class ClipStage:
    """Flux-CLIP on the demo world."""

    def __init__(self, recipe: ClipRecipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.loop.seed)
        self.world = recipe.world.open()
        self.text: TextTower = SentenceTower(recipe.text_tower or sentence_tower_path())
        nouns = sorted({noun.code for noun in self.world.pool})
        self._labels: dict[str, dict[str, int]] = {
            "noun": {code: index for index, code in enumerate(nouns)},
            "motion": {str(motion): index for index, motion in enumerate(self.world.level.motions)},
        }
        attributes = (
            {name: len(table) for name, table in self._labels.items()} if recipe.attribute_weight else {}
        )
        self.model = ClipModel(recipe.encoder.build(), self.text.dim, attributes, recipe)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return max(1, self.recipe.world.count // self.recipe.optim.micro_batch)

    def batch(self, index: int) -> ClipBatch:
        """Micro-batch `index`: clips, their captions' embeddings and attributes, and a token count."""
        recipe = self.recipe
        groups = recipe.optim.micro_batch // recipe.siblings
        first = recipe.world.first + (index % self.micro_batches) * groups
        samples = [
            sample for number in range(first, first + groups) for sample in self._group(self.world, number)
        ]
        keep = random.Random(f"{recipe.loop.seed}/{index}/keep").choice(recipe.keeps)
        return self._collate(self.world, samples, keep)

    def _group(self, world: World, number: int) -> list[Sample]:
        siblings = self.recipe.siblings
        return world.siblings(number, siblings) if siblings > 1 else [world.sample(number)]

    def _collate(self, world: World, samples: Sequence[Sample], keep: int) -> ClipBatch:
        recipe = self.recipe
        clips = [render_clip(world, sample, "", recipe.frames, recipe.resolution) for sample in samples]
        pixels = torch.stack([preprocess(clip, recipe.resolution, recipe.resolution) for clip in clips])
        actors = [sample.scene.actors[0] for sample in samples]
        labels = {
            "noun": torch.tensor([self._labels["noun"][actor.code] for actor in actors]),
            "motion": torch.tensor([self._labels["motion"][actor.motions[0]] for actor in actors]),
        }
        return ClipBatch(pixels, self.text.embed([sample.caption for sample in samples]), labels, keep)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Attribute accuracy on test clips at each token count, by the selector and by chance selection."""
        recipe = self.recipe
        test = World("test", recipe.world.seed, self.world.level)
        counts = sorted(set(recipe.keeps))
        right: dict[str, float] = {}
        for start in range(0, recipe.evaluate_clips, 32):
            size = min(32, recipe.evaluate_clips - start)
            samples = [test.sample(number) for number in range(start, start + size)]
            batch = self._collate(test, samples, 0)
            for keep in counts:
                for selector in COMPARED:
                    pooled = self.model.features(batch.pixels, keep, selector)
                    for name, head in self.model.attributes.items():
                        hits = (head(pooled).argmax(dim=1) == batch.labels[name]).sum().item()
                        key = f"{name}_{selector}_{keep}"
                        right[key] = right.get(key, 0.0) + hits / recipe.evaluate_clips
        return right

    def finish(self, out: Path) -> None:
        """The encoder, loadable by FluxViT.from_pretrained, and the alignment beside it."""
        from encoder.checkpoint import save_tensors

        self.model.encoder.save_pretrained(out / "encoder")
        rest = {k: v for k, v in self.model.state_dict().items() if not k.startswith("encoder.")}
        save_tensors(rest, out / "alignment.safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        recipe, resume = parse_command(ClipRecipe, argv, "training.clip", __doc__)
        train(ClipStage(recipe), recipe.optim, recipe.loop, resume=resume)
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
