"""Prompts of a training batch laid end to end, without padding; positions that all begin with are there once.

Causal attention gives the positions of a common beginning (system prompt, start of the user's turn) the same
states in every prompt, so they are computed once and every prompt attends to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llm_bridge.branches import branch_numbers, common_length, first_label, sees
from llm_bridge.prompt import PLACEHOLDER, Prompt


@dataclass(frozen=True)
class Packing:
    """Where the positions of prompts lie: first `shared` of all, then each prompt's own ones.

    lengths: own positions of each prompt, at least one. N = shared + sum(lengths) positions in all; L is the
    longest of the lengths. branched: the prompts, if any of them has branches.
    """

    shared: int
    lengths: tuple[int, ...]
    branched: tuple[Prompt, ...] = ()

    @staticmethod
    def of(prompts: Sequence[Prompt]) -> Packing:
        """Without the last position of each prompt, which predicts nothing."""
        ends = [max(1, len(p) - (p.ids[-1] != PLACEHOLDER)) for p in prompts]
        common = common_length([p.ids for p in prompts]) if len(prompts) > 1 else 0
        limits = [_shareable(prompt, end) for prompt, end in zip(prompts, ends, strict=True)]
        shared = min(common, *limits)
        branched = tuple(prompts) if any(prompt.branches for prompt in prompts) else ()
        return Packing(shared, tuple(end - shared for end in ends), branched)

    def of_prompts(self, values: Sequence[Sequence[int]]) -> list[int]:
        """One value per packed position (N) from one per position of each prompt."""
        own = [row[self.shared : self.shared + n] for row, n in zip(values, self.lengths, strict=True)]
        return [*values[0][: self.shared], *(value for row in own for value in row)]

    @cached_property
    def positions(self) -> list[int]:
        """Position in its prompt, of each packed one (N)."""
        if self.branched:
            return self.of_prompts([branch_numbers(p, len(p))[1].tolist() for p in self.branched])
        return self.of_prompts([range(self.shared + length) for length in self.lengths])

    @cached_property
    def padded(self) -> Tensor:
        """Packed position of each place in the padded rectangle of own positions (B, L); 0 at padding."""
        rows = torch.zeros(len(self.lengths), max(self.lengths), dtype=torch.long)
        rows[self._filled] = torch.arange(self.shared, self.shared + sum(self.lengths))
        return rows

    @cached_property
    def places(self) -> Tensor:
        """The reverse for own positions: place in the flattened rectangle (N - shared,)."""
        return self._filled.flatten().nonzero().squeeze(1)

    @cached_property
    def gaps(self) -> Tensor:
        """Places of the flattened rectangle that are padding."""
        return (~self._filled).flatten().nonzero().squeeze(1)

    @cached_property
    def _filled(self) -> Tensor:
        return torch.arange(max(self.lengths)) < torch.tensor(self.lengths).unsqueeze(1)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Additive causal mask of own positions (1, L, shared + L), or (B, ...) where branches hide from each
        other; padding on the right needs no other."""
        longest = max(self.lengths)
        hidden = torch.ones(1, longest, self.shared + longest, dtype=torch.bool).triu(self.shared + 1)
        if self.branched:
            keys = torch.stack([branch_numbers(p, self.shared + longest)[0] for p in self.branched])
            hidden = hidden | ~sees(keys[:, self.shared :], keys)
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


def _shareable(prompt: Prompt, end: int) -> int:
    """How long a common beginning may be: before visuals, branches and what predicts a label, one position
    left."""
    visual = min((start for start, _ in prompt.spans), default=end)
    beginning = prompt.branches[0][0] if prompt.branches else end
    return max(0, min(visual, first_label(prompt) - 1, beginning, end - 1))


def unpack(x: Tensor, packing: Packing, *, shared: bool) -> Tensor:
    """Packed (N, H, d) -> padded rows (B, H, L, d), or (B, H, shared + L, d) with the shared ones before."""
    padded: Tensor = _Unpack.apply(x, packing, packing.shared if shared else 0)
    return padded


def pack(x: Tensor, packing: Packing) -> Tensor:
    """Padded rows (B, H, L, d) -> packed own positions (N - shared, H, d); gradients at padding are 0."""
    packed: Tensor = _Pack.apply(x, packing)
    return packed


def _by_head(index: Tensor, heads: int, length: int) -> Tensor:
    """Places among (B, L) -> places among (B, H, L), (places, H)."""
    row = index.div(length, rounding_mode="floor") * (heads * length) + index % length
    return row.unsqueeze(1) + torch.arange(heads) * length


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing, shared: int) -> Tensor:
        count, heads, dim = x.shape
        ctx.packing, ctx.shared, ctx.count = packing, shared, count
        rows = packing.padded
        if shared:
            rows = torch.cat([torch.arange(shared).expand(len(rows), -1), rows], 1)
        # One copy of d contiguous values per position and head, straight into the layout of the products.
        index = (rows * heads).unsqueeze(1) + torch.arange(heads).view(1, heads, 1)
        found = x.reshape(count * heads, dim).index_select(0, index.flatten())
        return found.view(len(rows), heads, -1, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        packing, shared, grad = ctx.packing, ctx.shared, grads[0].contiguous()
        heads, length, dim = grad.shape[1:]
        places = packing.places
        own = length - shared
        places = places.div(own, rounding_mode="floor") * length + places % own + shared
        index = _by_head(places, heads, length)
        result = grad.new_zeros(ctx.count, heads, dim)
        flat = grad.view(-1, dim)
        torch.index_select(flat, 0, index.flatten(), out=result[packing.shared :].view(-1, dim))
        if shared:
            exact = torch.promote_types(grad.dtype, torch.float32)
            result[:shared] = grad[:, :, :shared].sum(0, dtype=exact).transpose(0, 1)
        return result, None, None


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        _, heads, length, dim = x.shape
        ctx.packing, ctx.shape = packing, x.shape
        index = _by_head(packing.places, heads, length)
        return x.reshape(-1, dim).index_select(0, index.flatten()).view(-1, heads, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        packing, grad = ctx.packing, grads[0].contiguous()
        batch, heads, length, dim = ctx.shape
        rows = (packing.padded - packing.shared).clamp_min(0)
        index = (rows * heads).unsqueeze(1) + torch.arange(heads).view(1, heads, 1)
        result = grad.view(-1, dim).index_select(0, index.flatten())
        result[_by_head(packing.gaps, heads, length).flatten()] = 0
        return result.view(batch, heads, length, dim), None
