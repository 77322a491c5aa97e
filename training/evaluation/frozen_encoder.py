"""What is measured of an encoder: its pooled features and class scores, and the heads that training.clip
trained beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.checkpoint import load_encoder, load_tensors, read_tensors
from encoder.config import FluxViTConfig
from encoder.cost import time_ms
from encoder.errors import CheckpointError, ConfigError, ModelError
from encoder.fluxvit import FluxViT
from encoder.tokens import VisionTokens
from llm_bridge.llm import default_device
from llm_bridge.text_encoders.text_towers import TextTower
from training.evaluation.encoder_input import EncoderInput
from training.models.trained_pools import TrainedPools

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
        target = torch.device(device) if device else default_device()
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
        model = FluxViT(FluxViTConfig.from_dict(values))
        load_tensors(model, read_tensors(path / "encoder.safetensors"))
        return model
    if not path.exists():
        raise CheckpointError(f"There is no encoder at {path}.")
    return load_encoder(path)


# -- what training.clip trained beside the encoder ----------------------------------------------------------


@dataclass(frozen=True)
class ClipHead:
    """align: pooled feature (B, clip_embed_dim) -> text space; heads: attribute name -> class scores; pools:
    the encoder's pooling heads that were trained with it."""

    align: nn.Module
    heads: Mapping[str, nn.Module]
    pools: TrainedPools = field(default_factory=TrainedPools)

    @property
    def dim(self) -> int:
        """Width of the text space."""
        last = [module for module in self.align.modules() if isinstance(module, nn.Linear)][-1]
        return last.out_features

    @property
    def modules(self) -> list[nn.Module]:
        """All of it, for a hash of the weights."""
        return [self.align, *self.heads.values()]

    def check(self, tower: TextTower) -> None:
        """Raises ModelError when its vectors cannot be compared with those of a text tower."""
        if self.dim != tower.dim:
            raise ModelError(
                f"The alignment leads to {self.dim} dimensions, but the text tower has {tower.dim}: name "
                "the tower that it was trained with (--text-tower)."
            )

    @torch.inference_mode()
    def embed(self, pooled: Tensor) -> Tensor:
        """(B, clip_embed_dim) -> unit vectors (B, dim), float32."""
        return F.normalize(self.align(pooled.float()), dim=-1)

    @torch.inference_mode()
    def scores(self, attribute: str, pooled: Tensor) -> Tensor:
        """Class scores (B, classes) of an attribute."""
        return self.heads[attribute](pooled.float())

    def to(self, device: torch.device) -> ClipHead:
        """On another device."""
        for module in self.modules:
            module.to(device)
        return self


def chosen_pools(pool: int | None, head: ClipHead | None, encoder: FrozenEncoder) -> TrainedPools:
    """Pooling heads that an evaluation uses: the one that was named, those trained with a CLIP head, or those
    of the encoder's class heads."""
    if pool is not None:
        return TrainedPools(pool)
    return class_pools(encoder.config) if head is None else head.pools


def read_clip_head(path: str | Path) -> ClipHead:
    """From `alignment.safetensors` of a `training.clip` run, its folder, or a file of the released layout.

    A linear map, or a LayerNorm and a linear map, under `align.` or `vision_align.`; heads under
    `attributes.NAME.`. Raises CheckpointError.
    """
    path = Path(path)
    tensors = read_tensors(path / "alignment.safetensors" if path.is_dir() else path)
    prefix = "align." if any(key.startswith("align.") for key in tensors) else "vision_align."
    align = _build(_below(tensors, prefix), path)
    names = sorted({key.split(".")[1] for key in tensors if key.startswith("attributes.")})
    heads = {name: _build(_below(tensors, f"attributes.{name}."), path) for name in names}
    return ClipHead(align, heads, TrainedPools.of_tensors(tensors))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _build(tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The module whose tensors these are: Linear, or Sequential of LayerNorm and Linear."""
    if "weight" in tensors and tensors["weight"].ndim == 2:
        module: nn.Module = _linear(tensors, "")
    elif "1.weight" in tensors and tensors["1.weight"].ndim == 2:
        module = nn.Sequential(nn.LayerNorm(tensors["1.weight"].shape[1]), _linear(tensors, "1."))
    else:
        raise CheckpointError(f"{path} holds no alignment with a text tower.")
    load_tensors(module, tensors)
    return module.eval().requires_grad_(False)


def _linear(tensors: Mapping[str, Tensor], prefix: str) -> nn.Linear:
    out_features, in_features = tensors[f"{prefix}weight"].shape
    return nn.Linear(in_features, out_features, bias=f"{prefix}bias" in tensors)
