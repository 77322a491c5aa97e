"""An answer as text: what an engine's tokens say, thoughts apart, and what they took."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from encoder.errors import BudgetError
from llm_bridge.engines import Engine, LocalEngine, Request
from llm_bridge.kv_cache import PrefixCache
from llm_bridge.llm import LanguageModel
from llm_bridge.prompt import Prompt
from llm_bridge.sampling import FinishReason, SamplingParams
from llm_bridge.thinking import AnswerLength, AnswerReader

if TYPE_CHECKING:
    from llm_bridge.compute_worker import ComputeWorker


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


@dataclass
class Generation:
    """One answer being generated: iterate for text pieces, then read `stats`.

    visuals, scope, stop, first_bias: as of a Request. engine: makes the tokens; None computes here, with
    `prefixes` to start from and `worker` as of LocalEngine. A prompt's KV is kept unless the answer fails.
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
    engine: Engine | None = None

    @property
    def request(self) -> Request:
        """What the engine is asked for."""
        bias = self.first_bias if self.sampling.schema is None else {}  # JSON begins with no word
        return Request(self.prompt, self.visuals, self.sampling, self.scope, self.stop, bias, self._length)

    def __iter__(self) -> Iterator[str]:
        engine = self.engine or self.llm.own_engine or LocalEngine(self.llm, self.worker, self.prefixes)
        self._check_context()
        vocabulary = getattr(self.llm.model.config.get_text_config(), "vocab_size", None)
        if vocabulary is not None:
            self.sampling.check_vocabulary(vocabulary)
        start, stats = time.perf_counter(), self.stats
        stats.prompt_tokens = len(self.prompt)
        reader, answer = self._reader(), engine.start(self.request)
        try:
            with closing(iter(answer)) as tokens:  # type: ignore[type-var]
                for token in tokens:
                    if not stats.completion_tokens:
                        stats.cached_tokens, stats.prefill_s = answer.cached_tokens, answer.prefill_s
                        stats.first_token_s = time.perf_counter() - start
                    stats.completion_tokens += 1
                    stats.thinking_tokens = self._length.thinking_tokens(stats.completion_tokens)
                    yield from self._spoken(reader.push(token))
            yield from self._spoken(reader.flush())
        finally:
            stats.cached_tokens, stats.prefill_s = answer.cached_tokens, answer.prefill_s
            stats.finish, stats.total_s = answer.finish, time.perf_counter() - start

    def _reader(self) -> AnswerReader:
        return AnswerReader(self.llm.tokenizer, self.llm.thinking_marks, self.prompt.ids)

    def _spoken(self, texts: Sequence[tuple[str, str]]) -> Iterator[str]:
        """The answer's part of texts; thoughts go to their listener."""
        for kind, text in texts:
            if kind == "answer":
                yield text
            elif self.on_thinking is not None:
                self.on_thinking(text)

    def _check_context(self) -> None:
        limit = self.llm.context_length
        needed = len(self.prompt) + self.sampling.max_new_tokens
        if limit is not None and needed > limit:
            raise BudgetError(
                f"The question needs {needed} positions but {self.llm.name} has {limit}: "
                f"lower the token budget or max_new_tokens by {needed - limit}."
            )

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
