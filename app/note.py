"""The sentence before an answer about a video that is nothing the model knows, and taking it out again.

note_for(236) + words                # what the reader gets
without_note(message.text)           # what the language model sees of it in later turns
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from app.messages import Media
from llm_bridge.prompt import Message

REAL_MODEL = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
_BEFORE, _AFTER = (
    "This small model knows only ",
    " drawn things, and what it is shown here does not look like them: the answer is a guess. "
    f"A model for real videos: `fluxchat web --model {REAL_MODEL}`.",
)
_NOTE = re.compile(rf"\s*{re.escape(_BEFORE)}\d+{re.escape(_AFTER)}\s*")


class Note(str):
    """The first piece of a streamed answer, when it is no word of the model's."""

    __slots__ = ()


def note_for(things: int) -> Note:
    """The sentence of a model that knows so many things, with the blank line behind it."""
    return Note(f"{_BEFORE}{things}{_AFTER}\n\n")


def without_note(text: str) -> str:
    """An answer without the sentence, whichever model said it."""
    return text[found.end() :] if (found := _NOTE.match(text)) else text


def without_notes(messages: Sequence[Message[Media]]) -> tuple[Message[Media], ...]:
    """Messages as the language model sees them: it never said the sentence."""
    return tuple(_own_words(message) if message.role == "assistant" else message for message in messages)


def _own_words(message: Message[Media]) -> Message[Media]:
    if not _NOTE.match(message.text):
        return message
    first = next(place for place, part in enumerate(message.content) if isinstance(part, str))
    part = message.content[first]
    assert isinstance(part, str)
    words = without_note(part)
    return Message(message.role, (*message.content[:first], words, *message.content[first + 1 :]))
