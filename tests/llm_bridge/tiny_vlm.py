"""A tiny model of all parts, and clips for it to see."""

from __future__ import annotations

from pathlib import Path

import torch

from encoder.config import MICRO
from encoder.fluxvit import FluxViT
from encoder.tokens import VisionTokens
from llm_bridge.model import VideoLanguageModel, VLMConfig, assemble
from llm_bridge.projector import ProjectorConfig
from llm_bridge.prompt import Message, Prompt, Visual, render_chat_training

ENCODER = MICRO.replace(embed_dim=32, depth=2, num_heads=2, pool_heads=2, clip_embed_dim=16)


def tiny_vlm(llm: Path) -> VideoLanguageModel:
    """In full precision, around the tiny language model in a folder."""
    torch.manual_seed(0)
    config = VLMConfig(llm=str(llm), projector=ProjectorConfig(32, 64, norm=True), encoder=ENCODER)
    return assemble(config, FluxViT(ENCODER), None, device="cpu", dtype=torch.float32)


def vision_of(model: VideoLanguageModel, keeps: list[int]) -> VisionTokens:
    clips = [torch.randn(3, 4, 28, 28, generator=torch.Generator().manual_seed(i)) for i in range(len(keeps))]
    return model.encode(clips, keeps, [(0.0, 1.0, 2.0, 3.0)] * len(keeps))


def answered(model: VideoLanguageModel, keep: int, answer: str) -> Prompt:
    """A question about a clip of `keep` tokens, with an answer to learn."""
    return render_chat_training(
        model.llm.tokenizer,
        [Message.of("user", Visual(keep, "k"), "What?"), Message.of("assistant", answer)],
    )
