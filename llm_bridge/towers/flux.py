"""FluxViT and a projector: the project's own tower. Patches are dropped before the first block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encoder.budget import InputSpace, Plan
from encoder.checkpoint import weights_hash
from encoder.cost import Speed, calibrate_encoder, encoder_features, encoder_mib
from encoder.merging import Merging
from encoder.preprocess import preprocess
from encoder.selection import DRAWN, Selector, select
from encoder.video.reader import Clip
from llm_bridge.towers.tower import Looked, Tower

if TYPE_CHECKING:
    from llm_bridge.model import VideoLanguageModel


class FluxTower(Tower):
    """The encoder and projector of a VideoLanguageModel."""

    shares_calls = True

    def __init__(self, model: VideoLanguageModel) -> None:
        self._model = model
        self.space = InputSpace.of(model.encoder.config)
        self.fit = model.config.fit
        self.plan_table = model.plan_table
        self.time_form = model.config.time_sentence
        self.familiarity = model.familiarity

    @property
    def device(self) -> torch.device:
        return self._model.encoder.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.encoder.cls_token.dtype

    def describe(self) -> dict[str, str]:
        encoder, projector = self._model.encoder, self._model.projector.config
        count = sum(parameter.numel() for parameter in encoder.parameters())
        return {
            "encoder": f"FluxViT {encoder.config.embed_dim}-d x {encoder.config.depth}, {count / 1e6:.1f} M",
            "projector": f"{projector.kind}, {projector.layers} layers",
        }

    def name_with(self, llm: str) -> str:
        return f"{self._model.encoder.config.embed_dim}-d FluxViT + {llm}"

    def prompt_tokens(self, plan: Plan) -> int:
        return self._model.projector.planned_tokens(plan.keep, plan.frames)

    def features(self, plan: Plan) -> list[float]:
        return encoder_features(self._model.encoder.config, plan.grid.size, plan.keep)

    def mib(self, plan: Plan) -> float:
        return encoder_mib(self._model.encoder.config, plan.frames, plan.height, plan.width, plan.keep)

    def measure(self) -> Speed:
        def encode(pixels: Tensor, keep: int) -> None:
            self._model.project(self._model.encode(list(pixels), [keep]))

        return calibrate_encoder(self._model.encoder, encode)

    def digest(self) -> str:
        return weights_hash(self._model.encoder, self._model.projector)

    def fingerprint(self) -> list[Any]:
        return [asdict(self._model.encoder.config), str(self.dtype)]

    def pixels(self, clip: Clip, plan: Plan) -> Tensor:
        return preprocess(clip.frames, plan.height, plan.width, fit=self.fit)

    @torch.inference_mode()
    def look(
        self,
        pixels: Tensor,
        plan: Plan,
        selector: Selector,
        times_s: Sequence[float] = (),
        seed: int = 0,
    ) -> Looked:
        generator = torch.Generator().manual_seed(seed)
        return self._looked(pixels, plan.keep, times_s, selector=selector, generator=generator, merge=None)

    @torch.inference_mode()
    def look_together(
        self,
        pixels: Sequence[Tensor],
        plan: Plan,
        selector: Selector,
        times_s: Sequence[Sequence[float]],
    ) -> list[Looked]:
        if len(pixels) == 1 or selector in DRAWN:  # each clip draws from a seed of its own
            return super().look_together(pixels, plan, selector, times_s)
        keep, times = [plan.keep] * len(pixels), [tuple(clip) for clip in times_s]
        tokens = self._model.encode(pixels, keep, times, selector=selector, merge=None)
        return [Looked(*looked) for looked in zip(self._model.project(tokens), tokens.kept, strict=True)]

    @torch.inference_mode()
    def merge(self, pixels: Tensor, merging: Merging, times_s: Sequence[float] = ()) -> Looked:
        return self._looked(pixels, None, times_s, selector="flux", merge=merging)

    def _looked(self, pixels: Tensor, keep: int | None, times_s: Sequence[float], **selection: Any) -> Looked:
        tokens = self._model.encode([pixels], [keep], [tuple(times_s)], replay=True, **selection)
        return Looked(self._model.project(tokens)[0], tokens.kept[0])

    @torch.inference_mode()
    def select(self, pixels: Tensor, plan: Plan, selector: Selector) -> Tensor:
        grid = replace(plan, frames=pixels.shape[1]).grid  # a clip in memory is used whole
        patches = self._model.encoder.embed(pixels[None].to(self.device, self.dtype))
        generator = torch.Generator().manual_seed(0)
        return select(patches, grid, plan.keep, selector=selector, generator=generator)[0]

    def is_familiar(self, frames: Tensor) -> bool | None:
        return self._model.is_familiar(frames)
