"""What VideoChat hands back: the answer, what it used, how long it took, and what was looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from encoder.tokens import Grid
from llm_bridge.generation import FinishReason
from llm_bridge.prompt import Visual


@dataclass(frozen=True)
class Usage:
    """Tokens: patches seen and kept by the encoder, embeddings into the LLM, prompt, reused, answered."""

    seen_tokens: int
    kept_tokens: int
    visual_tokens: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds; first_token_s and total_s count from the question, decode and encode are 0 when reused."""

    decode_s: float
    encode_s: float
    prefill_s: float
    first_token_s: float
    total_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class KeptTokens:
    """Which patches of which frames entered the encoder.

    times_s: per sampled frame, empty for an image. grid: frames x rows x columns. indices: kept patches,
    ascending in raster order (frame, row, column).
    """

    times_s: tuple[float, ...]
    duration_s: float
    grid: Grid
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """The text, and everything it took. finish: "stop" (complete), "length" or "cancelled"."""

    text: str
    usage: Usage
    timings: Timings
    kept: tuple[KeptTokens, ...]
    finish: FinishReason

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class EncodedVideo:
    """A video as the language model sees it: (M, D) embedding, its place in a prompt, and what it cost."""

    embedding: Tensor
    visual: Visual
    kept: KeptTokens
    decode_s: float
    encode_s: float

    @property
    def bytes(self) -> int:
        """Memory it holds, roughly."""
        return self.embedding.nbytes + 8 * len(self.kept.indices) + 512

    def again(self) -> EncodedVideo:
        """The same from the cache: nothing was decoded or encoded."""
        return replace(self, decode_s=0.0, encode_s=0.0)
