"""SmolVLM and SmolVLM2: each frame through SigLIP by itself, patches merged into cells of 3 x 3 or 4 x 4.

Every frame stands in the prompt with its time; positions are those of the language model (one axis). What the
processor of transformers writes around frames is written here the same way
(transformers/models/smolvlm/processing_smolvlm.py).

An image is one view, or as many tiles as a budget buys and a view of the whole, which always stays. Its cells
are those of the tiles, in raster order over the image; embeddings stand tile by tile.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoder.budget import InputSpace, Plan, scaled_size
from encoder.errors import ModelError
from encoder.selection import Selector
from encoder.video.reader import Clip
from llm_bridge.prompt import Stretch
from llm_bridge.towers.number_words import in_words
from llm_bridge.towers.pixels import PixelSettings, resized, to_pixels
from llm_bridge.towers.sizes import VitShape
from llm_bridge.towers.stock_tower import LEAST_PER_FRAME, MOST_FPS, StockTower, by_frame
from llm_bridge.towers.tower import Looked, Stage

LANCZOS = 1  # PIL's number
MOST_FRAMES = 64  # the model's own sampling has no more
MARK = "<fake_token_around_image>"
MOST_TILES = 16  # along the longer side; published models have 4
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
        if longest := _longest_tiled(folder, native):
            tiled = range(2 * native, longest + 1, native)
            image = InputSpace((1,), (*smaller, native, *tiled), cell, tile=native)
            self.space = replace(self.space, image=image)
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
        return plan.keep + plan.whole_tokens + FRAME_TEXT * _views(plan)

    def features(self, plan: Plan) -> list[float]:
        embedded, computed = self._counts(plan)
        return self._shape.features(_views(plan), embedded, computed, plan.keep + plan.whole_tokens)

    def mib(self, plan: Plan) -> float:
        return self._shape.mib(*self._counts(plan), self.dtype.itemsize)

    def _counts(self, plan: Plan) -> tuple[int, int]:
        """Patches embedded, patches that pass the blocks."""
        height, width = (plan.tile, plan.tile) if plan.tile else (plan.height, plan.width)
        embedded = _views(plan) * (height // self._patch) * (width // self._patch)
        cells = plan.keep + plan.whole_tokens
        return embedded, embedded if self.stage == "after" else cells * self._shape.patches_per_cell

    def fingerprint(self) -> list[Any]:
        return ["smolvlm", vars(self._shape), self._scale, self.stage, str(self.dtype)]

    # -- looking --------------------------------------------------------------------------------------------

    def pixels(self, clip: Clip, plan: Plan) -> Tensor:
        if not plan.tile:
            return super().pixels(clip, plan)
        longer, (height, width) = max(plan.height, plan.width), clip.frames.shape[1:3]
        # As the processor does it: to the longer side, to whole tiles, and from there to the whole.
        picture = resized(clip.frames[:1], *scaled_size(height, width, longer), self._settings)
        picture = resized(picture, plan.height, plan.width, self._settings)
        rows, columns = plan.tiles
        tiles = picture[0].unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).transpose(1, 2).flatten(0, 1)
        whole = resized(picture, plan.tile, plan.tile, self._settings)
        return to_pixels(torch.cat([tiles, whole]), plan.tile, plan.tile, self._settings)

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
            return Looked(self._project(self._kept_cells(pixels, patches, _places(plan, kept))), kept)
        cells = self._cells(self._blocks(patches + self._positions(pixels)))
        kept = self._choose_of(cells if selector == "evs" else self._cells(patches), plan, selector, seed)
        return Looked(self._project(cells.flatten(0, 1)[_places(plan, kept)]), kept)

    @torch.inference_mode()
    def select(self, pixels: Tensor, plan: Plan, selector: Selector) -> Tensor:
        if selector == "evs" and self.stage == "after":  # it goes by what the encoder makes
            return self.look(pixels, plan, selector).kept
        return self._choose_of(self._cells(self._embed(pixels)), plan, selector)

    def _choose_of(self, cells: Tensor, plan: Plan, selector: Selector, seed: int = 0) -> Tensor:
        """Kept cells (K,) of values (T, cells, N), of which those of the whole image are none."""
        if plan.tile:
            raster = cells[:-1].flatten(0, 1)[_tile_places(plan).to(cells.device)]
            return self._choose(raster, plan.grid, plan.keep, selector, seed)
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
        if plan.tile:
            return _tiled_layout(plan, kept)
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


def _longest_tiled(folder: Path, native: int) -> int:
    """The longer side, in whole tiles, that the folder's processor gives images; 0 where it makes none."""
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    if not values.get("do_image_splitting", bool(values)):
        return 0
    try:
        longest, tile = (values[name]["longest_edge"] for name in ("size", "max_image_size"))
    except (KeyError, TypeError):
        return 0
    if type(longest) is not int or longest > MOST_TILES * native:
        raise ModelError(f"{path} gives images a longer side of {longest!r:.40} pixels: that is too large.")
    return longest // native * native if tile == native else 0


def _views(plan: Plan) -> int:
    """Pictures that go through the encoder."""
    rows, columns = plan.tiles
    return rows * columns + 1 if plan.tile else plan.frames


def _tile_places(plan: Plan) -> Tensor:
    """Of each cell of a tiled image, in raster order, its number when they are counted tile by tile."""
    rows, columns = plan.tiles
    side = plan.tile // plan.patch_size
    by_tile = torch.arange(plan.grid.size).view(rows, columns, side, side)
    return by_tile.transpose(1, 2).flatten()


def _places(plan: Plan, kept: Tensor) -> Tensor:
    """Where kept cells lie among those of all views, ascending, with all of the view of the whole."""
    if not plan.tile:
        return kept
    places = _tile_places(plan).to(kept.device)[kept].sort().values
    whole = torch.arange(plan.grid.size, plan.grid.size + plan.whole_tokens, device=kept.device)
    return torch.cat([places, whole])


def _tiled_layout(plan: Plan, kept: Sequence[int]) -> tuple[str | Stretch, ...]:
    """Tiles by rows, each with its place, and the whole; positions stay where they are with all cells."""
    own: list[list[int]] = [[] for _ in range(_views(plan))]
    per_view = plan.whole_tokens
    for place in _places(plan, torch.tensor(kept, dtype=torch.long)).tolist():
        own[place // per_view].append(place % per_view)
    parts: list[str | Stretch] = []
    text = ""
    for index, cells in enumerate(own[:-1]):
        row, column = divmod(index, plan.tiles[1])
        text += "\n" if index and not column else ""
        parts += [
            f"{text}{MARK}<row_{row + 1}_col_{column + 1}>",
            Stretch(len(cells), (tuple(cells),), per_view),
        ]
        text = ""
    return (*parts, f"\n\n{MARK}<global-img>", Stretch(per_view), MARK)
