"""FluxViTConfig: every dimension of the encoder, and the four sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from encoder.errors import ConfigError
from encoder.json_files import read_object

Gelu = Literal["erf", "tanh"]
ImagePositions = Literal["interpolate", "mean"]


# Allowed (min, max) of every size in a configuration file: tensors and loops are made of them.
_RANGES: dict[str, tuple[int, int]] = {
    "embed_dim": (8, 8192),
    "depth": (1, 256),
    "num_heads": (1, 256),
    "patch_size": (1, 256),
    "pos_frames": (1, 1024),
    "pos_height": (1, 512),
    "pos_width": (1, 512),
    "pool_heads": (1, 256),
    "clip_embed_dim": (1, 2**16),
    "num_pools": (0, 32),
    "num_aligners": (0, 32),
    "num_classes": (0, 2**20),
}
_REAL_RANGES: dict[str, tuple[float, float]] = {
    "mlp_ratio": (0.1, 32.0),
    "drop_path": (0.0, 1.0),
    "layer_scale_init": (-1e3, 1e3),
}


SWITCHES = ("dual_patch_norm", "gpe", "lpe")


def _check_ranges(values: dict[str, Any]) -> None:
    """Raises ConfigError for a size of the wrong type or out of range."""
    for name, value in values.items():
        if name in _RANGES:
            least, most = _RANGES[name]
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"{name} must be a whole number from {least} to {most}, not {value!r:.40}.")
        elif name in _REAL_RANGES:
            low, high = _REAL_RANGES[name]
            if type(value) not in (int, float) or not low <= value <= high:
                raise ConfigError(f"{name} must be a number from {low:g} to {high:g}, not {value!r:.40}.")
        elif name in SWITCHES:
            if type(value) is not bool:
                raise ConfigError(f"{name} must be true or false, not {value!r:.40}.")
        elif name == "head_counts":
            whole = isinstance(value, (list, tuple)) and all(type(n) is int for n in value)
            if not whole or len(value) > 32 or min(value, default=0) < 0:
                raise ConfigError(f"head_counts must be a token count for each head, not {value!r:.60}.")
        elif name in ("frames_range", "resolution_range"):
            whole = (
                isinstance(value, (list, tuple)) and len(value) == 3 and all(type(n) is int for n in value)
            )
            if not whole or not (0 < value[0] < value[1] <= 2**14 and value[2] > 0):
                raise ConfigError(f"{name} must be [first, end, step], whole numbers, not {value!r:.60}.")


@dataclass(frozen=True)
class FluxViTConfig:
    """Dimensions of a FluxViT (arXiv 2503.14237; the names follow the released model file).

    The position table covers `pos_frames` x `pos_height` x `pos_width` patches and is interpolated to any
    other grid. `gelu`: the plain definition uses the exact error function; the released weights were
    trained with fused kernels whose default is the tanh form. `image_positions`: a single frame takes the
    table interpolated over time, which is the mean of its two middle frames, or the mean of all its frames,
    as InternVideo2's image-text training does. `head_counts`: the token count that each pooling and class
    head was fine-tuned at, 0 for none; empty when nothing says it.
    `dual_patch_norm`, `gpe`, `lpe`: the three parts that make a FluxViT of a plain ViT; all three off is the
    baseline of the paper's Table 3 and of its figures of gradient norms. Without `dual_patch_norm` patches
    have no norm at all, as in the released code without its flag.
    """

    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    patch_size: int = 14
    pos_frames: int = 24
    pos_height: int = 18
    pos_width: int = 18
    pool_heads: int = 16
    clip_embed_dim: int = 768
    num_pools: int = 3
    num_aligners: int = 2
    num_classes: int = 400
    gelu: Gelu = "erf"
    drop_path: float = 0.0
    layer_scale_init: float = 1e-5
    image_positions: ImagePositions = "interpolate"
    dual_patch_norm: bool = True
    gpe: bool = True
    lpe: bool = True
    head_counts: tuple[int, ...] = ()
    # Input ranges the weights were trained on; the default plan table is drawn from them.
    frames_range: tuple[int, int, int] = (4, 26, 2)
    resolution_range: tuple[int, int, int] = (168, 280, 28)

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}.")
        if self.num_pools and self.embed_dim % self.pool_heads:
            raise ConfigError(
                f"embed_dim {self.embed_dim} must be a multiple of pool_heads {self.pool_heads}."
            )
        if self.embed_dim % 8:
            raise ConfigError(
                f"embed_dim {self.embed_dim} must be a multiple of 8 for the 3-D sin-cos table."
            )
        if self.gelu not in ("erf", "tanh"):
            raise ConfigError(f"gelu must be 'erf' or 'tanh', not {self.gelu!r}.")
        if self.image_positions not in ("interpolate", "mean"):
            raise ConfigError(
                f"image_positions must be 'interpolate' or 'mean', not {self.image_positions!r}."
            )
        object.__setattr__(self, "head_counts", tuple(self.head_counts))
        object.__setattr__(self, "frames_range", tuple(self.frames_range))
        object.__setattr__(self, "resolution_range", tuple(self.resolution_range))

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def pos_tokens(self) -> int:
        """Rows of the position table without the cls row."""
        return self.pos_frames * self.pos_height * self.pos_width

    def replace(self, **changes: Any) -> FluxViTConfig:
        """A copy with some values changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> FluxViTConfig:
        """The reverse of `to_dict`; raises ConfigError on unknown keys and sizes out of range."""
        known = {field.name for field in dataclasses.fields(FluxViTConfig)}
        if unknown := set(values) - known:
            raise ConfigError(f"Unknown FluxViT setting {sorted(unknown)}: known are {sorted(known)}.")
        _check_ranges(values)
        return FluxViTConfig(**values)

    @staticmethod
    def read(path: str | Path) -> FluxViTConfig:
        """From a JSON file; raises ConfigError when it is missing or not a FluxViT configuration."""
        try:
            values = read_object(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"Cannot read the encoder configuration {path}: {error}.") from error
        return FluxViTConfig.from_dict(values)


# The size of the shipped model: trained from scratch on two CPU cores.
MICRO = FluxViTConfig(
    embed_dim=192,
    depth=6,
    num_heads=3,
    pos_frames=16,
    pos_height=8,
    pos_width=8,
    clip_embed_dim=384,
    num_classes=0,
    gelu="tanh",
    layer_scale_init=0.1,
    frames_range=(4, 18, 2),
    resolution_range=(56, 126, 14),
)
SMALL = FluxViTConfig()
BASE = FluxViTConfig(embed_dim=768, num_heads=12, pos_frames=32, pos_height=20, pos_width=20)
# Not released; dimensions inferred from the InternVideo2-L distillation setting, table size from BASE.
LARGE = FluxViTConfig(embed_dim=1024, depth=24, num_heads=16, pos_frames=32, pos_height=20, pos_width=20)

SIZES: dict[str, FluxViTConfig] = {"micro": MICRO, "small": SMALL, "base": BASE, "large": LARGE}
