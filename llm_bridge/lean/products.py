"""Matrix products of a decoding step, by how their weights are kept."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 8  # that products are made for, and tried with


class PlainProduct:
    """Weights (out, in) as torch has them."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self._weight, self._bias)


class PackedProduct:
    """Weights (out, in) reordered once as oneDNN's kernels read them, on CPUs; the same bits, in less time.

    oneDNN divides long sums of a single row otherwise than those of several. Where this machine is seen to do
    so, a single row is computed twice, which reads the weights no more often: an answer's tokens then do not
    depend on how many others are decoded.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self._bias = bias
        self._twice = single_row_differs(*weight.shape, weight.dtype, torch.get_num_threads())

    def __call__(self, rows: Tensor) -> Tensor:
        if self._twice and len(rows) == 1:
            return _packed(torch.cat((rows, rows)), self._weight, self._bias)[:1]
        return _packed(rows, self._weight, self._bias)


def _packed(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


@cache
def single_row_differs(outputs: int, inputs: int, dtype: torch.dtype, threads: int) -> bool:
    """Whether this machine sums a single row in another order than several, for weights of this shape."""
    random = torch.Generator().manual_seed(0)
    # The exact sums are 0, so that what is left is rounding, which shows the order.
    halves = [torch.randn(count, inputs // 2, generator=random) for count in (outputs, ROWS)]
    weight, rows = (
        torch.cat((half, sign * half, half.new_zeros(len(half), inputs % 2)), dim=1).to(dtype)
        for half, sign in zip(halves, (1, -1), strict=True)
    )
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    alone = torch.cat([_packed(row[None], packed, None) for row in rows])
    return not torch.equal(alone, _packed(rows, packed, None))


def packs(weight: Tensor) -> bool:
    """Whether PackedProduct takes such weights here."""
    kinds = (torch.float32, torch.bfloat16)
    return weight.device.type == "cpu" and weight.dtype in kinds and torch.backends.mkldnn.is_available()
