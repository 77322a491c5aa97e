"""Attention for training through a frozen language model on CPUs in half precision.

There the backward pass of the fused kernel is the slowest part of a step. Plain matrix products, with the
query heads of a group stacked so that keys and values are never copied, are faster (tests/bench/stage1.py
times whole steps). They also take prompts packed end to end, so that no other layer computes padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_bridge.packing import Packing

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
    packing: Packing | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling + mask) v; heads (B, H, L, d), keys and values (B, G, N, d) -> (B, L, H, d).

    attention_mask: additive, (B, 1, L, N), or None for no mask. packing: q, k and v are one packed batch
    (1, H or G, N, d), which defines the mask; `attention_mask` is not read.
    """
    dropout = dropout if module.training else 0.0
    if packing is not None:
        return _packed(query[0], key[0], value[0], packing, scaling, dropout).unsqueeze(0), None
    batch, heads, length, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    stacked = query.reshape(batch * groups, heads // groups * length, dim)
    scale = dim**-0.5 if scaling is None else scaling
    scores = torch.bmm(stacked * scale, key.reshape(batch * groups, keys, dim).transpose(1, 2))
    if attention_mask is not None:
        scores.view(batch, heads, length, keys).add_(attention_mask.to(scores.dtype))
    mixed = _mix(scores, value.reshape(batch * groups, keys, -1), dropout)
    return mixed.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def _packed(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, dropout: float
) -> Tensor:
    """Attention of a packed batch, block by block: q (H, N, d), k and v (G, N, d) -> (N, H, d)."""
    heads, _, dim = query.shape
    repeat = heads // len(key)
    scale = dim**-0.5 if scaling is None else scaling
    lengths = [block.length for block in packing.blocks]
    queries, keys, values = (x.split(lengths, dim=1) for x in (query, key, value))
    rows = []
    for number, (block, bias) in enumerate(
        zip(packing.blocks, packing.biases(repeat, query.dtype), strict=True)
    ):
        visible = (*block.before, number)
        k, v = (torch.cat([x[place] for place in visible], dim=1) for x in (keys, values))
        stacked = queries[number].reshape(len(key), repeat * block.length, dim)
        scores = torch.baddbmm(bias, stacked, k.transpose(1, 2), alpha=scale)
        rows.append(_mix(scores, v, dropout).view(heads, block.length, -1).transpose(0, 1))
    return torch.cat(rows)


def _mix(scores: Tensor, value: Tensor, dropout: float) -> Tensor:
    """softmax(scores) v."""
    weights = scores.softmax(dim=-1)
    return torch.bmm(nn.functional.dropout(weights, dropout) if dropout else weights, value)


def packs(model: Any, longest: int) -> bool:
    """Whether a model takes packed batches of prompts of up to `longest` positions."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return config._attn_implementation == NAME and (window is None or window >= longest)


def register() -> None:
    """Register it with transformers under NAME."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def use_for_training(model: Any) -> bool:
    """Switch a model to it where it helps: on CPUs, in half precision, for layouts with plain attention.

    Returns whether it was switched.
    """
    weight = model.get_input_embeddings().weight
    layout = model.config.get_text_config().model_type
    if weight.device.type != "cpu" or weight.dtype == torch.float32 or layout not in SUPPORTED:
        return False
    register()
    model.set_attn_implementation(NAME)
    return True
