"""What the towers of stock models share: where they compute, what they are, and the choice of cells."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoder.budget import Plan
from encoder.checkpoint import weights_hash
from encoder.selection import Selector, select
from encoder.tokens import Grid
from encoder.video.reader import Clip
from llm_bridge.towers.pixels import PixelSettings, to_pixels
from llm_bridge.towers.sizes import VitShape
from llm_bridge.towers.tower import Stage, Tower

LEAST_PER_FRAME = 16  # fewer would cost about as much in the text around a frame
MOST_FPS = 2.0  # their own sampling takes one or two a second


class StockTower(Tower):
    """A vision model of transformers and what maps its output to the language model.

    model: the whole, without adapters. folder: its files. stage: when cells are dropped.
    """

    pixel_default = PixelSettings()
    default_tokens: int = 1024
    _shape: VitShape

    def __init__(self, model: Any, folder: Path, stage: Stage) -> None:
        self.stage = stage
        self._settings = PixelSettings.read(folder, self.pixel_default)

    @property
    @abstractmethod
    def _parts(self) -> tuple[nn.Module, ...]:
        """All modules that it computes with."""

    @property
    @abstractmethod
    def _embedding(self) -> Any:
        """The convolution that embeds patches, which no quantisation touches."""

    @property
    def device(self) -> torch.device:
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.weight.dtype

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for part in self._parts for parameter in part.parameters())

    def digest(self) -> str:
        return f"{weights_hash(*self._parts)} {self.stage}"

    def _described(self, encoder: str, projector: str) -> dict[str, str]:
        shape = f"{self._shape.dim}-d x {self._shape.depth}"
        return {
            "encoder": f"{encoder} {shape}, {self.parameters / 1e6:.1f} M",
            "projector": projector,
            "select": f"{self.stage} the encoder",
        }

    def pixels(self, clip: Clip, plan: Plan) -> Tensor:
        return to_pixels(clip.frames, plan.height, plan.width, self._settings)

    @staticmethod
    def _choose(values: Tensor, grid: Grid, keep: int, selector: Selector, seed: int = 0) -> Tensor:
        """Kept cells (K,) by values (cells, N)."""
        generator = torch.Generator().manual_seed(seed)
        return select(values[None], grid, keep, selector=selector, generator=generator)[0]


def by_frame(cells: Sequence[int], grid: Grid) -> list[list[int]]:
    """Of each frame of a grid, its cells, counted from the frame's first."""
    per_frame = grid.height * grid.width
    found: list[list[int]] = [[] for _ in range(grid.frames)]
    for cell in cells:
        found[cell // per_frame].append(cell % per_frame)
    return found
