"""Embedders: unit vectors of one space, of the shipped model and of stock CLIP and SigLIP folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from app.library.embedders import SHIPPED, FluxEmbedder, StockEmbedder, open_embedder
from encoder.errors import CheckpointError, ModelError
from tests.llm_bridge.text_encoders.tiny_towers import clip_folder, sentence_folder, siglip_folder


def clips(count: int = 2, height: int = 48, width: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (8, height, width, 3)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("make", [clip_folder, siglip_folder])
def test_stock_clips_and_texts_lie_in_the_models_own_space(make: Callable[..., Any], tmp_path: Path) -> None:
    model = make(tmp_path)
    embedder = open_embedder(str(tmp_path), "cpu")
    assert isinstance(embedder, StockEmbedder)
    found = embedder.embed_clips(clips())
    texts = embedder.embed_texts(["a dog", "a cat"])
    assert found.shape == texts.shape
    assert torch.allclose(found.norm(dim=-1), torch.ones(2))
    # By the model's own door, from frames that need no resizing.
    frames = clips(1, 32, 32)[0]
    mean, std = ((0.5,) * 3,) * 2
    if make is clip_folder:
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (frames.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    with torch.no_grad():
        rows = model.get_image_features(pixel_values=pixels)
    rows = rows if isinstance(rows, torch.Tensor) else rows.pooler_output
    expected = F.normalize(F.normalize(rows, dim=-1).mean(0), dim=-1)
    assert torch.allclose(embedder.embed_clips([frames])[0], expected, atol=1e-5)


def test_the_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    before = StockEmbedder(str(tmp_path)).fingerprint
    assert StockEmbedder(str(tmp_path)).fingerprint == before
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert StockEmbedder(str(tmp_path)).fingerprint != before


def test_what_is_no_embedder_is_refused(tmp_path: Path) -> None:
    sentence_folder(tmp_path)
    with pytest.raises(ModelError, match="no image-text model"):
        open_embedder(str(tmp_path))
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "encoder.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"no alignment\.safetensors"):
        open_embedder(str(saved))


def test_the_shipped_encoder_gives_unit_vectors_that_do_not_depend_on_the_batch() -> None:
    embedder = open_embedder(device="cpu")
    assert isinstance(embedder, FluxEmbedder)
    several = clips(3)
    together = embedder.embed_clips(several)
    assert together.shape == (3, 384)
    assert torch.allclose(together.norm(dim=-1), torch.ones(3), atol=1e-5)
    alone = torch.cat([embedder.embed_clips([clip]) for clip in several])
    assert torch.allclose(together, alone, atol=1e-4)
    assert open_embedder(str(SHIPPED)).fingerprint == embedder.fingerprint
