"""Attention for training through a frozen language model on CPUs in half precision.

There the backward pass of the fused kernel is the slowest part of a step. Plain matrix products, with the
query heads of a group stacked so that keys and values are never copied, are faster (tests/bench/stage1.py
times whole steps).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "grouped_matmul"
SUPPORTED = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3"})


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling + mask) v; heads (B, H, L, d), keys and values (B, G, N, d) -> (B, L, H, d).

    attention_mask: additive, (B, 1, L, N), or None for no mask.
    """
    batch, heads, length, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    stacked = query.reshape(batch * groups, heads // groups * length, dim)
    scale = dim**-0.5 if scaling is None else scaling
    scores = torch.bmm(stacked * scale, key.reshape(batch * groups, keys, dim).transpose(1, 2))
    if attention_mask is not None:
        scores.view(batch, heads, length, keys).add_(attention_mask.to(scores.dtype))
    weights = scores.softmax(dim=-1)
    if dropout:
        weights = nn.functional.dropout(weights, dropout, module.training)
    mixed = torch.bmm(weights, value.reshape(batch * groups, keys, -1))
    return mixed.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def use_for_training(model: Any) -> bool:
    """Switch a model to it where it helps: on CPUs, in half precision, for layouts with plain attention.

    Returns whether it was switched.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    weight = model.get_input_embeddings().weight
    layout = model.config.get_text_config().model_type
    if weight.device.type != "cpu" or weight.dtype == torch.float32 or layout not in SUPPORTED:
        return False
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)
    return True
