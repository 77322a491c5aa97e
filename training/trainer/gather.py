"""Rows of all ranks on every rank, with gradient: what a contrastive loss needs of its batch.

features = gather_rows(features)    # (B, D) on each of W ranks -> (W * B, D), in order of the ranks
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(x: Tensor) -> Tensor:
    """(B, ...) of each rank -> (ranks * B, ...); x itself in one process.

    Every rank must give the same number of rows. The gradient of a row is the sum over the ranks' losses, so
    that DDP's mean over ranks is the gradient of the whole batch's loss, whichever rank holds the row.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x) if x.requires_grad else _collect(x)


def _collect(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return _collect(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        summed = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        first = dist.get_rank() * ctx.rows
        return summed[first : first + ctx.rows]
