"""Decoding attention on GPUs without copies: query heads that share keys become queries of one head.

transformers repeats keys and values for each query head wherever there is a mask, in every layer and step; of
many answers decoded together that is most of the time. With one new token an answer, the heads of a group can
stand where several tokens would.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llm_bridge.batch_invariance import attend_by

NAME = "attention_by_group"


def attention_by_group(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What "sdpa" computes. Heads (B, H, L, d), keys and values (B, G, N, d) -> (B, L, H, d).

    attention_mask: (B, 1, L, N) or None.
    """
    batch, heads, length, _ = query.shape
    if length > 1 or attention_mask is None or options.get("position_bias") is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.reshape(batch, key.shape[1], -1, query.shape[3])  # (B, G, H / G, d)
    mask = attention_mask.expand(-1, -1, grouped.shape[2], -1)
    attended = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(batch, 1, heads, -1), None


def group_heads(model: Any) -> bool:
    """Let a causal language model attend by group in decoding; returns whether it does.

    With as many key heads as query heads, and with another attention than "sdpa", it stays as it is.
    """
    config = model.config.get_text_config()
    key_heads = getattr(config, "num_key_value_heads", None)
    if key_heads in (None, config.num_attention_heads) or config._attn_implementation != "sdpa":
        return False
    attend_by(model, NAME, attention_by_group)
    return True
