"""Conversations in the forms that LLaVA-style data come in: what each says, or why it cannot be learned from.

{"conversations": [{"from": "human", "value": "<video> What?"}, {"from": "gpt", "value": "A cat."}]}
{"messages": [{"role": "user", "content": [{"type": "video", "video": "cat.mp4"}, ...]}, ...]}
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from encoder.errors import DataError
from training.data.examples import Conversation, Kind

FORMS = ("conversations", "messages")  # keys under which a row may hold one
PLACEHOLDER = re.compile(r"<(?:image|video)>")
SIDES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt"), "assistant"),
    "system": "system",
}


@dataclass(frozen=True)
class Talk:
    """A conversation as it was written. placeholders: places where a video or image belongs; files: those
    that its messages name."""

    turns: Conversation
    system: str
    placeholders: int
    files: tuple[tuple[Kind, str], ...]


@dataclass(frozen=True)
class _Message:
    side: str
    text: str
    placeholders: int
    files: tuple[tuple[Kind, str], ...]


def absent(value: Any) -> bool:
    """Whether a value stands for none: null, or the NaN of tables that were exported to JSON."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON's escapes may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_talk(messages: Any) -> Talk:
    """A list of messages as turns. A greeting of the assistant in front and a question without an answer at
    the end are left out, as LLaVA does.

    Raises DataError, whose message goes on after the example's name, for anything else that does not
    alternate, for a role nobody knows, and for an answer that is empty or holds a placeholder.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError("its conversation is no list of messages")
    parts = [_parse(message) for message in messages]
    system = ""
    if parts and parts[0].side == "system":
        system = parts.pop(0).text
    if parts and parts[0].side == "assistant":
        parts.pop(0)
    placeholders = sum(message.placeholders for message in parts)
    files = tuple(file for message in parts for file in message.files)
    if len(parts) % 2:
        parts.pop()
    if not parts:
        raise DataError("its conversation has no answer")
    turns = []
    for question, answer in zip(parts[::2], parts[1::2], strict=True):
        if (question.side, answer.side) != ("user", "assistant"):
            raise DataError("its conversation does not alternate between human and gpt")
        if answer.placeholders:
            raise DataError("an answer of it holds <image> or <video>")
        if not answer.text:
            raise DataError("it has an empty answer")
        turns.append((question.text, answer.text))
    return Talk(tuple(turns), system, placeholders, files)


def _parse(message: Any) -> _Message:
    if not isinstance(message, dict):
        raise DataError("its conversation holds something that is no message")
    role = message.get("from", message.get("role"))
    side = SIDES.get(role.lower()) if isinstance(role, str) else None
    if side is None:
        raise DataError(f"its conversation has a message of {role!r}, who is neither human nor gpt")
    content = message.get("value", message.get("content"))
    if absent(content):
        content = ""
    texts, placeholders, files = [], 0, []
    for part in content if isinstance(content, list) else [content]:
        part = part if isinstance(part, dict) else {"type": "text", "text": part}
        kind, text = part.get("type"), part.get("text")
        if kind == "text" and isinstance(text, str) and is_text(text):
            texts.append(PLACEHOLDER.sub("", text))
            placeholders += len(PLACEHOLDER.findall(text))
        elif kind in ("image", "video", "image_url", "video_url"):
            placeholders += 1
            name = part.get(kind, part.get("path", part.get("url")))
            name = name.get("url") if isinstance(name, dict) else name
            if isinstance(name, str):
                files.append(("video" if kind.startswith("video") else "image", name))
            elif not absent(name):
                raise DataError(f"its conversation has an {kind} that names no file")
        else:
            raise DataError("its conversation holds something that is neither text nor a video or image")
    return _Message(side, "".join(texts).strip(), placeholders, tuple(files))  # type: ignore[arg-type]
