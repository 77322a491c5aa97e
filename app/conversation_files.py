"""Conversations as files: saved to go on later, or exported to be read.

    save(conversation, "talk.json")                # media by path and hash, nothing of their content
    conversation = load(chat, "talk.json")
    export(record_of(conversation), "talk.md")     # or .json, each with the frames that were looked at

A saved conversation is JSON with a version. It is read as a stranger's file: its shape is checked, its size
is bounded, and a video that is gone or has changed is one sentence. `Record` is what an export holds; whoever
keeps conversations of another kind makes one of its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote

from torch import Tensor

from app.long_video import Showing, showings
from app.messages import Media
from encoder.budget import Budget
from encoder.checkpoint import atomic_path, save_json
from encoder.errors import ConfigError, FluxChatError, VideoError
from encoder.json_files import read_object
from encoder.selection import Selector
from encoder.video.clock import clock
from encoder.video.part import WHOLE, Part
from encoder.video.sources import Held, reason
from llm_bridge.prompt import Message
from llm_bridge.sampling import SamplingParams

if TYPE_CHECKING:
    from app.chat import VideoChat
    from app.conversation import Conversation

FORMAT, VERSION = "fluxchat conversation", 1
LARGEST = 64 * 2**20  # bytes of a saved conversation
JPEG_QUALITY = 85
# Options that are kept with a conversation: those that say how it is answered, not who asks or waits.
OPTIONS = ("budget", "selector", "system", "hedge", "start", "end", "region", "parts")
_SAMPLING = tuple(one.name for one in fields(SamplingParams))


# -- saving and loading -------------------------------------------------------------------------------------


def save(conversation: Conversation, path: str | os.PathLike[str]) -> None:
    """Write a conversation as JSON, atomically; videos are named by path and SHA-256.

    Raises ConfigError when a video is not a file or `path` cannot be written, VideoError when one is gone.
    """
    media: list[Media] = []
    rows = [
        {"role": message.role, "content": [_part_row(part, media) for part in message.content]}
        for message in conversation.messages
    ]
    new = [_part_row(medium, media)["medium"] for medium in conversation.new]
    options = {name: _plain(conversation.options[name]) for name in _kept(conversation.options)}
    values = {
        "format": FORMAT,
        "version": VERSION,
        "options": options,
        "media": [_medium_row(medium, index, len(media)) for index, medium in enumerate(media)],
        "messages": rows,
        "new": new,
    }
    try:
        save_json(values, Path(path))
    except OSError as error:
        raise ConfigError(
            f"Cannot write {Path(path).name!r}: {reason(error)}; name another place."
        ) from error


def load(chat: VideoChat, path: str | os.PathLike[str], **options: Any) -> Conversation:
    """The conversation that a file holds, to go on with. options: override those that were saved.

    A video that is not where it was is looked for beside the file. Raises ConfigError when the file is no
    saved conversation, VideoError when a video is gone or has changed since.
    """
    source = Path(path)
    try:
        values = read_object(source, limit=LARGEST)
        saved, media, messages, new = _parsed(values)
    except OSError as error:
        raise ConfigError(f"Cannot read {source.name!r}: {reason(error)}; check the path.") from error
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, FluxChatError) as error:
        why = str(error) if type(error) is ValueError else "it is not a conversation that was saved here"
        raise ConfigError(f"Cannot read {source.name!r}: {why}; give a file that `save` wrote.") from error
    found = [_found(row, source.parent) for row in media]
    conversation = chat.conversation(None, **{**saved, **options})
    conversation.restore(
        [
            Message(role, tuple(p if isinstance(p, str) else found[p] for p in parts))
            for role, parts in messages
        ],
        [found[index] for index in new],
    )
    return conversation


def _kept(options: dict[str, Any]) -> list[str]:
    return [name for name in options if name in (*OPTIONS, *_SAMPLING) and options[name] is not None]


def _plain(value: Any) -> Any:
    """An option as JSON: numbers, texts, lists of them, and a Budget by its fields."""
    if isinstance(value, Budget):
        return {"budget": asdict(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {"pairs": [[_plain(key), _plain(one)] for key, one in value.items()]}
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ConfigError(f"An option that is a {type(value).__name__} cannot be saved: leave it out.")


def _option(value: Any) -> Any:
    """The reverse of `_plain`."""
    if isinstance(value, dict):
        return Budget(**value["budget"]) if "budget" in value else {k: _option(v) for k, v in value["pairs"]}
    return tuple(map(_option, value)) if isinstance(value, list) else value


def _part_row(part: str | Media, media: list[Media]) -> dict[str, Any]:
    """A piece of a message as JSON; a medium by its place in `media`, where it is added."""
    if isinstance(part, str):
        return {"text": part}
    media.append(part)
    return {"medium": len(media) - 1}


def _medium_row(medium: Media, index: int, count: int) -> dict[str, Any]:
    label = medium.label(index, count)
    source = medium.source.original if isinstance(medium.source, Held) else medium.source
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"Cannot save {label}: it is not a file; write it to one and ask about that.")
    file = os.path.abspath(os.fsdecode(source))
    part = {"start": medium.part.start_s, "end": medium.part.end_s, "region": medium.part.region}
    return {"path": file, "sha256": _sha256(file, label), "name": medium.name, "part": part}


def _sha256(file: str, label: str) -> str:
    digest = hashlib.sha256()
    try:
        if not os.path.isfile(file):  # a pipe would wait for its writer
            raise VideoError(f"Cannot read {label}: there is no such file; it was at {file}.")
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise VideoError(f"Cannot read {label}: {reason(error)}; check the disk it is on.") from error
    return digest.hexdigest()


Turn = tuple[Any, list[str | int]]
_Parsed = tuple[dict[str, Any], list[dict[str, Any]], list[Turn], list[int]]


def _parsed(values: dict[str, Any]) -> _Parsed:
    """Options, media, messages and what is new; raises ValueError (with a reason), KeyError or TypeError."""
    if values.get("format") != FORMAT:
        raise ValueError("it is not a saved conversation")
    if values["version"] != VERSION:
        raise ValueError(f"it has version {str(values['version'])[:20]}, and version {VERSION} is known here")
    options = {name: _option(value) for name, value in values["options"].items()}
    if unknown := sorted(set(options) - {*OPTIONS, *_SAMPLING}):
        raise ValueError(f"it has an option {unknown[0][:40]!r}, which does not exist")
    count = len(values["media"])
    for row in values["media"]:
        if not all(isinstance(row[key], str) for key in ("path", "sha256", "name")):
            raise TypeError
        Part.of(**row["part"])
    messages: list[Turn] = []
    for index, row in enumerate(values["messages"]):
        if row["role"] != ("assistant" if index % 2 else "user"):
            raise TypeError
        messages.append((row["role"], [_piece(part, count) for part in row["content"]]))
    if len(messages) % 2:
        raise TypeError
    return options, values["media"], messages, [_place(index, count) for index in values["new"]]


def _piece(part: dict[str, Any], count: int) -> str | int:
    if "text" not in part:
        return _place(part["medium"], count)
    if not isinstance(part["text"], str):
        raise TypeError
    return part["text"]


def _place(index: Any, count: int) -> int:
    if type(index) is not int or not 0 <= index < count:
        raise IndexError
    return index


def _found(row: dict[str, Any], folder: Path) -> Media:
    """The medium of a saved conversation; raises VideoError when its file is gone or another one."""
    name = row["name"] or os.path.basename(row["path"])
    beside = folder / os.path.basename(row["path"])
    file = next((str(one) for one in (row["path"], beside) if os.path.isfile(one)), None)
    if file is None:
        raise VideoError(f"The video {name!r} of this conversation is gone: put it back at {row['path']}.")
    if _sha256(file, repr(name)) != row["sha256"]:
        raise VideoError(
            f"The video {name!r} of this conversation has changed since it was saved ({file}): "
            "put the old one back, or begin a new conversation."
        )
    return Media(file, row["name"], Part.of(**row["part"]))


# -- what an export holds -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """A frame that was looked at. time_s: of the whole video, None for an image. jpeg: the picture."""

    time_s: float | None
    jpeg: bytes = field(repr=False)


@dataclass(frozen=True)
class Shown:
    """A video or image in an exported conversation, with the frames of it that were looked at."""

    name: str
    duration_s: float = 0.0
    part: Part = WHOLE
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Record:
    """A conversation to be read: who answered, and the messages with what was shown where it was shown."""

    model: str
    messages: tuple[Message[Shown], ...]


def jpeg(frame: Tensor) -> bytes:
    """A picture, uint8 (H, W, 3), as JPEG."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(frame.numpy()).save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def shown(
    chat: VideoChat, medium: Media, budget: Budget | int | str | None, selector: Selector, scope: str = ""
) -> Shown:
    """A medium with the frames that a budget samples of it; raises VideoError."""
    seen = chat.preview(medium, budget, selector, scope=scope)
    times: Sequence[float | None] = seen.kept.times_s or [None] * len(seen.frames)
    frames = tuple(Frame(time_s, jpeg(frame)) for time_s, frame in zip(times, seen.frames, strict=True))
    return Shown(medium.label().strip("'"), seen.kept.duration_s, medium.part, frames)


def record_of(conversation: Conversation) -> Record:
    """A conversation as it can be exported; raises VideoError when a video cannot be read any more."""
    options, chat = conversation.options, conversation.chat
    budget, selector = chat.plan_budget(options.get("budget")), options.get("selector", get_args(Selector)[0])
    scope, parts = str(options.get("scope", "")), bool(options.get("parts"))

    def piece(part: str | Showing) -> str | Shown:
        return part if isinstance(part, str) else shown(chat, part.medium, part.budget, selector, scope)

    messages = tuple(
        Message(m.role, tuple(map(piece, m.content)))
        for m in showings(chat, conversation.messages, budget, parts=parts, scope=scope)[0]
    )
    return Record(chat.name, messages)


# -- exporting ----------------------------------------------------------------------------------------------


def export(record: Record, path: str | os.PathLike[str]) -> None:
    """Write a conversation to be read: .md with the frames in a folder beside it, or .json with them inside.

    Raises ConfigError for another suffix, or when it cannot be written.
    """
    target = Path(path)
    try:
        if target.suffix.lower() == ".json":
            save_json(to_dict(record), target)
        elif target.suffix.lower() in (".md", ".markdown"):
            _export_markdown(record, target)
        else:
            raise ConfigError(f"An export is a .md or a .json file, not {target.name!r}.")
    except OSError as error:
        raise ConfigError(f"Cannot write {target.name!r}: {reason(error)}; name another place.") from error


def _export_markdown(record: Record, target: Path) -> None:
    folder = target.with_name(f"{target.stem}_frames")
    names: list[str] = []
    for index, frame in enumerate(_frames(record)):
        names.append(f"{index:04d}.jpg")
        with atomic_path(folder / names[-1]) as temporary:
            temporary.write_bytes(frame.jpeg)
    text = to_markdown(record, [quote(f"{folder.name}/{name}") for name in names])
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _frames(record: Record) -> list[Frame]:
    pieces = [piece for message in record.messages for piece in message.content]
    return [frame for piece in pieces if isinstance(piece, Shown) for frame in piece.frames]


def to_dict(record: Record) -> dict[str, Any]:
    """A conversation as plain values for JSON; frames are base64 of JPEG."""

    def piece(part: str | Shown) -> dict[str, Any]:
        if isinstance(part, str):
            return {"text": part}
        frames = [{"time_s": f.time_s, "jpeg": base64.b64encode(f.jpeg).decode()} for f in part.frames]
        return {**asdict(part), "frames": frames}

    messages = [{"role": m.role, "content": list(map(piece, m.content))} for m in record.messages]
    return {"format": "fluxchat export", "version": 1, "model": record.model, "messages": messages}


def to_markdown(record: Record, images: Sequence[str] | None = None) -> str:
    """A conversation as Markdown. images: address of each frame, in order; data: addresses by default.

    What people and the model wrote cannot become markup of the page that shows it.
    """
    embedded = ["data:image/jpeg;base64," + base64.b64encode(f.jpeg).decode() for f in _frames(record)]
    addresses = iter(embedded if images is None else images)
    lines = [f"# Conversation with {_safe(record.model)}", ""]
    for message in record.messages:
        lines += [f"**{'You' if message.role == 'user' else message.role.capitalize()}**", ""]
        for piece in message.content:
            lines += [_safe(piece), ""] if isinstance(piece, str) else [*_shown_lines(piece, addresses), ""]
    return "\n".join(lines)


def _shown_lines(piece: Shown, addresses: Any) -> list[str]:
    about = [clock(piece.duration_s)] if piece.duration_s else []
    if piece.part.timed:
        end = piece.duration_s if piece.part.end_s is None else piece.part.end_s
        about.append(f"from {clock(piece.part.start_s)} to {clock(end)}")
    if piece.part.region is not None:
        about.append("the box " + ", ".join(f"{edge:g}" for edge in piece.part.region))
    head = f"*{_safe(piece.name)}*" + (f" ({', '.join(about)})" if about else "")
    pictures = []
    for frame in piece.frames:
        told = _safe(piece.name) if frame.time_s is None else clock(math.floor(10 * frame.time_s) / 10)
        pictures.append(f"![{told}]({next(addresses)})")
    return [head, "", " ".join(pictures)] if pictures else [head]


_MARKUP = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_[]"})


def _safe(text: str) -> str:
    """A text whose characters stand for themselves in Markdown."""
    lines = html.escape(text.translate(_MARKUP), quote=False).splitlines()
    return "  \n".join(f"\\{line}" if line[:1] in "#+-=~|" and line[:1] else line for line in lines)
