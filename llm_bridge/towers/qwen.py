"""What Qwen2.5-VL and Qwen3-VL share: pairs of frames, cells of 2 x 2 patches, positions on three axes.

Positions are (time, row, column). What follows a medium begins behind its larger side, whatever was dropped.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoder.budget import InputSpace, Plan
from encoder.selection import Selector
from encoder.tokens import Grid
from llm_bridge.prompt import Stretch
from llm_bridge.towers.sizes import VitShape
from llm_bridge.towers.stock_tower import LEAST_PER_FRAME, MOST_FPS, StockTower
from llm_bridge.towers.tower import Looked, Stage

# The models take any size; these keep a full budget within some thousand tokens.
SIDES = 224, 448
MOST_FRAMES = 64


class QwenTower(StockTower):
    """Vision model and merger of a Qwen-VL, cells of which span two frames."""

    marks = {"image": "<|image_pad|>", "video": "<|video_pad|>"}  # noqa: RUF012 - never changed
    axes = 3
    kind: str

    def __init__(self, model: Any, folder: Path, stage: Stage) -> None:
        super().__init__(model, folder, stage)
        self._visual, config = model.model.visual, model.config.vision_config
        self._patch, self._merge = int(config.patch_size), int(config.spatial_merge_size)
        self._span = int(config.temporal_patch_size)
        cell = self._patch * self._merge
        sides = tuple(side for side in range(cell, SIDES[1] + 1, cell) if side >= SIDES[0])
        frames = (1, *range(self._span, MOST_FRAMES + 1, self._span))
        self.space = InputSpace(
            frames,
            sides,
            cell,
            frames_per_cell=self._span,
            keeps_aspect=True,
            least_per_frame=LEAST_PER_FRAME,
            most_fps=MOST_FPS,
        )
        self._shape = self._vit_shape(config)

    @abstractmethod
    def _vit_shape(self, config: Any) -> VitShape:
        """By the vision model's settings."""

    @abstractmethod
    def _encode(self, rows: Tensor, patches: Tensor, grid: Grid, kept: Tensor | None) -> Tensor:
        """Embeddings of the kept cells (None: of all), which alone are computed.

        rows: values of patches (T, cells, merge * merge, N). patches: the same, embedded, without positions.
        """

    @property
    def _parts(self) -> tuple[nn.Module, ...]:
        return (self._visual,)

    @property
    def _embedding(self) -> Any:
        return self._visual.patch_embed.proj

    def describe(self) -> dict[str, str]:
        merged = f"merges {self._merge} x {self._merge} patches of {self._span} frames"
        return self._described(self.kind, merged)

    # -- price ----------------------------------------------------------------------------------------------

    def features(self, plan: Plan) -> list[float]:
        embedded, computed, cells = self._counts(plan)
        return self._shape.features(plan.grid.frames, embedded, computed, cells)

    def mib(self, plan: Plan) -> float:
        embedded, computed, _ = self._counts(plan)
        return self._shape.mib(embedded, computed, self.dtype.itemsize)

    def _counts(self, plan: Plan) -> tuple[int, int, int]:
        """Patches embedded, patches computed, cells merged."""
        cells = plan.grid.size if self.stage == "after" else plan.keep
        return plan.grid.size * self._merge**2, cells * self._merge**2, cells

    def fingerprint(self) -> list[Any]:
        return [self.kind, vars(self._shape), self._merge, self.stage, str(self.dtype)]

    # -- looking --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def look(
        self,
        pixels: Tensor,
        plan: Plan,
        selector: Selector,
        times_s: Sequence[float] = (),
        seed: int = 0,
    ) -> Looked:
        grid = replace(plan, frames=pixels.shape[1]).grid
        rows = self._rows(pixels)
        patches = self._embed(rows)
        if self.stage == "before":
            kept = self._choose(patches.flatten(2).flatten(0, 1), grid, plan.keep, selector, seed)
            return Looked(self._encode(rows, patches, grid, kept), kept)
        embeddings = self._encode(rows, patches, grid, None)
        scored = embeddings if selector == "evs" else patches.flatten(2).flatten(0, 1)
        kept = self._choose(scored, grid, plan.keep, selector, seed)
        return Looked(embeddings[kept], kept)

    @torch.inference_mode()
    def select(self, pixels: Tensor, plan: Plan, selector: Selector) -> Tensor:
        if selector == "evs" and self.stage == "after":  # it goes by what the encoder makes
            return self.look(pixels, plan, selector).kept
        grid = replace(plan, frames=pixels.shape[1]).grid
        patches = self._embed(self._rows(pixels)).flatten(2).flatten(0, 1)
        return self._choose(patches, grid, plan.keep, selector)

    def _rows(self, pixels: Tensor) -> Tensor:
        """Pixels (3, T, H, W) as the model takes them: (T / 2, cells, merge * merge, values of a patch)."""
        frames = pixels.transpose(0, 1).to(self.device, self.dtype)
        if missing := -len(frames) % self._span:  # the last frame is repeated
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        cells = self._in_cells(frames, self._patch)  # (T, cells, m * m, C, p, p)
        paired = cells.unflatten(0, (-1, self._span)).permute(0, 2, 3, 4, 1, 5, 6)
        return paired.flatten(3)

    def _in_cells(self, grid: Tensor, patch: int = 1) -> Tensor:
        """(T, C, rows * patch, columns * patch) to (T, cells, merge * merge, C, patch, patch)."""
        split = grid.unflatten(3, (-1, self._merge, patch)).unflatten(2, (-1, self._merge, patch))
        # (T, C, R, m, p, Q, m, p), of which cells are rows of R and Q
        return split.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(3, 4).flatten(1, 2)

    def _embed(self, rows: Tensor) -> Tensor:
        """(T, cells, merge * merge, C): patches before positions."""
        return self._visual.patch_embed(rows.flatten(0, 2)).view(*rows.shape[:3], -1)


def frame_times(times_s: Sequence[float], span: int) -> list[tuple[float, ...]]:
    """Times of the frames that lie in each pair (of `span`), the last one repeated."""
    missing = -len(times_s) % span
    padded = [*times_s, *[times_s[-1]] * missing] if times_s else []
    return [tuple(padded[start : start + span]) for start in range(0, len(padded), span)]


def cells_stretch(cells: Sequence[int], grid: Grid, frame_steps: Sequence[int]) -> Stretch:
    """Cells of a grid at their own places. frame_steps: positions in time, one per frame of the grid."""
    per_frame = grid.height * grid.width
    times = tuple(frame_steps[cell // per_frame] for cell in cells)
    rows = tuple(cell % per_frame // grid.width for cell in cells)
    columns = tuple(cell % grid.width for cell in cells)
    return Stretch(len(cells), (times, rows, columns), max(grid.height, grid.width))
