"""Several answers decoded in one pass by a lean model: their keys and values in buffers made beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_bridge.kv_cache import Layers
from llm_bridge.lean.attend import AttendByRow, AttendMasked
from llm_bridge.lean.rotary import Rotary
from llm_bridge.lean.step import Attend, LeanModel, step

GROWTH = 64  # positions of room that buffers have beyond the longest answer


class LeanBatch:
    """The keys and values of B answers, each of its own length, and the step that extends all of them.

    sequences: per answer, keys and values (1, G, length, d) of each layer; they are copied. lengths: of the
    answers, in positions.
    """

    def __init__(self, model: LeanModel, rotary: Rotary, sequences: Sequence[Layers]) -> None:
        self.lengths = [layers[0][0].shape[2] for layers in sequences]
        self.capacity = max(self.lengths) + GROWTH
        self._model, self._rotary = model, rotary
        self._buffers: list[Tensor] = []
        for number in range(len(model.layers)):
            buffer = self._empty(self.capacity)
            for row, layers in enumerate(sequences):
                keys, values = layers[number]
                filled = buffer[row, :, : self.lengths[row]]
                filled[: model.groups], filled[model.groups :] = keys[0], values[0]
            self._buffers.append(buffer)
        self._index_heads()

    def _index_heads(self) -> None:
        """Where each head of each answer begins, (B, 2 G), in positions."""
        heads = len(self.lengths) * 2 * self._model.groups
        starts = torch.arange(heads, device=self._model.device) * self.capacity
        self._starts = starts.view(len(self.lengths), -1)

    def _empty(self, capacity: int) -> Tensor:
        model = self._model  # zeros, since a mask multiplies what it hides by 0
        shape = len(self.lengths), 2 * model.groups, capacity, model.width
        return torch.zeros(shape, dtype=model.dtype, device=model.device)

    def step(self, tokens: Sequence[int], shifts: Sequence[int] = ()) -> Tensor:
        """Append one token to every answer; logits (B, V) of the next ones.

        shifts: how far each answer's positions run ahead of its length; none by default.
        """
        if self.full:
            self._grow()
        device = self._model.device
        shifts = shifts or [0] * len(tokens)
        positions = [length + shift for length, shift in zip(self.lengths, shifts, strict=True)]
        self._rotary.cover(max(positions) + 1)
        ids, turns, lengths = torch.tensor([list(tokens), positions, self.lengths], device=device)
        slots = (self._starts + lengths[:, None]).flatten()
        logits = step(self._model, self._buffers, ids, slots, self._rotary(turns), self._attend())
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    @property
    def full(self) -> bool:
        """Whether another step needs larger buffers."""
        return max(self.lengths) == self.capacity

    def _attend(self) -> Attend:
        lengths = [length + 1 for length in self.lengths]
        if self._model.device.type == "cpu":
            return AttendByRow(lengths)
        return AttendMasked(torch.tensor(lengths, device=self._model.device), self.capacity)

    def _grow(self) -> None:
        """Room for more positions; layer by layer, so that little more than the result is held meanwhile."""
        filled, capacity = self.capacity, self.capacity + max(GROWTH, self.capacity // 4)
        for number, old in enumerate(self._buffers):
            if old.shape[2] < capacity:  # else it was grown before another failed for want of memory
                new = self._empty(capacity)
                new[:, :, :filled] = old[:, :, :filled]
                self._buffers[number] = new
        self.capacity = capacity
        self._index_heads()

    def views(self, row: int) -> Layers:
        """Views of one answer's keys and values, without what a step that failed may have added."""
        groups, length = self._model.groups, self.lengths[row]
        parts = [buffer[row : row + 1, :, :length] for buffer in self._buffers]
        return tuple((part[:, :groups], part[:, groups:]) for part in parts)

    def copies(self, row: int) -> Layers:
        """Copies of one answer's keys and values, which do not keep the buffers alive."""
        return tuple((keys.clone(), values.clone()) for keys, values in self.views(row))
