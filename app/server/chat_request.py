"""A request for an answer, understood: messages whose texts and media are in the order they came.

    asked = parse_chat(body)   # raises ApiError that names what is wrong, and where

What fields there are is schemas.py; here is what they mean together.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from app.server.errors import ApiError
from app.server.schemas import (
    ALTERNATIVE,
    MAX_MEDIA,
    MODEL,
    ChatBody,
    File,
    FilePart,
    RefusalPart,
    Strict,
    TextPart,
    Url,
)
from encoder.selection import Selector
from llm_bridge.prompt import Message, Role

if TYPE_CHECKING:
    from app.chat import VideoChat

LOOKED_AT = 16  # unknown fields that are compared with the known ones


@dataclass(frozen=True)
class Reference:
    """A video or image that a request names. param: where it does, as a path.

    kind: "id" of an uploaded file, "data" in the request itself, or "url" for anything. name: what its user
    calls it, "" when the request does not say.
    """

    value: str = field(repr=False)
    param: str = "messages"
    kind: Literal["url", "id", "data"] = "url"
    name: str = ""


@dataclass(frozen=True)
class ChatRequest:
    """messages: from the first system prompt to the question, roles in turn; media as References.

    max_tokens None: the server's default. sampling: options of `VideoChat.stream_messages`. stop: texts that
    end the answer. label: sets apart what is kept for one user of the caller from what is kept for another.
    """

    messages: tuple[Message[Reference], ...]
    stream: bool
    include_usage: bool
    max_tokens: int | None
    sampling: Mapping[str, Any]
    stop: tuple[str, ...]
    token_budget: int | str | None
    selector: Selector
    label: str

    @property
    def media(self) -> list[Reference]:
        """All that is named, in order."""
        return [part for message in self.messages for part in message.content if not isinstance(part, str)]


def parse_chat(body: Any) -> ChatRequest:
    """A decoded JSON body as a ChatRequest; raises ApiError naming the field that is wrong."""
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.")
    model = body.get("model", MODEL)
    if isinstance(model, str) and model != MODEL:
        message = f"There is no model {model[:80]!r} here: use {MODEL!r}."
        raise ApiError(404, message, code="model_not_found", param="model")
    try:
        asked = ChatBody.model_validate(body)
    except ValidationError as error:
        raise refusal(error, ChatBody) from None
    longest = _longest(asked)
    if asked.min_tokens is not None and longest is not None and asked.min_tokens > longest:
        raise ApiError(400, "min_tokens must not be more than max_tokens.", param="min_tokens")
    options = asked.stream_options
    labels = [asked.user, asked.cache_salt]
    return ChatRequest(
        messages=tuple(_conversation(asked)),
        stream=bool(asked.stream),
        include_usage=bool(options and options.include_usage),
        max_tokens=longest,
        sampling={
            "temperature": asked.temperature or 0.0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "top_k": asked.top_k or 0,
            "min_p": asked.min_p or 0.0,
            "repetition_penalty": 1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            "min_tokens": asked.min_tokens or 0,
            "seed": asked.seed,
            "stop_token_ids": tuple(asked.stop_token_ids or ()),
            "logit_bias": {int(token): bias for token, bias in (asked.logit_bias or {}).items()} or None,
        },
        stop=tuple(asked.stop or ()),
        token_budget=asked.token_budget,
        selector=asked.selector or "flux",
        label=hashlib.blake2b(repr(labels).encode(), digest_size=12).hexdigest() if any(labels) else "",
    )


def _longest(asked: ChatBody) -> int | None:
    old, new = asked.max_tokens, asked.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(
            400, "max_tokens and max_completion_tokens differ: send one of them.", param="max_tokens"
        )
    return old if new is None else new


# -- the conversation ---------------------------------------------------------------------------------------


def _conversation(asked: ChatBody) -> Iterator[Message[Reference]]:
    """Messages with alternating roles; those of one role in a row are one."""
    turns: list[tuple[Role, list[str | Reference]]] = []
    for index, message in enumerate(asked.messages):
        role: Role = "system" if message.role == "developer" else message.role
        parts = list(_parts(message.content, f"messages[{index}].content", role))
        if role == "assistant" and not any(other == "user" for other, _ in turns):
            raise ApiError(400, "The conversation must begin with the user.", param=f"messages[{index}].role")
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(parts)
        elif parts or role != "system":
            turns.append((role, parts))
    last, question = turns[-1] if turns else ("system", [])
    if last != "user":
        raise ApiError(400, "The last message must be the user's question.", param="messages")
    if not any(isinstance(part, str) and part.strip() for part in question):
        raise ApiError(400, "The question is empty: ask something in words.", param="messages")
    if sum(isinstance(part, Reference) for _, parts in turns for part in parts) > MAX_MEDIA:
        raise ApiError(400, f"At most {MAX_MEDIA} videos and images fit one request.", param="messages")
    for role, parts in turns:
        yield Message(role, tuple(_joined(parts)))


def _joined(parts: Sequence[str | Reference]) -> Iterator[Any]:
    """The parts with texts in a row as one, line by line."""
    lines: list[str] = []
    for part in parts:
        if isinstance(part, str):
            lines.append(part)
            continue
        if lines:
            yield "\n".join(lines)
        lines = []
        yield part
    if lines:
        yield "\n".join(lines)


def _parts(content: Any, path: str, role: Role) -> Iterator[str | Reference]:
    """The texts that are not empty, and the media, of a message's content."""
    if isinstance(content, str):
        if content:
            yield _words(content, path, role)
        return
    for index, part in enumerate(content):
        if isinstance(part, (TextPart, RefusalPart)):
            key = "text" if isinstance(part, TextPart) else "refusal"
            found: str | Reference = _words(getattr(part, key), f"{path}[{index}].{key}", role)
        else:
            found = _reference(part, f"{path}[{index}]")
        if found != "":
            yield found


def _words(text: str, path: str, role: Role) -> str:
    """A text that every tokenizer can read. A model may have said a NUL; people have not."""
    if "\0" not in text:
        return text
    if role == "assistant":
        return text.replace("\0", "")
    raise ApiError(400, f"{path} has a NUL character: take it out.", param=path)


def _reference(part: Strict, path: str) -> Reference:
    """What a part names; exactly one of its fields must."""
    name = ""
    if isinstance(part, FilePart):
        part, path = part.file, f"{path}.file"
    if isinstance(part, File):
        name = part.filename or ""
    fields = [key for key in type(part).model_fields if key not in ("type", "detail", "filename")]
    given = [key for key in fields if getattr(part, key) is not None]
    if len(given) != 1:
        told = " or ".join(fields)
        raise ApiError(400, f"{path} must say where its content is by one of {told}.", param=path)
    (key,) = given
    value = getattr(part, key)
    if isinstance(value, Url):
        return Reference(value.url, f"{path}.{key}.url")
    kind: Literal["url", "id", "data"] = "id" if key == "file_id" else "data" if key == "file_data" else "url"
    return Reference(value, f"{path}.{key}", kind, name)


# -- what is wrong with a request ---------------------------------------------------------------------------


def refusal(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """The first thing that is wrong as one sentence; misspelt fields before fields that are missing."""
    errors = error.errors(include_url=False, include_context=True)
    # A body can hold a hundred thousand unknown fields; comparing names takes time.
    unknown = [found for found in errors if found["type"] == "extra_forbidden"][:LOOKED_AT]
    found = next((e for e in unknown if _nearest(model, e["loc"])), errors[0])
    kind, path = found["type"], _path(found["loc"], named=found["type"] == "extra_forbidden")
    if kind == "extra_forbidden":
        nearest = _nearest(model, found["loc"])
        advice = f"did you mean {nearest}?" if nearest else "leave it out."
        return ApiError(400, f"This server knows no field {path}: {advice}", param=path, code="unknown_field")
    return ApiError(400, f"{path} {_wrong(kind, found)}.", param=path)


def _wrong(kind: str, found: Mapping[str, Any]) -> str:
    """What a value must be, as the end of a sentence."""
    context = found.get("ctx") or {}
    simple = {
        "missing": "is missing",
        "string_type": "must be a text",
        "bool_type": "must be true or false",
        "int_type": "must be a whole number",
        "int_parsing": "must be a whole number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "list_type": "must be a list",
        "dict_type": "must be an object",
        "model_type": "must be an object",
        "model_attributes_type": "must be an object",
        "none_required": "must be null",
        "string_pattern_mismatch": "must be the id of a token, digits alone",
        "string_unicode": "must be valid Unicode",
    }
    if kind in simple:
        return simple[kind]
    if kind == "unsupported":
        return f"asks for what this server cannot do: {context['advice']}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_alternative(kind, found, context)
    if kind == "literal_error":
        return f"must be {context['expected']}"
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("more than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
    }
    if kind in bounds:
        words, key = bounds[kind]
        return (
            f"must be {words} {context[key]:g}" if context[key] < 2**31 else f"must be {words} {context[key]}"
        )
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind in ("too_long", "string_too_long"):
        return f"is too long: at most {context['max_length']} are allowed"
    return "is not valid"


def _wrong_alternative(kind: str, found: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    """A value that is none of several forms: of a wrong kind, or of a wrong type or role."""
    if context["discriminator"] == "_kind()":
        kinds = {"text": "a text", "list": "a list", "object": "an object", "number": "a whole number"}
        tags = re.findall(f"'{ALTERNATIVE}([a-z]+)'", context["expected_tags"])
        return f"must be {' or '.join(kinds[tag] for tag in tags if tag in kinds)}"
    value = found["input"]
    is_message = len(found["loc"]) == 2
    if not isinstance(value, Mapping):
        return "must be an object"
    if is_message:
        told = str(value.get("role", ""))[:40]
        if told in ("tool", "function"):
            return "has the role of a tool: this server calls no tools"
        return "must have a role: system, developer, user or assistant"
    if kind == "union_tag_not_found":
        return "must have a type: text, video_url, image_url or file"
    told = str(value.get("type", ""))[:40]
    usable = ", ".join(re.findall(f"'{ALTERNATIVE}([a-z_]+)'", context["expected_tags"]))
    return f"is of the type {told!r}, which cannot stand here: use one of {usable}"


def _path(loc: Sequence[str | int], named: bool = False) -> str:
    """messages[1].content[0].text; named: the last step is a field, whatever it looks like."""
    path = ""
    for index, step in enumerate(loc):
        if isinstance(step, int):
            path += f"[{step}]"
        elif step == "[key]" or (step.startswith(ALTERNATIVE) and not (named and index + 1 == len(loc))):
            continue
        else:
            path += f".{step[:80]}" if path else step[:80]
    return path or "body"


# What a field is called in Python and in the terminal.
OUR_NAMES = {"budget": "token_budget", "max_new_tokens": "max_tokens"}


def _nearest(model: type[BaseModel], loc: Sequence[str | int]) -> str | None:
    """The accepted field of the same object whose name is most like the last of `loc`."""
    *outer, name = loc
    fields = _fields(model, outer)
    written = str(name).lower()[:80]
    written = OUR_NAMES.get(written, written)
    close = difflib.get_close_matches(written, fields, 1, 0.7)
    return close[0] if close else None


def _fields(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Names of the fields of the object at `loc`: those of all models that may stand there."""
    found: list[Any] = [model]
    for step in loc:
        if isinstance(step, int):
            continue
        if step.startswith(ALTERNATIVE):
            found = [kind for kind in found if _stands_for(kind, step[len(ALTERNATIVE) :])] or found
            continue
        inner = [kind.model_fields[step] for kind in found if step in kind.model_fields]
        found = [kind for info in inner for kind in _models(info.annotation)]
    return sorted({name for kind in found for name in kind.model_fields})


def _stands_for(model: type[BaseModel], tag: str) -> bool:
    """Whether a model is the alternative of this role or type."""
    kinds = (model.model_fields.get(name) for name in ("role", "type"))
    return any(kind is not None and tag in get_args(kind.annotation) for kind in kinds)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def longest_text(chat: VideoChat) -> int:
    """Characters of text that a question about anything may have: tokens of 16 are rare in any language."""
    context = chat.model.llm.context_length
    return max(1 << 16, 16 * context) if context else 1 << 20


def check_text(body: Any, limit: int) -> None:
    """Raises ApiError 400 when the messages' texts together have more than `limit` characters.

    Nothing else in a request is tokenised; media are named, or bounded as files.
    """
    found = 0
    messages = body.get("messages") if isinstance(body, dict) else None
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            found += len(text) if isinstance(text, str) else 0
    if found > limit:
        raise ApiError(
            400,
            f"The texts have {found} characters, and at most {limit} can fit the model: shorten them.",
            code="context_length_exceeded",
            param="messages",
        )
