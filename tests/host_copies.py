"""Copies from main memory in a computation that lies on another device; each waits for that device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import extract_stack

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _devices(some: object) -> set[str]:
    return {x.device.type for x in tree_leaves(some) if isinstance(x, torch.Tensor)}


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if "cpu" in _devices((args, kwargs)) and _devices(out) - {"cpu"}:
            self._found.append(str(func))
        return out


class _Constructions(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and _devices(out) - {"cpu"}:
            self._found.append(f"{func.__name__}({args[0]!r})")
        return out


@contextmanager
def host_copies() -> Iterator[list[str]]:
    """The operations, named, that make a tensor on another device (also "meta") from CPU tensors or Python's
    numbers; of the thread that enters it."""
    found: list[str] = []
    with _Operations(found), _Constructions(found):
        yield found


class HostReads(TorchDispatchMode):
    """Counts the numbers that Python reads from tensors, each of which waits for the device.

    But for the one that transformers reads where it makes a mask, whatever it is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += all(frame.name != "_preprocess_mask_arguments" for frame in extract_stack())
        return func(*args, **(kwargs or {}))
