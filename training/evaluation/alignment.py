"""Alignment: what Flux-CLIP trained beside the encoder - the way to the text space, and attribute heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.checkpoint import load_tensors, read_tensors
from encoder.errors import CheckpointError


@dataclass(frozen=True)
class Alignment:
    """align: pooled feature (B, clip_embed_dim) -> text space; heads: attribute name -> class scores."""

    align: nn.Module
    heads: Mapping[str, nn.Module]

    @property
    def dim(self) -> int:
        """Width of the text space."""
        last = [m for m in self.align.modules() if isinstance(m, nn.Linear)][-1]
        return last.out_features

    @torch.inference_mode()
    def unit(self, pooled: Tensor) -> Tensor:
        """(B, clip_embed_dim) -> unit vectors (B, dim), float32."""
        return F.normalize(self.align(pooled.float()), dim=-1)

    @torch.inference_mode()
    def scores(self, name: str, pooled: Tensor) -> Tensor:
        """Class scores (B, classes) of an attribute."""
        return self.heads[name](pooled.float())

    def to(self, device: torch.device) -> Alignment:
        """On another device."""
        self.align.to(device)
        for head in self.heads.values():
            head.to(device)
        return self


def read_alignment(path: str | Path) -> Alignment:
    """From `alignment.safetensors` of a `training.clip` run, its folder, or a file of the released layout.

    A linear map, or a LayerNorm and a linear map, under `align.` or `vision_align.`; heads under
    `attributes.NAME.`. Raises CheckpointError.
    """
    path = Path(path)
    tensors = read_tensors(path / "alignment.safetensors" if path.is_dir() else path)
    prefix = "align." if any(key.startswith("align.") for key in tensors) else "vision_align."
    align = _chain(_below(tensors, prefix), path)
    names = sorted({key.split(".")[1] for key in tensors if key.startswith("attributes.")})
    heads = {name: _chain(_below(tensors, f"attributes.{name}."), path) for name in names}
    return Alignment(align, heads)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _chain(tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
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
    wide, narrow = tensors[f"{prefix}weight"].shape
    return nn.Linear(narrow, wide, bias=f"{prefix}bias" in tensors)
