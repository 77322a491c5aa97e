"""Conversations that the browser keeps: what it is sent of them, and what comes back when one is reopened.

The server keeps none. After every question and answer the page gets a record, which its script puts into the
browser's own store (theme/conversations.js); reopening sends the videos again, and what was said. What comes
back is read as a stranger's: its shape is checked and its size bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from app.page.sessions import MAX_MEDIA, Media, Session, Turn
from encoder.errors import ConfigError, VideoError
from encoder.video.part import Part

NAME = re.compile(r"[\w-]{8,64}", re.ASCII)
MAX_TURNS, MAX_TEXT = 100, 2_000_000  # turns, and characters of all together
UNANSWERED = "This was not answered: ask it again."


def record(session: Session, model: str, fresh: Collection[str] = ()) -> str:
    """A session's conversation for the browser, as HTML that shows nothing and carries JSON.

    fresh: keys of the turns whose evidence is sent along; the browser has that of the others.
    """
    with session.lock:
        session.records += 1
        number, turns = session.records, list(session.turns)
        conversation, parent = session.conversation, session.parent
    media = list({medium.path: medium for medium in (*_of_turns(turns), *session.media)}.values())
    places = {medium.path: index for index, medium in enumerate(media)}
    values = {
        "id": conversation,
        "parent": parent,
        "number": number,
        "model": model,
        "media": [
            {
                "path": medium.path,
                "name": medium.name,
                "kind": "image" if medium.is_image else "video",
                "duration_s": medium.info.duration_s,
                "thumbnail": session.thumbnails.get(medium.path, ""),
            }
            for medium in media
        ],
        "turns": [_turn(turn, places, turn.key in fresh and not turn.reopened) for turn in turns],
    }
    return f'<div hidden data-record="{escape(json.dumps(values))}"></div>'


def _of_turns(turns: Sequence[Turn]) -> list[Media]:
    return [medium for turn in turns for medium in turn.media]


def _turn(turn: Turn, places: Mapping[str, int], evidence: bool) -> dict[str, Any]:
    """A turn as JSON; its answer once it is there."""
    values: dict[str, Any] = {
        "key": turn.key,
        "question": turn.question,
        "text": turn.text if turn.done else "",
        "thinking": turn.thinking if turn.done else "",
        "error": turn.error,
        "media": [
            {
                "medium": places[medium.path],
                "start": medium.part.start_s,
                "end": medium.part.end_s,
                "region": medium.part.region,
            }
            for medium in turn.media
        ],
    }
    return {**values, "details": turn.details} if evidence else values


@dataclass(frozen=True)
class KeptTurn:
    """A turn of a kept conversation. media: places in the conversation's media, with the part of each."""

    key: str
    question: str
    text: str
    thinking: str
    error: str
    media: tuple[tuple[int, Part], ...]


@dataclass(frozen=True)
class Kept:
    """A kept conversation. media: names of its videos and images."""

    id: str
    parent: str
    media: tuple[str, ...]
    turns: tuple[KeptTurn, ...]

    @staticmethod
    def of(values: Any) -> Kept:
        """From what the browser sent; raises ConfigError, one sentence."""
        try:
            media = tuple(_text(name) for name in _list(values["media"]))
            turns = tuple(_kept_turn(turn, len(media)) for turn in _list(values["turns"]))
            kept = Kept(
                _name(values["id"]), "" if values["parent"] == "" else _name(values["parent"]), media, turns
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, VideoError) as error:
            raise ConfigError(
                "That conversation cannot be opened: what the browser kept of it is damaged. Delete it."
            ) from error
        said = sum(len(turn.question) + len(turn.text) + len(turn.thinking) for turn in turns)
        if len(turns) > MAX_TURNS or said > MAX_TEXT or len(media) > MAX_MEDIA * MAX_TURNS:
            raise ConfigError("That conversation cannot be opened: it is too long. Export it to read it.")
        return kept

    def turns_about(self, media: Sequence[Media | None]) -> list[Turn]:
        """The turns, about those of its media that are there."""
        found: list[Turn] = []
        for turn in self.turns:
            about = [
                replace(medium, part=part)
                for index, part in turn.media
                if (medium := media[index]) is not None
            ]
            answered = bool(turn.text)
            found.append(
                Turn(
                    turn.question,
                    media=tuple(about),
                    text=turn.text,
                    thinking=turn.thinking,
                    error="" if answered else turn.error or UNANSWERED,
                    # The browser has what it rests on, and puts it there.
                    details=f'<div class="fc-kept" data-evidence="{turn.key}"></div>' if answered else "",
                    reopened=answered,
                    key=turn.key,
                )
            )
        return found


def _kept_turn(values: Any, media: int) -> KeptTurn:
    about = tuple(
        (_place(one["medium"], media), Part.of(one["start"], one["end"], one["region"]))
        for one in _list(values["media"])
    )
    question, text, thinking, error = (
        _text(values[name]) for name in ("question", "text", "thinking", "error")
    )
    return KeptTurn(_name(values["key"]), question, text, thinking, error, about)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _place(index: Any, count: int) -> int:
    if type(index) is not int or not 0 <= index < count:
        raise IndexError
    return index


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _name(value: Any) -> str:
    if not NAME.fullmatch(value):
        raise ValueError
    return str(value)
