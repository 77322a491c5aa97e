"""A small VideoChat on a tiny language model, and a real video."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio
import pytest
import torch

from app.chat import VideoChat
from encoder.config import MICRO
from encoder.fluxvit import FluxViT
from llm_bridge.model import VideoLanguageModel, VLMConfig, assemble
from llm_bridge.projector import ProjectorConfig
from tests.passes import before_each_pass

VIDEOS = Path(gradio.__file__).parent / "media_assets" / "videos"
WORLD, SHORT = VIDEOS / "world.mp4", VIDEOS / "b.mp4"


@pytest.fixture(scope="session")
def tiny_model(llm_folder: Callable[[str], Path]) -> VideoLanguageModel:
    """A narrow encoder, a random projector and the tiny Qwen2."""
    encoder = MICRO.replace(embed_dim=32, depth=2, num_heads=2, pool_heads=2, clip_embed_dim=16)
    config = VLMConfig(
        llm=str(llm_folder("qwen2")),
        projector=ProjectorConfig(32, 64, norm=True),
        encoder=encoder,
        default_tokens=64,
    )
    torch.manual_seed(0)
    return assemble(config, FluxViT(encoder), None, device="cpu", dtype=torch.float32)


@pytest.fixture
def steps(tiny_model: VideoLanguageModel) -> Iterator[list[float]]:
    """Makes every pass of the language model take at least 0.1 s; collects when each began."""
    begun: list[float] = []

    def wait() -> None:
        begun.append(time.monotonic())
        time.sleep(0.1)

    with before_each_pass(tiny_model.llm, wait):
        yield begun


@pytest.fixture
def chat(tiny_model: VideoLanguageModel) -> Iterator[VideoChat]:
    """A fresh VideoChat with empty caches."""
    with VideoChat(tiny_model) as made:
        yield made
