"""vid-TLDR token merging inside the first blocks, the paper's alternative to selection (supplement Table 2).

Every token enters; after the attention of each of the first blocks the most alike tokens are joined until a
target is left. Tokens whose attention is spread out count as background and add nothing to what they join
(Choi et al., CVPR 2024). Positions in the sequence alternate between two sets: the even ones may join an odd
one, so that at most half of the tokens go per block; the cls token (position 0) never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.errors import BudgetError
from encoder.layers import QUERY_CHUNK, Block, Segment

EPSILON = 1e-12  # makes 0 / 0 zero where all tokens are equal

MergeBy = Literal["branch", "sum"]


class Merging(NamedTuple):
    """targets: patch tokens to leave after each of the first blocks; by: what likeness is measured on."""

    targets: tuple[int, ...]
    by: MergeBy = "branch"

    @staticmethod
    def of(value: Sequence[int] | Merging | None) -> Merging:
        """Targets alone merge as released, None not at all; raises BudgetError for targets below 1."""
        merging = value if isinstance(value, Merging) else Merging(tuple(value or ()))
        if min(merging.targets, default=1) < 1:
            raise BudgetError(f"Merging must leave at least 1 token, not {min(merging.targets)}.")
        if merging.by not in get_args(MergeBy):
            raise BudgetError(f"Merging goes by {' or '.join(get_args(MergeBy))}, not {merging.by!r}.")
        return merging


NO_MERGING = Merging(())


def vid_tldr_schedule(num_tokens: int, num_patches: int = 0) -> tuple[int, ...]:
    """Tokens left after each of the first blocks, as in supplement Table 2: 1024 -> (2048, 1536, 1024) and
    512 -> (1024, 512); other counts in proportion, with three steps from 1024 on (UNVERIFIED for those).

    num_patches: tokens that enter; where halving cannot reach `num_tokens` in so few steps, more follow.
    """
    if num_tokens < 1:
        raise BudgetError(f"A token budget must be at least 1, not {num_tokens}.")
    targets = (
        [2 * num_tokens, 2 * num_tokens - num_tokens // 2, num_tokens]
        if num_tokens >= 1024
        else [2 * num_tokens, num_tokens]
    )
    left = num_patches
    for target in targets:
        left = max(target, left - left // 2)
    while left > num_tokens:
        targets.append(num_tokens)
        left = max(num_tokens, left - left // 2)
    return tuple(targets)


def saliency(concentration: Tensor) -> Tensor:
    """Foreground score of each token: (B, N), the sum of p log p of its attention -> (B, N) from 0 to 1.

    Below the clip's mean is background, 0; the rest is stretched to 0..1.
    """
    scores = concentration - concentration.amin(dim=1, keepdim=True)
    scores = scores / scores.amax(dim=1, keepdim=True).clamp_min(EPSILON)
    mean = scores.mean(dim=1, keepdim=True)
    above = scores - mean
    return (above / above.amax(dim=1, keepdim=True).clamp_min(EPSILON)).masked_fill(scores < mean, 0.0)


def concentration(q: Tensor, k: Tensor) -> Tensor:
    """Sum of p log p of each token's attention, p being the mean over heads: (B, H, N, d) twice -> (B, N).

    Computed over chunks of queries, so that no N x N table of all heads is held.
    """
    keys = k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
    parts = []
    for chunk in q.float().split(QUERY_CHUNK, dim=-2):
        mean = (chunk @ keys).softmax(dim=-1).mean(dim=1)
        parts.append(-torch.special.entr(mean).sum(dim=-1))
    return torch.cat(parts, dim=1)


def merge_salient(
    x: Tensor, salience: Tensor, target: int, *, cls: bool = True, metric: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Join tokens until `target` are left, or half.

    x: (B, N, C); salience: (B, N); metric: (B, N, D) on which likeness is measured, None for x. Returns the
    tokens (B, M, C) in the published order (even ones that stayed, then all odd ones) and which position each
    had before, (B, M). cls: the first token is cls and stays. Each round the even tokens that are most alike
    to an odd one (by cosine) are added to it, weighted by their salience.
    """
    batch, count, _ = x.shape
    # One less than the even tokens, which the published code forgets: it can lose cls.
    remove = max(min(count - target, (count - 1) // 2 if cls else count // 2), 0)
    places = torch.arange(count, device=x.device).expand(batch, count)
    if not remove:
        return x, places
    with torch.no_grad():
        unit = F.normalize((x if metric is None else metric).float(), dim=-1)
        likeness = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        if cls:
            likeness[:, 0] = -torch.inf
        best, partner = likeness.max(dim=-1)
        ranked = best.argsort(dim=-1, descending=True, stable=True)
        joining, staying = ranked[:, :remove], ranked[:, remove:].sort(dim=1).values
        into = partner.gather(1, joining)
        weight = salience[:, ::2].gather(1, joining)
    even, odd = x[:, ::2].float(), x[:, 1::2].float()
    moved = _rows(even, joining) * weight.unsqueeze(-1)
    joined = odd.scatter_add(1, into.unsqueeze(-1).expand_as(moved), moved)
    left = torch.cat([_rows(even, staying), joined], dim=1).to(x.dtype)
    return left, torch.cat([places[:, ::2].gather(1, staying), places[:, 1::2]], dim=1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, C), index (B, M) -> (B, M, C)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def merging_block(
    block: Block,
    x: Tensor,
    segments: Sequence[Segment],
    kept: Sequence[Tensor],
    target: int,
    by: MergeBy = "branch",
) -> tuple[Tensor, list[Segment], list[Tensor]]:
    """One block that merges between its attention and its MLP, as the first public release did.

    x: packed (N, C) with cls first in each clip; kept: per segment (clips, K) places of the patch tokens.
    target: patch tokens to leave; by: see Merging. Returns the first three, smaller. Stochastic depth is not
    applied: merging is for trained weights.
    """
    q, k, v = block.attn.qkv_of(block.norm1(x))
    attended = block.attn.mix(q, k, v, segments)
    x = block.ls1(x, attended)
    metric = attended.float() * block.ls1.gamma.float() if by == "branch" else x
    parts, shorter, places = [], [], []
    rows = x.split([segment.clips * segment.length for segment in segments])
    per_segment = [part.split([len(r) for r in rows]) for part in (q, k, metric)]
    for segment, tokens, queries, keys, alike, before in zip(segments, rows, *per_segment, kept, strict=True):
        if segment.length <= target + 1:
            parts.append(tokens)
            shorter.append(segment)
            places.append(before)
            continue
        heads = [t.view(*segment, block.attn.heads, -1).transpose(1, 2) for t in (queries, keys)]
        with torch.no_grad():
            salient = saliency(concentration(*heads))
        left, origin = merge_salient(
            tokens.view(*segment, -1), salient, target + 1, metric=alike.view(*segment, -1)
        )
        parts.append(left.flatten(0, 1))
        shorter.append(Segment(segment.clips, left.shape[1]))
        places.append(before.gather(1, origin[:, 1:] - 1))
    x = parts[0] if len(parts) == 1 else torch.cat(parts)
    return block.ls2(x, block.mlp(block.norm2(x))), shorter, places


def in_raster_order(
    x: Tensor, segments: Sequence[Segment], kept: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Tokens of every clip sorted by place, cls still first: packed (N, C) and (clips, K) per segment."""
    parts, places = [], []
    for segment, tokens, chosen in zip(
        segments, x.split([s.clips * s.length for s in segments]), kept, strict=True
    ):
        ordered, order = chosen.sort(dim=1)
        clips = tokens.view(*segment, -1)
        parts.append(torch.cat([clips[:, :1], _rows(clips[:, 1:], order)], dim=1).flatten(0, 1))
        places.append(ordered)
    return torch.cat(parts), places
