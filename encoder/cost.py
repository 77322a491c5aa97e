"""What a plan costs before anything runs: multiply-accumulates by formula, milliseconds by calibration, MiB.

Multiply-accumulates follow the fvcore convention of the paper's GFLOPs column, attention products included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.config import FluxViTConfig
from encoder.fluxvit import FluxViT
from encoder.tokens import Grid

MIB = 2**20


def encoder_macs(
    config: FluxViTConfig, patches: int, num_tokens: int, *, pool: bool = False, classes: int = 0
) -> int:
    """Multiply-accumulates of one clip: `patches` embedded, `num_tokens` (plus cls) through the blocks.

    pool adds one attention pooling, classes a classification head of that width.
    """
    dim, tokens = config.embed_dim, num_tokens + 1
    embed = patches * 3 * config.patch_size**2 * dim
    block = (4 * dim * dim + 2 * dim * config.mlp_dim) * tokens + 2 * tokens * tokens * dim
    total = embed + config.depth * block
    if pool or classes:
        total += 2 * tokens * dim**2 + dim**2 + 2 * tokens * dim + dim * config.clip_embed_dim
    return total + classes * config.clip_embed_dim


def encoder_mib(
    config: FluxViTConfig, frames: int, height: int, width: int, num_tokens: int, bytes_per: int = 4
) -> float:
    """Peak working memory of one clip's forward without weights, in MiB: pixels and patches, or one block."""
    patches = frames * (height // config.patch_size) * (width // config.patch_size)
    patch_values = 3 * config.patch_size**2
    # Pixels, their patches before and after the first norm; then embeddings before selection.
    entry = patches * (3 * patch_values + 2 * config.embed_dim)
    # Residual, normalised input, and q, k, v, attended and LPE, or the hidden layer before and after GELU.
    block = (num_tokens + 1) * (2 * config.embed_dim + max(6 * config.embed_dim, 2 * config.mlp_dim))
    return max(entry, block) * bytes_per / MIB


@dataclass(frozen=True)
class Speed:
    """Milliseconds as a non-negative combination of features, fitted to one model on one machine."""

    weights: tuple[float, ...]

    def milliseconds(self, features: Sequence[float]) -> float:
        """Predicted time of a run with these features."""
        return sum(w * f for w, f in zip(self.weights, features, strict=True))

    @staticmethod
    def fit(rows: Sequence[Sequence[float]], milliseconds: Sequence[float]) -> Speed:
        """Relative least squares with non-negative weights, by projected coordinate descent."""
        y = torch.tensor(milliseconds, dtype=torch.float64)
        x = torch.tensor(rows, dtype=torch.float64) / y[:, None]
        scale = x.norm(dim=0).clamp_min(1e-30)
        x, target = x / scale, torch.ones_like(y)
        weights = torch.zeros(x.shape[1], dtype=torch.float64)
        for _ in range(2000):
            for column in range(x.shape[1]):
                residual = target - x @ weights + x[:, column] * weights[column]
                weights[column] = (x[:, column] @ residual).clamp_min(0)
        return Speed(tuple((weights / scale).tolist()))


def encoder_features(config: FluxViTConfig, patches: int, num_tokens: int) -> list[float]:
    """Constant, patch-embedding work, linear work, attention work (the last three in giga-MACs)."""
    embed = patches * 3 * config.patch_size**2 * config.embed_dim / 1e9
    attention = config.depth * 2 * (num_tokens + 1) ** 2 * config.embed_dim / 1e9
    linear = encoder_macs(config, patches, num_tokens) / 1e9 - embed - attention
    return [1.0, embed, linear, attention]


def time_ms(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Fastest of a few runs after one warm-up, in ms, waiting for the accelerator where there is one."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    once()
    return min(once() for _ in range(repeats))


@torch.inference_mode()
def calibrate_encoder(model: FluxViT, encode: Callable[[Tensor, int], object]) -> Speed:
    """Time `encode(pixels, num_tokens)` on a spread of this model's own inputs and fit `encoder_features`.

    pixels: (1, 3, T, H, W) zeros on the model's device. Takes about a second per 20 GMAC/s of machine speed
    for SMALL; much less for MICRO.
    """
    config, weight = model.config, model.pos_embed
    frames = sorted({min(range(*config.frames_range)), max(range(*config.frames_range))})
    sides = sorted({min(range(*config.resolution_range)), max(range(*config.resolution_range))})
    rows, times = [], []
    for count in frames:
        for side in sides:
            grid = Grid(count, side // config.patch_size, side // config.patch_size)
            pixels = torch.zeros(1, 3, count, side, side, device=weight.device, dtype=weight.dtype)
            for num_tokens in sorted({max(1, grid.size // 8), max(1, grid.size // 3)}):
                rows.append(encoder_features(config, grid.size, num_tokens))
                times.append(time_ms(lambda p=pixels, k=num_tokens: encode(p, k), weight.device, repeats=2))  # type: ignore[misc]
    return Speed.fit(rows, times)
