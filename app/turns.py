"""Answers in the making and conversations of many turns: what `VideoChat.stream` hands out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from app.answer import Answer, Seen, Timings, Usage
from encoder.budget import Budget
from encoder.errors import ConfigError, FluxChatError
from encoder.selection import Selector
from llm_bridge.generate import Generation, Sampling
from llm_bridge.prompt import Message, render

if TYPE_CHECKING:
    from app.chat import VideoChat

# What begins ("decode", "encode", "prefill"), of which video, of how many.
Progress = Callable[[str, int, int], None]


class Videos(list[Any]):
    """Several videos or images for one question: `chat.ask(Videos(["a.mp4", "b.jpg"]), "Which one?")`."""


class AnswerStream:
    """An answer in the making: iterate for pieces of text, `stop()` from any thread, then read `answer`."""

    def __init__(
        self,
        chat: VideoChat,
        videos: list[Any],
        question: str,
        *,
        budget: Budget | int | str | None,
        history: Sequence[Message | tuple[str, str]],
        system: str | None,
        selector: Selector,
        sampling: Sampling,
        scope: str,
        progress: Progress | None,
        stop: threading.Event | None,
    ) -> None:
        self._chat, self._videos, self._question = chat, videos, question
        self._budget, self._history, self._system = budget, history, system
        self._selector, self._sampling = selector, sampling
        self._scope, self._progress = scope, progress
        self._stop = threading.Event() if stop is None else stop
        self._answer: Answer | None = None

    def stop(self) -> None:
        """End computing within one token; what was said so far stays."""
        self._stop.set()

    @property
    def answer(self) -> Answer:
        """The finished (or stopped) answer; raises FluxChatError before the iteration has ended."""
        if self._answer is None:
            raise FluxChatError("The answer is not there yet: iterate over the stream first.")
        return self._answer

    def __iter__(self) -> Iterator[str]:
        chat, start = self._chat, time.perf_counter()
        looks = [self._look(index, video) for index, video in enumerate(self._videos)]
        messages, visuals = self._messages(looks)
        prompt = render(chat.model.llm.tokenizer, messages, time_form=chat.model.config.time_sentence)
        if self._progress is not None:
            self._progress("prefill", 0, 1)
        prepared = time.perf_counter() - start
        generation = Generation(
            chat.model.llm,
            prompt,
            [v.embedding for v in visuals],
            self._sampling,
            chat._prefixes,
            self._scope,
            self._stop,
            batcher=chat._batcher,
        )
        pieces: list[str] = []
        try:
            for piece in generation:
                pieces.append(piece)
                yield piece
        finally:
            stats = generation.stats
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

    def _look(self, index: int, video: Any) -> Seen:
        def tell(what: str) -> None:
            if self._progress is not None:
                self._progress(what, index, len(self._videos))

        return self._chat.look(video, self._budget, self._selector, scope=self._scope, progress=tell)

    def _messages(self, looks: list[Seen]) -> tuple[list[Message], list[Seen]]:
        """The conversation with the videos in its first user turn, and what is seen, in order."""
        system = self._system or self._chat.model.config.system
        messages = [Message.of("system", system)] if system else []
        turns: list[Message] = []
        for turn in self._history:
            if isinstance(turn, Message):
                turns.append(turn)
            else:
                turns += [Message.of("user", question_text(turn[0])), Message.of("assistant", str(turn[1]))]
        turns.append(Message.of("user", self._question))
        visuals = [look.visual for look in looks]
        turns[0] = Message("user", (*visuals, *turns[0].content))
        return messages + turns, looks


class Conversation:
    """Many turns about one or more videos; follow-ups pay only for their own words.

    `add` brings in another video for the next question. Not for several threads at once.
    """

    def __init__(self, chat: VideoChat, video: Any, options: dict[str, Any]) -> None:
        self._chat = chat
        self.options = options
        self.videos = list(video) if isinstance(video, Videos) else [] if video is None else [video]
        self.turns: list[tuple[str, str]] = []

    def add(self, video: Any) -> None:
        """Another video or image; it joins the others at the start of the conversation."""
        self.videos.append(video)

    def ask(self, question: str, **options: Any) -> Answer:
        """The next question; options override the conversation's for this turn."""
        stream = self.stream(question, **options)
        for _ in stream:
            pass
        return stream.answer

    def stream(self, question: str, **options: Any) -> AnswerStream:
        """The next question, streamed; a stopped answer stays in the conversation as far as it got."""
        return _ConversationStream(self, question, {**self.options, **options})


class _ConversationStream(AnswerStream):
    """Adds its turn to the conversation when it ends."""

    def __init__(self, conversation: Conversation, question: str, options: dict[str, Any]) -> None:
        stream = conversation._chat.stream(
            Videos(conversation.videos), question, **{**options, "history": list(conversation.turns)}
        )
        self.__dict__.update(stream.__dict__)
        self._conversation = conversation

    def __iter__(self) -> Iterator[str]:
        try:
            yield from super().__iter__()
        finally:
            if self._answer is not None:
                self._conversation.turns.append((self._question, self._answer.text))


def question_text(question: str) -> str:
    """The question without surrounding blanks; raises ConfigError when nothing is left."""
    if not isinstance(question, str) or not question.strip():
        raise ConfigError("The question is empty: ask something in words.")
    return question.strip()
