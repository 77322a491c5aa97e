"""Several answers decoded together: one forward pass makes the next token of each.

    batcher = Batcher(llm, max_rows=8)
    for piece in Generation(llm, prompt, visuals, batcher=batcher): ...

Decoding reads every weight once per step, so that answers after the first are nearly free. They join and
leave between any two steps; shorter ones are padded on the left, where the mask hides it. All computing is
in one thread, first come, first served: a new question's encoding and prefill take turns with the steps.

On CPUs the answers are those made alone, bit by bit (see batch_invariance.py). On GPUs a matrix product of
several rows may round otherwise than that of one, so that a near tie may fall either way.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from llm_bridge.cache import rewindable
from llm_bridge.generate import FinishReason, Sampling, chooser
from llm_bridge.llm import LanguageModel

if TYPE_CHECKING:
    from llm_bridge.shared_kv import SharedKV

T = TypeVar("T")


class Row:
    """One answer among those being decoded: iterate for token ids; `leave` at the end, whatever happened.

    tokens: made so far; may be ahead of the reader. finish: how it ended, None while it runs.
    """

    def __init__(
        self, batcher: Batcher, kv: Any, logits: Tensor, sampling: Sampling, stop: threading.Event
    ) -> None:
        self.kv: Any | None = kv  # None while it is in the shared buffers
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.error: BaseException | None = None
        self.stop = stop
        self._batcher, self._limit = batcher, sampling.max_new_tokens
        self._choose = chooser(sampling, batcher.llm.device)
        self.push(logits)

    def push(self, logits: Tensor) -> None:
        """Choose the next token by its scores (V,)."""
        token = self._choose(logits)
        if token in self._batcher.eos:
            self.finish = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) == self._limit:
            self.finish = "length"

    def __iter__(self) -> Iterator[int]:
        count = 0
        while not self.stop.is_set():
            if count < len(self.tokens):
                count += 1
                yield self.tokens[count - 1]
            elif self.finish is not None:
                return
            else:
                self._batcher.run(self._batcher.advance, self, count)
                if self.error is not None:
                    raise self.error
        self.finish = "cancelled"

    def leave(self) -> Any | None:
        """Stop taking part; the KV cache, as long as it was computed, or None if computing failed."""
        self._batcher.run(self._batcher.remove, self)
        return self.kv if self.error is None else None


class Batcher:
    """Runs one language model for many threads.

    max_rows: answers decoded in one pass, 1 is one at a time. A model whose cache forgets (sliding windows,
    state spaces) or that takes no positions decodes its answers in turn, a token each.
    """

    def __init__(self, llm: LanguageModel, max_rows: int = 8) -> None:
        self.llm, self.max_rows, self.eos = llm, max_rows, llm.eos_ids
        self.steps = self.made = 0  # forward passes and the tokens that they made
        self._rows: list[Row] = []  # by arrival; from here on only the computing thread reads and writes
        self._shared: SharedKV | None = None
        self._sharing: list[Row] = []
        self._padding = "position_ids" in inspect.signature(llm.model.forward).parameters
        self._thread = ThreadPoolExecutor(1, "fluxchat-compute")

    @property
    def active(self) -> int:
        """Answers being decoded now."""
        return len(self._rows)

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the computing thread, after what waits already; returns what it returns."""
        try:
            future = self._thread.submit(function, *args)
        except RuntimeError:  # closed: nothing else computes any more
            return function(*args)
        return future.result()

    def join(self, kv: Any, logits: Tensor, sampling: Sampling, stop: threading.Event) -> Row:
        """Decode from a prefilled KV cache and the scores (V,) of the first token on."""
        row = Row(self, kv, logits, sampling, stop)
        if row.finish is None:
            self.run(self._rows.append, row)
        return row

    def close(self) -> None:
        """End the computing thread once it is idle."""
        self._thread.shutdown(wait=False)

    def advance(self, row: Row, count: int) -> None:
        """One step for all (computing thread only), unless this row's token `count` has been made already."""
        if len(row.tokens) > count or row.finish is not None or row.error is not None:
            return
        for other in [other for other in self._rows if other.stop.is_set()]:
            self.remove(other)
        rows = self._rows[: self.max_rows]
        try:
            with torch.inference_mode():
                self._step(rows)
        except BaseException as error:
            self._shared, self._sharing = None, []
            for other in rows:
                other.error = error
            self._rows = self._rows[self.max_rows :]
            raise
        for other in rows:
            if other.finish is not None:
                self.remove(other)

    def remove(self, row: Row) -> None:
        """Take an answer out (computing thread only); does nothing when it is out."""
        if row in self._rows:
            self._rows.remove(row)
        if self._shared is not None and row.kv is None:
            with torch.inference_mode():
                row.kv = self._shared.extract(self._sharing.index(row), self.llm)
        if all(other.kv is not None for other in self._sharing):
            self._shared, self._sharing = None, []

    def _step(self, rows: list[Row]) -> None:
        together = [row for row in rows if self._padding and (row.kv is None or rewindable(row.kv))]
        self._share(together if len(together) > 1 else [])
        if self._shared is not None:
            scores = self._shared.step(self.llm, [row.tokens[-1] for row in self._sharing])
            self.steps += 1
            for row, logits in zip(self._sharing, scores, strict=True):
                row.push(logits)
        for row in rows:
            if row.kv is not None:
                ids = torch.tensor([row.tokens[-1:]], device=self.llm.device)
                scores = self.llm.advance(row.kv, input_ids=ids)
                self.steps += 1
                row.push(scores[0])
        self.made += len(rows)

    def _share(self, rows: list[Row]) -> None:
        """Make the shared buffers hold exactly these answers, with room for a step."""
        from llm_bridge.shared_kv import SharedKV, own_parts

        old, sharing = self._shared, self._sharing
        if sharing == rows and (old is None or old.filled < old.capacity):
            return
        if old is not None:
            for index, row in enumerate(sharing):
                if row.kv is None and row not in rows:
                    row.kv = old.extract(index, self.llm)
        parts = [
            own_parts(row.kv) if row.kv is not None else old.parts(sharing.index(row))  # type: ignore[union-attr]
            for row in rows
        ]
        self._shared, self._sharing = (SharedKV(parts), rows) if rows else (None, [])
        for row in rows:
            row.kv = None
