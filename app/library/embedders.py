"""What turns clips and texts into unit vectors of one space.

    embedder = open_embedder()                           # the shipped encoder, and MiniLM for texts
    embedder = open_embedder("google/siglip2-base-patch16-224")     # any CLIP or SigLIP of Hugging Face

The half that sees and the half that reads are loaded when they are first used: indexing needs one, searching
the other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from app.library.video_files import FileIdentity
from encoder.checkpoint import build, read_tensors
from encoder.config import FluxViTConfig
from encoder.errors import CheckpointError, ModelError
from encoder.fluxvit import FluxViT
from encoder.json_files import read_object
from encoder.preprocess import centre, preprocess
from llm_bridge.clip_head import ALIGNMENT, ClipHead, read_clip_head
from llm_bridge.llm import default_device, usable_device
from llm_bridge.model_files.bars import without_bars
from llm_bridge.model_files.checks import open_folder, open_settings, refused
from llm_bridge.text_encoders.text_towers import ContrastiveTower, SentenceTower, local_sentence_tower
from llm_bridge.towers.pixels import HALF, PixelSettings, to_pixels

SHIPPED = Path(__file__).parent.parent / "pretrained"
ENCODER = "encoder.safetensors"
FRAMES = 8  # of a clip
TOKENS_SHARE = 4  # one token in so many is kept: with the shipped model 128 of 512
CLIP_COLOURS = PixelSettings((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Embedder(Protocol):
    """name: what opens it again. frames: of a clip."""

    name: str
    frames: int

    @property
    def fingerprint(self) -> str:
        """Of its weights and settings, hex."""
        ...

    def embed_clips(self, clips: Sequence[Tensor]) -> Tensor:
        """uint8 (frames, H, W, 3) each -> (B, dim) unit vectors, float32, on the CPU."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(B, dim) unit vectors, float32, on the CPU."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens these texts have, all together."""
        ...


class FluxEmbedder:
    """Pooled Flux-CLIP features of a saved model with its alignment; texts go through MiniLM.

    folder: holds config.json, encoder.safetensors and alignment.safetensors. Raises CheckpointError.
    """

    frames = FRAMES

    def __init__(self, folder: str | Path | None = None, device: str | None = None) -> None:
        self.name = "" if folder is None else os.path.abspath(folder)
        self._folder = SHIPPED if folder is None else Path(folder)
        self._device = usable_device(device) or default_device()
        self.fingerprint = _fingerprint(
            self._folder, ["config.json", ENCODER, ALIGNMENT], FRAMES, TOKENS_SHARE
        )

    @cached_property
    def _encoder(self) -> FluxViT:
        try:
            values = read_object(self._folder / "config.json")["encoder"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self._folder} has no config.json of a saved model.") from error
        config = FluxViTConfig.from_dict(values)
        encoder = build(lambda: FluxViT(config), read_tensors(self._folder / ENCODER))
        return encoder.to(self._device).eval().requires_grad_(False)

    @cached_property
    def _head(self) -> ClipHead:
        return read_clip_head(self._folder).to(self._device)

    @cached_property
    def _tower(self) -> SentenceTower:
        tower = SentenceTower(local_sentence_tower())
        read_clip_head(self._folder).check(tower)
        return tower

    @torch.inference_mode()
    def embed_clips(self, clips: Sequence[Tensor]) -> Tensor:
        encoder, side = self._encoder, self._encoder.config.resolution_range[0]
        pixels = torch.stack([preprocess(frames, side, side) for frames in clips]).to(self._device)
        keep = max(1, encoder.grid_of(self.frames, side, side).size // TOKENS_SHARE)
        pooled = encoder.pool(encoder(pixels, keep), self._head.pools.nearest(keep))
        return self._head.embed(pooled).cpu()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._tower.embed(texts).cpu()

    def count_tokens(self, texts: Sequence[str]) -> int:
        return _count(self._tower.tokenizer, texts)


class StockEmbedder:
    """An image-text model of Hugging Face; a clip is the mean of its frames' unit vectors.

    source: folder or hub id of a CLIP, SigLIP or the like. Raises ModelError.
    """

    frames = FRAMES

    def __init__(self, source: str, device: str | None = None) -> None:
        self.name = os.path.abspath(source) if os.path.isdir(source) else source
        self._device = usable_device(device) or default_device()
        with refused(f"Cannot load an embedder from {source}"):
            settings = Path(open_settings(source))
            self._config = read_object(settings / "config.json")
        if not isinstance(self._config.get("vision_config"), dict):
            raise ModelError(f"{source} is no image-text model: name a CLIP or SigLIP.")

    @cached_property
    def _place(self) -> tuple[Path, dict[str, Any]]:
        with refused(f"Cannot load an embedder from {self.name}"):
            place, options = open_folder(self.name)
        return Path(place), options

    @cached_property
    def fingerprint(self) -> str:
        folder = self._place[0]
        files = ["config.json", "preprocessor_config.json", *(f.name for f in folder.glob("*.safetensors"))]
        return _fingerprint(folder, [name for name in files if (folder / name).is_file()], FRAMES)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModel

        place, options = self._place
        with without_bars(), refused(f"Cannot load an embedder from {self.name}"):
            model = AutoModel.from_pretrained(place, dtype=torch.float32, trust_remote_code=False, **options)
        if not hasattr(model, "get_image_features"):
            raise ModelError(
                f"{self.name} is a {model.config.model_type} model, which has no image features."
            )
        return model.to(self._device).eval().requires_grad_(False)

    @cached_property
    def _tower(self) -> ContrastiveTower:
        return ContrastiveTower(self.name)

    @cached_property
    def _pixels(self) -> tuple[PixelSettings, bool]:
        """Colours and filter, and whether pictures are cut to a square rather than squashed."""
        siglip = str(self._config.get("model_type")).startswith("siglip")
        folder = self._place[0]
        settings = PixelSettings.read(folder, PixelSettings(HALF, HALF) if siglip else CLIP_COLOURS)
        file = folder / "preprocessor_config.json"
        values = read_object(file) if file.is_file() else {}
        return settings, bool(values.get("do_center_crop", not siglip))

    @torch.inference_mode()
    def embed_clips(self, clips: Sequence[Tensor]) -> Tensor:
        side = int(self._model.config.vision_config.image_size)
        settings, cut = self._pixels
        rows = []
        for frames in clips:
            frames = centre(frames, side, side).contiguous() if cut else frames.contiguous()
            pixels = to_pixels(frames, side, side, settings).transpose(0, 1).to(self._device)
            found = self._model.get_image_features(pixel_values=pixels)
            features = found if isinstance(found, Tensor) else found.pooler_output
            rows.append(F.normalize(F.normalize(features.float(), dim=-1).mean(0), dim=-1))
        return torch.stack(rows).cpu()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._tower.embed(texts).cpu()

    def count_tokens(self, texts: Sequence[str]) -> int:
        return _count(self._tower.tokenizer, texts)


def open_embedder(source: str | None = None, device: str | None = None) -> Embedder:
    """The embedder that `source` is: nothing for the shipped model, a saved model's folder with its
    alignment.safetensors, or a folder or hub id of a CLIP or SigLIP. Raises CheckpointError or ModelError."""
    if not source:
        return FluxEmbedder(device=device)
    if (Path(source) / ENCODER).is_file():
        if not (Path(source) / ALIGNMENT).is_file():
            raise CheckpointError(f"{source} has no {ALIGNMENT}: copy it there from its training.clip run.")
        return FluxEmbedder(source, device)
    return StockEmbedder(source, device)


def _count(tokenizer: Any, texts: Sequence[str]) -> int:
    return sum(map(len, tokenizer(list(texts))["input_ids"])) if texts else 0


def _fingerprint(folder: Path, files: Sequence[str], *settings: object) -> str:
    """A hash of the files' sizes and ends and of settings; raises CheckpointError."""
    try:
        known = [
            (name, identity.size, identity.ends)
            for name in sorted(files)
            for identity in [FileIdentity.of(str(folder / name))]
        ]
    except OSError as error:
        raise CheckpointError(f"Cannot read the model in {folder}: {error.strerror}.") from error
    return hashlib.sha256(repr((known, settings)).encode()).hexdigest()[:16]
