"""The one thread in which a model computes: encoding, prefills, and the decoding of several answers at once.

    worker = ComputeWorker(llm, max_batch=8)
    embedding = worker.run(encode, pixels)
    for piece in Generation(llm, prompt, [embedding], worker=worker): ...

A decoding step reads every weight once, however many answers it serves, so that answers after the first are
nearly free. They join and leave between any two steps; shorter ones are padded on the left, where the mask
hides it. Everything runs first come, first served: the encoding and prefill of a new question take turns with
the steps. On accelerators prompts that wait are prefilled with the first of them (see prefill.py).

Failures are isolated. An error in sampling one answer's token ends that answer alone. A forward pass that
fails is tried again for each answer by itself, and those answers are decoded in turn from then on. Memory is
bounded while answers are made: the newest answer gives way, with a sentence, to those before it.

On CPUs the answers are those made alone, bit by bit (see batch_invariance.py). On GPUs a matrix product of
several rows may round otherwise than that of one, so that a near tie may fall either way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encoder.errors import ModelError, OutOfMemory
from llm_bridge.compute_thread import CLOSED, ComputeThread
from llm_bridge.kv_cache import DecodingBatch, kv_from_layers, layers_of, rewindable
from llm_bridge.llm import LanguageModel
from llm_bridge.model_files.checks import free_memory
from llm_bridge.own_kv import OwnKV
from llm_bridge.prefill import Stretch, compute_together, fit_together
from llm_bridge.sampled_tokens import SampledTokens
from llm_bridge.sampling import Sampler, SamplingParams, leading

if TYPE_CHECKING:
    from llm_bridge.static_kv_cache import StaticDecoder

LOG = logging.getLogger("fluxchat")
NO_ROOM = "There was not enough memory for this question: lower the token budget, or ask again later."
KV_SHARE = 0.5  # of the memory that is free when the model is ready, which answers in progress may take


class SequenceState(SampledTokens):
    """One answer being decoded: iterate for token ids; call `leave` at the end, whatever happened.

    alone: decoded by itself, since a pass that it shared failed. shift: how far its positions run ahead of
    the indices in its KV cache, None when they are the indices.
    """

    def __init__(
        self,
        worker: ComputeWorker,
        kv: Any,
        sampling: SamplingParams,
        stop: threading.Event,
        sampler: Sampler,
        shift: int | None = None,
    ) -> None:
        super().__init__(sampler, worker.eos | frozenset(sampling.stop_token_ids), stop)
        self.shift = shift
        self.kv: Any | None = kv  # None while it is in the batched KV cache, and at the end
        self.alone = False
        self._worker = worker
        self.own: OwnKV | None = None  # once it is decoded by itself
        self.came = threading.Event()  # what its reader waits for
        self._prompt = int(kv.get_seq_length())

    @property
    def positions(self) -> int:
        """How many its KV holds, or will with the next step."""
        return self._prompt + len(self.tokens)

    def __iter__(self) -> Iterator[int]:
        return self.read(partial(self._worker.wait_for_token, self))

    def leave(self) -> None:
        """Stop taking part; waits for nothing, since a garbage collector may call it in any thread."""
        if not self.ended:
            self.finish = "cancelled"
        self._worker.drop(self)


class ComputeWorker(ComputeThread):
    """The computing thread of one language model, for any number of asking threads.

    kv_limit: bytes that the KV of all answers in progress may take; default: half of what is free now.
    max_batch: answers decoded in one pass, 1 is one at a time. A model that does not batch (see
    `LanguageModel.batches`: state spaces above all) decodes its answers in turn, a token each. static: decode
    in buffers of fixed shape, replayed as CUDA graphs (see static_kv_cache.py); None: where the model allows
    it and lies on a CUDA device. prefill_together: compute prompts that wait in one pass, where the model
    allows it; None: on accelerators, since a prompt's bits may depend on the others.
    """

    def __init__(
        self,
        llm: LanguageModel,
        max_batch: int = 8,
        kv_limit: int | None = None,
        *,
        static: bool | None = None,
        prefill_together: bool | None = None,
    ) -> None:
        super().__init__()
        self.kv_limit = int(KV_SHARE * free_memory(llm.device)) if kv_limit is None else kv_limit
        self.llm, self.max_batch, self.eos = llm, max_batch, llm.eos_ids
        self.steps = self.made = 0  # forward passes and the tokens that they made
        self.prefills = 0  # forward passes over prompts
        self._waiting: dict[SequenceState, int] = {}  # whose readers wait, and how many tokens they have
        self._stepping = False  # whether the computing thread will look at them
        self._lock = threading.Lock()  # of these two
        # Read and written in the computing thread only.
        self._sequences: list[SequenceState] = []  # by arrival
        self._batch_kv: DecodingBatch | None = None
        self._static = self._static_decoder(llm, static, self.kv_limit)
        self._batched: list[SequenceState] = []  # the rows of _batch_kv
        self._batches = llm.batches
        wanted = llm.device.type != "cpu" if prefill_together is None else prefill_together
        self._prefills_together = wanted and llm.prefills_together

    @staticmethod
    def _static_decoder(llm: LanguageModel, wanted: bool | None, limit: int) -> StaticDecoder | None:
        if wanted is False or (wanted is None and llm.device.type != "cuda"):
            return None
        from llm_bridge.static_kv_cache import StaticDecoder, is_static

        return StaticDecoder(llm, limit) if is_static(llm) else None

    @property
    def _lean(self) -> bool:
        return self._static is None and self.llm.lean is not None

    @property
    def sequences(self) -> tuple[SequenceState, ...]:
        """The answers in decoding, by arrival."""
        return tuple(self._sequences)

    @property
    def active(self) -> int:
        """Number of answers being decoded now."""
        return sum(not sequence.ended for sequence in self.sequences)

    def join(
        self,
        kv: Any,
        logits: Tensor,
        sampling: SamplingParams,
        stop: threading.Event,
        sampler: Sampler | None = None,
        shift: int | None = None,
    ) -> SequenceState:
        """Decode from a prefilled KV cache and the logits (V,) of the first token on.

        sampler: default: one of `sampling` that does not know the prompt. shift: see SequenceState.
        """
        sampler = sampler or Sampler(sampling, end_ids=self.eos)
        sequence = SequenceState(self, kv, sampling, stop, sampler, shift)
        sequence.append(logits)
        try:
            if not sequence.ended:
                self.run(self._sequences.append, sequence)
        except BaseException:  # such as Ctrl-C while waiting: nobody will read what is computed
            sequence.leave()
            raise
        return sequence

    def wait_for_token(self, sequence: SequenceState, count: int) -> None:
        """Wait until a sequence has more than `count` tokens or has ended; all others get theirs meanwhile.

        Raises ModelError when nothing is computed any more.
        """
        self.check_process()
        try:
            with self._lock:
                if len(sequence.tokens) > count or sequence.ended:
                    return
                sequence.came.clear()
                self._waiting[sequence] = count
                begins, self._stepping = not self._stepping, True
            if begins:
                self._go_on()
            sequence.came.wait()
        except BaseException:  # such as Ctrl-C before the step was asked for, which others wait for
            with self._lock:
                self._waiting.pop(sequence, None)
            self._go_on()
            raise

    def drop(self, sequence: SequenceState) -> None:
        """Have an answer that has ended taken out soon."""
        self.post(self.remove, sequence)

    def close(self) -> None:
        """Answers still being made end with a ModelError; the computing thread ends once it is idle."""
        try:
            self.submit(self._abandon)
        except ModelError:  # closed already, or not ours
            return
        super().close()

    # -- in the computing thread ----------------------------------------------------------------------------

    def prefill(self, stretch: Stretch) -> None:
        """Compute a stretch of a prompt, and with it those that wait and can share its pass.

        Raises OutOfMemory where the prompt has no room.
        """
        self.check_room(stretch.whole)
        together = self._with_others(stretch)
        if len(together) > 1:
            try:
                compute_together(self.llm, together)
                self.prefills += 1
                return
            except BaseException as error:  # noqa: BLE001 - each is tried alone, and fails with its own error
                failed = f"{type(error).__name__}: {error}".splitlines()[0]
            # Outside of the handler, which holds what the failed pass had allocated.
            LOG.warning("%d prompts are computed in turn, since their pass failed: %s", len(together), failed)
            for other in together:
                other.alone = True
        self.prefills += 1
        stretch.compute(self.llm)

    def _with_others(self, stretch: Stretch) -> list[Stretch]:
        """A stretch and those that wait and can share its pass, by arrival; they are called next."""
        chosen = [stretch]
        if not self._prefills_together or not stretch.shares:
            return chosen
        for other in self.waiting(Stretch):
            if len(chosen) == self.max_batch or not fit_together([*chosen, other]):
                break
            if other.shares and self._have_room([*chosen, other]):
                chosen.append(other)
        self.bring_forward(chosen[1:])
        return chosen

    def _have_room(self, stretches: Sequence[Stretch]) -> bool:
        try:
            self.check_room(len(stretches) * max(stretch.whole for stretch in stretches))
        except OutOfMemory:
            return False
        return True

    def _abandon(self) -> None:
        for sequence in self.sequences:
            sequence.error = ModelError(CLOSED)
            self.remove(sequence)
        self._wake()

    def remove(self, sequence: SequenceState) -> None:
        """Take an answer out (computing thread only); does nothing when it is out."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
            sequence.kv = sequence.own = None
        if not any(other in self._sequences for other in self._batched):
            self._batch_kv, self._batched = None, []

    def _go_on(self) -> None:
        """Have the next step made after what waits already (from any thread)."""
        try:
            self.submit(self._step_for_readers)
        except ModelError as error:
            with self._lock:
                waiting = list(self._waiting)
            for sequence in waiting:
                sequence.error = sequence.error or ModelError(str(error))
            self._wake()

    def _step_for_readers(self) -> None:
        """One step for all, if a reader waits for one, and again in turn with what else is to be computed."""
        with self._lock:
            waiting = list(self._waiting)
        try:
            for sequence in waiting:
                if sequence not in self._sequences and not sequence.ended:  # or its reader waits for ever
                    sequence.error = ModelError("The answer was given up: ask again.")
            if any(not sequence.ended for sequence in waiting):
                self._advance()
        except BaseException as error:  # noqa: BLE001 - the readers raise it
            for sequence in waiting:
                sequence.error = sequence.error or error
        if self._wake():
            self._go_on()

    def _wake(self) -> bool:
        """Wake the readers that have what they wait for; returns whether others wait on, for another step."""
        with self._lock:
            for sequence, count in list(self._waiting.items()):
                if len(sequence.tokens) > count or sequence.ended:
                    del self._waiting[sequence]
                    sequence.came.set()
            self._stepping = bool(self._waiting)
            return self._stepping

    def _advance(self) -> None:
        """One step for all."""
        for other in self._sequences:
            other.check_stop()
        self._remove_ended()
        self._make_room()
        self._remove_ended()
        batch = self._sequences[: self.max_batch]
        lengths = [len(other.tokens) for other in batch]
        with torch.inference_mode():
            try:
                self._step_together(batch)
            except BaseException as error:  # noqa: BLE001 - each is tried alone, and fails with its own error
                failed = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                failed = ""
            if failed:  # outside of the handler, which holds what the failed pass had allocated
                self._separate(batch)
                self._leave_static(failed)
            for other, length in zip(batch, lengths, strict=True):
                if len(other.tokens) == length and not other.ended:
                    self._step_alone(other)
        self.made += sum(len(other.tokens) for other in batch) - sum(lengths)
        self._remove_ended()

    def _step_together(self, batch: list[SequenceState]) -> None:
        """The next token of those that can share a pass; none where a single one gains nothing by it."""
        together = [
            sequence for sequence in batch if self._batches and not sequence.alone and self._shares(sequence)
        ]
        fewest = 1 if self._static is not None or self._lean else 2
        self._rebatch(together if len(together) >= fewest else [])
        if self._batch_kv is None:
            return
        tokens = [sequence.tokens[-1] for sequence in self._batched]
        logits = self._batch_kv.step(tokens, [sequence.shift or 0 for sequence in self._batched])
        self.steps += 1
        firsts = leading(logits, [sequence.sampler for sequence in self._batched])
        for sequence, row, first in zip(self._batched, logits, firsts, strict=True):
            sequence.append(row, first)

    @staticmethod
    def _shares(sequence: SequenceState) -> bool:
        return sequence.own is None and (sequence.kv is None or rewindable(sequence.kv))

    def _step_alone(self, sequence: SequenceState) -> None:
        """The next token of one answer from its own KV cache, or its error."""
        while not sequence.ended:
            try:
                if sequence.own is None:
                    sequence.own = OwnKV(self.llm, sequence.kv)
                    sequence.kv = None
                logits = sequence.own.step(sequence.tokens[-1], sequence.shift)
            except BaseException as error:  # noqa: BLE001 - its reader raises it
                failed: BaseException = error
            else:
                self.steps += 1
                sequence.append(logits)
                return
            # Outside of the handler, which holds what the failed pass had allocated.
            if not (is_memory_error(failed) and self._end_newest(sequence)):
                sequence.error = failed
            del failed

    def _end_newest(self, than: SequenceState) -> bool:
        """End the newest answer, for want of memory, if one is newer than this; returns whether."""
        running = [other for other in self._sequences if not other.ended]
        if than not in running or running[-1] is than:
            return False
        running[-1].error = OutOfMemory(NO_ROOM)
        self.remove(running[-1])
        return True

    def check_room(self, positions: int) -> None:
        """Raises OutOfMemory when the KV of a new answer's prompt has no room beside that of the others."""
        if (self._kv_positions() + positions) * self.llm.kv_bytes_per_token > self.kv_limit:
            raise OutOfMemory(NO_ROOM)

    def _make_room(self) -> None:
        """End the newest answers until the KV of the others' next step has room."""
        while len(self._sequences) > 1 and (
            self._kv_positions() * self.llm.kv_bytes_per_token > self.kv_limit
        ):
            newest = self._sequences[-1]
            newest.error = OutOfMemory(NO_ROOM)
            self._sequences.remove(newest)
            newest.kv = newest.own = None

    def _kv_positions(self) -> int:
        """Positions that the KV of all answers takes in the next step; a pass pads all to its longest."""
        batch = self._sequences[: self.max_batch]
        shared = [sequence.positions for sequence in batch if self._batches and not sequence.alone]
        others = sum(other.positions for other in self._sequences if other not in batch or other.alone)
        return len(shared) * max(shared, default=0) + others

    def _rebatch(self, batch: list[SequenceState]) -> None:
        """Make the batched KV cache hold exactly these sequences, with room for a step."""
        old_kv, old_batch = self._batch_kv, self._batched
        if old_batch == batch and (old_kv is None or self._lean or not old_kv.full):
            return
        if old_kv is not None:
            for row, sequence in enumerate(old_batch):
                if sequence in self._sequences and sequence not in batch:
                    sequence.kv = kv_from_layers(self.llm.model.config, old_kv.copies(row))
        layers = [
            layers_of(sequence.kv) if sequence.kv is not None else old_kv.views(old_batch.index(sequence))  # type: ignore[union-attr]
            for sequence in batch
        ]
        together = self.llm.together if self._static is None else self._static.begin
        self._batch_kv, self._batched = (together(layers), batch) if batch else (None, [])
        for sequence in batch:
            sequence.kv = None

    def _separate(self, batch: list[SequenceState]) -> None:
        """Give these sequences, and all in the batched KV cache, a cache of their own as before the step."""
        old_kv, old_batch = self._batch_kv, self._batched
        self._batch_kv, self._batched = None, []
        for sequence in batch:
            sequence.alone = True
        for row, sequence in enumerate(old_batch):
            if old_kv is None or sequence.kv is not None or sequence not in self._sequences:
                continue
            sequence.alone = True
            try:
                # Views, since memory may be short; its next step copies them.
                sequence.kv = kv_from_layers(self.llm.model.config, old_kv.views(row))
            except BaseException as error:  # noqa: BLE001 - its reader raises it
                sequence.error = error

    def _leave_static(self, why: str) -> None:
        """Decode in growing buffers from now on, where it was in static ones."""
        if self._static is not None:
            self._static = None
            LOG.warning("Answers are decoded without CUDA graphs from now on, since a step failed: %s", why)

    def _remove_ended(self) -> None:
        for sequence in self.sequences:
            if sequence.ended:
                self.remove(sequence)


def is_memory_error(error: BaseException) -> bool:
    """Torch has a class for accelerators; of main memory it raises a RuntimeError known by its text."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and "allocate memory" in str(error))
