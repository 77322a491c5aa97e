"""The KV cache of one answer that is decoded by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llm_bridge.kv_cache import DecodingBatch, layers_of, rewindable
from llm_bridge.llm import LanguageModel


class OwnKV:
    """A prefilled KV cache of transformers, extended token by token, as `LanguageModel.together` would.

    Where a step fails it is as before it, unless the model keeps more than positions.
    """

    def __init__(self, llm: LanguageModel, kv: Any) -> None:
        self._llm = llm
        self._batch: DecodingBatch | None
        self._kv: Any
        self._batch, self._kv = None, kv
        if llm.lean is not None and rewindable(kv):
            self._batch, self._kv = llm.together([layers_of(kv)]), None

    @property
    def positions(self) -> int:
        """How many it holds."""
        return int(self._kv.get_seq_length()) if self._batch is None else self._batch.lengths[0]

    def step(self, token: int, shift: int | None = None) -> Tensor:
        """Append a token; logits (V,). shift: how far positions run ahead, None when they do not."""
        if self._batch is not None:
            return self._batch.step([token], [shift or 0])[0]
        length = self.positions
        try:
            return self._llm.step(self._kv, token, None if shift is None else length + shift)
        except BaseException:
            if rewindable(self._kv):
                self._kv.crop(length)
            raise
