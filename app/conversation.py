"""A conversation of many turns about one or more videos: what `VideoChat.conversation` returns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.answer import Answer
from app.messages import Media, as_media, media_of, question_text
from app.streaming import AnswerStream, NotCopyable
from encoder.errors import ConfigError
from encoder.video.part import Part
from llm_bridge.prompt import Message, check_text

if TYPE_CHECKING:
    from app.chat import VideoChat

OWN_HISTORY = "A conversation keeps its own history: leave history out."
NOT_HERE = "That video is not in this conversation: see its `videos`."


class Conversation(NotCopyable):
    """Many turns about one or more videos; a follow-up question computes only its own words.

    `add` brings in another video for the next question. A turn is kept when its answer is complete, or was
    stopped after its first words; a question that is refused or fails changes nothing. Not for several
    threads at once. options: defaults of every turn, may be changed between turns.
    """

    def __init__(self, chat: VideoChat, video: Any, options: dict[str, Any]) -> None:
        if "history" in options:
            raise ConfigError(OWN_HISTORY)
        self._chat = chat
        self.options = options
        self._messages: tuple[Message[Media], ...] = ()  # user, assistant, user, ...
        self._new = tuple(chat.keep(medium) for medium in media_of(video))  # for the next question

    @property
    def chat(self) -> VideoChat:
        """The model that answers."""
        return self._chat

    @property
    def messages(self) -> tuple[Message[Media], ...]:
        """All that was said, user and assistant in turn, with the media where they were shown."""
        return self._messages

    @property
    def new(self) -> tuple[Media, ...]:
        """The media that come with the next question."""
        return self._new

    def restore(self, messages: Sequence[Message[Media]], new: Sequence[Media]) -> None:
        """Go on from messages, user and assistant in turn, with media for the next question."""
        self._messages, self._new = tuple(messages), tuple(new)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a file that `load` reads; see `app.conversation_files`."""
        from app.conversation_files import save

        save(self, path)

    @staticmethod
    def load(chat: VideoChat, path: str | os.PathLike[str], **options: Any) -> Conversation:
        """A saved conversation, to go on with; see `app.conversation_files`."""
        from app.conversation_files import load

        return load(chat, path, **options)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write it to be read, as .md or .json with the frames; see `app.conversation_files`."""
        from app.conversation_files import export, record_of

        export(record_of(self), path)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """The (question, answer) pairs so far."""
        texts = [message.text for message in self._messages]
        return list(zip(texts[::2], texts[1::2], strict=True))

    @property
    def videos(self) -> list[Any]:
        """The videos and images so far, those for the next question last."""
        return [medium.source for medium in (*self._media(), *self._new)]

    def latest(self, video: Any) -> Media:
        """A video or image as it was shown last, or comes with the next question.

        video: as it was given, or its path. Raises ConfigError when it is not in the conversation.
        """
        for medium in (*self._new, *reversed(self._media())):
            if _same(medium, video):
                return medium
        raise ConfigError(NOT_HERE)

    def _media(self) -> list[Media]:
        return [part for message in self._messages for part in message.content if isinstance(part, Media)]

    def add(self, video: Any) -> None:
        """Another video or image (or a `Videos`), which comes with the next question.

        Raises VideoError when one cannot be read; then none is added.
        """
        new = tuple(self._chat.keep(medium) for medium in media_of(video))
        for medium in new:
            self._chat.probe(medium)
        self._new += new

    def look_at(self, video: Any, start: Any = None, end: Any = None, region: Any = None) -> None:
        """The next question is about that part of a video that is here, without one about all of it.

        It is shown anew unless it was what was shown of that video last. video: as it was given, or its path.
        Raises ConfigError when it is not in the conversation, and VideoError; then nothing changes.
        """
        medium = replace(self.latest(video), part=Part.of(start, end, region))
        medium.part.range_s(self._chat.probe(medium))
        shown = [one.part for one in self._media() if _same(one, video)]
        others = tuple(one for one in self._new if not _same(one, video))
        self._new = others if shown and shown[-1] == medium.part else (medium, *others)

    def drop(self, video: Any) -> None:
        """Take a video or image out again, wherever it was shown; the words about it stay.

        video: as it was given, or its path. Raises ConfigError when it is not in the conversation.
        """
        self.latest(video)

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
        """The next question, streamed; a stopped answer stays in the conversation as far as it got.

        start, end, region (see `stream_messages`): of the videos that come with this question, or of the
        conversation's, of which that part is then shown anew.
        """
        if "history" in options:
            raise ConfigError(OWN_HISTORY)
        chosen = {**self.options, **options}
        if "start" in options or "end" in options:  # a range is said as a whole
            chosen |= {name: options.get(name) for name in ("start", "end")}
        system = chosen.pop("system", None)
        part = Part.of(*(chosen.pop(name, None) for name in ("start", "end", "region")))
        new = self._new
        new_message: Message[Media] = Message("user", (*self._shown(part), question_text(question)))
        messages = [*self._messages, new_message]
        if system:
            messages.insert(0, Message.of("system", check_text(system, "The system prompt")))
        stream = self._chat.stream_messages(messages, **chosen)
        stream.then(lambda answer: self._add_turn(new_message, new, answer))
        return stream

    def _shown(self, part: Part) -> tuple[Media, ...]:
        """What the next question shows: what is new, or those parts of earlier videos that are new."""
        if part.whole:
            return self._new
        if self._new:
            return tuple(replace(one, part=part) if one.part.whole else one for one in self._new)
        latest: dict[Any, Media] = {_identity(medium.source): medium for medium in self._media()}
        if part.timed:  # pictures have no times
            latest = {key: m for key, m in latest.items() if self._chat.probe(m).kind != "image"}
        return tuple(replace(medium, part=part) for medium in latest.values() if medium.part != part)

    def _add_turn(self, message: Message[Media], new: tuple[Media, ...], answer: Answer) -> None:
        """Add a turn, unless it was stopped before its first word."""
        if answer.finish == "cancelled" and not answer.text:
            return
        earlier = {id(medium) for medium in self._media()}  # another stream may have added one since
        content = tuple(part for part in message.content if id(part) not in earlier)
        self._messages += (Message("user", content), Message.of("assistant", answer.text))
        self._new = tuple(medium for medium in self._new if all(medium is not one for one in new))


def _identity(source: Any) -> Any:
    """What two media of one source have in common."""
    return os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else id(source)


def _same(medium: Media, video: Any) -> bool:
    """Whether `video` names the medium: it is the Media itself, its source, or its path."""
    if medium is video or medium.source is as_media(video).source:
        return True
    paths = (medium.source, video)
    return all(isinstance(path, (str, os.PathLike)) for path in paths) and Path(paths[0]) == Path(paths[1])
