"""The engine that llama.cpp computes: one KV memory in which every answer is a sequence.

Prompts are prefilled in the same pieces as by LocalEngine, ids as ids and visuals as embeddings, and whole
pieces of what was asked before are shared, not computed again. Answers in progress take a token each in one
pass. All of it runs in the worker's thread, in turn with the encoding of videos.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from encoder.errors import ConfigError, ModelError, OutOfMemory
from llm_bridge.compute_thread import CLOSED
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.engines.engine import Request
from llm_bridge.engines.gguf_model import GgufModel
from llm_bridge.engines.llama_context import NO_CELLS, LlamaContext
from llm_bridge.engines.local import biased, piece_ends
from llm_bridge.kv_cache import CacheStats
from llm_bridge.prompt import PLACEHOLDER
from llm_bridge.sampled_tokens import SampledTokens
from llm_bridge.sampling import FinishReason, Sampler


@dataclass
class Slot:
    """A sequence of the KV memory: what it holds of which prompt.

    keys, ends: of the positions that it holds, and where their pieces end. used: when, counted in requests.
    """

    number: int
    scope: str = ""
    keys: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    used: int = 0
    answer: LlamaAnswer | None = None  # that is being made in it

    def common(self, keys: Sequence[int], ends: Sequence[int], scope: str) -> int:
        """How many pieces it has of a prompt's."""
        count = start = 0
        for own, wanted in zip(self.ends, ends, strict=False):
            if self.scope != scope or own != wanted or self.keys[start:own] != list(keys[start:own]):
                break
            count, start = count + 1, own
        return count


class LlamaCppEngine:
    """Runs a GGUF file.

    worker: computes. max_batch: answers that share a pass, at most. kept_bytes: for earlier prompts.
    context: the KV memory of all answers; default: one of the model's (see GgufModel.context).
    Raises OutOfMemory where the KV memory has no room.
    """

    name = "llamacpp"

    def __init__(
        self,
        llm: GgufModel,
        worker: ComputeWorker,
        max_batch: int = 8,
        kept_bytes: int = 2**28,
        context: LlamaContext | None = None,
    ) -> None:
        self.llm, self.worker, self.max_batch = llm, worker, max_batch
        self.context = context or llm.context(kept_bytes)
        # Read and written in the computing thread only.
        self._slots = [Slot(number) for number in range(self.context.sequences)]
        self._running: list[LlamaAnswer] = []  # in decoding, by arrival
        self._requests = self._hits = self._misses = self._steps = self._made = 0
        self._closed = False

    def start(self, request: Request) -> LlamaAnswer:
        """An answer to be read; raises ConfigError for a prompt that llama.cpp cannot carry."""
        width = self.llm.hidden_size
        if request.prompt.positions or any(rows.shape[1] != width for rows in request.visuals):
            raise ConfigError(
                "The engine llamacpp takes no positions or layers of a model's own: use the engine local."
            )
        return LlamaAnswer(self, request)

    def close(self) -> None:
        """Answers being made end with a ModelError; the weights are freed once nothing computes."""
        try:
            self.worker.run(self._close)
        except ModelError:  # its thread has ended: nothing computes
            self._close()

    def forget(self, scope: str | None = None) -> None:
        """Drop what is kept for follow-up questions, of one scope or all."""
        with suppress(ModelError):  # closed: nothing is kept
            self.worker.run(self._forget, scope)

    @property
    def kept(self) -> CacheStats:
        """Prompts that are kept for follow-up questions."""
        idle = [
            len(slot.keys)
            for slot in self._slots
            if slot.keys and (slot.answer is None or slot.answer.made.ended)
        ]
        return CacheStats(self._hits, self._misses, len(idle), sum(idle) * self.llm.kv_bytes_per_token)

    @property
    def decoding(self) -> tuple[int, int, int]:
        """Forward passes that made tokens, the tokens made, and the answers being made now."""
        return self._steps, self._made, sum(not answer.made.ended for answer in tuple(self._running))

    # -- in the computing thread ----------------------------------------------------------------------------

    def _close(self) -> None:
        self._closed = True
        for answer in self._running:
            answer.made.error = answer.made.error or ModelError(CLOSED)
        self._running.clear()
        self.context.close()

    def _forget(self, scope: str | None) -> None:
        for slot in self._slots:
            if slot.answer is None and (scope is None or slot.scope == scope):
                self._empty(slot)

    def _empty(self, slot: Slot) -> None:
        self.context.rewind(slot.number, 0)
        slot.keys, slot.ends, slot.scope = [], [], ""

    def begin(self, answer: LlamaAnswer) -> Slot:
        """A sequence for an answer, which holds the pieces that are known already, but never the last one."""
        if self._closed:
            raise ModelError(CLOSED)
        self._requests += 1
        keys, ends, scope = answer.keys, answer.ends[:-1], answer.request.scope
        source = max(self._slots, key=lambda slot: (slot.common(keys, ends, scope), slot.answer is None))
        count = source.common(keys, ends, scope)
        upto = ends[count - 1] if count else 0
        self._hits, self._misses = self._hits + bool(count), self._misses + (not count)
        if count and source.answer is None and count == len(source.ends):
            slot = source  # nothing of it would be lost
        else:
            slot = self._free_slot(source if count else None)
            self._empty(slot)
            if upto:
                self.context.copy(source.number, slot.number, upto)
                source.used = self._requests
        if not self.context.rewind(slot.number, upto):
            count = upto = 0
        slot.keys, slot.ends, slot.scope = list(keys[:upto]), list(ends[:count]), scope
        slot.used, slot.answer = self._requests, answer
        return slot

    def _free_slot(self, beside: Slot | None) -> Slot:
        """The sequence that was not used for longest, empty ones first; raises OutOfMemory if all compute."""
        free = [slot for slot in self._slots if slot.answer is None and slot is not beside]
        if not free:
            raise OutOfMemory(NO_CELLS)
        return min(free, key=lambda slot: (bool(slot.keys), slot.used))

    def _make_room(self) -> bool:
        """Drop the kept prompt that was not used for longest; False where none is kept."""
        kept = [slot for slot in self._slots if slot.answer is None and slot.keys]
        if kept:
            self._empty(min(kept, key=lambda slot: slot.used))
        return bool(kept)

    def prefill_piece(self, answer: LlamaAnswer, start: int, end: int) -> Tensor | None:
        """Append a piece of an answer's prompt to its sequence; logits (V,) after it, None if stopped."""
        if answer.request.stop.is_set():
            return None
        slot = answer.slot
        assert slot is not None
        while True:
            try:
                logits = self._append(answer, slot.number, start, end)
                break
            except OutOfMemory:
                self.context.rewind(slot.number, start)
                if not self._make_room():
                    raise
        slot.keys += answer.keys[start:end]
        slot.ends.append(end)
        return logits

    def _append(self, answer: LlamaAnswer, sequence: int, start: int, end: int) -> Tensor:
        ids, logits = answer.request.prompt.ids, torch.empty(0)
        while start < end:
            visual, stop = ids[start] == PLACEHOLDER, start
            while stop < end and (ids[stop] == PLACEHOLDER) == visual:
                stop += 1
            if visual:
                logits = self.context.append_rows(answer.rows(start, stop), at=start, sequence=sequence)
            else:
                logits = self.context.append_ids(ids[start:stop], at=start, sequence=sequence)
            start = stop
        return logits

    def join(self, answer: LlamaAnswer, logits: Tensor) -> None:
        """Have an answer decoded from the logits (V,) of its first token on."""
        answer.made.append(logits)
        if not answer.made.ended:
            self._running.append(answer)

    def leave(self, answer: LlamaAnswer) -> None:
        """Take an answer out; the pieces of its prompt are kept, unless it failed."""
        if answer in self._running:
            self._running.remove(answer)
        slot, answer.slot = answer.slot, None
        if slot is None or self._closed:
            return
        slot.answer = None
        if (
            answer.made.error is not None
            or not slot.ends
            or not self.context.rewind(slot.number, slot.ends[-1])
        ):
            self._empty(slot)

    def advance(self, answer: LlamaAnswer, count: int) -> None:
        """One step for all, unless this answer has token `count` already."""
        if len(answer.made.tokens) > count or answer.made.ended:
            return
        for other in self._running:
            other.made.check_stop()
        self._running = [other for other in self._running if not other.made.ended]
        if answer.made.ended:
            return
        batch = self._running[: self.max_batch]
        if answer not in batch:  # its turn comes before those that wait for nobody
            batch[-1:] = [answer]
        self._step(batch)
        self._running = [other for other in self._running if not other.made.ended]

    def _step(self, batch: list[LlamaAnswer]) -> None:
        """The next token of each; the newest gives way where memory is short, and who fails fails alone."""
        while batch:
            try:
                logits = self.context.step(
                    [answer.made.tokens[-1] for answer in batch],
                    [answer.positions for answer in batch],
                    [answer.slot.number for answer in batch if answer.slot is not None],
                )
            except OutOfMemory as error:
                if not self._make_room():
                    newest = self._running[-1]
                    newest.made.error = error
                    self.leave(newest)
                    batch = [answer for answer in batch if answer is not newest]
                continue
            except ModelError as error:
                for answer in batch:
                    answer.made.error = error
                return
            self._steps += 1
            self._made += len(batch)
            for answer, row in zip(batch, logits, strict=True):
                answer.made.append(row)
            return


class LlamaAnswer:
    """One answer of llama.cpp; see TokenStream."""

    def __init__(self, engine: LlamaCppEngine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.cached_tokens, self.prefill_s = 0, 0.0
        self.finish: FinishReason = "cancelled"
        self.keys: Sequence[int] = request.prompt.cache_keys
        self.ends = piece_ends(request.prompt)
        self.slot: Slot | None = None
        ends = engine.llm.eos_ids | frozenset(request.sampling.stop_token_ids)
        text = [token for token in request.prompt.ids if token != PLACEHOLDER]
        guide = engine.llm.guide(request.sampling)
        sampler = Sampler(request.sampling, text, ends, request.length, guide)
        self.made = SampledTokens(sampler, ends, request.stop)

    @property
    def positions(self) -> int:
        """How many its sequence holds before its last token."""
        return len(self.request.prompt) + len(self.made.tokens) - 1

    def rows(self, start: int, end: int) -> Tensor:
        """The embeddings (N, D) that stand from one position to another of one stretch."""
        prompt = self.request.prompt
        index, (place, _) = next(
            (index, span) for index, span in enumerate(prompt.spans) if span[0] <= start < span[0] + span[1]
        )
        first = sum(token == PLACEHOLDER for token in prompt.ids[place:start])
        return self.request.visuals[index][first : first + end - start]

    def __iter__(self) -> Iterator[int]:
        engine, worker = self.engine, self.engine.worker
        worker.check_process()
        start = time.perf_counter()
        try:
            self.slot = worker.run(engine.begin, self)
            logits = self._prefill()
            self.prefill_s = time.perf_counter() - start
            if logits is None:
                return
            if self.request.first_bias:
                logits = biased(logits, self.request.first_bias)
            worker.run(engine.join, self, logits)
            yield from self.made.read(partial(worker.run, engine.advance, self))
        except Exception as error:
            self.made.error = error
            raise
        finally:
            self.finish = self.made.finish or "cancelled"
            self._leave()

    def _prefill(self) -> Tensor | None:
        """Compute the pieces that are not there yet; the logits (V,) of the first token, None if stopped."""
        assert self.slot is not None
        at = self.cached_tokens = len(self.slot.keys)
        logits = None
        for end in self.ends[len(self.slot.ends) :]:
            logits = self.engine.worker.run(self.engine.prefill_piece, self, at, end)
            if logits is None:
                return None
            at = end
        return logits

    def _leave(self) -> None:
        """Waits for nothing, since a garbage collector may call it in any thread."""
        self.engine.worker.post(self.engine.leave, self)
