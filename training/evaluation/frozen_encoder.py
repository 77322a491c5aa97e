"""What is measured of an encoder: its pooled features and class scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoder.checkpoint import build, load_encoder, read_tensors
from encoder.config import FluxViTConfig
from encoder.cost import time_ms
from encoder.errors import CheckpointError, ConfigError
from encoder.fluxvit import FluxViT
from encoder.tokens import VisionTokens
from llm_bridge.clip_head import ClipHead, TrainedPools
from llm_bridge.llm import default_device, usable_device
from training.evaluation.encoder_input import EncoderInput

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# Of fine-tuned class heads whose encoder does not say: the order of the released training engine, UNVERIFIED
# on released weights.
RELEASED_POOLS = TrainedPools(1, {3072: 0, 2048: 1, 1024: 2})


def class_pools(config: FluxViTConfig) -> TrainedPools:
    """Pooling and class head of each token count of a fine-tuned encoder."""
    trained = {count: head for head, count in enumerate(config.head_counts) if count}
    if trained:
        return TrainedPools(min(trained.values()), trained)
    return RELEASED_POOLS if config.num_pools >= 3 else TrainedPools(min(1, config.num_pools - 1))


class FrozenEncoder:
    """An encoder with its poolings, without gradients, on one device in one dtype."""

    def __init__(self, encoder: FluxViT) -> None:
        self.encoder = encoder

    @staticmethod
    def open(path: str | Path, device: str | None = None, dtype: str = "fp32") -> FrozenEncoder:
        """From a folder or official file of an encoder, or a folder of a whole model, of which the encoder is
        taken. Raises CheckpointError or ConfigError."""
        target = usable_device(device) or default_device()
        return FrozenEncoder(open_encoder(Path(path)).to(target, DTYPES[dtype]).eval().requires_grad_(False))

    @property
    def device(self) -> torch.device:
        """Where pixels go."""
        return self.encoder.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.encoder.cls_token.dtype

    @property
    def config(self) -> FluxViTConfig:
        """The encoder's dimensions."""
        return self.encoder.config

    @torch.inference_mode()
    def tokens(self, pixels: Sequence[Tensor], encoder_input: EncoderInput, seed: int = 0) -> VisionTokens:
        """Clips (3, T, H, W) of one shape -> their tokens; the seed decides what "random" keeps."""
        batch = torch.stack(list(pixels)).to(self.device, self.dtype)
        merge = encoder_input.merging(self.config.patch_size)
        generator = torch.Generator().manual_seed(seed)
        keep = None if encoder_input.merge else encoder_input.keep
        return self.encoder(batch, keep, selector=encoder_input.selector, generator=generator, merge=merge)

    def ms(self, encoder_input: EncoderInput) -> float:
        """Fastest of three times that one clip takes, in milliseconds."""
        pixels = [torch.zeros(3, encoder_input.frames, encoder_input.resolution, encoder_input.resolution)]
        return time_ms(lambda: self.tokens(pixels, encoder_input), self.device)

    @torch.inference_mode()
    def pooled(
        self, pixels: Sequence[Tensor], encoder_input: EncoderInput, pools: TrainedPools, seed: int = 0
    ) -> Tensor:
        """Pooled features (B, clip_embed_dim) in float32. Raises ConfigError for a head that is not there."""
        head = self._head(encoder_input, pools)
        return self.encoder.pool(self.tokens(pixels, encoder_input, seed), head).float()

    @torch.inference_mode()
    def logits(
        self, pixels: Sequence[Tensor], encoder_input: EncoderInput, pools: TrainedPools, seed: int = 0
    ) -> Tensor:
        """Class scores (B, num_classes) in float32. Raises ConfigError for an encoder without classes."""
        if not self.config.num_classes:
            raise ConfigError(
                "The encoder has no class heads: train them with `python -m training.finetune`."
            )
        head = self._head(encoder_input, pools)
        return self.encoder.classify(self.tokens(pixels, encoder_input, seed), head).float()

    def _head(self, encoder_input: EncoderInput, pools: TrainedPools) -> int:
        head = pools.nearest(encoder_input.keep)
        if not 0 <= head < self.config.num_pools:
            raise ConfigError(
                f"The encoder has {self.config.num_pools} pooling heads, no head {head}: name one (--pool)."
            )
        return head


def open_encoder(path: Path) -> FluxViT:
    """From an encoder's folder or file, or a model's folder."""
    if (path / "encoder.safetensors").is_file():
        try:
            values: Any = json.loads((path / "config.json").read_text())["encoder"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} has encoder.safetensors but no model's config.json.") from error
        config = FluxViTConfig.from_dict(values)
        return build(lambda: FluxViT(config), read_tensors(path / "encoder.safetensors"))
    if not path.exists():
        raise CheckpointError(f"There is no encoder at {path}.")
    return load_encoder(path)


def chosen_pools(pool: int | None, head: ClipHead | None, encoder: FrozenEncoder) -> TrainedPools:
    """Pooling heads that an evaluation uses: the one that was named, those trained with a CLIP head, or those
    of the encoder's class heads."""
    if pool is not None:
        return TrainedPools(pool)
    return class_pools(encoder.config) if head is None else head.pools
