"""Positions: the learnable 3-D sin-cos table, its interpolation to any grid, and a cache per grid."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.tokens import Grid


def _sin_cos(dim: int, positions: Tensor) -> Tensor:
    """(N,) positions -> (N, dim): sines, then cosines, of frequencies 10000^(-i / (dim/2))."""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sin_cos_3d(dim: int, grid: Grid) -> Tensor:
    """(1, 1 + T*h*w, dim) float32 table with a zero cls row (method of the released code).

    The first quarter of the channels encodes the frame; of the rest, one half the column, one half the row.
    """
    temporal, spatial = dim // 4, dim - dim // 4
    frame, row, column = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    table = torch.cat(
        [
            _sin_cos(temporal, frame.flatten()),
            _sin_cos(spatial // 2, column.flatten()),
            _sin_cos(spatial // 2, row.flatten()),
        ],
        dim=1,
    )
    return torch.cat([torch.zeros(1, dim, dtype=table.dtype), table]).float().unsqueeze(0)


@lru_cache(maxsize=256)
def _resampling(source: int, target: int, mode: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(target, source) matrix of one axis of `F.interpolate` (align_corners False, no antialias).

    Kept on its device, since a copy in each step would wait for it and cannot be recorded in a CUDA graph.
    """
    # Made on the CPU, also when the model itself is built on another device or in inference mode.
    with torch.inference_mode(False), torch.device("cpu"):
        identity = torch.eye(source)
        if mode == "linear":
            weights = F.interpolate(identity[None], size=target, mode="linear")[0].T
        else:
            weights = F.interpolate(identity[None, ..., None], size=(target, 1), mode="bicubic")[0, :, :, 0].T
        return weights.contiguous().to(device, dtype)


def interpolate(table: Tensor, source: Grid, target: Grid) -> Tensor:
    """Position rows for another grid: linear over time, then bicubic over rows and columns.

    table: (source.size, C). Returns (target.size, C); the table itself when the grids are equal (all three
    extents, not merely their product). Written as matrix products: differentiable and the same on any device.
    """
    if source == target:
        return table
    x = table.view(*source, -1)

    def matrix(before: int, after: int, mode: str) -> Tensor:
        return _resampling(before, after, mode, table.device, table.dtype)

    if source.frames != target.frames:
        x = torch.einsum("ts,shwc->thwc", matrix(source.frames, target.frames, "linear"), x)
    if source.height != target.height:
        x = torch.einsum("gh,thwc->tgwc", matrix(source.height, target.height, "bicubic"), x)
    if source.width != target.width:
        x = torch.einsum("vw,thwc->thvc", matrix(source.width, target.width, "bicubic"), x)
    return x.reshape(target.size, -1)


class PositionCache:
    """Least-recently-used cache of interpolated tables, for inference; changed weights are another key."""

    def __init__(self, entries: int = 8) -> None:
        self._entries = entries
        self._tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, table: Tensor, source: Grid, target: Grid) -> Tensor:
        """`interpolate(table, source, target)` without its graph, once per grid and weight version."""
        if source == target:
            return table
        if table.is_inference():  # no version to notice changed weights by
            return interpolate(table, source, target)
        key = (target, table.data_ptr(), table._version, table.dtype, table.device)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        with torch.inference_mode(False), torch.no_grad():
            rows = interpolate(table, source, target)
        with self._lock:
            self._tables[key] = rows
            while len(self._tables) > self._entries:
                self._tables.popitem(last=False)
        return rows

    def __len__(self) -> int:
        return len(self._tables)

    def __deepcopy__(self, memo: dict[int, object]) -> PositionCache:
        return PositionCache(self._entries)

    def __reduce__(self) -> tuple[type[PositionCache], tuple[int]]:
        return PositionCache, (self._entries,)
