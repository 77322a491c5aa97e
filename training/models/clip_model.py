"""The model of Flux-CLIP: encoder, pooling, the way to the text space, temperature, attribute heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.checkpoint import load_tensors, read_tensors
from encoder.config import ImagePositions
from encoder.errors import CheckpointError, ConfigError
from encoder.fluxvit import FluxViT
from encoder.selection import Selector
from encoder.tokens import VisionTokens
from llm_bridge.clip_head import POOLS, TrainedPools
from llm_bridge.text_encoders.text_towers import TextTower, Tower
from training.trainer.distributed import gather_rows
from training.trainer.losses import contrastive_loss

Trained = Literal["projector", "all"]
BACKGROUND = 0  # the class of patches that show no object


@dataclass(frozen=True)
class ClipSettings:
    """What of a recipe the model depends on; see ClipRecipe."""

    train: Trained = "all"
    pools: TrainedPools = field(default_factory=TrainedPools)
    align_norm: bool = False
    temperature: float = 0.07
    temperature_min: float = 0.01
    attribute_weight: float = 0.0
    patch_weight: float = 0.0
    patch_background: float = 1.0
    train_text: bool = False


@dataclass(frozen=True)
class ClipBatch:
    """pixels (B, 3, T, H, W); text (B, D) unit vectors, or None for the model to embed the captions itself;
    labels (B,) or (B, classes) per attribute; K; ids (B,) of the examples, None to compare texts; the kind of
    media; patch labels (B, F, rows, columns) per attribute."""

    pixels: Tensor
    text: Tensor | None
    labels: dict[str, Tensor]
    num_tokens: int
    captions: tuple[str, ...] = ()
    ids: Tensor | None = None
    kind: str | None = None
    patches: dict[str, Tensor] = field(default_factory=dict)


class ClipModel(nn.Module):
    """`forward(batch) -> (loss, figures)`, the loss over the batches of all ranks.

    `align` is a Linear, or a LayerNorm and a Linear as the released `vision_align` (`align_norm`).
    """

    def __init__(
        self,
        encoder: FluxViT,
        tower: TextTower,
        attributes: Mapping[str, int],
        settings: ClipSettings,
        patches: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.settings = encoder, settings
        width = encoder.config.clip_embed_dim
        used = {settings.pools.default, *settings.pools.by_count.values()}
        if max(used) >= encoder.config.num_pools or min(used) < 0:
            raise ConfigError(f"The encoder has {encoder.config.num_pools} pools, no pool {max(used)}.")
        linear = nn.Linear(width, tower.dim)
        self.align = nn.Sequential(nn.LayerNorm(width), linear) if settings.align_norm else linear
        self.attributes = nn.ModuleDict({name: nn.Linear(width, count) for name, count in attributes.items()})
        self.patches = nn.ModuleDict(
            {name: nn.Linear(encoder.config.embed_dim, count) for name, count in (patches or {}).items()}
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / settings.temperature)))
        if settings.train_text:
            if not isinstance(tower, Tower):
                raise ConfigError("train_text needs a text tower that can be trained.")
            self.text_tower = tower.requires_grad_(True)
        self._frozen_tower = [] if settings.train_text else [tower]  # a list keeps it out of the state
        if settings.train == "projector":
            encoder.requires_grad_(False)
            for pool in used:
                encoder.clip_projector[pool].requires_grad_(True)

    def set_temperature(self, value: float) -> None:
        """Go on from that temperature, of the softmax over texts."""
        self.log_scale.data.fill_(math.log(1 / value))

    def train(self, mode: bool = True) -> ClipModel:
        """A frozen encoder stays as it is in evaluation."""
        super().train(mode)
        if self.settings.train == "projector":
            self.encoder.eval()
        return self

    def features(self, pixels: Tensor, num_tokens: int | None, selector: Selector = "flux") -> Tensor:
        """Pooled features (B, clip_embed_dim)."""
        return self._pool(self._tokens(pixels, num_tokens, selector), num_tokens)

    def embed(self, pixels: Tensor, num_tokens: int | None, selector: Selector = "flux") -> Tensor:
        """Unit vectors (B, D) in the text space, float32."""
        pooled = self.features(pixels, num_tokens, selector).float()
        with torch.autocast(pooled.device.type, enabled=False):
            return F.normalize(self.align(pooled), dim=-1)

    def _tokens(self, pixels: Tensor, num_tokens: int | None, selector: Selector) -> VisionTokens:
        frozen = self.settings.train == "projector"
        with torch.no_grad() if frozen else nullcontext():
            return self.encoder(pixels, num_tokens, selector=selector)

    def _pool(self, tokens: VisionTokens, num_tokens: int | None) -> Tensor:
        return self.encoder.pool(tokens, self.settings.pools.of(num_tokens))

    def forward(self, batch: ClipBatch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """(loss, figures) of a batch."""
        device = self.log_scale.device
        tokens = self._tokens(batch.pixels.to(device), batch.num_tokens, "flux")
        pooled = self._pool(tokens, batch.num_tokens).float()
        # Projected instead of clamped where it is used: at the bound it still has a gradient.
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(1 / self.settings.temperature_min))
        text = self._text(batch, device)
        with torch.autocast(device.type, enabled=False):
            video = gather_rows(F.normalize(self.align(pooled), dim=-1))
            ids = None if batch.ids is None else gather_rows(batch.ids.to(device))
            loss = contrastive_loss(video, gather_rows(text.float()), self.log_scale.exp(), ids)
            name = "contrastive" if batch.kind is None else f"contrastive_{batch.kind}"
            figures: dict[str, float | Tensor] = {
                name: loss.detach(),
                "scale": self.log_scale.exp().detach(),
                "tokens": float(sum(tokens.lengths)),
            }
            for name, head in self.attributes.items():
                wrong = label_loss(head(pooled), batch.labels[name].to(device))
                figures[name] = wrong.detach()
                loss = loss + self.settings.attribute_weight * wrong
            for name, head in self.patches.items():
                patch_labels = [
                    labels.flatten()[k.cpu()]
                    for labels, k in zip(batch.patches[name], tokens.kept, strict=True)
                ]
                scores = head(tokens.packed.float())
                share = torch.ones(scores.shape[1], device=device)
                share[BACKGROUND] = self.settings.patch_background
                wrong = label_loss(scores, torch.cat(patch_labels).to(device), share)
                figures[f"patch_{name}"] = wrong.detach()
                loss = loss + self.settings.patch_weight * wrong
        return loss, figures

    def _text(self, batch: ClipBatch, device: torch.device) -> Tensor:
        if self.settings.train_text:
            return self.text_tower(batch.captions)
        if batch.text is not None:
            return batch.text.to(device)
        tower = self._frozen_tower[0]
        assert isinstance(tower, Tower)
        return tower.to(device).embed(batch.captions)

    def head_state(self) -> dict[str, Tensor]:
        """Tensors of the CLIP head: all but encoder and text tower, by name; and which pools it reads."""
        outside = ("encoder.", "text_tower.")
        head = {k: v for k, v in self.state_dict().items() if not k.startswith(outside)}
        return {**head, POOLS: self.settings.pools.to_tensor()}


def label_loss(scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of (N, classes) with (N,) classes, negative ones left out, or (N, classes) shares.

    weight: (classes,), how much each class counts in the mean.
    """
    if labels.is_floating_point():
        return F.cross_entropy(scores, labels, weight)
    known = labels >= 0
    return F.cross_entropy(scores[known], labels[known], weight) if known.any() else 0.0 * scores.sum()


def hits(scores: Tensor, labels: Tensor) -> tuple[int, int]:
    """(Rows whose best class is right, rows that have a right class); labels as for `label_loss`."""
    best = scores.argmax(dim=1)
    if labels.is_floating_point():
        return int((labels.gather(1, best[:, None]) > 0).sum()), len(labels)
    return int((best == labels).sum()), int((labels >= 0).sum())


def set_image_positions(encoder: FluxViT, how: ImagePositions | None) -> None:
    """How the position table serves a single frame; None leaves the encoder's own way."""
    if how is not None:
        encoder.config = encoder.config.replace(image_positions=how)


def load_clip_head(model: ClipModel, path: str) -> None:
    """Continue from an earlier stage's `alignment.safetensors`; raises CheckpointError when it does not fit.

    Heads of attributes and patches are taken where both have them.
    """
    tensors = read_tensors(path)
    report = load_tensors(model, tensors, strict=False)
    lost = [
        k
        for k in model.head_state()
        if k not in report.loaded and not k.startswith(("attributes.", "patches.", POOLS))
    ]
    if lost:
        raise CheckpointError(f"{path} does not fit the recipe's CLIP head ({lost[0]}): {report}.")
