"""The head of Flux-CLIP: pooled features of an encoder -> the space of a text tower, and attribute heads.

    head = read_clip_head("app/pretrained")          # alignment.safetensors of a `training.clip` run
    head.embed(encoder.pool(tokens, head.pools.nearest(128)))    # (B, dim), comparable with texts

A pooling head that no stage trained gives features that mean nothing, and nothing in a weight file tells it
from the others: so a run notes its heads where its weights are, and what uses them reads them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.checkpoint import load_tensors, read_tensors
from encoder.errors import CheckpointError, ModelError
from llm_bridge.text_encoders.text_towers import TextTower

ALIGNMENT = "alignment.safetensors"
POOLS = "pools"  # of the tensor in alignment.safetensors


@dataclass(frozen=True)
class TrainedPools:
    """default: the head of all token counts, unless `by_count` names one for each that was trained.

    The default of the default is 1, the head of every Flux-CLIP recipe that wrote no such note.
    """

    default: int = 1
    by_count: Mapping[int, int] = field(default_factory=dict)

    def of(self, num_tokens: int | None) -> int:
        """The head of exactly this count, in training."""
        return self.by_count.get(num_tokens or 0, self.default)

    def nearest(self, num_tokens: int | None) -> int:
        """The head of the trained count nearest to this one (None: every token), in evaluation."""
        if not self.by_count:
            return self.default
        wanted = max(self.by_count) if num_tokens is None else num_tokens
        return self.by_count[min(self.by_count, key=lambda count: abs(count - wanted))]

    def to_tensor(self) -> Tensor:
        """int64 (1 + counts, 2): rows of count and head, the first one 0 and the default."""
        return torch.tensor([[0, self.default], *map(list, sorted(self.by_count.items()))])

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> TrainedPools:
        """What `to_tensor` made among an alignment's tensors, the default without; raises CheckpointError."""
        if POOLS not in tensors:
            return TrainedPools()
        rows = tensors[POOLS]
        if rows.dtype != torch.int64 or rows.ndim != 2 or rows.shape[1] != 2 or not len(rows):
            raise CheckpointError("The alignment's pools are not rows of token count and pooling head.")
        (_, default), *others = rows.tolist()
        return TrainedPools(default, dict(others))

    def __str__(self) -> str:
        if not self.by_count:
            return str(self.default)
        return ", ".join(f"{count}: {head}" for count, head in sorted(self.by_count.items()))


@dataclass(frozen=True)
class ClipHead:
    """align: pooled feature (B, clip_embed_dim) -> text space; heads: attribute name -> class scores; pools:
    the encoder's pooling heads that were trained with it."""

    align: nn.Module
    heads: Mapping[str, nn.Module]
    pools: TrainedPools = field(default_factory=TrainedPools)

    @property
    def dim(self) -> int:
        """Width of the text space."""
        last = [module for module in self.align.modules() if isinstance(module, nn.Linear)][-1]
        return last.out_features

    @property
    def modules(self) -> list[nn.Module]:
        """All of it, for a hash of the weights."""
        return [self.align, *self.heads.values()]

    def check(self, tower: TextTower) -> None:
        """Raises ModelError when its vectors cannot be compared with those of a text tower."""
        if self.dim != tower.dim:
            raise ModelError(
                f"The alignment leads to {self.dim} dimensions, but the text tower has {tower.dim}: name "
                "the tower that it was trained with (--text-tower)."
            )

    @torch.inference_mode()
    def embed(self, pooled: Tensor) -> Tensor:
        """(B, clip_embed_dim) -> unit vectors (B, dim), float32."""
        return F.normalize(self.align(pooled.float()), dim=-1)

    @torch.inference_mode()
    def scores(self, attribute: str, pooled: Tensor) -> Tensor:
        """Class scores (B, classes) of an attribute."""
        return self.heads[attribute](pooled.float())

    def to(self, device: torch.device) -> ClipHead:
        """On another device."""
        for module in self.modules:
            module.to(device)
        return self


def read_clip_head(path: str | Path) -> ClipHead:
    """From `alignment.safetensors` of a `training.clip` run, its folder, or a file of the released layout.

    A linear map, or a LayerNorm and a linear map, under `align.` or `vision_align.`; heads under
    `attributes.NAME.`. Raises CheckpointError.
    """
    path = Path(path)
    tensors = read_tensors(path / ALIGNMENT if path.is_dir() else path)
    prefix = "align." if any(key.startswith("align.") for key in tensors) else "vision_align."
    align = _build(_below(tensors, prefix), path)
    names = sorted({key.split(".")[1] for key in tensors if key.startswith("attributes.")})
    heads = {name: _build(_below(tensors, f"attributes.{name}."), path) for name in names}
    return ClipHead(align, heads, TrainedPools.of_tensors(tensors))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _build(tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The module whose tensors these are: Linear, or Sequential of LayerNorm and Linear."""
    if "weight" in tensors and tensors["weight"].ndim == 2:
        module: nn.Module = _linear(tensors, "")
    elif "1.weight" in tensors and tensors["1.weight"].ndim == 2:
        module = nn.Sequential(nn.LayerNorm(tensors["1.weight"].shape[1]), _linear(tensors, "1."))
    else:
        raise CheckpointError(f"{path} holds no alignment with a text tower.")
    load_tensors(module, tensors)
    return module.eval().requires_grad_(False)


def _linear(tensors: Mapping[str, Tensor], prefix: str) -> nn.Linear:
    out_features, in_features = tensors[f"{prefix}weight"].shape
    return nn.Linear(in_features, out_features, bias=f"{prefix}bias" in tensors)
