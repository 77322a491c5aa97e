"""Attention for training through a frozen language model on CPUs in half precision.

There the backward pass of the fused kernel is the slowest part of a step. Plain matrix products, with the
query heads of a group stacked so that keys and values are never copied, are faster (tests/bench/stage1.py
times whole steps). They also take prompts packed end to end, so that no other layer computes padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_bridge.packing import Packing, pack, unpack

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
    (1, H or G, N, d) and the mask is the packing's, (1 or B, 1, L, shared + L).
    """
    if packing is not None:
        assert attention_mask is not None
        q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
        dropout = dropout if module.training else 0.0
        return _packed(q, k, v, attention_mask[:, 0], packing, scaling, dropout).unsqueeze(0), None
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


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    packing: Packing,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Attention of a packed batch: q (N, H, d), k and v (N, G, d), bias (1 or B, L, shared + L)."""
    rows = _attend(
        unpack(query, packing, shared=False),
        unpack(key, packing, shared=True),
        unpack(value, packing, shared=True),
        bias,
        scaling,
        dropout,
    )
    own = pack(rows, packing)
    if not packing.shared:
        return own
    first = [x[: packing.shared].transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
    # The mask's top left corner is shifted by the shared positions: theirs is plainly causal.
    causal = torch.full((packing.shared, packing.shared), torch.finfo(bias.dtype).min, dtype=bias.dtype)
    shared = _attend(first[0], first[1], first[2], causal.triu(1).unsqueeze(0), scaling, dropout)
    return torch.cat([shared[0].transpose(0, 1), own])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    """softmax(q k^T * scaling + bias) v; q (B, H, L, d), k and v (B, G, M, d), bias (1 or B, L, M): as q."""
    batch, heads, length, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    scale = dim**-0.5 if scaling is None else scaling
    each = bias[:, None, None].expand(-1, groups, heads // groups, -1, -1)
    scores = torch.baddbmm(
        each.reshape(-1, heads // groups * length, keys) if len(bias) > 1 else each[0, 0].flatten(0, 1),
        query.reshape(batch * groups, heads // groups * length, dim),
        key.reshape(batch * groups, keys, dim).transpose(1, 2),
        alpha=scale,
    )
    weights = scores.softmax(dim=-1)
    if dropout:
        weights = nn.functional.dropout(weights, dropout)
    mixed = torch.bmm(weights, value.reshape(batch * groups, keys, dim))
    return mixed.view(batch, heads, length, dim)


def packs(model: Any, longest: int) -> bool:
    """Whether a model takes packed batches of prompts of up to `longest` positions."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return config._attn_implementation == NAME and (window is None or window >= longest)


def register() -> None:
    """Make it known to transformers by its name."""
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
