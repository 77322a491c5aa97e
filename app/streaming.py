"""An answer as a stream of text pieces: what `VideoChat.stream` returns."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

from app.answer import Answer, Timings, Usage
from app.note import Note
from app.vision import EncodedVideo
from encoder.errors import FluxChatError, ModelError, OutOfMemory
from llm_bridge.compute_worker import NO_ROOM, is_memory_error
from llm_bridge.generation import Generation, GenerationStats


class NotCopyableError(ModelError, pickle.PicklingError):
    """Raised for an object that belongs to one process, when it is pickled or copied."""


class NotCopyable:
    """Base of objects with a model, threads and caches behind them: they cannot be pickled or copied."""

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise NotCopyableError(
            f"{type(self).__name__} objects cannot be pickled or copied: make a VideoChat in each process."
        )


class Thought(str):
    """A piece of what the model thinks before it answers, where it stands among pieces of the answer."""


class Step(str):
    """What begins ("decode", "encode"), as progress is told of it. part, parts: of a long video, from 1."""

    part: int
    parts: int

    def __new__(cls, what: str, part: int = 1, parts: int = 1) -> Step:
        step = super().__new__(cls, what)
        step.part, step.parts = part, parts
        return step


class Stopped(Exception):
    """Raised while an answer is prepared, once it was stopped."""


class StopSignal(threading.Event):
    """An event that is also set when one of the others is."""

    def __init__(self, *others: Any) -> None:
        super().__init__()
        self._others = others

    def is_set(self) -> bool:
        return super().is_set() or any(other.is_set() for other in self._others)

    def check(self) -> None:
        """Raises Stopped once it is set."""
        if self.is_set():
            raise Stopped


class AnswerStream(NotCopyable):
    """An answer being made: iterate once for pieces of text, `stop()` from any thread, then read `answer`.

    prepare: looks at the videos and returns them encoded, the generation, ready to run, and the note that
    comes before its first piece, as a piece of its own ("": none); raises Stopped when it ends before that.
    check: raises ModelError when no answer can be made any more.
    """

    def __init__(
        self,
        prepare: Callable[[StopSignal], tuple[Sequence[EncodedVideo], Generation, Note]],
        check: Callable[[], None],
        stop: StopSignal,
    ) -> None:
        self._prepare, self._check, self._stop = prepare, check, stop
        self._listeners: list[Callable[[Answer], None]] = []
        self._timing_listeners: list[Callable[[Sequence[EncodedVideo], GenerationStats], None]] = []
        self._thoughts: list[str] = []
        self._thought_listeners: list[Callable[[str], None]] = [self._thoughts.append]
        self._begun = False
        self._answer: Answer | None = None

    def stop(self) -> None:
        """End computing within one token; the text so far stays."""
        self._stop.set()

    def then(self, listener: Callable[[Answer], None]) -> None:
        """Call a function with the answer once it is complete or was stopped; not when it failed."""
        self._listeners.append(listener)

    def on_timings(self, listener: Callable[[Sequence[EncodedVideo], GenerationStats], None]) -> None:
        """Call a function with the videos and the generation's figures, when `then` calls its own."""
        self._timing_listeners.append(listener)

    def on_thinking(self, listener: Callable[[str], None]) -> None:
        """Call a function with each piece of what the model thinks, before the answer's first piece comes."""
        self._thought_listeners.append(listener)

    def _thought(self, piece: str) -> None:
        for listener in self._thought_listeners:
            listener(piece)

    def _end(self, answer: Answer) -> None:
        self._answer = answer
        for listener in self._listeners:
            listener(answer)

    @property
    def answer(self) -> Answer:
        """The finished (or stopped) answer; raises FluxChatError before the iteration has ended."""
        if self._answer is None:
            raise FluxChatError("The answer is not there yet: iterate over the stream first.")
        return self._answer

    @contextmanager
    def _reason_first(self) -> Iterator[None]:
        """Where no answer can be made any more, that is said, and not what failed because of it."""
        try:
            yield
        except ModelError:
            self._check()
            raise

    def __iter__(self) -> Iterator[str]:
        if self._begun:
            raise FluxChatError("This stream was read already: read its `answer`, or ask again.")
        self._begun = True
        start = time.perf_counter()
        try:
            with memory_errors_as_sentences(), self._reason_first():
                videos, generation, note = self._prepare(self._stop)
        except Stopped:
            self._check()
            self._end(make_answer("", [], GenerationStats(), 0.0, time.perf_counter() - start, Note()))
            return
        generation.on_thinking = self._thought
        prepared_s = time.perf_counter() - start
        pieces: list[str] = []

        def end(stats: GenerationStats) -> None:
            total_s = time.perf_counter() - start
            said = note if pieces else Note()
            answer = make_answer("".join(pieces), videos, stats, prepared_s, total_s, said)
            for told in self._timing_listeners:
                told(videos, stats)
            self._end(replace(answer, thinking="".join(self._thoughts).strip()))

        try:
            with memory_errors_as_sentences(), self._reason_first():
                for piece in generation:
                    pieces.append(piece)
                    if note and len(pieces) == 1:  # not before there is an answer
                        yield note
                    yield piece
                    self._check()
                self._check()
        except Exception:  # an answer that failed is none
            raise
        except BaseException:  # the reader left, or Ctrl-C: a stop
            end(replace(generation.stats, finish="cancelled"))
            raise
        end(generation.stats)


def make_answer(
    text: str,
    videos: Sequence[EncodedVideo],
    stats: GenerationStats,
    prepared_s: float,
    total_s: float,
    note: Note,
) -> Answer:
    """A generation's answer. prepared_s: seconds from the question to its start. note: said before it."""
    return Answer(
        text=(note + text.strip()).strip(),
        usage=Usage(
            seen_tokens=sum(video.kept.grid.size for video in videos),
            kept_tokens=sum(len(video.kept.indices) for video in videos),
            visual_tokens=sum(video.visual.tokens for video in videos),
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            completion_tokens=stats.completion_tokens,
            thinking_tokens=stats.thinking_tokens,
        ),
        timings=Timings(
            decode_s=sum(video.decode_s for video in videos),
            encode_s=sum(video.encode_s for video in videos),
            prefill_s=stats.prefill_s,
            first_token_s=prepared_s + stats.first_token_s,
            total_s=total_s,
            tokens_per_s=stats.tokens_per_s,
        ),
        kept=tuple(video.kept for video in videos),
        finish=stats.finish,
        familiar=all_familiar(videos),
        note=note.strip(),
    )


def all_familiar(videos: Sequence[EncodedVideo]) -> bool | None:
    """Whether all look like what the model was trained on; None when it cannot tell, or there are none."""
    verdicts = [video.familiar for video in videos]
    return None if not verdicts or None in verdicts else all(verdicts)


@contextmanager
def memory_errors_as_sentences() -> Iterator[None]:
    """Turns the errors of exhausted memory into one OutOfMemory sentence."""
    try:
        yield
    except FluxChatError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        raise OutOfMemory(NO_ROOM) from error
