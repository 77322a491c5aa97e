"""The KV caches of several answers in one set of buffers, right-aligned: one forward pass extends them all.

Imported only where it is needed: it loads transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from llm_bridge.kv_cache import Layers
from llm_bridge.llm import LanguageModel

GROWTH = 64  # positions of room that a new set of buffers has


class _Layer(DynamicLayer):
    """Keys and values (B, heads, capacity, width) of one layer; `filled` positions are in use."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.lazy_initialization(keys, values)
        self._buffers = keys, values
        self._show(filled)

    def _show(self, filled: int) -> None:
        self.keys, self.values = (buffer[:, :, :filled] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values


class BatchedKVCache:
    """The KV caches of B answers, each of its own length, and the step that extends all of them.

    sequences: per answer, keys and values (1, heads, length, width) of each layer. They are copied.
    """

    def __init__(self, llm: LanguageModel, sequences: Sequence[Layers]) -> None:
        self._llm = llm
        self.lengths = [layers[0][0].shape[2] for layers in sequences]
        self.filled = max(self.lengths)
        self.capacity = self.filled + GROWTH
        self._layers: list[_Layer] = []
        for index, (first_keys, first_values) in enumerate(sequences[0]):
            keys, values = (
                first.new_zeros(len(sequences), first.shape[1], self.capacity, first.shape[3])
                for first in (first_keys, first_values)
            )
            for row, length in enumerate(self.lengths):
                keys[row, :, self.filled - length : self.filled] = sequences[row][index][0][0]
                values[row, :, self.filled - length : self.filled] = sequences[row][index][1][0]
            self._layers.append(_Layer(keys, values, self.filled))
        self._kv = Cache(layers=list(self._layers))
        self._mask = torch.zeros(len(sequences), self.capacity, dtype=torch.long)
        for row, length in enumerate(self.lengths):
            self._mask[row, self.filled - length : self.filled] = 1
        self._mask = self._mask.to(sequences[0][0][0].device)

    @property
    def full(self) -> bool:
        """Whether another step needs larger buffers, which is a batch made anew."""
        return self.filled == self.capacity

    def step(self, tokens: Sequence[int], shifts: Sequence[int] = ()) -> Tensor:
        """Append one token to every answer; logits (B, V) of the next ones.

        shifts: how far each answer's positions run ahead of its length; none by default.
        """
        self._mask[:, self.filled] = 1
        positions = [
            length + shift for length, shift in zip(self.lengths, shifts or [0] * len(tokens), strict=True)
        ]
        logits = self._llm.advance(
            self._kv,
            input_ids=torch.tensor(tokens, device=self._llm.device)[:, None],
            attention_mask=self._mask[:, : self.filled + 1].to(self._llm.device),
            position_ids=torch.tensor(positions, device=self._llm.device)[:, None],
        )
        self.filled += 1
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def views(self, row: int) -> Layers:
        """Views of one answer's keys and values, without what a step that failed may have added."""
        own = slice(self.filled - self.lengths[row], self.filled)
        return tuple(
            (layer.keys[row : row + 1, :, own], layer.values[row : row + 1, :, own]) for layer in self._layers
        )

    def copies(self, row: int) -> Layers:
        """Copies of one answer's keys and values, which do not keep the buffers alive."""
        return tuple((keys.clone(), values.clone()) for keys, values in self.views(row))
