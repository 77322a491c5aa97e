"""Token-by-token answers: prefill what the cache lacks, then decode; stops within one token when told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from encoder.errors import BudgetError, ConfigError
from llm_bridge.cache import Prefix, PrefixCache
from llm_bridge.llm import LanguageModel
from llm_bridge.prompt import PLACEHOLDER, Prompt

if TYPE_CHECKING:
    from llm_bridge.batching import Batcher

PREFILL_CHUNK = 512
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. temperature 0 is greedy; seed makes sampling repeatable.

    Raises ConfigError for values that make no sense.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if not 0 <= self.temperature <= 10:
            raise ConfigError(f"temperature must lie between 0 and 10, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie above 0 and not above 1, not {self.top_p}.")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (off) or positive, not {self.top_k}.")


@dataclass
class GenerationStats:
    """What a generation cost; complete when its iterator has ended. Times in seconds from its start."""

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
        return text[len(before) :]

    def _text(self, start: int, end: int) -> str:
        return self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@dataclass
class Generation:
    """One answer in the making: iterate for text pieces, then read `stats`.

    prompt and visuals: what is asked; visuals are (M, D), one per span of the prompt. stop: set it, from any
    thread, and computing ends within one token. prefixes: KV caches to start from and to leave this one in,
    those of `scope` only. batcher: computes for several generations at once, each in a thread of its own.
    Raises BudgetError on iteration when prompt and answer exceed the model's context.
    """

    llm: LanguageModel
    prompt: Prompt
    visuals: Sequence[Tensor]
    sampling: Sampling = Sampling()
    prefixes: PrefixCache | None = None
    scope: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    stats: GenerationStats = field(default_factory=GenerationStats)
    batcher: Batcher | None = None
    _kv: Any | None = field(default=None, init=False, repr=False)  # what the cache gets at the end

    def __iter__(self) -> Iterator[str]:
        self._check_context()
        start = time.perf_counter()
        keys = list(self.prompt.cache_keys)
        prefix = self.prefixes.take(keys, scope=self.scope) if self.prefixes is not None else None
        cached = len(prefix.keys) if prefix is not None else 0
        kv = self._kv = prefix.kv if prefix is not None else self._new_kv()
        self.stats.prompt_tokens, self.stats.cached_tokens = len(keys), cached
        decoder = StreamingDecoder(self.llm.tokenizer)
        try:
            logits = self._prefill(kv, cached)
            self.stats.prefill_s = time.perf_counter() - start
            with closing(self._decode(kv, logits, keys)) as tokens:
                for token in tokens:
                    if not self.stats.completion_tokens:
                        self.stats.first_token_s = time.perf_counter() - start
                    self.stats.completion_tokens += 1
                    if piece := decoder.push(token):
                        yield piece
            if piece := decoder.flush():
                yield piece
        finally:
            self.stats.total_s = time.perf_counter() - start
            kv = self._kv
            if self.prefixes is not None and kv is not None:
                self.prefixes.put(Prefix(tuple(keys[: kv.get_seq_length()]), kv, self.scope))

    def _check_context(self) -> None:
        limit = self.llm.context_length
        needed = len(self.prompt) + self.sampling.max_new_tokens
        if limit is not None and needed > limit:
            raise BudgetError(
                f"The question needs {needed} positions but {self.llm.name} has {limit}: "
                f"lower the token budget or max_new_tokens by {needed - limit}."
            )

    def _new_kv(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.llm.model.config)

    def _embeddings(self, start: int) -> Tensor:
        """Input embeddings (1, N - start, D) of the prompt from `start` on."""
        ids = torch.tensor(self.prompt.ids[start:], device=self.llm.device)
        embedded = self.llm.embed(ids.masked_fill(ids == PLACEHOLDER, 0))
        for visual, (position, count) in zip(self.visuals, self.prompt.spans, strict=True):
            skip = max(start - position, 0)
            if skip < count:
                embedded[position + skip - start : position + count - start] = visual[skip:].to(embedded)
        return embedded[None]

    def _prefill(self, kv: Any, cached: int) -> Tensor | None:
        """Run the prompt from position `cached` on; scores (V,) of the first new token, None if stopped."""
        logits = None
        for start in range(cached, len(self.prompt), PREFILL_CHUNK):
            if self.batcher is None:
                logits = self._prefill_chunk(kv, start)
            else:
                logits = self.batcher.run(self._prefill_chunk, kv, start)
        return logits

    @torch.inference_mode()
    def _prefill_chunk(self, kv: Any, start: int) -> Tensor | None:
        if self.stop.is_set():
            return None
        return self._step(kv, inputs_embeds=self._embeddings(start)[:, :PREFILL_CHUNK])

    def _step(self, kv: Any, **inputs: Tensor) -> Tensor:
        return self.llm.advance(kv, **inputs)[0]

    def _decode(self, kv: Any, logits: Tensor | None, keys: list[int]) -> Generator[int, None, None]:
        """New tokens until the end of the turn, the length limit, or a stop."""
        if logits is None:
            return
        if self.batcher is not None:
            yield from self._decode_together(self.batcher, kv, logits, keys)
            return
        choose, eos = chooser(self.sampling, self.llm.device), self.llm.eos_ids
        for count in range(self.sampling.max_new_tokens):
            if self.stop.is_set():
                return
            token = choose(logits)
            if token in eos:
                self.stats.finish = "stop"
                return
            keys.append(token)
            yield token
            if count + 1 == self.sampling.max_new_tokens:
                self.stats.finish = "length"
                return
            if self.stop.is_set():
                return
            with torch.inference_mode():
                logits = self._step(kv, input_ids=torch.tensor([[token]], device=self.llm.device))

    def _decode_together(self, batcher: Batcher, kv: Any, logits: Tensor, keys: list[int]) -> Iterator[int]:
        row = batcher.join(kv, logits, self.sampling, self.stop)
        try:
            yield from row
        finally:
            self._kv = row.leave()
            keys += row.tokens  # the KV cache may be ahead of the reader
            self.stats.finish = row.finish or "cancelled"


def chooser(sampling: Sampling, device: torch.device) -> Any:
    """Scores (V,) -> token id, by the sampling settings."""
    if sampling.temperature == 0:
        return lambda logits: int(logits.argmax())
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    no_ids = torch.zeros(1, 0, dtype=torch.long)
    generator = torch.Generator()  # on the CPU: the same draws on every device
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)

    def draw(logits: Tensor) -> int:
        scores: Tensor = warpers(no_ids, logits.cpu()[None])  # type: ignore[arg-type]
        return int(torch.multinomial(scores.softmax(dim=-1)[0], 1, generator=generator))

    return draw
