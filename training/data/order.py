"""In which order an epoch goes through a dataset: a pure function of seed and epoch."""

from __future__ import annotations

import torch
from torch import Tensor


def epoch_order(count: int, seed: int, epoch: int, window: int | None = None) -> Tensor:
    """Numbers 0..count-1 in the order of an epoch, int64 (count,).

    window: shuffle blocks of this many neighbours and then inside each block, so that a tar shard or a disk
    is read block by block; None shuffles everything.
    """
    generator = torch.Generator().manual_seed(seed * 7919 + epoch)
    if window is None or window >= count:
        return torch.randperm(count, generator=generator)
    blocks = -(-count // window)
    parts = []
    for block in torch.randperm(blocks, generator=generator).tolist():
        size = min(window, count - block * window)
        parts.append(block * window + torch.randperm(size, generator=generator))
    return torch.cat(parts)
