"""LoRA's linear layers for training on CPUs in half precision, without passes over whole activations.

There peft casts every input to float32 and back, and scales and adds the update in passes of their own. Here
matrix products do all of it, in the base's type; the trained matrices stay float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llm_bridge.batch_invariance import RowInvariantLinear


def use_for_training(adapted: nn.Module) -> int:
    """Switch the adapted layers to it where it helps and applies; returns how many were switched.

    It applies to a plain LoRA without dropout on an unquantised linear layer in half precision on a CPU.
    """
    from peft.tuners.lora import Linear

    layers = [layer for layer in adapted.modules() if type(layer) is Linear and _applies(layer)]
    for layer in layers:
        layer.__class__ = _fused_class(Linear)
    return len(layers)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x W^T + bias + scale x A^T B^T in the type of W: (..., in) -> (..., out).

    weight: W (out, in), frozen as the bias (out,) is. a, b: (rank, in) and (out, rank), of any type.
    """
    result: Tensor = _LoraLinear.apply(x, weight, bias, a, b, scale)
    return result


def _applies(layer: Any) -> bool:
    base, active = layer.get_base_layer(), layer.active_adapters
    plain = type(base) in (nn.Linear, RowInvariantLinear)
    if len(active) != 1 or not plain or layer.lora_variant or layer.fan_in_fan_out:
        return False
    a, b, dropout = (part[active[0]] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    half = base.weight.device.type == "cpu" and base.weight.dtype in (torch.bfloat16, torch.float16)
    return half and isinstance(dropout, nn.Identity) and a.bias is None and b.bias is None


@cache
def _fused_class(linear: Any) -> Any:
    """peft's linear layer with another forward pass; made on demand, since importing peft takes seconds."""

    class FusedLoraLinear(linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged or args or kwargs:
                result: Tensor = super().forward(x, *args, **kwargs)
                return result
            base, name = self.get_base_layer(), self.active_adapters[0]
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            return lora_linear(x, base.weight, base.bias, a, b, self.scaling[name])

    return FusedLoraLinear


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        a_cast, b_cast = a.to(weight.dtype), (b * scale).to(weight.dtype)
        low = rows @ a_cast.T
        ctx.save_for_backward(rows, weight, a_cast, b_cast, low)
        ctx.shape, ctx.types, ctx.scale = x.shape, (x.dtype, a.dtype, b.dtype), scale
        result = nn.functional.linear(rows, weight, bias).addmm_(low, b_cast.T)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, weight, a_cast, b_cast, low = ctx.saved_tensors
        x_type, a_type, b_type = ctx.types
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_low = grad @ b_cast
        grad_a, grad_b = (grad_low.T @ rows).to(a_type), (grad.T @ low).to(b_type) * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a_cast).view(ctx.shape).to(x_type)
        return grad_x, None, None, grad_a, grad_b, None
