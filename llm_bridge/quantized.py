"""Weights of 8 and 4 bits on CPUs, multiplied by torch's own kernels.

int8 has a scale for each output; int4 has a scale and an offset for each 32 inputs of an output, and a head
of 8 bits. Products that the kernels do not take stay as they are. Each row is summed by itself, in one order.

A model that adapters were merged into has no offsets in int4. Its weights before may have come from a file of
4 bits with such offsets; then what adapters change, less than half of a step, is rounded away on the same
grid, while on another one it is kept on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.errors import ModelError
from llm_bridge.batch_invariance import RowInvariantLinear

Kind = Literal["int8", "int4"]
KINDS: tuple[Kind, ...] = ("int8", "int4")
GROUP = 32  # inputs that share a scale in int4
BLOCK = 64  # outputs that int4's layout keeps together
MANY = 16  # positions of a sequence from which on it pays to widen int8 weights
CLIPS = (1.0, 0.9, 0.8)  # shares of a group's range that are tried
CACHED = 2**16  # weights that are worked on at a time: what is made of them stays in the processor's cache


class QuantizedLinear(nn.Module):
    """A linear layer (in -> out) with few bits; its inference only."""

    in_features: int
    out_features: int
    bias: Tensor | None

    @property
    def parameters_replaced(self) -> int:
        """Number of the parameters that it stands for."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.out_features)

    def product(self, rows: Tensor) -> Tensor:
        """(B, in) -> (B, out), each row as if it were alone."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.product(input.reshape(-1, self.in_features)).view(*input.shape[:-1], self.out_features)


class Int8Linear(QuantizedLinear):
    """Weights (out, in) of -127 to 127, a scale for each output."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.scales: Tensor
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None) -> Int8Linear:
        """The nearest to weights (out, in)."""
        wide = weight.float()
        scales = (wide.abs().amax(dim=1) / 127).clamp_min(1e-12).to(weight.dtype)
        whole = (wide / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        return Int8Linear(whole, scales, bias)

    def product(self, rows: Tensor) -> Tensor:
        out = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scales)
        return out if self.bias is None else out + self.bias

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() > 1 and input.shape[-2] > MANY:
            out = F.linear(input, self.weight.to(input.dtype)) * self.scales
            return out if self.bias is None else out + self.bias
        return super().forward(input)

    @staticmethod
    def joined(layers: Sequence[Int8Linear]) -> Int8Linear:
        """Layers on the same rows, side by side; they read its weights from now on."""
        weight, scales = (torch.cat([getattr(x, name) for x in layers]) for name in ("weight", "scales"))
        whole = Int8Linear(weight, scales, _joined_bias([layer.bias for layer in layers]))
        _share(layers, whole.weight)
        return whole


class Int4Linear(QuantizedLinear):
    """Weights of 0 to 15 in the layout of torch's kernel; scales and offsets (in / GROUP, out, 2)."""

    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.scales: Tensor
        self.in_features, self.out_features = len(scales) * GROUP, scales.shape[1]
        self.register_buffer("weight", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, *, merged: bool = False) -> Int4Linear:
        """The nearest to weights (out, in), of a few ranges for each group the one with the least error.

        merged: adapters were merged into them.
        """
        grids = _signed_grids if merged else _grids
        parts = [_nearest(part, grids) for part in weight.split(max(1, CACHED // weight.shape[1]))]
        whole, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
        scales = scales.transpose(0, 1).contiguous().to(weight.dtype)
        return Int4Linear(packed, scales, bias)

    def product(self, rows: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.contiguous(), self.weight, GROUP, self.scales
        )
        return out if self.bias is None else out + self.bias

    @staticmethod
    def joined(layers: Sequence[Int4Linear]) -> Int4Linear:
        """As of Int8Linear; all have whole blocks of outputs."""
        whole = Int4Linear(
            torch.cat([layer.weight for layer in layers]),
            torch.cat([layer.scales for layer in layers], dim=1),
            _joined_bias([layer.bias for layer in layers]),
        )
        _share(layers, whole.weight)
        return whole


# For groups of weights (out, in / GROUP, GROUP), the step and what stands for 8, of each range that is tried.
Grids = Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]]


def _grids(groups: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """From about a group's least weight to its greatest."""
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    for share in CLIPS:
        span = (high - low) * share
        step = span / 15
        yield step, (high + low - span) / 2 + 8 * step


def _signed_grids(groups: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Around zero, from a group's weight of the greatest size, as GGUF's Q4_0 has it.

    Only one: the nearest of several would often be the one near the grid of before.
    """
    peak = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    yield peak / -8, torch.zeros_like(peak)


def _nearest(weight: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
    """Whole numbers (out, in) of 0 to 15, and scale and offset (out, in / GROUP, 2), nearest to weights."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    least = torch.full_like(groups[..., :1], torch.inf)
    whole, scale, offset = torch.zeros_like(groups), torch.zeros_like(least), torch.zeros_like(least)
    for wanted, middle in grids(groups):
        step = torch.where(wanted.abs() < 1e-8, 1e-8, wanted).to(weight.dtype).float()
        start = middle.to(weight.dtype).float()
        found = ((groups - start) / step).round_().add_(8).clamp_(0, 15)
        error = ((found - 8) * step + start - groups).square_().sum(dim=2, keepdim=True)
        better = error < least
        least, scale = torch.where(better, error, least), torch.where(better, step, scale)
        whole, offset = torch.where(better, found, whole), torch.where(better, start, offset)
    return whole.flatten(1).int(), torch.cat((scale, offset), dim=2)


def joined_product(layers: Sequence[QuantizedLinear]) -> Callable[[Tensor], Tensor]:
    """The products of several layers on the same rows, side by side."""
    if len(layers) == 1:
        return layers[0].product
    kinds = {type(layer) for layer in layers}
    if kinds == {Int8Linear}:
        return Int8Linear.joined([x for x in layers if isinstance(x, Int8Linear)]).product
    if kinds == {Int4Linear} and all(layer.out_features % BLOCK == 0 for layer in layers):
        return Int4Linear.joined([x for x in layers if isinstance(x, Int4Linear)]).product
    return lambda rows: torch.cat([layer.product(rows) for layer in layers], dim=1)


def _joined_bias(biases: Sequence[Tensor | None]) -> Tensor | None:
    there = [bias for bias in biases if bias is not None]
    return torch.cat(there) if there else None


def _share(layers: Sequence[QuantizedLinear], weight: Tensor) -> None:
    for layer, part in zip(layers, weight.split([x.out_features for x in layers]), strict=True):
        layer.weight = part


@torch.no_grad()
def quantize_linear(model: Any, kind: str, *, merged: bool = False) -> None:
    """Replace the linear layers of a causal language model on a CPU, one by one.

    merged: adapters were merged into it. Raises ModelError where there is no such kernel, and when the model
    has been quantised already.
    """
    device = model.get_input_embeddings().weight.device
    if device.type != "cpu":
        raise ModelError(
            f"{kind} is for CPUs, and the language model is on {device}: use quantize='8bit' or '4bit' there."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"The language model's weights are quantised already: leave out quantize={kind!r}.")
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, RowInvariantLinear):
                setattr(parent, name, _quantized(child, "int8" if child is head else kind, merged))


def _quantized(layer: Any, kind: str, merged: bool) -> nn.Module:
    """A layer with few bits, or itself where the kernels do not take its shape."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    outputs, inputs = weight.shape
    if inputs % GROUP or outputs % 16:
        found: nn.Module = layer
    elif kind == "int8":
        found = Int8Linear.of(weight, bias)
    else:
        found = Int4Linear.of(weight, bias, merged=merged)
    return found.eval()
