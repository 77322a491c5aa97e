"""Small parts for the stages: real videos, a tiny encoder and language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from encoder.config import MICRO
from encoder.fluxvit import FluxViT
from tests.encoder.video import video_files as vf
from tests.training.synthetic.tiny_world import make_cache


@pytest.fixture(scope="session")
def world_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder ($FLUXCHAT_CACHE) with the small synthetic world."""
    return make_cache(tmp_path_factory.mktemp("world-cache"))


@pytest.fixture
def cached_world(world_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in use."""
    monkeypatch.setenv("FLUXCHAT_CACHE", str(world_cache))
    return world_cache


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a narrow FluxViT."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    FluxViT(
        MICRO.replace(embed_dim=32, depth=2, num_heads=2, pool_heads=2, clip_embed_dim=16)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve records on real video files and one image, one of text alone, one whose video is missing."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("llava")
    rows = []
    for number in range(12):
        vf.write(folder / f"{number}.mp4", vf.steady(10 + number), size=(64, 48))
        rows.append(
            {
                "id": str(number),
                "video": f"{number}.mp4",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": f"Bars that count to {number}."},
                ],
            }
        )
    Image.new("RGB", (50, 40), "green").save(folder / "green.png")
    talk = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "Green."}]
    rows.append({"id": "image", "image": "green.png", "conversations": talk})
    rows.append(
        {
            "id": "text",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
        }
    )
    rows.append({"id": "lost", "video": "lost.mp4", "conversations": talk})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.fixture(scope="session")
def stage1_recipe(
    tiny_encoder: Path,
    llm_folder: Callable[[str], Path],
    llava_json: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small stage-1 recipe on those."""
    path = tmp_path_factory.mktemp("recipe") / "chat_stage1.yaml"
    path.write_text(f"""
model: {{encoder: {tiny_encoder}, llm: {llm_folder("qwen2")}, projector: {{norm: true}}}}
datasets: [{{json_path: {llava_json}, data_root: {llava_json.parent}}}]
frames: 4
resolution: 56
num_tokens: [8, 16]
template: chat
optim: {{lr: 1e-2, batch_size: 4, micro_batch: 2, epochs: 4}}
loop: {{out: {path.parent / "out"}, precision: fp32, checkpoint_every: 2, keep_checkpoints: 20}}
""")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and videos with captions."""
    from tests.training.data import clip_corpus

    return clip_corpus.make(tmp_path_factory.mktemp("corpus"))
