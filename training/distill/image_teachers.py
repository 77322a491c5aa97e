"""Image encoders as teachers: they look at each frame by itself, and at all of it.

Their feature maps are resampled to the student's patch grid where the two differ. A Vision Transformer is run
at the size that gives it exactly the student's patches, so nothing is resampled unless `resolution` asks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.errors import ConfigError, ModelError
from encoder.json_files import read_object
from encoder.preprocess import IMAGENET_MEAN, IMAGENET_STD
from encoder.tokens import Grid
from llm_bridge.model_files.checks import open_folder, open_settings, refused
from training.distill.teachers import (
    DTYPES,
    Precision,
    Teacher,
    TeacherTargets,
    spaced_layers,
    weights_digest,
)
from training.trainer.losses import unit

Triple = tuple[float, float, float]


def renormalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """ImageNet-normalised (N, 3, H, W) to another mean and deviation."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=pixels.device, dtype=torch.float32).view(3, 1, 1)

    scale = column(IMAGENET_STD) / column(std)
    return torch.addcmul((column(IMAGENET_MEAN) - column(mean)) / column(std), pixels.float(), scale)


class FrameTeacher:
    """Common part: frames to maps, maps to targets. Subclasses give `input_size` and `look`."""

    has_cls = False
    dense = True
    layer_dims: tuple[int, ...]
    final_dim: int
    fingerprint: str

    def __init__(
        self, model: nn.Module, mean: Triple, std: Triple, precision: Precision, frames_at_once: int
    ) -> None:
        self.model = model.to(DTYPES[precision]).eval().requires_grad_(False)
        self.mean, self.std = mean, std
        self.dtype = DTYPES[precision]
        self.frames_at_once = frames_at_once

    def to(self, device: torch.device) -> FrameTeacher:
        """Move the weights."""
        self.model.to(device)
        return self

    def input_size(self, pixels: Tensor, grid: Grid) -> tuple[int, int]:
        """Height and width at which frames of (B, 3, T, H, W) are looked at."""
        raise NotImplementedError

    def look(self, frames: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """(n, 3, H, W) -> maps (n, D, h, w) per layer, attention (n, h, w), final (n, F)."""
        raise NotImplementedError

    def _frames(self, pixels: Tensor, grid: Grid) -> Tensor:
        """(B, 3, T, H, W) -> (B*T, 3, h, w) as the model wants them."""
        frames = renormalise(pixels.transpose(1, 2).flatten(0, 1), self.mean, self.std)
        size = self.input_size(pixels, grid)
        if frames.shape[-2:] != size:
            frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
        return frames.to(self.dtype)

    def patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        """Raises ConfigError: only teachers with patch embeddings can drive the selection."""
        raise ConfigError(f"{type(self).__name__} has no patch embeddings: use selection: student.")

    @torch.no_grad()
    def observe(self, pixels: Tensor, grid: Grid, chosen: Tensor) -> dict[str, Tensor]:
        """Maps "layer_I" (B, T, D, h, w), "attention" (B, T, h, w), "final" (B, F), whatever the choice."""
        clips = len(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            looked = [self.look(chunk) for chunk in self._frames(pixels, grid).split(self.frames_at_once)]
        observed = {
            f"layer_{index}": torch.cat([maps[index] for maps, _, _ in looked])
            for index in range(len(self.layer_dims))
        }
        observed["attention"] = torch.cat([attention for _, attention, _ in looked])
        by_clip = {name: value.float().unflatten(0, (clips, -1)) for name, value in observed.items()}
        final = torch.cat([final for _, _, final in looked]).float().unflatten(0, (clips, -1))
        return by_clip | {"final": unit(final.mean(dim=1))}

    def targets(self, observed: Mapping[str, Tensor], grid: Grid, chosen: Tensor) -> TeacherTargets:
        """Maps at the student's grid, of the chosen tokens, at unit length."""
        layers = []
        for index in range(len(self.layer_dims)):
            tokens = _resample(observed[f"layer_{index}"], grid).permute(0, 1, 3, 4, 2).flatten(1, 3)
            layers.append(unit(tokens.gather(1, chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))))
        attention = _resample(observed["attention"].unsqueeze(2), grid).flatten(1)
        return TeacherTargets(
            tuple(layers), unit(observed["final"]), attention.gather(1, chosen).clamp(min=0)
        )


def _resample(maps: Tensor, grid: Grid) -> Tensor:
    """(B, T, D, h, w) -> (B, T, D, grid.height, grid.width), bilinear, in float32."""
    if maps.shape[-2:] == grid[1:]:
        return maps.float()
    frames = F.interpolate(maps.flatten(0, 1).float(), grid[1:], mode="bilinear", align_corners=False)
    return frames.unflatten(0, maps.shape[:2])


# -- Hugging Face -------------------------------------------------------------------------------------------


class ImageEncoderTeacher(FrameTeacher):
    """A Hugging Face Vision Transformer: CLIP, SigLIP, DINOv2 and their kin.

    Attention: of the cls token in the last block where there is one (mean over heads, as UMT ranks tokens by
    its CLIP teacher), of the pooling probe where there is that (SigLIP), else the norm of the last map.
    Final: the model's own pooled output, mean over frames.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[int],
        mean: Triple,
        std: Triple,
        *,
        resolution: int | None = None,
        precision: Precision = "fp32",
        frames_at_once: int = 64,
    ) -> None:
        super().__init__(model, mean, std, precision, frames_at_once)
        config = model.config
        depth, width = config.num_hidden_layers, config.hidden_size
        if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] >= depth:
            raise ConfigError(f"Teacher layers must ascend within 0 to {depth - 1}, not {list(layers)}.")
        self.patch_size = int(config.patch_size)
        if resolution is not None and resolution % self.patch_size:
            raise ConfigError(f"The teacher's resolution must be a multiple of {self.patch_size}.")
        self.layers, self.resolution = tuple(layers), resolution
        self.layer_dims = (width,) * len(self.layers)
        self.final_dim = width
        accepted = inspect.signature(model.forward).parameters
        self._extra = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        self.fingerprint = weights_digest(model, self.layers, mean, std, resolution, precision)

    def input_size(self, pixels: Tensor, grid: Grid) -> tuple[int, int]:
        if self.resolution is not None:
            return self.resolution, self.resolution
        return grid.height * self.patch_size, grid.width * self.patch_size

    def patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        """The model's patch projection (B, T*h*w, C), where its patches are the student's."""
        embeddings: Any = self.model.embeddings
        embedding = getattr(embeddings, "patch_embedding", None)
        if embedding is None:
            embedding = getattr(getattr(embeddings, "patch_embeddings", None), "projection", None)
        if embedding is None or self.resolution is not None:
            return super().patches(pixels, grid)
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            maps = embedding(self._frames(pixels, grid))
        return maps.flatten(2).transpose(1, 2).unflatten(0, (len(pixels), -1)).flatten(1, 2)

    def look(self, frames: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        height, width = frames.shape[-2] // self.patch_size, frames.shape[-1] // self.patch_size
        model: Any = self.model
        pooling = getattr(getattr(model, "head", None), "attention", None)
        out = model(
            pixel_values=frames, output_hidden_states=True, output_attentions=pooling is None, **self._extra
        )
        prefix = out.last_hidden_state.shape[1] - height * width  # cls and register tokens
        maps = [
            out.hidden_states[layer + 1][:, prefix:].transpose(1, 2).unflatten(2, (height, width))
            for layer in self.layers
        ]
        if pooling is not None:
            probe = model.head.probe.expand(len(frames), -1, -1)
            attention = pooling(probe, out.last_hidden_state, out.last_hidden_state)[1][:, 0]
        elif prefix and out.attentions:
            attention = out.attentions[-1].mean(dim=1)[:, 0, prefix:]
        else:
            attention = maps[-1].norm(dim=1).flatten(1)
        final = out.pooler_output
        if final is None:
            final = out.last_hidden_state.mean(dim=1)
        return maps, attention.unflatten(1, (height, width)), final


@dataclass(frozen=True)
class ImageEncoderSource:
    """model: hub id or folder. count, interval, layers: as for InternVideo2. mean, std: of its pixels, read
    from preprocessor_config.json when not given. resolution: the side it looks at (None: the one that gives
    it the student's patches)."""

    model: str
    count: int = 6
    interval: float = 1.0
    layers: tuple[int, ...] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    resolution: int | None = None
    precision: Precision = "fp32"
    frames_at_once: int = 64

    def open(self) -> Teacher:
        """The teacher; raises ModelError or ConfigError."""
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        with refused(f"Cannot load an image encoder from {self.model}"):
            folder, options = open_folder(self.model)
            model: Any = AutoModel.from_pretrained(
                folder, attn_implementation="eager", trust_remote_code=False, **options
            )
        model = getattr(model, "vision_model", model)
        if not hasattr(model.config, "patch_size") or not hasattr(model.config, "num_hidden_layers"):
            raise ModelError(f"{self.model} is not a Vision Transformer: its configuration has no patches.")
        mean, std = self.mean, self.std
        if mean is None or std is None:
            mean, std = _normalisation(self.model)
        return ImageEncoderTeacher(
            model,
            self.layers or spaced_layers(model.config.num_hidden_layers, self.count, self.interval),
            mean,
            std,
            resolution=self.resolution,
            precision=self.precision,
            frames_at_once=self.frames_at_once,
        )


def _normalisation(model: str) -> tuple[Triple, Triple]:
    """image_mean and image_std that the model was published with; raises ModelError when there are none."""
    try:
        values = read_object(open_settings(model) / "preprocessor_config.json")
        mean, std = (tuple(float(x) for x in values[key]) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError("not three channels")
        return mean, std
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{model} says nothing of its pixel normalisation ({error}): set the teacher's mean and std."
        ) from error
