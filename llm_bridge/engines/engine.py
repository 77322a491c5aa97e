"""What an engine is: it takes a prompt, ids with embeddings between, and makes tokens until it is stopped.

    engine: Engine = LocalEngine(llm)
    tokens = engine.start(Request(prompt, [embedding]))
    for token in tokens: ...
    tokens.finish, tokens.cached_tokens, tokens.prefill_s

An engine that takes text alone cannot serve. A greedy answer depends on its request only, whatever else the
engine makes at the same time. What becomes of the tokens (text, thoughts, figures) is Generation's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from llm_bridge.prompt import Prompt
from llm_bridge.sampling import FinishReason, SamplingParams
from llm_bridge.thinking import AnswerLength


@dataclass(frozen=True)
class Request:
    """One answer to be made.

    visuals: embeddings (M, D), one per visual of the prompt, in its order; (M, (1 + n) D) where n layers
    of the language model add rows of their own, which follow each embedding. scope: nothing kept for one
    serves another. stop: set it, from any thread, and computing ends within one token. first_bias: added
    to the scores of token ids where the answer begins, and only there. length: counts the tokens and says
    when the answer has all of them, or which one must come next; default: `sampling.max_new_tokens`,
    without thoughts.
    """

    prompt: Prompt
    visuals: Sequence[Tensor]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    scope: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    first_bias: Mapping[int, float] = field(default_factory=dict)
    length: AnswerLength | None = None


class TokenStream(Protocol):
    """The tokens of one answer: iterate once; leaving early ends it.

    cached_tokens: positions of the prompt that were not computed anew. prefill_s: seconds until the first
    token's scores were there. finish: how it ended, "cancelled" until it has. Raises on iteration ModelError
    (OutOfMemory among them) or ConfigError: one sentence.
    """

    cached_tokens: int
    prefill_s: float
    finish: FinishReason

    def __iter__(self) -> Iterator[int]: ...


class Engine(Protocol):
    """Makes answers, any number at a time, each read in a thread of its own.

    name: as people call it.
    """

    name: str

    def start(self, request: Request) -> TokenStream:
        """An answer to be read; nothing is computed before its first token is asked for."""
        ...

    def close(self) -> None:
        """Answers being made end with a ModelError; nothing is made afterwards."""
        ...
