"""Several answers decoded together: one forward pass makes the next token of each.

    worker = ComputeWorker(llm, max_batch=8)
    for piece in Generation(llm, prompt, visuals, worker=worker): ...

Decoding reads every weight once per step, so that answers after the first are nearly free. They join and
leave between any two steps; shorter ones are padded on the left, where the mask hides it. All computing is
in one thread, first come, first served: a new question's encoding and prefill take turns with the steps.

One answer's failure is its own. What goes wrong in choosing its token ends it alone. A pass that fails is
tried again for each answer by itself, and those that it served are decoded in turn from then on.

On CPUs the answers are those made alone, bit by bit (see batch_invariance.py). On GPUs a matrix product of
several rows may round otherwise than that of one, so that a near tie may fall either way.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from encoder.errors import ModelError
from llm_bridge.generation import FinishReason, cache_of
from llm_bridge.kv_cache import rewindable
from llm_bridge.llm import LanguageModel
from llm_bridge.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from llm_bridge.batched_kv_cache import BatchedKVCache

T = TypeVar("T")
CLOSED = "The model was closed, so that nothing is computed any more: load it again and ask again."


class SequenceState:
    """One answer among those being decoded: iterate for token ids; `leave` at the end, whatever happened.

    tokens: made so far; may be ahead of the reader. finish: how it ended, error: what ended it instead, both
    None while it runs. in_turn: decoded by itself, since a pass that it shared failed.
    """

    def __init__(
        self, worker: ComputeWorker, kv: Any, sampling: SamplingParams, stop: threading.Event, choose: Sampler
    ) -> None:
        self.kv: Any | None = kv  # None while it is in the shared buffers, and at the end
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.error: BaseException | None = None
        self.in_turn = False
        self._stop, self._worker, self._choose = stop, worker, choose
        self._limit, self._ends = sampling.max_new_tokens, frozenset(sampling.stop_token_ids)

    @property
    def over(self) -> bool:
        """Whether no more tokens come."""
        return self.finish is not None or self.error is not None

    def push(self, logits: Tensor) -> None:
        """Choose the next token by its scores (V,); whatever that raises becomes this row's error."""
        try:
            token = self._choose(logits)
            if token in self._worker.eos or token in self._ends:
                self.finish = "stop"
                return
            self.tokens.append(token)
            if len(self.tokens) == self._limit:
                self.finish = "length"
        except BaseException as error:  # noqa: BLE001 - its reader raises it
            self.error = error

    def look_at_stop(self) -> None:
        """End it when it was told to stop."""
        try:
            if self._stop.is_set():
                self.finish = "cancelled"
        except BaseException as error:  # noqa: BLE001 - its reader raises it
            self.error = error

    def __iter__(self) -> Iterator[int]:
        count = 0
        while True:
            if not self.over or count < len(self.tokens):
                self.look_at_stop()  # what was made ahead of the reader is not read any more
            if self.finish == "cancelled":
                return
            if count < len(self.tokens):
                count += 1
                yield self.tokens[count - 1]
            elif self.error is not None:
                raise self.error
            elif self.finish is not None:
                return
            else:
                self._worker.run(self._worker.advance, self, count)

    def leave(self) -> None:
        """Stop taking part; waits for nothing, since a garbage collector may call it in any thread."""
        if not self.over:
            self.finish = "cancelled"
        self._worker.drop(self)


class ComputeWorker:
    """Runs one language model for many threads.

    max_batch: answers decoded in one pass, 1 is one at a time. A model whose cache forgets (sliding windows,
    state spaces) or that takes no positions decodes its answers in turn, a token each.
    """

    def __init__(self, llm: LanguageModel, max_batch: int = 8) -> None:
        self.llm, self.max_batch, self.eos = llm, max_batch, llm.eos_ids
        self.steps = self.made = 0  # forward passes and the tokens that they made
        self._rows: list[SequenceState] = []  # by arrival
        self._shared: BatchedKVCache | None = None
        self._sharing: list[SequenceState] = []
        self._padding = "position_ids" in inspect.signature(llm.model.forward).parameters
        self._thread, self._process = ThreadPoolExecutor(1, "fluxchat-compute"), os.getpid()

    @property
    def active(self) -> int:
        """Answers being decoded now."""
        return sum(not row.over for row in list(self._rows))

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the computing thread, after what waits already; returns what it returns.

        Raises ModelError when there is no such thread any more: after `close`, and in a forked process.
        """
        return self._submit(function, *args).result()

    def check_process(self) -> None:
        """Raises ModelError in a forked process, where there is no computing thread and locks may be held."""
        if os.getpid() != self._process:
            raise ModelError(
                "The model was loaded before this process was forked, and cannot compute here: load it in "
                "the process that asks."
            )

    def _submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        self.check_process()
        try:
            return self._thread.submit(function, *args)
        except RuntimeError:  # shut down, by `close` or as the interpreter ends
            raise ModelError(CLOSED) from None

    def join(
        self,
        kv: Any,
        logits: Tensor,
        sampling: SamplingParams,
        stop: threading.Event,
        choose: Sampler | None = None,
    ) -> SequenceState:
        """Decode from a prefilled KV cache and the scores (V,) of the first token on.

        choose: how, by default by `sampling` without knowing the prompt.
        """
        row = SequenceState(self, kv, sampling, stop, choose or Sampler(sampling, end_ids=self.eos))
        row.push(logits)
        try:
            if not row.over:
                self.run(self._add, row)
        except BaseException:  # such as Ctrl-C while waiting: nobody will read what is computed
            row.leave()
            raise
        return row

    def drop(self, row: SequenceState) -> None:
        """Let an answer that is over be taken out soon."""
        with suppress(ModelError):  # closed, or in a forked process: it is not held for long
            self._submit(self.remove, row)

    def close(self) -> None:
        """Answers still being made end with a ModelError; the computing thread ends once it is idle."""
        try:
            self._submit(self._abandon)
        except ModelError:  # closed already, or not ours
            return
        self._thread.shutdown(wait=False)

    # -- in the computing thread ----------------------------------------------------------------------------

    def _add(self, row: SequenceState) -> None:
        self._rows.append(row)

    def _abandon(self) -> None:
        for row in list(self._rows):
            row.error = ModelError(CLOSED)
            self.remove(row)

    def remove(self, row: SequenceState) -> None:
        """Take an answer out (computing thread only); does nothing when it is out."""
        if row in self._rows:
            self._rows.remove(row)
            row.kv = None
        if not any(other in self._rows for other in self._sharing):
            self._shared, self._sharing = None, []

    def advance(self, row: SequenceState, count: int) -> None:
        """One step for all (computing thread only), unless this row's token `count` has been made already."""
        if len(row.tokens) > count or row.over:
            return
        if row not in self._rows:  # or its reader would wait for ever
            row.error = ModelError("The answer was given up: ask again.")
            return
        for other in self._rows:
            other.look_at_stop()
        self._drop_those_over()
        rows = self._rows[: self.max_batch]
        made = [len(other.tokens) for other in rows]
        with torch.inference_mode():
            try:
                self._step(rows)
            except BaseException:  # noqa: BLE001 - each is tried alone, and fails with an error of its own
                failed = True
            else:
                failed = False
            if failed:  # outside of the handler, which holds what the failed pass had allocated
                self._part(rows)
            for other, before in zip(rows, made, strict=True):
                if len(other.tokens) == before and not other.over:
                    self._step_alone(other)
        self.made += sum(len(other.tokens) for other in rows) - sum(made)
        self._drop_those_over()

    def _step(self, rows: list[SequenceState]) -> None:
        """The next token of those that share a pass."""
        together = [
            row
            for row in rows
            if self._padding and not row.in_turn and (row.kv is None or rewindable(row.kv))
        ]
        self._share(together if len(together) > 1 else [])
        if self._shared is None:
            return
        scores = self._shared.step(self.llm, [row.tokens[-1] for row in self._sharing])
        self.steps += 1
        for row, logits in zip(self._sharing, scores, strict=True):
            row.push(logits)

    def _step_alone(self, row: SequenceState) -> None:
        """The next token of one answer from its own cache, or its error."""
        try:
            ids = torch.tensor([row.tokens[-1:]], device=self.llm.device)
            scores = self.llm.advance(row.kv, input_ids=ids)
        except BaseException as error:  # noqa: BLE001 - its reader raises it
            row.error = error
            return
        self.steps += 1
        row.push(scores[0])

    def _share(self, rows: list[SequenceState]) -> None:
        """Make the shared buffers hold exactly these answers, with room for a step."""
        from llm_bridge.batched_kv_cache import BatchedKVCache, layers_of

        old, sharing = self._shared, self._sharing
        if sharing == rows and (old is None or old.filled < old.capacity):
            return
        if old is not None:
            for index, row in enumerate(sharing):
                if row in self._rows and row not in rows:
                    row.kv = cache_of(self.llm, old.copies(index))
        parts = [
            layers_of(row.kv) if row.kv is not None else old.parts(sharing.index(row))  # type: ignore[union-attr]
            for row in rows
        ]
        self._shared, self._sharing = (BatchedKVCache(parts), rows) if rows else (None, [])
        for row in rows:
            row.kv = None

    def _part(self, rows: list[SequenceState]) -> None:
        """Give these answers, and all in the shared buffers, a cache of their own as before the step."""
        shared, sharing = self._shared, self._sharing
        self._shared, self._sharing = None, []
        for row in rows:
            row.in_turn = True
        for index, row in enumerate(sharing):
            if shared is None or row.kv is not None or row not in self._rows:
                continue
            row.in_turn = True
            try:
                # Views, since memory may be short; its next step copies them.
                row.kv = cache_of(self.llm, shared.parts(index))
            except BaseException as error:  # noqa: BLE001 - its reader raises it
                row.error = error

    def _drop_those_over(self) -> None:
        for row in [row for row in self._rows if row.over]:
            self.remove(row)
