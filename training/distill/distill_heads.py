"""Heads of a student in distillation: from its tokens and pooled features to a teacher's targets.

Discarded after pre-training, unlike the encoder's own aligners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.fluxvit import FluxViT
from encoder.layers import Aligner
from encoder.positions import interpolate, sin_cos_3d
from encoder.tokens import Grid

Kind = Literal["mlp", "linear"]
Sharing = Literal["shared", "per_count"]


class MlpDecoder(nn.Module):
    """Linear, GELU, Linear, LayerNorm, L2 norm."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(in_dim, in_dim), nn.GELU(), nn.Linear(in_dim, out_dim))
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim), unit length, float32."""
        return F.normalize(self.norm(self.head(x)).float(), dim=-1)


@dataclass(frozen=True)
class DecoderConfig:
    """How the student is compared with the teacher.

    kind: "mlp" as in the InternVideo2 distillation, "linear" as the aligners of the released FluxViT. layers,
    final: whether the token counts share the decoders (how many Flux-UMT has is UNVERIFIED; the defaults: one
    per layer for all counts, and one for each count's own pooled feature). positions: add a second learnable
    table at the visible places before the layer decoders, as the InternVideo2 distillation does.
    """

    kind: Kind = "mlp"
    layers: Sharing = "shared"
    final: Sharing = "per_count"
    positions: bool = True


class Decoders(nn.Module):
    """All decoders of a run with `counts` token counts.

    layer_dims, final_dim: widths of the teacher's targets.
    """

    def __init__(
        self,
        encoder: FluxViT,
        layer_dims: Sequence[int],
        final_dim: int,
        counts: int,
        config: DecoderConfig,
    ) -> None:
        super().__init__()
        dim, pooled = encoder.config.embed_dim, encoder.config.clip_embed_dim
        make = {"mlp": MlpDecoder, "linear": Aligner}[config.kind]
        self.layers = nn.ModuleList(
            nn.ModuleList(make(dim, out_dim) for out_dim in layer_dims)
            for _ in range(counts if config.layers == "per_count" else 1)
        )
        self.final = nn.ModuleList(
            make(pooled, final_dim) for _ in range(counts if config.final == "per_count" else 1)
        )
        self._grid = encoder.pos_grid
        self.pos_embed = nn.Parameter(sin_cos_3d(dim, self._grid)) if config.positions else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def positions(self, grid: Grid, kept: Tensor) -> Tensor | None:
        """Rows (B, 1+K, C) of the second table at the kept places, cls first; None without one."""
        if self.pos_embed is None:
            return None
        rows = interpolate(self.pos_embed[0, 1:], self._grid, grid)[kept]
        return torch.cat([self.pos_embed[:, :1].expand(len(rows), -1, -1), rows], dim=1)

    def tokens(
        self, hidden: Tensor, positions: Tensor | None, layer: int, count: int, *, cls: bool
    ) -> Tensor:
        """A student layer (B, 1+K, C), number `layer` of those compared -> unit vectors like the teacher's.

        count: number of the token count; cls: whether the cls token is compared too.
        """
        decoder = self.layers[min(count, len(self.layers) - 1)][layer]  # type: ignore[index]
        x = hidden if positions is None else hidden + positions.to(hidden.dtype)
        return decoder(x if cls else x[:, 1:])

    def clip(self, pooled: Tensor, count: int) -> Tensor:
        """Pooled feature (B, clip_embed_dim) of a count -> unit vector (B, F)."""
        return self.final[min(count, len(self.final) - 1)](pooled)
