"""A small VideoChat on a tiny language model, and a real video."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from httpx import create_ssl_context

from app.chat import VideoChat
from app.estimate import Calibration
from app.page.gradio_import import gradio
from encoder.config import MICRO
from encoder.cost import Speed
from encoder.fluxvit import FluxViT
from llm_bridge.chat_model import ChatModel
from llm_bridge.model import VideoLanguageModel, VLMConfig, assemble
from llm_bridge.projector import ProjectorConfig
from tests.passes import before_each_pass, never_ends
from tests.patience import PATIENCE_S

VIDEOS = Path(gradio.__file__).parent / "media_assets" / "videos"
WORLD, SHORT = VIDEOS / "world.mp4", VIDEOS / "b.mp4"
# As the tiny model was measured on two cores.
SPEEDS = Calibration(
    decode=Speed((13.0, 1.0, 6.3)),
    encode=Speed((1.4, 95.0, 79.0, 119.0)),
    prefill=Speed((2.1, 0.005, 1.5e-05)),
)


@pytest.fixture(scope="package", autouse=True)
def known_speeds() -> Iterator[Callable[[ChatModel], Calibration]]:
    """The machine was measured before: that takes seconds, and on a busy one each model would again.
    Gives what measures."""
    measure = Calibration.load_or_measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calibration, "load_or_measure", staticmethod(lambda _: SPEEDS))
        yield measure


@pytest.fixture(scope="package", autouse=True)
def clients_of_httpx() -> Iterator[None]:
    """Wait longer than 5 s for a busy machine, and read the certificates of all authorities once: each
    client, thus each `httpx.get`, would anew, in 20 ms."""
    with pytest.MonkeyPatch.context() as patch:  # neither is a part of its interface
        patch.setattr(
            "httpx._transports.default.create_ssl_context", cache(create_ssl_context), raising=False
        )
        for phase in ("connect", "read", "write", "pool"):
            patch.setattr(f"httpx._config.DEFAULT_TIMEOUT_CONFIG.{phase}", PATIENCE_S, raising=False)
        yield


@pytest.fixture
def measured_speeds(
    known_speeds: Callable[[ChatModel], Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The machine is measured, and what was found is kept in this cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLUXCHAT_CACHE", str(folder))
    monkeypatch.setattr(Calibration, "load_or_measure", staticmethod(known_speeds))
    return folder


@pytest.fixture(scope="session")
def tiny_model(llm_folder: Callable[[str], Path]) -> VideoLanguageModel:
    """A narrow encoder, a random projector and the tiny Qwen2, whose answers never end of themselves."""
    encoder = MICRO.replace(embed_dim=32, depth=2, num_heads=2, pool_heads=2, clip_embed_dim=16)
    config = VLMConfig(
        llm=str(llm_folder("qwen2")),
        projector=ProjectorConfig(32, 64, norm=True),
        encoder=encoder,
        default_tokens=64,
    )
    torch.manual_seed(0)
    model = assemble(config, FluxViT(encoder), None, device="cpu", dtype=torch.float32)
    never_ends(model.llm)
    return model


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
