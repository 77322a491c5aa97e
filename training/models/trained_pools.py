"""Which pooling head of an encoder was trained for which token count, kept with what was trained beside it.

A head that no stage trained gives features that mean nothing, and nothing in a weight file tells it from the
others: so a run notes its heads where its weights are, and evaluation reads them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from encoder.errors import CheckpointError

NAME = "pools"  # of the tensor in alignment.safetensors


@dataclass(frozen=True)
class TrainedPools:
    """default: the head of all token counts, unless `by_count` names one for each that was trained.

    The default of the default is 1, the head of every Flux-CLIP recipe that wrote no such note.
    """

    default: int = 1
    by_count: Mapping[int, int] = field(default_factory=dict)

    def of(self, num_tokens: int | None) -> int:
        """The head of exactly this count, in training."""
        return self.by_count.get(num_tokens or 0, self.default)

    def nearest(self, num_tokens: int | None) -> int:
        """The head of the trained count nearest to this one (None: every token), in evaluation."""
        if not self.by_count:
            return self.default
        wanted = max(self.by_count) if num_tokens is None else num_tokens
        return self.by_count[min(self.by_count, key=lambda count: abs(count - wanted))]

    def to_tensor(self) -> Tensor:
        """int64 (1 + counts, 2): rows of count and head, the first one 0 and the default."""
        return torch.tensor([[0, self.default], *map(list, sorted(self.by_count.items()))])

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> TrainedPools:
        """What `to_tensor` made among an alignment's tensors, the default without; raises CheckpointError."""
        if NAME not in tensors:
            return TrainedPools()
        rows = tensors[NAME]
        if rows.dtype != torch.int64 or rows.ndim != 2 or rows.shape[1] != 2 or not len(rows):
            raise CheckpointError("The alignment's pools are not rows of token count and pooling head.")
        (_, default), *others = rows.tolist()
        return TrainedPools(default, dict(others))

    def __str__(self) -> str:
        if not self.by_count:
            return str(self.default)
        return ", ".join(f"{count}: {head}" for count, head in sorted(self.by_count.items()))
