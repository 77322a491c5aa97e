"""SmolVLM and SmolVLM2: each frame through SigLIP by itself, patches merged into cells of 3 x 3 or 4 x 4.

Every frame stands in the prompt with its time; positions are those of the language model (one axis). What the
processor of transformers writes around frames is written here the same way
(transformers/models/smolvlm/processing_smolvlm.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoder.budget import InputSpace, Plan
from encoder.selection import Selector
from llm_bridge.prompt import Stretch
from llm_bridge.towers.number_words import in_words
from llm_bridge.towers.pixels import PixelSettings
from llm_bridge.towers.sizes import VitShape
from llm_bridge.towers.stock_tower import LEAST_PER_FRAME, MOST_FPS, StockTower, by_frame
from llm_bridge.towers.tower import Looked, Stage

LANCZOS = 1  # PIL's number
MOST_FRAMES = 64  # the model's own sampling has no more
MARK = "<fake_token_around_image>"
FRAME_TEXT = 12  # tokens of the time and the marks around a frame, about


class SmolVLMTower(StockTower):
    """Vision model and connector of a SmolVLM."""

    marks = {"image": "<image>", "video": "<video>"}  # noqa: RUF012 - never changed
    pixel_default = PixelSettings(resample=LANCZOS)

    def __init__(self, model: Any, folder: Path, stage: Stage) -> None:
        super().__init__(model, folder, stage)
        self._vision, self._connector = model.model.vision_model, model.model.connector
        config, self._scale = model.config.vision_config, int(model.config.scale_factor)
        self._patch = int(config.patch_size)
        cell = self._patch * self._scale
        native = int(config.image_size)
        smaller = tuple(side for side in range(cell, native, cell) if side >= native // 2)
        frames = (1, *range(2, MOST_FRAMES + 1, 2))
        self.space = InputSpace(
            frames, (*smaller, native), cell, least_per_frame=LEAST_PER_FRAME, most_fps=MOST_FPS
        )
        self.default_tokens = min(1024, self.space.tokens(16, native))
        self._shape = VitShape(
            int(config.hidden_size),
            int(config.num_hidden_layers),
            int(config.intermediate_size),
            3 * self._patch**2,
            self._scale**2,
            sum(p.numel() for p in self._connector.parameters()),
        )

    @property
    def _parts(self) -> tuple[nn.Module, ...]:
        return self._vision, self._connector

    @property
    def _embedding(self) -> Any:
        return self._vision.embeddings.patch_embedding

    def describe(self) -> dict[str, str]:
        return self._described("SigLIP", f"merges {self._scale} x {self._scale} patches")

    # -- price ----------------------------------------------------------------------------------------------

    def prompt_tokens(self, plan: Plan) -> int:
        return plan.keep + FRAME_TEXT * plan.frames

    def features(self, plan: Plan) -> list[float]:
        embedded, computed = self._counts(plan)
        return self._shape.features(plan.frames, embedded, computed, plan.keep)

    def mib(self, plan: Plan) -> float:
        return self._shape.mib(*self._counts(plan), self.dtype.itemsize)

    def _counts(self, plan: Plan) -> tuple[int, int]:
        """Patches embedded, patches that pass the blocks."""
        embedded = plan.frames * (plan.height // self._patch) * (plan.width // self._patch)
        return embedded, embedded if self.stage == "after" else plan.keep * self._shape.patches_per_cell

    def fingerprint(self) -> list[Any]:
        return ["smolvlm", vars(self._shape), self._scale, self.stage, str(self.dtype)]

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
        patches = self._embed(pixels)
        if self.stage == "before":
            kept = self._choose_of(self._cells(patches), plan, selector, seed)
            return Looked(self._project(self._kept_cells(pixels, patches, kept)), kept)
        cells = self._cells(self._blocks(patches + self._positions(pixels)))
        kept = self._choose_of(cells if selector == "evs" else self._cells(patches), plan, selector, seed)
        return Looked(self._project(cells.flatten(0, 1)[kept]), kept)

    @torch.inference_mode()
    def select(self, pixels: Tensor, plan: Plan, selector: Selector) -> Tensor:
        if selector == "evs" and self.stage == "after":  # it goes by what the encoder makes
            return self.look(pixels, plan, selector).kept
        return self._choose_of(self._cells(self._embed(pixels)), plan, selector)

    def _choose_of(self, cells: Tensor, plan: Plan, selector: Selector, seed: int = 0) -> Tensor:
        """Kept cells (K,) of values (T, cells, N)."""
        grid = plan.grid._replace(frames=len(cells))  # a clip in memory is used whole
        return self._choose(cells.flatten(0, 1), grid, plan.keep, selector, seed)

    def _embed(self, pixels: Tensor) -> Tensor:
        """Patches (T, rows, columns, C) of pixels (3, T, H, W), before positions."""
        frames = pixels.transpose(0, 1).to(self.device, self.dtype)
        return self._embedding(frames).permute(0, 2, 3, 1)

    def _positions(self, pixels: Tensor) -> Tensor:
        """Position embeddings (1, rows, columns, C), as the model gives them to frames of this size."""
        rows, columns = pixels.shape[2] // self._patch, pixels.shape[3] // self._patch
        side = self._vision.embeddings.num_patches_per_side
        bounds = torch.arange(1 / side, 1.0, 1 / side, device=self.device)

        def places(count: int) -> Tensor:
            step = torch.tensor(1.0, device=self.device) / count
            at = (torch.arange(count, dtype=torch.float32, device=self.device) * step).clamp(max=1 - 1e-6)
            return torch.bucketize(at, bounds, right=True)

        ids = places(rows)[:, None] * side + places(columns)
        return self._vision.embeddings.position_embedding(ids)[None]

    def _blocks(self, patches: Tensor) -> Tensor:
        """(N, ..., C) through all blocks; those of one n see each other."""
        flat = patches.flatten(1, -2)
        out = self._vision.encoder(inputs_embeds=flat, attention_mask=None).last_hidden_state
        return self._vision.post_layernorm(out).view_as(patches)

    def _cells(self, patches: Tensor) -> Tensor:
        """(T, rows, columns, C) to cells (T, cells, scale * scale * C), in the connector's order."""
        scale = self._scale
        whole = patches[:, : patches.shape[1] // scale * scale, : patches.shape[2] // scale * scale]
        split = whole.unflatten(1, (-1, scale)).unflatten(3, (-1, scale))  # (T, R, s, Q, s, C)
        return split.transpose(2, 3).flatten(3).flatten(1, 2)

    def _kept_cells(self, pixels: Tensor, patches: Tensor, kept: Tensor) -> Tensor:
        """Kept cells (K, scale * scale * C) after the blocks, of which the other patches are no part."""
        entries = self._cells(patches + self._positions(pixels))
        frames, per_frame = entries.shape[:2]
        frame_of = kept // per_frame
        counts = torch.bincount(frame_of, minlength=frames).tolist()
        chosen = entries.flatten(0, 1)[kept].unflatten(1, (self._scale**2, -1))  # (K, s * s, C)
        parts = chosen.split(counts)
        out: dict[int, Tensor] = {}
        for count in sorted(set(counts) - {0}):  # frames that keep as many are computed together
            same = [index for index, own in enumerate(counts) if own == count]
            computed = self._blocks(torch.stack([parts[index] for index in same]))
            out |= dict(zip(same, computed, strict=True))
        return torch.cat([out[index] for index in sorted(out)]).flatten(1)

    def _project(self, cells: Tensor) -> Tensor:
        """(K, scale * scale * C) to embeddings (K, D)."""
        return self._connector.modality_projection(cells[None])[0]

    def layout(
        self, plan: Plan, kept: Sequence[int], times_s: Sequence[float], duration_s: float
    ) -> tuple[str | Stretch, ...]:
        grid = plan.grid._replace(frames=max(1, len(times_s)))
        per_frame = grid.height * grid.width
        # Positions stay where they would be were all cells kept.
        frames = [Stretch(len(own), (tuple(own),), per_frame) for own in by_frame(kept, grid)]
        if not times_s:
            return (f"{MARK}<global-img>", *frames, MARK)
        text = (
            f"You are provided the following series of {in_words(len(times_s))} frames "
            f"from a {timedelta(seconds=int(duration_s))} [H:MM:SS] video.\n"
        )
        parts: list[str | Stretch] = []
        for time_s, frame in zip(times_s, frames, strict=True):
            minutes, seconds = divmod(int(time_s), 60)
            # The text of neighbours is one piece, since it is tokenised as one.
            parts += [f"{text}\nFrame from {minutes:02d}:{seconds:02d}:{MARK}<global-img>", frame]
            text = MARK
        return (*parts, f"{text}\n\n")
