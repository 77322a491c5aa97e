"""Token-by-token answers: prefill what the prefix cache lacks, then decode; stops within one token.

A prompt is prefilled in pieces whose ends depend on it alone (see `piece_ends`), and only whole pieces are
reused. So every kernel sees the same shapes and values whatever was asked before, and gives the same bits.
KV of decoded tokens is not bit-equal to prefilled KV: a follow-up question prefills the last answer.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encoder.errors import BudgetError
from llm_bridge.kv_cache import Piece, PrefixCache, joined, kv_from_layers
from llm_bridge.llm import LanguageModel
from llm_bridge.prompt import PLACEHOLDER, Prompt
from llm_bridge.sampling import FinishReason, Sampler, SamplingParams
from llm_bridge.thinking import AnswerLength, AnswerReader

if TYPE_CHECKING:
    from llm_bridge.compute_worker import ComputeWorker

# In positions. A pass over few takes nearly the time of reading all weights; one over more gains no speed.
SHORTEST_PIECE, LONGEST_PIECE = 16, 256
MARK = 3  # the last ids of a prompt that are taken for the words that begin an answer


@dataclass
class GenerationStats:
    """Tokens and times of a generation; complete when its iterator has ended. Seconds from its start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    thinking_tokens: int = 0  # of the completion's
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
    finish: FinishReason = "cancelled"

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed after the first token; 0 for fewer than two tokens."""
        decoding = self.total_s - self.first_token_s
        return (self.completion_tokens - 1) / decoding if self.completion_tokens > 1 and decoding > 0 else 0.0


def _biased(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Logits (V,) with what is added to those of some ids."""
    with torch.inference_mode():
        ids = torch.tensor(list(bias), device=logits.device)
        added = torch.tensor(list(bias.values()), device=logits.device, dtype=logits.dtype)
        return logits.index_add(0, ids, added)


def piece_ends(prompt: Prompt) -> list[int]:
    """Where the pieces end that a prompt is prefilled in; the last one is its length.

    At the end of each visual and where an answer begins, of earlier turns too, so that another question about
    the same video and the next turn of a conversation find all of what they have in common with this one.
    """
    mark = prompt.ids[-MARK:]
    wanted = {start + count for start, count in prompt.spans} | {len(prompt)}
    if PLACEHOLDER not in mark:
        wanted.update(
            end for end in range(len(mark), len(prompt)) if prompt.ids[end - len(mark) : end] == mark
        )
    ends, last = [], 0
    for end in sorted(wanted):
        if end - last < SHORTEST_PIECE and end < len(prompt):
            continue
        while end - last > 1.5 * LONGEST_PIECE:  # no short rest
            last += LONGEST_PIECE
            ends.append(last)
        ends.append(end)
        last = end
    return ends


@dataclass
class Generation:
    """One answer being generated: iterate for text pieces, then read `stats`.

    visuals: embeddings (M, D), one per visual of the prompt, in its order; (M, (1 + n) D) where n layers of
    the language model add rows of their own, which follow each embedding. stop: set it, from any thread, and
    computing ends within one token. prefixes: KV to start from, of `scope` only; the prompt's KV is added
    unless the answer fails. worker: computes for several generations, each iterated in a thread of its own;
    None computes here. first_bias: added to the scores of token ids where the answer begins, and only there.
    Raises on iteration: BudgetError when prompt and answer exceed the model's context, ConfigError when the
    sampling names tokens that the model lacks, ModelError when its logits are not finite.
    """

    llm: LanguageModel
    prompt: Prompt
    visuals: Sequence[Tensor]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prefixes: PrefixCache | None = None
    scope: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    stats: GenerationStats = field(default_factory=GenerationStats)
    worker: ComputeWorker | None = None
    on_thinking: Callable[[str], None] | None = None
    first_bias: Mapping[int, float] = field(default_factory=dict)
    # KV of the prompt from its start: cached pieces, then computed ones.
    _pieces: list[Piece] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def _rows(self) -> Tensor:
        """The embeddings (sum M, ...) of all visuals, in the order of their places."""
        starts = [start for start, _ in self.prompt.spans]
        return torch.cat(
            [self.visuals[index] for index in sorted(range(len(starts)), key=starts.__getitem__)]
        )

    @cached_property
    def _places(self) -> list[int]:
        """Positions of the prompt that take a row each, ascending."""
        return [index for index, token in enumerate(self.prompt.ids) if token == PLACEHOLDER]

    def __iter__(self) -> Iterator[str]:
        if self.worker is not None:
            self.worker.check_process()
        self._check_context()
        vocabulary = getattr(self.llm.model.config.get_text_config(), "vocab_size", None)
        if vocabulary is not None:
            self.sampling.check_vocabulary(vocabulary)
        start = time.perf_counter()
        keys = self.prompt.cache_keys
        ends = [len(keys)] if self.llm.memory == "whole" else piece_ends(self.prompt)
        self._pieces = self._take_prefix(keys, ends)
        self.stats.prompt_tokens = len(keys)
        self.stats.cached_tokens = sum(piece.length for piece in self._pieces)
        reader = self._reader()
        try:
            kv, logits = self.prefill(ends)
            if logits is not None and self.first_bias:
                logits = _biased(logits, self.first_bias)
            self.stats.prefill_s = time.perf_counter() - start
            with closing(self._decode(kv, logits)) as tokens:
                del kv, logits  # else the KV would stay beside its copy in the batch
                for token in tokens:
                    if not self.stats.completion_tokens:
                        self.stats.first_token_s = time.perf_counter() - start
                    self.stats.completion_tokens += 1
                    self.stats.thinking_tokens = self._length.thinking_tokens(self.stats.completion_tokens)
                    yield from self._spoken(reader.push(token))
            yield from self._spoken(reader.flush())
            self._put_prefix(keys, ends)
        except GeneratorExit:  # its reader left
            self._put_prefix(keys, ends)
            raise
        finally:
            self._pieces = []
            self.stats.total_s = time.perf_counter() - start

    def _reader(self) -> AnswerReader:
        return AnswerReader(self.llm.tokenizer, self.llm.thinking_marks, self.prompt.ids)

    def _spoken(self, texts: Sequence[tuple[str, str]]) -> Iterator[str]:
        """The answer's part of texts; thoughts go to their listener."""
        for kind, text in texts:
            if kind == "answer":
                yield text
            elif self.on_thinking is not None:
                self.on_thinking(text)

    def _take_prefix(self, keys: Sequence[int], ends: Sequence[int]) -> list[Piece]:
        """The pieces to go on from; never the last one, which the first token's logits come from."""
        if self.prefixes is None:
            return []
        pieces = self.prefixes.take(keys, ends[:-1], self.scope)
        while pieces and self.llm.memory == "states" and pieces[-1].states is None:
            pieces.pop()
        return pieces

    def _put_prefix(self, keys: Sequence[int], ends: Sequence[int]) -> None:
        if self.prefixes is not None:
            self.prefixes.put(keys, ends, self._pieces, self.scope)

    def _check_context(self) -> None:
        limit = self.llm.context_length
        needed = len(self.prompt) + self.sampling.max_new_tokens
        if limit is not None and needed > limit:
            raise BudgetError(
                f"The question needs {needed} positions but {self.llm.name} has {limit}: "
                f"lower the token budget or max_new_tokens by {needed - limit}."
            )

    def inputs(self, start: int, end: int) -> dict[str, Any]:
        """What the language model's forward takes for the prompt's positions from `start` to `end`.

        inputs_embeds (1, end - start, D); position_ids (axes, 1, end - start) where they are not the indices;
        extra (rows, n, D) and their places (1, end - start), where layers add rows of their own.
        """
        ids = torch.tensor(self.prompt.ids[start:end], device=self.llm.device)
        embedded = self.llm.embed(ids.masked_fill(ids == PLACEHOLDER, 0))
        first, last = bisect_left(self._places, start), bisect_left(self._places, end)
        inputs: dict[str, Any] = {"inputs_embeds": embedded[None], **self.llm.beside_embeddings(ids[None])}
        if first < last:
            rows, width = self._rows[first:last].to(embedded), embedded.shape[1]
            embedded[ids == PLACEHOLDER] = rows[:, :width]
            if rows.shape[1] > width:
                inputs |= {
                    "extra": rows[:, width:].unflatten(1, (-1, width)),
                    "places": ids[None] == PLACEHOLDER,
                }
        if self.prompt.positions:
            positions = [axis[start:end] for axis in self.prompt.positions]
            inputs["position_ids"] = torch.tensor(positions, device=self.llm.device)[:, None]
        return inputs

    def prefill(self, ends: Sequence[int]) -> tuple[Any, Tensor | None]:
        """Compute the pieces of the prompt that were not cached, whose ends are in `ends`.

        Returns the prompt's KV cache and the logits (V,) of the first new token, None if stopped.
        """
        kv = logits = None
        start = self.stats.cached_tokens
        for end in ends[len(self._pieces) :]:
            if self.worker is None:
                kv, logits = self._prefill_piece(kv, start, end)
            else:
                kv, logits = self.worker.run(self._prefill_piece, kv, start, end)
            if logits is None:
                break
            start = end
        return kv, logits

    @torch.inference_mode()
    def _prefill_piece(self, kv: Any, start: int, end: int) -> tuple[Any, Tensor | None]:
        if self.stop.is_set():
            return kv, None
        if kv is None:
            config, pieces = self.llm.model.config, self._pieces
            kv = (
                kv_from_layers(config, joined(pieces), pieces[-1].states)
                if pieces
                else kv_from_layers(config)
            )
        logits = self.llm.advance(kv, **self.inputs(start, end))[0]
        if self.prefixes is not None and end - start >= SHORTEST_PIECE and self.llm.memory != "whole":
            self._pieces.append(Piece.of(kv, start, end, states=self._parts_at(start, end)))
        return kv, logits

    def _parts_at(self, start: int, end: int) -> bool:
        """Whether to keep a model's states at the end of a piece, since another question may part there."""
        if self.llm.memory != "states":
            return False
        # A piece of the greatest length was cut by its length alone.
        visual = any(end == place + count for place, count in self.prompt.spans)
        return visual or end - start != LONGEST_PIECE

    def _sampler(self, end_ids: Collection[int]) -> Sampler:
        text = [token for token in self.prompt.ids if token != PLACEHOLDER]
        return Sampler(self.sampling, text, end_ids, self._length)

    @cached_property
    def _length(self) -> AnswerLength:
        """What an answer may have, and its thoughts: no more than the context has room for."""
        most, marks = self.sampling.max_new_tokens, self.llm.thinking_marks
        if marks is None:
            return AnswerLength(most)
        close = self.llm.tokenizer(marks.close, add_special_tokens=False).input_ids
        thinking, limit = self.sampling.max_thinking_tokens, self.llm.context_length
        if limit is not None:
            thinking = min(thinking, max(0, limit - len(self.prompt) - most - len(close)))
        return AnswerLength(most, self._reader(), thinking, close)

    def _decode(self, kv: Any, logits: Tensor | None) -> Generator[int, None, None]:
        """New tokens until the end of the turn, the length limit, or a stop; none without logits."""
        if self.worker is None:
            return self._decode_alone(kv, logits)
        return self._decode_together(self.worker, kv, logits)

    def _decode_alone(self, kv: Any, logits: Tensor | None) -> Generator[int, None, None]:
        if logits is None:
            return
        ends = self.llm.eos_ids | frozenset(self.sampling.stop_token_ids)
        sampler = self._sampler(ends)
        while not self.stop.is_set():
            token = sampler(logits)
            if token in ends:
                self.stats.finish = "stop"
                return
            yield token
            if sampler.full:
                self.stats.finish = "length"
                return
            if self.stop.is_set():
                return
            with torch.inference_mode():
                shift = self.prompt.shift
                position = None if shift is None else kv.get_seq_length() + shift
                logits = self.llm.step(kv, token, position)

    def _decode_together(
        self, worker: ComputeWorker, kv: Any, logits: Tensor | None
    ) -> Generator[int, None, None]:
        if logits is None:
            return
        sequence = worker.join(
            kv, logits, self.sampling, self.stop, self._sampler(worker.eos), self.prompt.shift
        )
        del kv, logits
        try:
            yield from sequence
        finally:
            sequence.leave()
            self.stats.finish = sequence.finish or "cancelled"
            if sequence.error is not None:
                self._pieces = []
