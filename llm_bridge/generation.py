"""Token-by-token answers: prefill what the prefix cache lacks, then decode; stops within one token.

A prompt is prefilled in pieces whose ends depend on it alone (see `piece_ends`), and only whole pieces are
reused. So every kernel sees the same shapes and values whatever was asked before, and gives the same bits.
KV of decoded tokens is not bit-equal to prefilled KV: a follow-up question prefills the last answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encoder.errors import BudgetError
from llm_bridge.kv_cache import Piece, PrefixCache, joined, kv_from_layers, rewindable
from llm_bridge.llm import LanguageModel
from llm_bridge.prompt import PLACEHOLDER, Prompt
from llm_bridge.sampling import FinishReason, Sampler, SamplingParams

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
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
    finish: FinishReason = "cancelled"

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed after the first token; 0 for fewer than two tokens."""
        decoding = self.total_s - self.first_token_s
        return (self.completion_tokens - 1) / decoding if self.completion_tokens > 1 and decoding > 0 else 0.0


class StreamingDecoder:
    """Token ids -> text pieces that never end inside a character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._text(self._start, len(self._ids))
        if text.endswith("\ufffd"):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """Whatever is left at the end."""
        return self._emit(self._text(self._start, len(self._ids)))

    def _emit(self, text: str) -> str:
        # Decoding with the tokens before keeps the spaces that tokenizers drop at the start of a text.
        before = self._text(self._start, self._read)
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :].replace("\0", "")  # which no later prompt could hold

    def _text(self, start: int, end: int) -> str:
        return self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


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

    visuals: embeddings (M, D), one per span of the prompt. stop: set it, from any thread, and computing ends
    within one token. prefixes: KV to start from, of `scope` only; the prompt's KV is added unless the answer
    fails. worker: computes for several generations, each iterated in a thread of its own; None computes here.
    first_bias: added to the scores of token ids where the answer begins, and only there.
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
    first_bias: Mapping[int, float] = field(default_factory=dict)
    # KV of the prompt from its start: cached pieces, then computed ones.
    _pieces: list[Piece] = field(default_factory=list, init=False, repr=False)

    def __iter__(self) -> Iterator[str]:
        if self.worker is not None:
            self.worker.check_process()
        self._check_context()
        vocabulary = getattr(self.llm.model.config.get_text_config(), "vocab_size", None)
        if vocabulary is not None:
            self.sampling.check_vocabulary(vocabulary)
        start = time.perf_counter()
        keys, ends = self.prompt.cache_keys, piece_ends(self.prompt)
        # The last piece is always computed: the first token's logits come from it.
        self._pieces = self.prefixes.take(keys, ends[:-1], self.scope) if self.prefixes is not None else []
        self.stats.prompt_tokens = len(keys)
        self.stats.cached_tokens = sum(piece.length for piece in self._pieces)
        decoder = StreamingDecoder(self.llm.tokenizer)
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
                    if piece := decoder.push(token):
                        yield piece
            if piece := decoder.flush():
                yield piece
            self._put_prefix(keys, ends)
        except GeneratorExit:  # its reader left
            self._put_prefix(keys, ends)
            raise
        finally:
            self._pieces = []
            self.stats.total_s = time.perf_counter() - start

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

    def embeddings(self, start: int, end: int) -> Tensor:
        """Input embeddings (1, end - start, D) of the prompt's positions."""
        ids = torch.tensor(self.prompt.ids[start:end], device=self.llm.device)
        embedded = self.llm.embed(ids.masked_fill(ids == PLACEHOLDER, 0))
        for visual, (position, count) in zip(self.visuals, self.prompt.spans, strict=True):
            first, last = max(start, position), min(end, position + count)
            if first < last:
                part = visual[first - position : last - position]
                embedded[first - start : last - start] = part.to(embedded)
        return embedded[None]

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
            kv = kv_from_layers(self.llm.model.config, joined(self._pieces) if self._pieces else ())
        logits = self._step(kv, inputs_embeds=self.embeddings(start, end))
        if self.prefixes is not None and end - start >= SHORTEST_PIECE and rewindable(kv):
            self._pieces.append(Piece.of(kv, start, end))
        return kv, logits

    def _step(self, kv: Any, **inputs: Tensor) -> Tensor:
        return self.llm.advance(kv, **inputs)[0]

    def _sampler(self, end_ids: Collection[int]) -> Sampler:
        text = [token for token in self.prompt.ids if token != PLACEHOLDER]
        return Sampler(self.sampling, text, end_ids)

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
        for count in range(self.sampling.max_new_tokens):
            if self.stop.is_set():
                return
            token = sampler(logits)
            if token in ends:
                self.stats.finish = "stop"
                return
            yield token
            if count + 1 == self.sampling.max_new_tokens:
                self.stats.finish = "length"
                return
            if self.stop.is_set():
                return
            with torch.inference_mode():
                logits = self._step(kv, input_ids=torch.tensor([[token]], device=self.llm.device))

    def _decode_together(
        self, worker: ComputeWorker, kv: Any, logits: Tensor | None
    ) -> Generator[int, None, None]:
        if logits is None:
            return
        sequence = worker.join(kv, logits, self.sampling, self.stop, self._sampler(worker.eos))
        del kv, logits
        try:
            yield from sequence
        finally:
            sequence.leave()
            self.stats.finish = sequence.finish or "cancelled"
            if sequence.error is not None:
                self._pieces = []
