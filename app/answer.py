"""An answer and its figures: tokens used, seconds taken, patches kept of each video."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from encoder.errors import ModelError
from encoder.tokens import Grid
from llm_bridge.sampling import FinishReason

CUT = (
    "The answer was cut off before its JSON was complete: raise max_new_tokens, or bound the texts and lists "
    "of the schema (maxLength, maxItems)."
)
STOPPED = "The answer was stopped before its JSON was complete: ask again."


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens.

    seen_tokens, kept_tokens: patches before and after selection. visual_tokens: embeddings that stand for the
    videos in the prompt. prompt_tokens: positions of the prompt, of which cached_tokens were not computed
    again. completion_tokens: of the answer, and of what was thought before it, which are thinking_tokens.
    """

    seen_tokens: int
    kept_tokens: int
    visual_tokens: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    thinking_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds; first_token_s and total_s count from the question; decode_s and encode_s: 0 if cached."""

    decode_s: float
    encode_s: float
    prefill_s: float
    first_token_s: float
    total_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class KeptTokens:
    """Which patches of which frames entered the encoder.

    times_s: per frame of the grid, empty for an image; of the whole video, as duration_s. grid: frames x rows
    x columns. indices: kept patches, ascending in raster order (frame, row, column). region: what of the
    whole, upright picture the grid covers: left, top, right, bottom as fractions.
    """

    times_s: tuple[float, ...]
    duration_s: float
    grid: Grid
    indices: tuple[int, ...]
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def boxes(self) -> list[tuple[int, float, float, float, float]]:
        """(frame, left, top, right, bottom) of each kept patch, as fractions of the whole picture."""
        left, top, right, bottom = self.region
        _, rows, columns = self.grid
        across, down = (right - left) / columns, (bottom - top) / rows
        boxes = []
        for index in self.indices:
            frame, place = divmod(index, rows * columns)
            row, column = divmod(place, columns)
            x, y = left + column * across, top + row * down
            boxes.append((frame, x, y, x + across, y + down))
        return boxes


@dataclass(frozen=True)
class Answer:
    """The text and its figures. finish: "stop" (complete), "length" (max_new_tokens) or "cancelled".

    thinking: what the model thought before it answered.
    familiar: whether every video looks like what the model was trained on; None when the model cannot tell,
    or there is none. note: what `text` begins with that is not the model's: that a video does not, or has no
    such time as the question names; it is no token of usage.
    """

    text: str
    usage: Usage
    timings: Timings
    kept: tuple[KeptTokens, ...]
    finish: FinishReason
    thinking: str = ""
    familiar: bool | None = None
    note: str = ""

    def __str__(self) -> str:
        return self.text

    def json(self) -> Any:
        """What an answer that was asked for with a schema says, as plain values.

        Raises ModelError for one that was cut off or stopped before its JSON was complete, and for no JSON.
        """
        if self.finish != "stop":
            raise ModelError(CUT if self.finish == "length" else STOPPED)
        try:
            return json.loads(self.text)
        except ValueError:
            raise ModelError("The answer is not JSON: ask with a schema.") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
