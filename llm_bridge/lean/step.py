"""One decoding step of B answers as a pure function of tensors: the operations of transformers, few of them.

Every rounding is that of transformers' own modules, so the logits are theirs to the bit wherever the products
are. It reads no value of a tensor, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # rows (B, in) -> (B, out)
# Query heads (B, H, d), keys and values (B, 2 G, capacity, d), a layer's window -> (B, H * d).
Attend = Callable[[Tensor, Tensor, int | None], Tensor]


@dataclass(frozen=True)
class LeanLayer:
    """One layer's weights. Norms of transformers have a weight; eps is the model's.

    qkv: rows -> H query, G key and G value heads, d wide each, side by side. heads_norm: weight (H + G, d) of
    a norm over each query and key head. rotates: whether positions turn its heads. window: positions it sees.
    """

    attention_norm: Tensor
    qkv: Product
    heads_norm: Tensor | None
    rotates: bool
    window: int | None
    out: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


@dataclass(frozen=True)
class LeanModel:
    """The weights of a decoder and the numbers of its shape.

    embedding: (V, D). heads, groups: of queries, of keys and values; width: of a head.
    """

    embedding: Tensor
    layers: Sequence[LeanLayer]
    norm: Tensor
    head: Product
    eps: float
    heads: int
    groups: int
    width: int

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of hidden states, keys and values."""
        return self.embedding.dtype


def step(
    model: LeanModel,
    kv: Sequence[Tensor],
    tokens: Tensor,
    places: Tensor,
    turns: tuple[Tensor, Tensor],
    attend: Attend,
) -> Tensor:
    """Append one token to each of B answers; their logits (B, V), float32.

    kv: per layer (B, 2 G, capacity, d), keys before values, written in place. tokens: (B,). places:
    (B * 2 G,), where each head's new position lies among the B * 2 G * capacity. turns: cosines and signed
    sines (B, 1, d) of their positions, see Rotary.
    """
    turned_heads = model.heads + model.groups
    cosines, sines = turns
    hidden = F.embedding(tokens, model.embedding)
    for layer, buffer in zip(model.layers, kv, strict=True):
        rows = rms_norm(hidden, layer.attention_norm, model.eps)
        heads = layer.qkv(rows).view(len(rows), -1, model.width)
        turned = heads[:, :turned_heads]
        if layer.heads_norm is not None:
            turned.copy_(rms_norm(turned, layer.heads_norm, model.eps))
        if layer.rotates:
            torch.add(turned * cosines, turned.roll(model.width // 2, -1) * sines, out=turned)
        buffer.view(-1, model.width).index_copy_(0, places, heads[:, model.heads :].flatten(0, 1))
        hidden = hidden + layer.out(attend(heads[:, : model.heads], buffer, layer.window))
        gate, up = layer.gate_up(rms_norm(hidden, layer.mlp_norm, model.eps)).chunk(2, dim=-1)
        hidden = hidden + layer.down(F.silu(gate) * up)
    return model.head(rms_norm(hidden, model.norm, model.eps)).float()


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, rounded as transformers rounds it."""
    wide = rows.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return weight * wide.mul_(scale).to(rows.dtype) if wide is not rows else weight * (rows * scale)
