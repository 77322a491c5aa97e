"""Answers in the making and conversations of many turns: what `VideoChat.stream` hands out."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from app.answer import Answer, EncodedVideo, Timings, Usage
from app.messages import Media, Videos, as_media, media_of, question_text
from encoder.errors import ConfigError, FluxChatError, ModelError, OutOfMemory
from encoder.video.reader import VideoInfo
from llm_bridge.generation import Generation, GenerationStats
from llm_bridge.prompt import Message, check_text

__all__ = ["AnswerStream", "Conversation", "Videos"]


class NotCopyableError(ModelError, pickle.PicklingError):
    """An object that belongs to one process: neither pickled nor copied."""


class NotCopyable:
    """Something with a model, threads and caches behind it: it stays in its process, as it is."""

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise NotCopyableError(
            f"{type(self).__name__} objects cannot be pickled or copied: make a VideoChat in each process."
        )


class StopSignal(threading.Event):
    """An event that is also set when one of the others is."""

    def __init__(self, *others: Any) -> None:
        super().__init__()
        self._others = others

    def is_set(self) -> bool:
        return super().is_set() or any(other.is_set() for other in self._others)


class AnswerStream(NotCopyable):
    """An answer in the making: iterate once for pieces of text, `stop()` from any thread, read `answer`.

    prepare: looks at the media and gives what was seen and the generation, ready to run. check: raises
    ModelError when no answer can be made any more.
    """

    def __init__(
        self,
        prepare: Callable[[StopSignal], tuple[Sequence[EncodedVideo], Generation]],
        check: Callable[[], None],
        stop: StopSignal,
    ) -> None:
        self._prepare, self._check, self._stop = prepare, check, stop
        self._listeners: list[Callable[[Answer], None]] = []
        self._begun = False
        self._answer: Answer | None = None

    def stop(self) -> None:
        """End computing within one token; what was said so far stays."""
        self._stop.set()

    def then(self, listener: Callable[[Answer], None]) -> None:
        """Have a function told the answer once it has ended: complete, or stopped, but not failed."""
        self._listeners.append(listener)

    @property
    def answer(self) -> Answer:
        """The finished (or stopped) answer; raises FluxChatError before the iteration has ended."""
        if self._answer is None:
            raise FluxChatError("The answer is not there yet: iterate over the stream first.")
        return self._answer

    def __iter__(self) -> Iterator[str]:
        if self._begun:
            raise FluxChatError("This stream was read already: read its `answer`, or ask again.")
        self._begun = True
        start = time.perf_counter()
        with memory_errors_as_sentences():
            looks, generation = self._prepare(self._stop)
        prepared = time.perf_counter() - start
        pieces: list[str] = []
        try:
            with memory_errors_as_sentences():
                for piece in generation:
                    pieces.append(piece)
                    yield piece
                    self._check()
                self._check()
        except Exception:  # an answer that failed is none
            raise
        except BaseException:  # the reader left, or Ctrl-C: a stop
            self._end(looks, replace(generation.stats, finish="cancelled"), pieces, prepared, start)
            raise
        self._end(looks, generation.stats, pieces, prepared, start)

    def _end(
        self,
        looks: Sequence[EncodedVideo],
        stats: GenerationStats,
        pieces: list[str],
        prepared: float,
        start: float,
    ) -> None:
        """Make the answer and tell it."""
        self._answer = Answer(
            text="".join(pieces).strip(),
            usage=Usage(
                seen_tokens=sum(look.kept.grid.size for look in looks),
                kept_tokens=sum(len(look.kept.indices) for look in looks),
                visual_tokens=sum(look.visual.tokens for look in looks),
                prompt_tokens=stats.prompt_tokens,
                cached_tokens=stats.cached_tokens,
                completion_tokens=stats.completion_tokens,
            ),
            timings=Timings(
                decode_s=sum(look.decode_s for look in looks),
                encode_s=sum(look.encode_s for look in looks),
                prefill_s=stats.prefill_s,
                first_token_s=prepared + stats.first_token_s,
                total_s=time.perf_counter() - start,
                tokens_per_s=stats.tokens_per_s,
            ),
            kept=tuple(look.kept for look in looks),
            finish=stats.finish,
        )
        for listener in self._listeners:
            listener(self._answer)


@contextmanager
def memory_errors_as_sentences() -> Iterator[None]:
    """Raises OutOfMemory, one sentence, for what Python and torch raise when memory is exhausted.

    Torch has an error of its own for cards, and none for the machine's memory but its words.
    """
    try:
        yield
    except FluxChatError:
        raise
    except (MemoryError, RuntimeError) as error:
        words = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in words:
            raise
        raise OutOfMemory(
            "There was not enough memory for this question: lower the token budget, or ask again later."
        ) from error


class Chat(Protocol):
    """What a conversation needs of a VideoChat."""

    def stream_messages(self, messages: Sequence[Message[Media]], **options: Any) -> AnswerStream: ...

    def probe(self, video: Any) -> VideoInfo: ...

    def keep(self, video: Any) -> Media: ...


class Conversation(NotCopyable):
    """Many turns about one or more videos; follow-ups pay only for their own words.

    `add` brings in another video for the next question. A turn is kept when its answer is complete, or was
    stopped after its first words; a question that is refused or fails changes nothing. Not for several
    threads at once. options: defaults of every turn, may be changed between turns.
    """

    def __init__(self, chat: Chat, video: Any, options: dict[str, Any]) -> None:
        if "history" in options:
            raise ConfigError("A conversation keeps its own history: leave history out.")
        self._chat = chat
        self.options = options
        self._messages: tuple[Message[Media], ...] = ()  # user, assistant, user, ...
        self._new = tuple(chat.keep(medium) for medium in media_of(video))  # for the next question

    @property
    def turns(self) -> list[tuple[str, str]]:
        """The (question, answer) pairs so far."""
        texts = [message.text for message in self._messages]
        return list(zip(texts[::2], texts[1::2], strict=True))

    @property
    def videos(self) -> list[Any]:
        """The videos and images so far, those for the next question last."""
        return [medium.source for medium in (*self._shown(), *self._new)]

    def _shown(self) -> list[Media]:
        return [part for message in self._messages for part in message.content if isinstance(part, Media)]

    def add(self, video: Any) -> None:
        """Another video or image (or a `Videos`), which comes with the next question.

        Raises VideoError when one cannot be read; then none is added.
        """
        new = tuple(self._chat.keep(medium) for medium in media_of(video))
        for medium in new:
            self._chat.probe(medium)
        self._new += new

    def drop(self, video: Any) -> None:
        """Take a video or image out again, wherever it was shown; the words about it stay.

        video: as it was given, or its path. Raises ConfigError when it is not in the conversation.
        """

        if not any(_same(medium, video) for medium in (*self._shown(), *self._new)):
            raise ConfigError("That video is not in this conversation: see its `videos`.")

        def stays(part: str | Media) -> bool:
            return not (isinstance(part, Media) and _same(part, video))

        self._messages = tuple(Message(m.role, tuple(filter(stays, m.content))) for m in self._messages)
        self._new = tuple(filter(stays, self._new))

    def ask(self, question: str, **options: Any) -> Answer:
        """The next question; options override the conversation's for this turn."""
        stream = self.stream(question, **options)
        for _ in stream:
            pass
        return stream.answer

    def stream(self, question: str, **options: Any) -> AnswerStream:
        """The next question, streamed; a stopped answer stays in the conversation as far as it got."""
        if "history" in options:
            raise ConfigError("A conversation keeps its own history: leave history out.")
        chosen = {**self.options, **options}
        system = chosen.pop("system", None)
        asked: Message[Media] = Message("user", (*self._new, question_text(question)))
        messages = [*self._messages, asked]
        if system:
            messages.insert(0, Message.of("system", check_text(system, "The system prompt")))
        stream = self._chat.stream_messages(messages, **chosen)
        stream.then(lambda answer: self._keep(asked, answer))
        return stream

    def _keep(self, asked: Message[Media], answer: Answer) -> None:
        """Add a turn, unless it was stopped before its first word."""
        if answer.finish == "cancelled" and not answer.text:
            return
        shown = {id(medium) for medium in self._shown()}
        content = tuple(part for part in asked.content if id(part) not in shown)
        self._messages += (Message("user", content), Message.of("assistant", answer.text))
        self._new = tuple(medium for medium in self._new if all(medium is not part for part in content))


def _same(medium: Media, video: Any) -> bool:
    """Whether a medium is what somebody names: itself, its source, or the path of it."""
    if medium is video or medium.source is as_media(video).source:
        return True
    paths = (medium.source, video)
    return all(isinstance(path, (str, os.PathLike)) for path in paths) and Path(paths[0]) == Path(paths[1])
