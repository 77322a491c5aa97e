"""Arguments of VideoChat as messages of text and media, and the checks of them.

Messages keep the order: a medium stands in the prompt where its message put it, in the turn it came with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from encoder.errors import BudgetError, ConfigError, VideoError
from encoder.selection import Selector
from encoder.video.in_memory import is_images
from encoder.video.part import WHOLE, Part
from encoder.video.reader import Clip
from encoder.video.sources import Held, source_name
from llm_bridge.prompt import Message, Role, check_text

NAMELESS = "the video"  # in errors, for one that has no name
# Several letters before the colon: one is a drive.
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)


@dataclass(frozen=True)
class Media:
    """One video or image of a message.

    source: whatever `VideoChat.ask` takes as one video. name: in errors (default: the file's own). part: what
    of it is looked at.
    """

    source: Any
    name: str = ""
    part: Part = WHOLE

    def label(self, index: int = 0, count: int = 1) -> str:
        """Its name in a sentence: 'b.mp4', or "video 2 of 3 ('b.mp4')" where there are several."""
        name = self.name or source_name(self.source)
        own = repr(name) if name else ""
        if count == 1:
            return own or NAMELESS
        return f"video {index + 1} of {count}" + (f" ({own})" if own else "")


class Videos(list[Any]):
    """Several videos or images for one question: `chat.ask(Videos(["a.mp4", "b.jpg"]), "Which one?")`.

    `Videos("a.mp4", "b.jpg")` is the same, and one alone is one.
    """

    def __init__(self, *videos: Any) -> None:
        collection = len(videos) == 1 and not _is_single(videos[0])
        super().__init__(videos[0] if collection else videos)


def _is_single(value: Any) -> bool:
    """Whether a value is a video itself rather than a collection of them."""
    if isinstance(value, (list, tuple)):
        return False
    if isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike, Clip, Media, Held)):
        return True
    return hasattr(value, "read") or is_images(value) or not isinstance(value, Iterable)


def as_media(video: Any) -> Media:
    """One video or image as a Media."""
    return video if isinstance(video, Media) else Media(video)


def part_of(video: Any, start: Any = None, end: Any = None, region: Any = None) -> Media:
    """One video or image as a Media of a part (see `Part.of`), or of its own one where none is said."""
    medium, part = as_media(video), Part.of(start, end, region)
    return medium if part.whole else replace(medium, part=part)


def media_of(video: Any) -> tuple[Media, ...]:
    """What `VideoChat.ask` takes as its video: one, a `Videos` of several, or None."""
    videos = list(video) if isinstance(video, Videos) else [] if video is None else [video]
    return tuple(as_media(one) for one in videos)


def with_part(messages: Sequence[Message[Media]], part: Part) -> tuple[Message[Media], ...]:
    """The messages with that part of each medium that is not a part already."""

    def changed(piece: str | Media) -> str | Media:
        return replace(piece, part=part) if isinstance(piece, Media) and piece.part.whole else piece

    if part.whole:
        return tuple(messages)
    return tuple(Message(m.role, tuple(map(changed, m.content))) for m in messages)


def question_text(question: Any, what: str = "The question") -> str:
    """The question without surrounding blanks; raises ConfigError when it is no text, or nothing is left."""
    if not check_text(question, what).strip():
        raise ConfigError(f"{what} is empty: ask something in words.")
    return question.strip()


def question_messages(
    video: Any,
    question: str,
    history: Sequence[Message[Media] | tuple[str, str]] = (),
    system: str | None = None,
) -> tuple[Message[Media], ...]:
    """A question about one or more videos, which stand before the text of the first turn.

    history: earlier turns, as (question, answer) pairs or messages. Raises ConfigError.
    """
    messages: list[Message[Media]] = []
    if system:
        messages.append(Message.of("system", check_text(system, "The system prompt")))
    for turn in _turns(history):
        messages += [turn] if isinstance(turn, Message) else _pair(turn)
    check_order(video, question)
    messages.append(Message.of("user", question_text(question)))
    first = next(index for index, message in enumerate(messages) if message.role == "user")
    messages[first] = Message("user", (*media_of(video), *messages[first].content))
    return tuple(messages)


def check_order(video: Any, question: Any) -> None:
    """Raises ConfigError when a question stands where its video should, and the other way round."""
    texts = isinstance(video, str) and isinstance(question, str)
    if texts and os.path.isfile(question) and not os.path.lexists(video):
        raise ConfigError("The video comes first, then the question.")


def _turns(history: Any) -> Sequence[Any]:
    if isinstance(history, (str, bytes, dict)) or not isinstance(history, Sequence):
        raise ConfigError("history must be a list of (question, answer) pairs, the oldest first.")
    return history


def _pair(turn: Any) -> list[Message[Media]]:
    """The two messages of an earlier turn; the answer may be empty."""
    if isinstance(turn, (str, bytes, dict)) or not isinstance(turn, Sequence) or len(turn) != 2:
        raise ConfigError("history must be a list of (question, answer) pairs, the oldest first.")
    answer = check_text(turn[1], "An answer of the history")
    question = question_text(turn[0], "A question of the history")
    return [Message.of("user", question), Message.of("assistant", answer)]


_WHOSE = {
    "system": "The system prompt",
    "user": "A question of the history",
    "assistant": "An answer of the history",
}


def check_messages(messages: Any) -> tuple[Message[Media], ...]:
    """The messages, if a question can be asked with them; raises ConfigError or VideoError.

    The last must be the user's, with words; every text must be valid.
    """
    if isinstance(messages, Message) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError("The messages must be a list of at least one Message.")
    for message in messages:
        if not isinstance(message, Message) or message.role not in get_args(Role):
            raise ConfigError("Every message must be a Message of the system, the user or the assistant.")
        for part in message.content:
            if isinstance(part, Media):
                continue
            if not isinstance(part, str):
                kind = type(part).__name__
                raise ConfigError(f"A message holds texts and Media, not a {kind}: wrap it in Media(...).")
            check_text(part, "The question" if message is messages[-1] else _WHOSE[message.role])
    if messages[-1].role != "user":
        raise ConfigError("The last message must be the user's question.")
    if not messages[-1].text.strip():
        raise ConfigError("The question is empty: ask something in words.")
    return tuple(messages)


def check_source(medium: Media, label: str) -> None:
    """Raises VideoError, with the remedy, for frequent mistakes; all other sources are left to the reader."""
    source = medium.source
    if source is None:
        raise VideoError(f"Cannot read {label}: it is None; give a video or image, or leave it out.")
    if isinstance(source, (list, tuple)):
        _check_pictures(source, label)
    elif isinstance(source, bytes):
        # The content of a video has zeros; a path has none.
        if source and len(source) < 4096 and 0 not in source and os.path.exists(source):
            raise VideoError(
                f"Cannot read {label}: bytes are the content of a video; give a path as text (os.fsdecode)."
            )
    elif isinstance(source, (str, os.PathLike)):
        _check_path(os.fsdecode(source), label)


def _check_pictures(pictures: Sequence[Any], label: str) -> None:
    for index, picture in enumerate(pictures):
        if picture is None:
            raise VideoError(f"Cannot read {label}: picture {index + 1} of {len(pictures)} is None.")
        if isinstance(picture, (str, bytes, os.PathLike, Clip, Media, Held, list, tuple)) or hasattr(
            picture, "read"
        ):
            raise VideoError(
                f"Cannot read {label}: a list is the pictures of one video, in memory; "
                "for several files write Videos([...])."
            )


def _check_path(path: str, label: str) -> None:
    if not path.strip():
        raise VideoError("The name of the video is empty: give the path of a video or image file.")
    scheme = _ADDRESS.match(path)
    if scheme is None or os.path.lexists(path):
        return
    kind = scheme[1].lower()
    if kind == "data":
        raise VideoError("A data: address cannot be read here: decode it and give the bytes.")
    if kind == "file":
        raise VideoError(f"Cannot read {label}: give its path, without {path[: scheme.end()]}//.")
    if path[scheme.end() :].startswith("//"):
        raise VideoError(
            f"Cannot read {label}: it is an address, and nothing is fetched here; "
            "download the video first and give the path of the file."
        )


def with_name(error: VideoError, label: str) -> VideoError:
    """The error, with the name of its video where it lacks it."""
    text = str(error)
    if label in text or label == NAMELESS:
        return error
    return VideoError(f"Cannot read {label}: {text[:1].lower()}{text[1:]}")


def check_selector(selector: Any) -> None:
    """Raises BudgetError for a selector that does not exist."""
    if selector not in get_args(Selector):
        known = ", ".join(map(repr, get_args(Selector)))
        raise BudgetError(f"There is no selector {selector!r}; use one of {known}.")
