"""VisionTokens: the encoder's output, with the raster index and time of every token that was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Patch grid of one clip: frames x rows x columns."""

    frames: int
    height: int
    width: int

    @property
    def size(self) -> int:
        """Number of patches, frames * height * width."""
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class VisionTokens:
    """Encoder output for a batch of clips whose kept counts and grids may differ.

    Tokens lie packed, clip after clip, so that a clip costs only its own tokens.

    packed: (sum K_i, C) patch tokens after the last block that was run, without the cls token;
        inside a clip they are in raster (frame, row, column) order, hence sorted in time.
    cls: (B, C) cls token of each clip.
    kept: per clip, (K_i,) int64 ascending raster indices into that clip's grid.
    grids: per clip, its patch grid.
    times_s: per clip, presentation time in seconds of each of its frames, or None when unknown.
    hidden: packed outputs (sum (1 + K_i), C) of the blocks that were asked for, cls first in each clip.
    summary: (B, clip_embed_dim) pooled feature of each clip, where it was asked for.
    """

    packed: Tensor
    cls: Tensor
    kept: tuple[Tensor, ...]
    grids: tuple[Grid, ...]
    times_s: tuple[tuple[float, ...], ...] | None = None
    hidden: tuple[Tensor, ...] = ()
    summary: Tensor | None = None

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def lengths(self) -> list[int]:
        """Kept tokens per clip, [K_0, ..., K_{B-1}]."""
        return [len(k) for k in self.kept]

    @property
    def tokens(self) -> Tensor:
        """(B, K, C), for batches whose clips all kept the same count; ValueError otherwise."""
        if len(set(self.lengths)) != 1:
            raise ValueError(f"clips kept different counts {self.lengths}: iterate with split() instead")
        return self.packed.view(len(self), -1, self.packed.shape[-1])

    def split(self) -> list[Tensor]:
        """Per clip, its tokens (K_i, C)."""
        return list(self.packed.split(self.lengths))

    def frame_of(self, clip: int) -> Tensor:
        """(K_i,) int64: the frame index of each kept token of one clip."""
        grid = self.grids[clip]
        return self.kept[clip] // (grid.height * grid.width)

    def seconds_of(self, clip: int) -> Tensor:
        """(K_i,) float32: presentation time of each kept token of one clip; 0 where unknown."""
        times = () if self.times_s is None else self.times_s[clip]
        if not times:
            return torch.zeros(len(self.kept[clip]), device=self.packed.device)
        return torch.tensor(times, device=self.packed.device)[self.frame_of(clip)]

    def select(self, clip: int) -> VisionTokens:
        """One clip of the batch as a batch of one."""
        return VisionTokens(
            packed=self.split()[clip],
            cls=self.cls[clip : clip + 1],
            kept=(self.kept[clip],),
            grids=(self.grids[clip],),
            times_s=None if self.times_s is None else (self.times_s[clip],),
            summary=None if self.summary is None else self.summary[clip : clip + 1],
        )

    def to(self, *args: object, **kwargs: object) -> VisionTokens:
        """The same tokens on another device or in another dtype (kept indices move device only)."""
        packed = self.packed.to(*args, **kwargs)  # type: ignore[call-overload]
        kept = tuple(k.to(packed.device) for k in self.kept)
        hidden = tuple(h.to(packed) for h in self.hidden)
        summary = None if self.summary is None else self.summary.to(packed)
        return replace(
            self, packed=packed, cls=self.cls.to(packed), kept=kept, hidden=hidden, summary=summary
        )

    @staticmethod
    def concatenate(parts: Sequence[VisionTokens]) -> VisionTokens:
        """Several batches as one, in order."""
        times = [p.times_s for p in parts]
        summaries = [p.summary for p in parts]
        return VisionTokens(
            packed=torch.cat([p.packed for p in parts]),
            cls=torch.cat([p.cls for p in parts]),
            kept=tuple(k for p in parts for k in p.kept),
            grids=tuple(g for p in parts for g in p.grids),
            times_s=None if None in times else tuple(t for p in times for t in p),  # type: ignore[union-attr]
            summary=None if any(s is None for s in summaries) else torch.cat(summaries),  # type: ignore[arg-type]
        )
