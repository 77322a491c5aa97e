"""The text half of MobileCLIP-B: the tower that InternVideo2's small CLIP models align with.

    tower = MobileClipText.load("weights/mobileclip_blt.pt")

Own implementation of the published layout (arXiv 2311.17049), which the file keeps under `text_encoder.`:

    embedding_layer.weight                            (49408, 512)
    positional_embedding.pos_embed.pos_embed          (1, 1, 77, 512)
    transformer.N.pre_norm_mha.0.weight, .bias        (512,)           LayerNorm before the attention
    transformer.N.pre_norm_mha.1.qkv_proj.weight      (1536, 512)      q, k, v one after the other; .bias
    transformer.N.pre_norm_mha.1.out_proj.weight      (512, 512)       .bias
    transformer.N.pre_norm_ffn.0.weight, .bias        (512,)           LayerNorm before the MLP
    transformer.N.pre_norm_ffn.1.weight               (2048, 512)      .bias
    transformer.N.pre_norm_ffn.4.weight               (512, 2048)      .bias
    final_layer_norm.weight, .bias                    (512,)
    projection_layer                                  (512, 512)       applied as x @ projection_layer

Known from two public readers of that file (InternVideo2's and open_clip's); the file itself was not opened.
UNVERIFIED: that Flux-CLIP uses it too, which its equal baselines suggest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.checkpoint import build, read_tensors
from encoder.errors import CheckpointError

PREFIX = "text_encoder."


@dataclass(frozen=True)
class MobileClipConfig:
    """Dimensions; the defaults are MobileCLIP-B's."""

    dim: int = 512
    layers: int = 12
    heads: int = 8
    mlp_dim: int = 2048
    vocabulary: int = 49408
    context: int = 77
    projection: int = 512


class MobileClipText(nn.Module):
    """A causal pre-norm transformer whose last real token, the end of text, is projected."""

    def __init__(self, config: MobileClipConfig = MobileClipConfig()) -> None:
        super().__init__()
        self.config = config
        self.embedding_layer = nn.Embedding(config.vocabulary, config.dim)
        self.positional_embedding = _Positions(config.context, config.dim)
        self.transformer = nn.ModuleList(
            _Layer(config.dim, config.heads, config.mlp_dim) for _ in range(config.layers)
        )
        self.final_layer_norm = nn.LayerNorm(config.dim)
        self.projection_layer = nn.Parameter(torch.empty(config.dim, config.projection))
        nn.init.normal_(self.projection_layer, std=config.dim**-0.5)

    @staticmethod
    def load(path: str | Path) -> MobileClipText:
        """From a MobileCLIP file, or one of its text half alone; sizes follow from the tensors.

        Raises CheckpointError when it is missing, damaged, or of another layout.
        """
        tensors = read_tensors(path)
        if any(name.startswith(PREFIX) for name in tensors):
            tensors = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
        config = _config_of(tensors, path)
        return build(lambda: MobileClipText(config), tensors)

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Token ids (B, L) and the place of each text's end token (B,) -> (B, projection), not normalised."""
        x = self.embedding_layer(ids) + self.positional_embedding(ids.shape[1])
        for layer in self.transformer:
            x = layer(x)
        # Causal: what stands after the end token cannot change it, so no padding mask is needed.
        x = self.final_layer_norm(x[torch.arange(len(x), device=x.device), ends])
        return x @ self.projection_layer


class _Positions(nn.Module):
    """Learnt positions (1, 1, context, dim), nested as in the published file."""

    def __init__(self, context: int, dim: int) -> None:
        super().__init__()
        self.pos_embed = nn.Module()
        self.pos_embed.pos_embed = nn.Parameter(torch.zeros(1, 1, context, dim))

    def forward(self, length: int) -> Tensor:
        """(1, length, dim)."""
        table = self.pos_embed.pos_embed
        assert isinstance(table, Tensor)
        return table[0, :, :length]


class _Attention(nn.Module):
    """Causal self-attention with one projection for q, k and v."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv_proj(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    """Attention and MLP, each behind a LayerNorm; the numbers in the names are those of the file."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.pre_norm_mha = nn.Sequential(nn.LayerNorm(dim), _Attention(dim, heads))
        self.pre_norm_ffn = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, mlp_dim), nn.GELU(), nn.Identity(), nn.Linear(mlp_dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + self.pre_norm_mha(x)
        return x + self.pre_norm_ffn(x)


def _config_of(tensors: dict[str, Tensor], path: str | Path) -> MobileClipConfig:
    """Sizes of a file's text half; heads are 64 wide, as in all MobileCLIP models."""
    try:
        vocabulary, dim = tensors["embedding_layer.weight"].shape
        layers = {int(name.split(".")[1]) for name in tensors if name.startswith("transformer.")}
        return MobileClipConfig(
            dim=dim,
            layers=max(layers) + 1,
            heads=max(1, dim // 64),
            mlp_dim=tensors["transformer.0.pre_norm_ffn.1.weight"].shape[0],
            vocabulary=vocabulary,
            context=tensors["positional_embedding.pos_embed.pos_embed"].shape[2],
            projection=tensors["projection_layer"].shape[1],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is not a MobileCLIP file: its text half lacks {error}.") from error
