"""Which tokens a budget would keep, before anything is asked: decoding and patch embedding, no blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.answer import KeptTokens
from encoder.budget import Plan
from encoder.preprocess import centre, preprocess
from encoder.selection import Selector, select
from encoder.video.geometry import fit_within
from encoder.video.in_memory import shrink
from encoder.video.reader import Clip
from llm_bridge.model import VideoLanguageModel

THUMBNAIL = 320  # pixels of the longer side


@dataclass(frozen=True)
class Preview:
    """Sampled frames and the patches of them that stay.

    frames: uint8 (T, H, W, 3) thumbnails of exactly what the patch grid covers. kept: the patches.
    """

    frames: Tensor
    kept: KeptTokens


def thumbnails(model: VideoLanguageModel, clip: Clip, plan: Plan) -> Tensor:
    """uint8 (T, H, W, 3) of the part of each frame that the model sees, at most THUMBNAIL pixels a side."""
    frames = centre(clip.frames, plan.height, plan.width) if model.config.fit == "crop" else clip.frames
    return shrink(frames, fit_within(frames.shape[2], frames.shape[1], THUMBNAIL))


@torch.inference_mode()
def choose(model: VideoLanguageModel, clip: Clip, plan: Plan, selector: Selector) -> KeptTokens:
    """The patches that `plan` keeps of a clip, the same as encoding it would."""
    plan = replace(plan, frames=len(clip.frames))  # a clip in memory is used whole
    pixels = preprocess(clip.frames, plan.height, plan.width, fit=model.config.fit)
    cls = model.encoder.cls_token
    patches = model.encoder.embed(pixels[None].to(cls.device, cls.dtype))
    generator = torch.Generator().manual_seed(0)
    kept = select(patches, plan.grid, plan.keep, selector=selector, generator=generator)
    return kept_tokens(clip, plan, kept[0])


def kept_tokens(clip: Clip, plan: Plan, indices: Tensor) -> KeptTokens:
    """(K,) kept raster indices with the times of the frames that they lie in."""
    times = clip.times_s if clip.info.kind != "image" else ()
    return KeptTokens(times, clip.duration_s, plan.grid, tuple(indices.tolist()))
