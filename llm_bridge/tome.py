"""Token merging (ToMe) as in VideoChat-Flash's `tome16_mlp_hd64`, with an output in order of time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def merge_schedule(tokens: int, target: int) -> list[int]:
    """Tokens to remove per round: half while more than half must go, then the rest, e.g. 784 -> 64 gives
    [392, 196, 98, 34]."""
    rounds = []
    while tokens > target:
        rounds.append(min(tokens - target, tokens // 2))
        tokens -= rounds[-1]
    return rounds


def merge_tokens(x: Tensor, target: int, heads: int, positions: Tensor | None = None) -> Tensor:
    """Average the most similar tokens until `target` are left.

    x: (B, K, C), C a multiple of `heads`. positions: (B, K) order of the tokens, raster indices for instance;
    default 0..K-1. Returns (B, min(K, target), C), sorted by the size-weighted mean position of the
    tokens that were merged (the published code leaves them unordered; as sets the rows are equal).

    Per round, even tokens are matched to their most similar odd token by the cosine of their head-mean, and
    the best-matched even tokens join their partner, weighted by how many tokens each already stands for.
    """
    batch, count, dim = x.shape
    sizes = x.new_ones(batch, count, 1)
    if positions is None:
        positions = torch.arange(count, device=x.device).expand(batch, count)
    order = positions.float().unsqueeze(-1)
    for remove in merge_schedule(count, target):
        metric = F.normalize(x.detach().unflatten(-1, (heads, dim // heads)).mean(dim=2), dim=-1)
        similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        best, partner = similarity.max(dim=-1)
        ranked = best.argsort(dim=-1, descending=True)
        joining, staying = ranked[:, :remove], ranked[:, remove:]
        into = partner.gather(1, joining)

        def join(
            values: Tensor, joining: Tensor = joining, staying: Tensor = staying, into: Tensor = into
        ) -> Tensor:
            even, odd = values[:, ::2], values[:, 1::2]
            width = values.shape[-1]
            moved = even.gather(1, joining.unsqueeze(-1).expand(-1, -1, width))
            remaining = even.gather(1, staying.unsqueeze(-1).expand(-1, -1, width))
            merged = odd.scatter_add(1, into.unsqueeze(-1).expand(-1, -1, width), moved)
            return torch.cat([remaining, merged], dim=1)

        total = join(sizes)
        x = join(x * sizes) / total
        order = join(order * sizes.float()) / total.float()
        sizes = total
    sequence = order.squeeze(-1).argsort(dim=-1, stable=True)
    return x.gather(1, sequence.unsqueeze(-1).expand(-1, -1, dim))
