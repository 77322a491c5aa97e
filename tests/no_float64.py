"""What Apple's GPUs do not have, refused on any device: numbers of 64 bits that are not whole."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = (torch.float64, torch.complex128)


class NoFloat64(TorchDispatchMode):
    """Refuses any operation with such a tensor or type; of the thread that enters it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        found = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, (torch.Tensor, torch.dtype))]
        assert not any(getattr(x, "dtype", x) in REFUSED for x in found), func
        return out
