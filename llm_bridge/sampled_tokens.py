"""The tokens of one answer, sampled in the thread that computes and read in another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator

from torch import Tensor

from llm_bridge.sampling import FinishReason, Leading, Sampler


class SampledTokens:
    """What an answer has so far.

    tokens: may be ahead of the reader. finish: how it ended, error: what ended it instead, both None while it
    runs. ends: tokens that end it. stop: ends it as cancelled when it is set.
    """

    def __init__(self, sampler: Sampler, ends: Collection[int], stop: threading.Event) -> None:
        self.sampler, self.ends = sampler, frozenset(ends)
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.error: BaseException | None = None
        self._stop = stop

    @property
    def ended(self) -> bool:
        """Whether no more tokens come."""
        return self.finish is not None or self.error is not None

    def append(self, logits: Tensor, first: Leading | None = None) -> None:
        """Sample the next token from its logits (V,); whatever that raises becomes this answer's error.

        first: what `leading` gave for them, if it was called for several answers at once.
        """
        try:
            token = self.sampler(logits, first)
            if token in self.ends:
                self.finish = "stop"
                return
            self.tokens.append(token)
            self.finish = self.sampler.finish
        except BaseException as error:  # noqa: BLE001 - its reader raises it
            self.error = error

    def check_stop(self) -> None:
        """End it as cancelled when its stop event is set."""
        try:
            if self._stop.is_set():
                self.finish = "cancelled"
        except BaseException as error:  # noqa: BLE001 - its reader raises it
            self.error = error

    def read(self, more: Callable[[int], object]) -> Iterator[int]:
        """The tokens, until it has ended. more: called with their number to have another one made."""
        count = 0
        while True:
            if not self.ended or count < len(self.tokens):
                self.check_stop()  # tokens made ahead of the reader are not read any more
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
                more(count)
