"""Batch invariance on CPUs: the logits of a sequence are bit-equal whatever is decoded in the same batch.

Two operations let the rounding of one sequence depend on the others. Attention: keys padded to the longest
sequence are summed in other blocks, by another kernel. Matrix products: a single row has a kernel of its own,
in float32 MKL has several for few rows, and it divides rows among threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAME = "attention_by_row"


class RowInvariantLinear(nn.Linear):
    """nn.Linear whose rows do not depend on their number, for inference on CPUs.

    All of it is left to oneDNN, which has one kernel for a single row and another for any other number; so a
    single row is computed twice, which reads the weights no more often.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if torch.is_grad_enabled() or input.device.type != "cpu":
            return super().forward(input)
        single = input.dim() > 1 and input.numel() == self.in_features
        rows = torch.cat((input, input)) if single else input
        if input.dtype == torch.float32:  # which nn.Linear would leave to MKL
            out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        else:
            out = super().forward(rows)
        return out[:1] if single else out


def attention_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What "sdpa" computes; on CPUs one new token of each sequence is computed without the others' padding.

    Heads (B, H, L, d), keys and values (B, G, N, d) -> (B, L, H, d). attention_mask: (B, 1, L, N), True where
    a key is seen, or None.
    """
    batch, heads, length, _ = query.shape
    starts = None
    if length == 1 and query.device.type == "cpu" and options.get("position_bias") is None:
        starts = [0] * batch if attention_mask is None else left_padding(attention_mask)
    if starts is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.reshape(batch, key.shape[1], -1, query.shape[3])  # (B, G, H / G, d)
    rows = [
        nn.functional.scaled_dot_product_attention(
            grouped[row, None], key[row, None, :, start:], value[row, None, :, start:], scale=scaling
        )
        for row, start in enumerate(starts)
    ]
    return torch.cat(rows).view(batch, 1, heads, -1), None


def attend_by(model: Any, name: str, attention: Callable[..., tuple[Tensor, None]]) -> None:
    """Have a model attend by a function of ours, which takes the masks that "sdpa" takes."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def left_padding(mask: Tensor) -> list[int] | None:
    """Per row of a mask (B, 1, 1, N), the first key seen; None unless each row sees all from there on."""
    if mask.dtype != torch.bool:
        return None
    visible = mask[:, 0, -1]
    starts = visible.int().argmax(dim=1)
    if not torch.equal(visible.sum(dim=1) + starts, torch.full_like(starts, visible.shape[1])):
        return None
    return starts.tolist()


def make_batch_invariant(model: Any) -> bool:
    """Let a causal language model on a CPU decode a sequence as if it were alone; returns whether it does.

    Elsewhere, and with another attention than "sdpa", the model stays as it is. What may still round a last
    bit otherwise: float32 activations whose width is no multiple of 32, activations of over 32768 elements in
    one step when threads divide them, bfloat16 where the processor emulates it.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return False
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    attend_by(model, NAME, attention_by_row)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowInvariantLinear
    return True
