"""Qwen2.5-VL: all pairs of frames side by side, told apart by their positions in time.

Cells are dropped after the encoder only: most of its blocks attend within windows of fixed places, so without
some cells the others would see less than they were trained to see. Positions in time may reach beyond
those of the text that follows; both are as the model's get_rope_index has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoder.budget import Plan
from encoder.errors import ConfigError
from encoder.tokens import Grid
from llm_bridge.prompt import Stretch
from llm_bridge.towers.pixels import PixelSettings
from llm_bridge.towers.qwen import QwenTower, cells_stretch, frame_times
from llm_bridge.towers.sizes import VitShape
from llm_bridge.towers.tower import Stage


class Qwen25VLTower(QwenTower):
    """Vision model of a Qwen2.5-VL. Raises ConfigError for stage "before"."""

    kind = "Qwen2.5-VL"
    pixel_default = PixelSettings((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

    def __init__(self, model: Any, folder: Path, stage: Stage) -> None:
        if stage == "before":
            raise ConfigError(
                "Qwen2.5-VL attends within windows, which dropping tokens before the encoder would tear: "
                "select after it."
            )
        super().__init__(model, folder, stage)
        self._per_second = float(model.config.vision_config.tokens_per_second)

    def _vit_shape(self, config: Any) -> VitShape:
        return VitShape(
            int(config.hidden_size),
            int(config.depth),
            int(config.intermediate_size) * 3 // 2,  # its gate is a third matrix
            3 * self._span * self._patch**2,
            self._merge**2,
            sum(p.numel() for p in self._visual.merger.parameters()),
            int(config.depth) - len(config.fullatt_block_indexes),
            (int(config.window_size) // self._patch) ** 2,
        )

    def prompt_tokens(self, plan: Plan) -> int:
        return plan.keep

    def _encode(self, rows: Tensor, patches: Tensor, grid: Grid, kept: Tensor | None) -> Tensor:
        size = [grid.frames, grid.height * self._merge, grid.width * self._merge]
        grid_thw = torch.tensor([size], device=rows.device)
        embeddings = self._visual(rows.flatten(0, 2), grid_thw=grid_thw, return_dict=True).pooler_output
        return embeddings if kept is None else embeddings[kept]

    def layout(
        self, plan: Plan, kept: Sequence[int], times_s: Sequence[float], duration_s: float
    ) -> tuple[str | Stretch, ...]:
        grid = replace(plan, frames=max(1, len(times_s))).grid
        steps = self._steps(times_s) if times_s else [0]
        return (cells_stretch(kept, grid, steps),)

    def _steps(self, times_s: Sequence[float]) -> list[int]:
        """Positions in time of the pairs: whole numbers, `tokens_per_second` apart in a second."""
        pairs = len(frame_times(times_s, self._span))
        between = (times_s[-1] - times_s[0]) / max(1, len(times_s) - 1)
        # As the model's get_rope_index rounds, in float32.
        step = torch.tensor(self._per_second) * torch.tensor(between * self._span)
        return (torch.arange(pairs) * step).long().tolist()
