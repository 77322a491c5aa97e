"""Sentences before an answer that are not the model's words, and taking them out again.

One about a video that is nothing the model knows, one about a time that a video does not have.

note_for(236) + words                # what the reader gets
no_such_time(5025, 0, 800) + words
without_note(message.text)           # what the language model sees of it in later turns
without_guess(answer.text)           # where many answers say it once, together
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from app.messages import Media
from encoder.video.clock import clock
from llm_bridge.prompt import Message

REAL_MODEL = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
_BEFORE, _AFTER = (
    "This small model knows only ",
    " drawn things, and what it is shown here does not look like them: the answer is a guess. "
    f"A model for real videos: `fluxchat web --model {REAL_MODEL}`.",
)
_ABSENT = "There is nothing at {} in the video, which goes from {} to {}: the answer is about all of it."
_TIME = r"[\d:.]+"
_SENTENCES = (
    rf"{re.escape(_BEFORE)}\d+{re.escape(_AFTER)}",
    _ABSENT.replace(".", r"\.").replace("{}", _TIME),
)
_NOTE = re.compile(rf"\s*(?:(?:{'|'.join(_SENTENCES)})\s*)+")
_GUESS = re.compile(rf"\s*{_SENTENCES[0]}\s*")


class Note(str):
    """The first piece of a streamed answer, when it is no word of the model's."""

    __slots__ = ()


def note_for(things: int) -> Note:
    """The sentence of a model that knows so many things, with the blank line behind it."""
    return Note(f"{_BEFORE}{things}{_AFTER}\n\n")


def no_such_time(time_s: float, start_s: float, end_s: float) -> Note:
    """The sentence about a time that is named and lies outside of what is asked about, all in seconds."""
    return Note(_ABSENT.format(clock(time_s), clock(start_s), clock(end_s)) + "\n\n")


def without_note(text: str) -> str:
    """An answer without the sentences, whichever model's it is."""
    return text[found.end() :] if (found := _NOTE.match(text)) else text


def without_guess(text: str) -> str:
    """An answer without the sentence that it is a guess."""
    return text[found.end() :] if (found := _GUESS.match(text)) else text


def guess_of(note: str) -> str:
    """The sentence that the answer is a guess, of `Answer.note`; "" without it."""
    return note.removesuffix(without_guess(note)).strip()


def guesses(count: int, total: int) -> str:
    """One sentence about so many answers that are guesses, of as many in all."""
    return (
        f"{count} of {total} videos look like nothing that this small model knows: their answers are guesses "
        f'("familiar": false). A model for real videos: `--model {REAL_MODEL}`.'
    )


def without_notes(messages: Sequence[Message[Media]]) -> tuple[Message[Media], ...]:
    """Messages as the language model sees them: it never said these sentences."""
    return tuple(_own_words(message) if message.role == "assistant" else message for message in messages)


def _own_words(message: Message[Media]) -> Message[Media]:
    if not _NOTE.match(message.text):
        return message
    first = next(place for place, part in enumerate(message.content) if isinstance(part, str))
    part = message.content[first]
    assert isinstance(part, str)
    words = without_note(part)
    return Message(message.role, (*message.content[:first], words, *message.content[first + 1 :]))
