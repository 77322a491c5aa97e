"""Rotary position embeddings as a table, made once by the model's own module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIRST = 2048  # positions of the first table


class Rotary:
    """Cosines and sines of positions, from a rotary module of transformers; the table grows by doubling.

    With positions on several axes it is that of text, whose positions are the same on all of them.
    """

    def __init__(self, module: Any, like: Tensor) -> None:
        self._module, self._like = module, like
        self._cosines = self._sines = like.new_empty(0, 0)

    def cover(self, positions: int) -> None:
        """Make the table hold positions below this one."""
        if positions <= len(self._cosines):
            return
        size = max(FIRST, 1 << (positions - 1).bit_length())
        cosines, sines = self._module(self._like[None], torch.arange(size, device=self._like.device)[None])
        cosines, sines = (x.reshape(-1, size, x.shape[-1])[0] for x in (cosines, sines))
        half = sines.shape[-1] // 2
        self._cosines, self._sines = cosines, torch.cat((-sines[:, :half], sines[:, half:]), dim=-1)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, 1, d) of positions (B,) that the table covers.

        The first half of the sines is negative: a head turns as x * cos + roll(x, d / 2) * sin.
        """
        return self._cosines[positions][:, None], self._sines[positions][:, None]
