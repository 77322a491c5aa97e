"""What one new token of each answer sees of its own keys and values, in buffers that all answers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class AttendByRow:
    """Answer by answer, on its own positions only: no answer's sums depend on the others (CPUs).

    lengths: positions of each answer, the new one among them.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = tuple(lengths)

    def __call__(self, queries: Tensor, buffer: Tensor, window: int | None) -> Tensor:
        groups, width = buffer.shape[1] // 2, buffer.shape[3]
        # The query heads of a group stand as so many queries, which are never masked.
        grouped = queries.view(len(queries), groups, -1, width)
        mixed = []
        for row, length in enumerate(self._lengths):
            start = 0 if window is None else max(0, length - window)
            seen = buffer[row : row + 1, :, start:length]
            mixed.append(
                F.scaled_dot_product_attention(grouped[row : row + 1], seen[:, :groups], seen[:, groups:])
            )
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).reshape(len(queries), -1)


class AttendMasked:
    """All answers at once over the whole buffers, by a mask: the same operations at every step (GPUs).

    lengths: (B,), positions of each answer, the new one among them. capacity: of the buffers.
    """

    def __init__(self, lengths: Tensor, capacity: int) -> None:
        self._lengths = lengths[:, None]
        self._index = torch.arange(capacity, device=lengths.device)
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, queries: Tensor, buffer: Tensor, window: int | None) -> Tensor:
        if window not in self._masks:
            seen = self._index < self._lengths
            if window is not None:
                seen &= self._index >= self._lengths - window
            self._masks[window] = seen[:, None, None]
        groups = buffer.shape[1] // 2
        mixed = F.scaled_dot_product_attention(
            queries[:, :, None],
            buffer[:, :groups],
            buffer[:, groups:],
            attn_mask=self._masks[window],
            enable_gqa=True,
        )
        return mixed.reshape(len(queries), -1)
