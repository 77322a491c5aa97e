"""Learning rates and parameter groups."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from training.config import OptimConfig

# As in the released training code: these and all 1-D parameters are not decayed.
NEVER_DECAYED = ("pos_embed", "cls_token")


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Rate of step 0..total-1: linear warm-up over `warmup_ratio` of the steps, then cosine to `min_lr`."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed, and never (1-D, position table, cls token)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or name.split(".")[-1] in NEVER_DECAYED
            (plain if spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
