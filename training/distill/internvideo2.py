"""InternVideo2, the teacher of Flux-UMT, on any grid and any choice of tokens.

Names and shapes are those of the official checkpoints (the 1B model: 1408 wide, 40 blocks). Beyond the
official teacher it interpolates its position table to the grid at hand and runs on chosen tokens alone, which
is what flexible grids and the token selector need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoder.checkpoint import load_tensors, read_tensors
from encoder.config import Gelu
from encoder.errors import BudgetError, CheckpointError, ConfigError
from encoder.layers import AttentionPool, LayerScale, Mlp, RMSNorm, attend
from encoder.positions import PositionCache, interpolate, sin_cos_3d
from encoder.tokens import Grid
from training.distill.teachers import (
    DTYPES,
    Precision,
    Teacher,
    TeacherTargets,
    spaced_layers,
    weights_digest,
)
from training.trainer.losses import unit

# Parts of official pre-training files that the teacher has no use for: image tables and their own decoders.
UNUSED = ("clip_decoder.", "final_clip_decoder.", "clip_pos_embed", "clip_img_pos_embed", "img_pos_embed")
# Parts of a stage-2 file (a video-text model) outside the vision encoder.
OUTSIDE = ("text_encoder.", "vision_proj.", "text_proj.", "itm_head.", "temp")


@dataclass(frozen=True)
class InternVideo2Config:
    """Dimensions; the defaults are the 1B model at 8 x 224^2. drop_path acts in train mode only."""

    embed_dim: int = 1408
    depth: int = 40
    num_heads: int = 16
    mlp_dim: int = 6144
    patch_size: int = 14
    pool_heads: int = 16
    clip_embed_dim: int = 768
    pos_frames: int = 8
    pos_height: int = 16
    pos_width: int = 16
    gelu: Gelu = "tanh"
    drop_path: float = 0.25

    def __post_init__(self) -> None:
        for heads in (self.num_heads, self.pool_heads):
            if self.embed_dim % heads:
                raise ConfigError(
                    f"The teacher's width {self.embed_dim} must be a multiple of {heads} heads."
                )

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> InternVideo2Config:
        """The 1B model with some values changed; raises ConfigError on unknown ones."""
        known = {field.name for field in dataclasses.fields(InternVideo2Config)}
        if unknown := set(values) - known:
            raise ConfigError(f"Unknown InternVideo2 setting {sorted(unknown)}: known are {sorted(known)}.")
        return InternVideo2Config(**values)


class TeacherAttention(nn.Module):
    """Self-attention, queries and keys RMS-normalised over all heads together."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = RMSNorm(dim)
        self.k_norm = RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        heads = [
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_norm(q), self.k_norm(k), v)
        ]
        return self.proj(attend(*heads).transpose(1, 2).flatten(2))


class TeacherBlock(nn.Module):
    """Pre-norm block; in train mode whole branches of a clip drop with probability `drop_path`."""

    def __init__(self, config: InternVideo2Config, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = RMSNorm(dim)
        self.attn = TeacherAttention(dim, config.num_heads)
        self.ls1 = LayerScale(dim, 1e-5)
        self.norm2 = RMSNorm(dim)
        self.mlp = Mlp(dim, config.mlp_dim, config.gelu)
        self.ls2 = LayerScale(dim, 1e-5)
        self.drop_path = drop_path

    def _drop(self, y: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return y
        stays = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path
        return y * (stays.to(y.dtype) / (1 - self.drop_path))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = self.ls1(x, self._drop(self.attn(self.norm1(x))))
        return self.ls2(x, self._drop(self.mlp(self.norm2(x))))


class TeacherPatchEmbed(nn.Module):
    """Non-overlapping 1 x P x P patches, one linear map, no norm."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        kernel = (1, patch_size, patch_size)
        self.proj = nn.Conv3d(3, dim, kernel, stride=kernel)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, T*h*w, C) in raster order."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class TeacherOutput:
    """hidden: per asked layer (B, 1+N, C), cls first; pooled (B, clip_embed_dim); attention (B, N) of the
    pooling query over the patch tokens, mean over heads (the part on cls is left out)."""

    hidden: tuple[Tensor, ...]
    pooled: Tensor
    attention: Tensor


class InternVideo2(nn.Module):
    """The vision encoder of InternVideo2 with its attentive pooling."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.pos_grid = Grid(config.pos_frames, config.pos_height, config.pos_width)
        self._position_cache = PositionCache()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sin_cos_3d(dim, self.pos_grid))
        self.patch_embed = TeacherPatchEmbed(dim, config.patch_size)
        self.blocks = nn.ModuleList(
            TeacherBlock(config, config.drop_path * index / max(1, config.depth - 1))
            for index in range(config.depth)
        )
        self.clip_projector = AttentionPool(dim, config.pool_heads, config.clip_embed_dim)

    def grid_of(self, pixels: Tensor) -> Grid:
        """Patch grid of (B, 3, T, H, W); raises BudgetError unless the sides are multiples of the patch."""
        frames, height, width = pixels.shape[2:]
        size = self.config.patch_size
        if height % size or width % size:
            raise BudgetError(
                f"The teacher needs sides that are multiples of {size}, not {height} x {width}."
            )
        return Grid(frames, height // size, width // size)

    def forward(
        self, pixels: Tensor, chosen: Tensor | None = None, layers: Sequence[int] = ()
    ) -> TeacherOutput:
        """pixels (B, 3, T, H, W) ImageNet-normalised; chosen: (B, N) raster indices, None for all tokens."""
        patches = self.patch_embed(pixels.to(self.cls_token.dtype))
        return self.encode(patches, self.grid_of(pixels), chosen, layers)

    def encode(
        self, patches: Tensor, grid: Grid, chosen: Tensor | None = None, layers: Sequence[int] = ()
    ) -> TeacherOutput:
        """Blocks and pooling on patch embeddings (B, T*h*w, C)."""
        rows = self.pos_embed[0, 1:]
        if torch.is_grad_enabled():
            table = interpolate(rows, self.pos_grid, grid)
        else:
            table = self._position_cache.get(rows, self.pos_grid, grid)
        if chosen is None:
            x = patches + table
        else:
            x = patches.gather(1, chosen.unsqueeze(-1).expand(-1, -1, patches.shape[-1])) + table[chosen]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        hidden = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in layers:
                hidden.append(x)
        return TeacherOutput(tuple(hidden), self.clip_projector(x), self.clip_projector.attention(x)[:, 1:])


def load_internvideo2(path: str | Path, config: InternVideo2Config) -> InternVideo2:
    """The encoder with the weights of an official file, in eval mode and without gradients.

    A table of another number of frames (4 in the stage-2 file) is interpolated to `config.pos_frames`, as the
    official teacher does at loading. Raises CheckpointError when a tensor is missing, mis-shaped or unknown.
    """
    tensors = {
        name: value for name, value in read_tensors(path).items() if not name.startswith(UNUSED + OUTSIDE)
    }
    with torch.device("meta"):
        model = InternVideo2(config)
    model.to_empty(device="cpu")
    table = tensors.get("pos_embed")
    if table is not None and table.shape[-2:] != model.pos_embed.shape[-2:]:
        tensors["pos_embed"] = _fit_table(table, model.pos_grid, path)
    load_tensors(model, tensors)
    return model.eval().requires_grad_(False)


def _fit_table(table: Tensor, wanted: Grid, path: str | Path) -> Tensor:
    """(1, 1 + T*L, C) for another number of frames."""
    rows, per_frame = table.shape[1] - 1, wanted.height * wanted.width
    if rows % per_frame or not rows:
        raise CheckpointError(
            f"The position table of {path} has {rows} rows, which are no frames of {wanted.height} x "
            f"{wanted.width}: set the teacher's pos_height and pos_width."
        )
    saved_grid = Grid(rows // per_frame, wanted.height, wanted.width)
    return torch.cat([table[:, :1], interpolate(table[0, 1:].float(), saved_grid, wanted)[None]], dim=1)


# -- as a teacher -------------------------------------------------------------------------------------------


class InternVideo2Teacher:
    """InternVideo2 on the chosen tokens alone.

    compat_train_mode keeps stochastic depth (0 to config.drop_path) active, as the official distillation
    does, which never calls eval(); off by default.
    """

    has_cls = True
    dense = False

    def __init__(
        self,
        model: InternVideo2,
        layers: Sequence[int],
        *,
        compat_train_mode: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        depth = model.config.depth
        if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] >= depth:
            raise ConfigError(f"Teacher layers must ascend within 0 to {depth - 1}, not {list(layers)}.")
        self.model = model.to(DTYPES[precision]).requires_grad_(False).train(compat_train_mode)
        self.layers = tuple(layers)
        self.layer_dims = (model.config.embed_dim,) * len(self.layers)
        self.final_dim = model.config.clip_embed_dim
        self.fingerprint = weights_digest(model, self.layers, compat_train_mode, precision)

    def to(self, device: torch.device) -> InternVideo2Teacher:
        """Move the weights."""
        self.model.to(device)
        return self

    def compile(self) -> None:
        """Have torch.compile make the kernels of its blocks."""
        for block in self.model.blocks:
            block.compile()

    @torch.no_grad()
    def patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        """Patch embeddings before positions, (B, T*h*w, C)."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self.model.patch_embed(pixels.to(self.model.cls_token.dtype))

    @torch.no_grad()
    def observe(self, pixels: Tensor, grid: Grid, chosen: Tensor) -> dict[str, Tensor]:
        """Layer outputs "layer_I" (B, 1+N, C), "final" (B, F) and "attention" (B, N)."""
        if self.model.grid_of(pixels) != grid:
            raise ConfigError(
                f"InternVideo2 cuts a clip into {tuple(self.model.grid_of(pixels))} patches, the student "
                f"into {tuple(grid)}: their patch sizes must be equal."
            )
        with torch.autocast(pixels.device.type, enabled=False):
            out = self.model(pixels, chosen, self.layers)
        observed = {f"layer_{index}": unit(value) for index, value in enumerate(out.hidden)}
        return observed | {"final": unit(out.pooled), "attention": out.attention.float()}

    def targets(self, observed: Mapping[str, Tensor], grid: Grid, chosen: Tensor) -> TeacherTargets:
        """As observed, at unit length."""
        layers = tuple(unit(observed[f"layer_{index}"]) for index in range(len(self.layers)))
        return TeacherTargets(layers, unit(observed["final"]), observed["attention"].float())


@dataclass(frozen=True)
class InternVideo2Source:
    """An official file and how it is used.

    weights: the .pt file (stage-2 1B for the paper's recipe, by inference from the InternVideo2 distillation
    scripts). count, interval: the layers, see `spaced_layers`; layers: their indices instead. settings:
    changes to InternVideo2Config. compat_train_mode: see InternVideo2Teacher.
    """

    weights: str
    count: int = 6
    interval: float = 3.34
    layers: tuple[int, ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    compat_train_mode: bool = False
    precision: Precision = "bf16"

    def open(self) -> Teacher:
        """The teacher; raises CheckpointError or ConfigError."""
        config = InternVideo2Config.from_dict(self.settings)
        layers = self.layers or spaced_layers(config.depth, self.count, self.interval)
        return InternVideo2Teacher(
            load_internvideo2(self.weights, config),
            layers,
            compat_train_mode=self.compat_train_mode,
            precision=self.precision,
        )
