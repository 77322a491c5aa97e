"""Parsing chat completion requests: messages with texts and media references in order, sampling options.

    request = parse_chat(body)   # raises ApiError that names the field that is wrong

schemas.py has the fields; here is what they mean together.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from app.server.errors import ApiError
from app.server.schemas import (
    ALTERNATIVE,
    MAX_MEDIA,
    MODEL,
    AnyText,
    ChatBody,
    File,
    FilePart,
    RefusalPart,
    SchemaJson,
    Strict,
    TextPart,
    Url,
)
from encoder.errors import ConfigError, VideoError
from encoder.selection import Selector
from encoder.video.part import WHOLE, Part
from llm_bridge.prompt import Message, Role
from llm_bridge.structured import AnswerSchema

if TYPE_CHECKING:
    from app.chat import VideoChat

# Fields of a message part that do not say where its content is.
_NOT_CONTENT = ("type", "detail", "filename", "start", "end", "region")
MAX_COMPARED = 16  # unknown fields that are compared with the known ones


Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class Reference:
    """A video or image that a request names. param: the path of the field that names it.

    kind: "id" of an uploaded file, "data" in the request itself, or "url" for anything. name: the client's
    name of the file, "" when the request has none. part: what of it is looked at.
    """

    value: str = field(repr=False)
    param: str = "messages"
    kind: Literal["url", "id", "data"] = "url"
    name: str = ""
    part: Part = WHOLE


@dataclass(frozen=True)
class ChatRequest:
    """messages: from the first system prompt to the question, roles in turn; media as References.

    max_tokens None: the server's default. sampling: options of `VideoChat.stream_messages`. stop: texts that
    end the answer. include_reasoning: whether thoughts are sent. label: a hash of user and cache_salt;
    answers with different labels share no cache. part: of the media that are no parts already. parts: whether
    a long video is looked at in parts.
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
    include_reasoning: bool = True
    part: Part = WHOLE
    parts: bool = True

    @property
    def media(self) -> list[Reference]:
        """All references, in order."""
        return [part for message in self.messages for part in message.content if not isinstance(part, str)]


def parse_chat(data: Any) -> ChatRequest:
    """A decoded JSON body as a ChatRequest; raises ApiError naming the field that is wrong."""
    body = validated(data, ChatBody)
    longest = _longest(body)
    if body.min_tokens is not None and longest is not None and body.min_tokens > longest:
        raise ApiError(400, "min_tokens must not be more than max_tokens.", param="min_tokens")
    options = body.stream_options
    labels = [body.user, body.cache_salt]
    return ChatRequest(
        messages=tuple(_conversation(body)),
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        max_tokens=longest,
        sampling={
            "temperature": body.temperature or 0.0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_k": body.top_k or 0,
            "min_p": body.min_p or 0.0,
            "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
            "min_tokens": body.min_tokens or 0,
            "seed": body.seed,
            "stop_token_ids": tuple(body.stop_token_ids or ()),
            **_thinking(body),
            **_schema(body),
            "logit_bias": {int(token): bias for token, bias in (body.logit_bias or {}).items()} or None,
        },
        stop=tuple(body.stop or ()),
        token_budget=body.token_budget,
        selector=body.selector or "flux",
        include_reasoning=body.include_reasoning is not False,
        part=_part(body, ""),
        parts=body.parts is not False,
        label=hashlib.blake2b(repr(labels).encode(), digest_size=12).hexdigest() if any(labels) else "",
    )


def check_model(data: Mapping[str, Any]) -> None:
    """Raises ApiError 404 for a body that names another model."""
    model = data.get("model", MODEL)
    if isinstance(model, str) and model != MODEL:
        message = f"There is no model {model[:80]!r} here: use {MODEL!r}."
        raise ApiError(404, message, code="model_not_found", param="model")


def _thinking(body: ChatBody) -> dict[str, Any]:
    """Options of thinking that were given; what is not has the server's default."""
    options = body.chat_template_kwargs
    flags = [] if options is None else [options.enable_thinking, options.thinking]
    chosen: dict[str, Any] = {}
    if given := [flag for flag in flags if flag is not None]:
        chosen["think"] = given[0]
    if body.thinking_token_budget is not None:
        chosen["max_thinking_tokens"] = body.thinking_token_budget
    return chosen


def _schema(body: ChatBody) -> dict[str, Any]:
    """The schema of the answer, if one was given; raises ApiError for one that cannot be enforced."""
    form = body.response_format
    if form is None or isinstance(form, AnyText):
        return {}
    for name in ("stop", "stop_token_ids", "min_tokens"):
        if getattr(body, name):
            raise ApiError(400, f"{name} does not go with JSON: leave one of them out.", param=name)
    if _thinking(body).get("think"):
        message = "An answer in JSON is made without thinking: leave one of them out."
        raise ApiError(400, message, param="chat_template_kwargs")
    named = isinstance(form, SchemaJson)
    wanted = form.json_schema.schema_ if isinstance(form, SchemaJson) else {"type": "object"}
    try:
        schema = AnswerSchema.of(wanted)
    except ConfigError as error:
        param = "response_format.json_schema.schema" if named else "response_format"
        raise ApiError(400, str(error), param=param) from None
    return {"schema": schema, "think": False}


def _longest(body: ChatBody) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(
            400, "max_tokens and max_completion_tokens differ: send one of them.", param="max_tokens"
        )
    return old if new is None else new


# -- the conversation ---------------------------------------------------------------------------------------


def _conversation(body: ChatBody) -> Iterator[Message[Reference]]:
    """Messages with alternating roles; those of one role in a row are one."""
    turns: list[tuple[Role, list[str | Reference]]] = []
    for index, message in enumerate(body.messages):
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
            yield without_nul(content, path, role)
        return
    for index, part in enumerate(content):
        if isinstance(part, (TextPart, RefusalPart)):
            key = "text" if isinstance(part, TextPart) else "refusal"
            item: str | Reference = without_nul(getattr(part, key), f"{path}[{index}].{key}", role)
        else:
            item = reference(part, f"{path}[{index}]")
        if item != "":
            yield item


def without_nul(text: str, path: str, role: Role = "user") -> str:
    """A text without NUL, which tokenizers cannot read: dropped from answers, refused in other messages."""
    if "\0" not in text:
        return text
    if role == "assistant":
        return text.replace("\0", "")
    raise ApiError(400, f"{path} has a NUL character: take it out.", param=path)


def reference(part: Strict, path: str) -> Reference:
    """The reference of a message part; exactly one of its fields must name the content."""
    name = ""
    looked = _part(part, path)
    if isinstance(part, FilePart):
        part, path = part.file, f"{path}.file"
    if isinstance(part, File):
        name = part.filename or ""
    fields = [key for key in type(part).model_fields if key not in _NOT_CONTENT]
    present = [key for key in fields if getattr(part, key) is not None]
    if len(present) != 1:
        names = " or ".join(fields)
        raise ApiError(400, f"{path} must say where its content is by one of {names}.", param=path)
    (key,) = present
    value = getattr(part, key)
    if isinstance(value, Url):
        return Reference(value.url, f"{path}.{key}.url", part=looked)
    kind: Literal["url", "id", "data"] = "id" if key == "file_id" else "data" if key == "file_data" else "url"
    return Reference(value, f"{path}.{key}", kind, name, looked)


def _part(body: Any, path: str) -> Part:
    """The part of a medium that a message part, or the whole request, names."""
    try:
        return Part.of(body.start, body.end, body.region)
    except VideoError as error:
        named = next(
            (name for name in ("start", "end", "region") if str(error).startswith(f"The {name}")), "start"
        )
        raise ApiError(400, str(error), param=f"{path}.{named}".lstrip(".")) from None


# -- validation errors ---------------------------------------------------------------------------------------


def validated(data: Any, kind: type[Body]) -> Body:
    """A decoded JSON body as the schema's object; raises ApiError naming the field that is wrong."""
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.")
    check_model(data)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, kind) from None


def validation_error(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """A pydantic error as one sentence about the first problem; misspelt fields before missing ones."""
    errors = error.errors(include_url=False, include_context=True)
    # A body can hold a hundred thousand unknown fields; comparing names takes time.
    unknown = [problem for problem in errors if problem["type"] == "extra_forbidden"][:MAX_COMPARED]
    problem = next((e for e in unknown if _nearest(model, e["loc"])), errors[0])
    kind, path = problem["type"], _path(problem["loc"], named=problem["type"] == "extra_forbidden")
    if kind == "extra_forbidden":
        nearest = _nearest(model, problem["loc"])
        advice = f"did you mean {nearest}?" if nearest else "leave it out."
        return ApiError(400, f"This server knows no field {path}: {advice}", param=path, code="unknown_field")
    return ApiError(400, f"{path} {_problem_text(kind, problem)}.", param=path)


def _problem_text(kind: str, problem: Mapping[str, Any]) -> str:
    """The end of the sentence about a problem: what the value must be."""
    context = problem.get("ctx") or {}
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
        return _wrong_alternative(kind, problem, context)
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


def _wrong_alternative(kind: str, problem: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    """The message for a value that matches no alternative of a union."""
    if context["discriminator"] == "_kind()":
        kinds = {"text": "a text", "list": "a list", "object": "an object", "number": "a whole number"}
        tags = re.findall(f"'{ALTERNATIVE}([a-z]+)'", context["expected_tags"])
        return f"must be {' or '.join(kinds[tag] for tag in tags if tag in kinds)}"
    value = problem["input"]
    is_message = len(problem["loc"]) == 2
    if not isinstance(value, Mapping):
        return "must be an object"
    if is_message:
        role = str(value.get("role", ""))[:40]
        if role in ("tool", "function"):
            return "has the role of a tool: this server calls no tools"
        return "must have a role: system, developer, user or assistant"
    if kind == "union_tag_not_found":
        formats = problem["loc"][0] == "response_format"
        types = "text, json_object or json_schema" if formats else "text, video_url, image_url or file"
        return f"must have a type: {types}"
    name = str(value.get("type", ""))[:40]
    usable = ", ".join(re.findall(f"'{ALTERNATIVE}([a-z_]+)'", context["expected_tags"]))
    return f"is of the type {name!r}, which cannot stand here: use one of {usable}"


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
    models: list[Any] = [model]
    for step in loc:
        if isinstance(step, int):
            continue
        if step.startswith(ALTERNATIVE):
            models = [kind for kind in models if _stands_for(kind, step[len(ALTERNATIVE) :])] or models
            continue
        inner = [kind.model_fields[step] for kind in models if step in kind.model_fields]
        models = [kind for info in inner for kind in _models(info.annotation)]
    return sorted({info.alias or name for kind in models for name, info in kind.model_fields.items()})


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
    characters = 0
    messages = body.get("messages") if isinstance(body, dict) else None
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            characters += len(text) if isinstance(text, str) else 0
    if characters > limit:
        raise ApiError(
            400,
            f"The texts have {characters} characters, and at most {limit} can fit the model: shorten them.",
            code="context_length_exceeded",
            param="messages",
        )
