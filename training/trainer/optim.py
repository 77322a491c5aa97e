"""Learning rates and parameter groups."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from training.trainer.recipe import OptimConfig

# As in the released training code: these and all 1-D parameters are not decayed.
NEVER_DECAYED = ("pos_embed", "cls_token")
# The batch that a rate under `optim.scale_lr` is written for.
BASE_BATCH = 256

_BLOCK = re.compile(r"^(.*?)blocks\.(\d+)\.")
_FIRST = re.compile(r"^(.*?)(pos_embed|cls_token|patch_embed)(\.|$)")


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Rate of step 0..total-1: linear warm-up over `warmup_ratio` of the steps, then cosine to `min_lr`.

    With `warmup_lr` the first step has that rate, as in the released code; without, warm-up starts one step
    above zero. With `scale_lr` every rate is multiplied by batch_size / 256.
    """
    scale = config.batch_size / BASE_BATCH if config.scale_lr else 1.0
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup and config.warmup_lr is None:
        return scale * (config.lr * (step + 1) / warmup)
    if step < warmup and config.warmup_lr is not None:
        return scale * (config.warmup_lr + (config.lr - config.warmup_lr) * step / max(1, warmup - 1))
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return scale * (config.min_lr + (config.lr - config.min_lr) * cosine)


def learn_in_float32(model: nn.Module) -> None:
    """Keep trained parameters, and so their gradients and AdamW's states, in float32: what a small step adds
    is lost in half precision. They compute in the recipe's precision, under autocast."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def layer_of(name: str, depths: dict[str, int]) -> tuple[int, int]:
    """(layer, last layer) of a parameter: patch and position embeddings 0, block i i + 1, the rest last.

    depths: blocks of the encoder under each prefix, from `encoder_depths`. A parameter outside any encoder
    is in the last layer.
    """
    for pattern in (_BLOCK, _FIRST):
        match = pattern.match(name)
        if match and match[1] in depths:
            last = depths[match[1]] + 1
            return (int(match[2]) + 1 if pattern is _BLOCK else 0), last
    return 0, 0


def encoder_depths(names: Iterable[str]) -> dict[str, int]:
    """Number of blocks under each prefix that has any: {"encoder.": 12}."""
    depths: dict[str, int] = {}
    for name in names:
        if match := _BLOCK.match(name):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    return depths


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Trainable parameters in groups that share weight decay and rate.

    Never decayed: 1-D parameters, position tables, cls tokens. `lr_scale` of a group multiplies the rate of
    the schedule: layer_decay ** (last - layer), so 0.75 ** (13 - id) in an encoder of 12 blocks (the
    released code's groups; GPE, pools and heads are in the last layer).
    """
    depths = encoder_depths(name for name, _ in model.named_parameters())
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, last = layer_of(name, depths)
            spared = parameter.ndim < 2 or name.split(".")[-1] in NEVER_DECAYED
            groups.setdefault((layer_decay ** (last - layer), spared), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if spared else weight_decay, "lr_scale": scale}
        # Decayed first: a checkpoint numbers parameters in this order.
        for (scale, spared), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
