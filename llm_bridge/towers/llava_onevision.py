"""LLaVA-OneVision: each frame through SigLIP by itself, its projected patches pooled; a newline at the end.

A cell is one pooled embedding. The newline is none: it is always there, so K cells are K + 1 embeddings. An
image is looked at as a video of one frame; the model's tiles of large images are not made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoder.budget import InputSpace, Plan
from encoder.errors import BudgetError, ConfigError
from encoder.selection import Selector
from encoder.video.reader import Clip
from llm_bridge.prompt import Stretch
from llm_bridge.towers.sizes import VitShape
from llm_bridge.towers.stock_tower import LEAST_PER_FRAME, MOST_FPS, StockTower
from llm_bridge.towers.tower import Looked, Stage

MOST_FRAMES = 32  # it was trained with no more


class LlavaOnevisionTower(StockTower):
    """Vision model and projector of a LLaVA-OneVision. Raises ConfigError for stage "before"."""

    marks = {"image": "<image>", "video": "<video>"}  # noqa: RUF012 - never changed

    def __init__(self, model: Any, folder: Path, stage: Stage) -> None:
        if stage == "before":
            raise ConfigError(
                "LLaVA-OneVision pools patches that lie in two cells at once, so none can be dropped before "
                "the encoder: select after it."
            )
        super().__init__(model, folder, stage)
        self._model, config = model.model, model.config.vision_config
        self._patch, self._side = int(config.patch_size), int(config.image_size)
        cell = self._side // ((self._side // self._patch + 1) // 2)  # whose number is rounded up
        self.space = InputSpace(
            (1, *range(2, MOST_FRAMES + 1, 2)),
            (self._side,),
            cell,
            least_per_frame=LEAST_PER_FRAME,
            most_fps=MOST_FPS,
        )
        self._shape = VitShape(
            int(config.hidden_size),
            int(config.num_hidden_layers),
            int(config.intermediate_size),
            3 * self._patch**2,
            4,
            sum(p.numel() for p in self._model.multi_modal_projector.parameters()),
        )

    @property
    def _parts(self) -> tuple[nn.Module, ...]:
        return self._model.vision_tower, self._model.multi_modal_projector

    @property
    def _embedding(self) -> Any:
        vision = getattr(self._model.vision_tower, "vision_model", self._model.vision_tower)
        return vision.embeddings.patch_embedding

    def describe(self) -> dict[str, str]:
        return self._described("SigLIP", "pools 2 x 2 patches")

    # -- price ----------------------------------------------------------------------------------------------

    def prompt_tokens(self, plan: Plan) -> int:
        return plan.keep + 1

    def features(self, plan: Plan) -> list[float]:
        patches = self._patches(plan)
        return self._shape.features(plan.frames, patches, patches, patches)  # all of them are projected

    def mib(self, plan: Plan) -> float:
        patches = self._patches(plan)
        return self._shape.mib(patches, patches, self.dtype.itemsize)

    def _patches(self, plan: Plan) -> int:
        return plan.frames * (self._side // self._patch) ** 2

    def fingerprint(self) -> list[Any]:
        return ["llava_onevision", vars(self._shape), self._side, str(self.dtype)]

    # -- looking --------------------------------------------------------------------------------------------

    def pixels(self, clip: Clip, plan: Plan) -> Tensor:
        if (plan.height, plan.width) != (self._side, self._side):  # its positions are those of one size
            raise BudgetError(f"LLaVA-OneVision takes {self._side} pixels a side: leave out the resolution.")
        return super().pixels(clip, plan)

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
        frames = pixels.transpose(0, 1).to(self.device, self.dtype)
        every = self._model.get_video_features(frames[None], return_dict=True).pooler_output[0]
        cells, newline = every[:-1], every[-1:]
        values = cells if selector == "evs" else self._pooled(frames)
        kept = self._choose(values, grid, plan.keep, selector, seed)
        return Looked(torch.cat([cells[kept], newline]), kept)

    @torch.inference_mode()
    def select(self, pixels: Tensor, plan: Plan, selector: Selector) -> Tensor:
        if selector == "evs":  # it goes by what the encoder makes
            return self.look(pixels, plan, selector).kept
        grid = replace(plan, frames=pixels.shape[1]).grid
        frames = pixels.transpose(0, 1).to(self.device, self.dtype)
        return self._choose(self._pooled(frames), grid, plan.keep, selector)

    def _pooled(self, frames: Tensor) -> Tensor:
        """Embedded patches of frames (T, 3, H, W), pooled as the model pools later: (T * cells, C)."""
        patches = self._embedding(frames).flatten(2).transpose(1, 2)
        return self._model.apply_pooling(patches).flatten(0, 1)

    def layout(
        self, plan: Plan, kept: Sequence[int], times_s: Sequence[float], duration_s: float
    ) -> tuple[str | Stretch, ...]:
        cells = replace(plan, frames=max(1, len(times_s))).grid.size
        return (Stretch(len(kept) + 1, ((*kept, cells),), cells + 1),)
