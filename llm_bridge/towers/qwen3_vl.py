"""Qwen3-VL: pairs of frames, each with its time as text; rows go behind the first layers too (deepstack).

A pair attends to itself only, so whole cells can be dropped before the blocks. The pairs, as transformers'
processor writes them, stand in place of the chat template's own marks, as in the processor that came out with
the model and in vLLM; that of transformers 5.24 leaves an empty pair of marks around them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from encoder.budget import Plan
from encoder.tokens import Grid
from llm_bridge.prompt import Stretch
from llm_bridge.towers.qwen import QwenTower, cells_stretch, frame_times
from llm_bridge.towers.sizes import VitShape
from llm_bridge.towers.stock_tower import by_frame

PAIR_TEXT = 10  # tokens of the time and the marks around a pair, about


class Qwen3VLTower(QwenTower):
    """Vision model of a Qwen3-VL; an embedding is (1 + n) rows, for the input and n layers."""

    kind = "Qwen3-VL"
    marks = {  # noqa: RUF012 - never changed
        "image": "<|image_pad|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
    }

    def _vit_shape(self, config: Any) -> VitShape:
        mergers = (self._visual.merger, *self._visual.deepstack_merger_list)
        return VitShape(
            int(config.hidden_size),
            int(config.depth),
            int(config.intermediate_size),
            3 * self._span * self._patch**2,
            self._merge**2,
            sum(p.numel() for merger in mergers for p in merger.parameters()),
        )

    def prompt_tokens(self, plan: Plan) -> int:
        return plan.keep + (PAIR_TEXT * plan.grid.frames if plan.frames > 1 else 0)

    def _encode(self, rows: Tensor, patches: Tensor, grid: Grid, kept: Tensor | None) -> Tensor:
        if kept is None:
            kept = torch.arange(grid.size, device=patches.device)
        place = kept % (grid.height * grid.width)
        places = self._places(grid)[place].flatten(0, 1)  # (K * m * m, 2)
        hidden = patches.flatten(0, 1)[kept].flatten(0, 1)
        hidden = hidden + self._positions(places, grid).to(hidden.dtype)
        counts = torch.bincount(kept // (grid.height * grid.width)) * self._merge**2
        ends = counts[counts > 0].cumsum(0, dtype=torch.int32)
        options = {
            "cu_seqlens": torch.nn.functional.pad(ends, (1, 0)),
            "position_embeddings": self._angles(places),
        }
        deep = dict(
            zip(self._visual.deepstack_visual_indexes, self._visual.deepstack_merger_list, strict=True)
        )
        parts = []
        for number, block in enumerate(self._visual.blocks):
            hidden = block(hidden, **options)
            if number in deep:
                parts.append(deep[number](hidden))
        return torch.cat([self._visual.merger(hidden), *parts], dim=1)

    def _places(self, grid: Grid) -> Tensor:
        """Row and column of the patches of a frame: (cells, merge * merge, 2)."""
        rows = torch.arange(grid.height * self._merge, device=self.device)
        columns = torch.arange(grid.width * self._merge, device=self.device)
        both = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        return self._in_cells(both[None])[0, ..., 0, 0]

    def _positions(self, places: Tensor, grid: Grid) -> Tensor:
        """Learned positions (N, C) of places (N, 2), interpolated from the square they were learned in."""
        table = self._visual.pos_embed
        side = int(table.num_embeddings**0.5)
        last = torch.tensor([grid.height, grid.width], device=places.device) * self._merge - 1
        at = places.float() * (side - 1) / last.clamp(min=1)
        low = at.floor().long()
        high = (low + 1).clamp(max=side - 1)
        part = at - low
        (top, left), (bottom, right) = low.unbind(1), high.unbind(1)
        ids = torch.stack(
            [top * side + left, top * side + right, bottom * side + left, bottom * side + right], dim=1
        )
        (y, x), (up, across) = part.unbind(1), (1 - part).unbind(1)
        weights = torch.stack([up * across, up * x, y * across, y * x], dim=1)
        return (table(ids) * weights[:, :, None]).sum(1)

    def _angles(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, width of a head) of the rotary positions of places (N, 2)."""
        speeds = self._visual.rotary_pos_emb.inv_freq.to(places.device, torch.float32)
        angles = (places[..., None].float() * speeds).flatten(1)
        angles = torch.cat([angles, angles], dim=1)
        return angles.cos(), angles.sin()

    def layout(
        self, plan: Plan, kept: Sequence[int], times_s: Sequence[float], duration_s: float
    ) -> tuple[str | Stretch, ...]:
        grid = replace(plan, frames=max(1, len(times_s))).grid
        if not times_s:
            return (cells_stretch(kept, grid, [0]),)
        parts: list[str | Stretch] = []
        before = ""
        for times, own in zip(frame_times(times_s, self._span), by_frame(kept, grid), strict=True):
            # The text of neighbours is one piece, since it is tokenised as one.
            parts += [
                f"{before}<{(times[0] + times[-1]) / 2:.1f} seconds><|vision_start|>",
                cells_stretch(own, grid, [0]),
            ]
            before = "<|vision_end|>"
        return (*parts, before)
