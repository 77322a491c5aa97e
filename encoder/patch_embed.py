"""Dual patch norm: RMSNorm on raw patches, linear projection, RMSNorm on embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.norm import RMSNorm


class PatchEmbed(nn.Module):
    """Non-overlapping 1 x P x P patches, normalised before and after their projection (paper: DPN).

    The paper says LayerNorm; the released model uses RMSNorm without bias, and so does this.
    """

    def __init__(self, embed_dim: int, patch_size: int = 14, channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(
            channels, embed_dim, (1, patch_size, patch_size), stride=(1, patch_size, patch_size)
        )
        self.norm = RMSNorm(embed_dim)
        self.norm_before = RMSNorm(channels * patch_size**2)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, T, H, W), H and W multiples of P -> (B, T, L, C) with L = (H/P) * (W/P)."""
        size = self.patch_size
        batch, channels, frames, height, width = pixels.shape
        patches = (
            pixels.view(batch, channels, frames, height // size, size, width // size, size)
            .permute(0, 2, 3, 5, 4, 6, 1)  # [B, T, h, w, P, P, 3]: channel last, as norm_before is indexed
            .reshape(batch, frames, -1, size * size * channels)
        )
        # A convolution whose stride is its kernel is one linear map of the flattened patch. The first norm's
        # weight joins that map and its scale follows it, which spares three passes over the raw patches.
        weight = self.proj.weight.squeeze(2).permute(0, 2, 3, 1).flatten(1) * self.norm_before.weight
        scale = self.norm_before.scale(patches)
        return self.norm(torch.addcmul(self.proj.bias, F.linear(patches, weight), scale))  # type: ignore[arg-type]
