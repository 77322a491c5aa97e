"""What programs send to and get from the server: OpenAI's chat completions, checked field by field.

Nothing is ignored silently that would change the answer: what this server cannot do is an error.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.answer import Answer
from encoder.errors import BudgetError, ConfigError, FluxChatError, ModelError, VideoError

MODEL = "fluxchat"
MAX_MEDIA = 16  # videos and images in one request
MAX_STOPS = 4


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @staticmethod
    def of(error: BaseException) -> ApiError:
        """The same for what asking can raise; what nobody foresaw is a 500 without details."""
        if isinstance(error, ApiError):
            return error
        message = " ".join(str(error).split())
        if isinstance(error, VideoError):
            return ApiError(400, message, code="invalid_media", param="messages")
        if isinstance(error, BudgetError):
            return ApiError(400, message, code="context_length_exceeded", param="token_budget")
        if isinstance(error, ConfigError):
            return ApiError(400, message)
        if isinstance(error, ModelError):
            return ApiError(503, message, kind="server_error", code="model_unavailable")
        if isinstance(error, FluxChatError):
            return ApiError(400, message)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            text = "The server ran out of memory: lower token_budget, or try again later."
            return ApiError(503, text, kind="server_error", code="out_of_memory")
        return ApiError(500, "The server failed; its log says why.", kind="server_error")


@dataclass(frozen=True)
class ChatRequest:
    """A request that was understood. turns: earlier (question, answer) pairs. media: urls as they were sent.

    max_tokens None: the server's default. stop: texts that end the answer.
    """

    question: str
    turns: tuple[tuple[str, str], ...]
    media: tuple[str, ...]
    system: str | None
    stream: bool
    include_usage: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    token_budget: int | str | None
    selector: str
    user: str


# What these may be set to: the values that change nothing here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
}
_SELECTORS = ("flux", "uniform", "random")


def parse_chat(body: Any) -> ChatRequest:
    """A decoded JSON body as a ChatRequest; raises ApiError naming the parameter that is wrong."""
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.")
    model = body.get("model", MODEL)
    if model != MODEL:
        raise ApiError(
            404,
            f"There is no model {str(model)[:80]!r} here: use {MODEL!r}.",
            code="model_not_found",
            param="model",
        )
    for name, values in _NEUTRAL.items():
        if body.get(name) not in values:
            raise ApiError(400, f"This server cannot do what {name} asks for: leave it out.", param=name)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object.", param="stream_options")
    system, turns, question, media = _conversation(body.get("messages"))
    longest = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    budget = body.get("token_budget")
    if isinstance(budget, bool) or not isinstance(budget, (int, str, type(None))):
        raise ApiError(
            400, "token_budget must be a number, 'full', 'auto' or 'auto:SECONDS'.", param="token_budget"
        )
    return ChatRequest(
        question=question,
        turns=turns,
        media=media,
        system=system,
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
        max_tokens=_integer(body, longest, None, 1),
        temperature=_number(body, "temperature", 0.0),
        top_p=_number(body, "top_p", 1.0),
        top_k=_integer(body, "top_k", 0, 0) or 0,
        seed=_integer(body, "seed", None, -(2**63)),
        stop=_stops(body.get("stop")),
        token_budget=budget,
        selector=_choice(body, "selector", _SELECTORS),
        user=str(body.get("user") or "")[:256],
    )


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise ApiError(400, f"{name} must be true or false.", param=name)
    return bool(value)


def _integer(body: Mapping[str, Any], name: str, default: int | None, least: int) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ApiError(400, f"{name} must be a whole number, at least {least}.", param=name)
    return value


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ApiError(400, f"{name} must be a number.", param=name)
    return float(value)


def _choice(body: Mapping[str, Any], name: str, values: Sequence[str]) -> str:
    value = body.get(name)
    if value is None:
        return values[0]
    if value not in values:
        raise ApiError(400, f"{name} must be one of {', '.join(values)}.", param=name)
    return str(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ApiError(400, f"stop must be a text or a list of up to {MAX_STOPS}.", param="stop")
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(400, "stop must consist of texts that are not empty.", param="stop")
    return tuple(stops)


def _conversation(
    messages: Any,
) -> tuple[str | None, tuple[tuple[str, str], ...], str, tuple[str, ...]]:
    """(system prompt, earlier turns, question, media) of a list of messages."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message.", param="messages")
    system: list[str] = []
    texts: list[str] = []  # user, assistant, user, ...
    media: list[str] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise ApiError(400, f"{where} needs a role: system, user or assistant.", param=where)
        text, found = _content(message.get("content"), where)
        if found and role != "user":
            raise ApiError(400, f"{where}: only the user can show videos.", param=where)
        if role in ("system", "developer"):
            system.append(text)
            continue
        media += found
        is_user = len(texts) % 2 == 0  # whose turn it is
        if (role == "user") == is_user:
            texts.append(text)
        elif texts:  # twice the same role: one turn
            texts[-1] = f"{texts[-1]}\n{text}".strip()
        else:
            raise ApiError(400, f"{where}: the conversation must begin with the user.", param=where)
    if len(texts) % 2 == 0:
        raise ApiError(400, "The last message must be the user's question.", param="messages")
    if not texts[-1].strip():
        raise ApiError(400, "The question is empty: ask something in words.", param="messages")
    if len(media) > MAX_MEDIA:
        raise ApiError(400, f"At most {MAX_MEDIA} videos and images fit one request.", param="messages")
    turns = tuple((texts[i] or "Look at this.", texts[i + 1]) for i in range(0, len(texts) - 1, 2))
    return "\n".join(system).strip() or None, turns, texts[-1], tuple(media)


def _content(content: Any, where: str) -> tuple[str, list[str]]:
    """(text, media urls) of a message's content, a text or a list of parts."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise ApiError(400, f"{where}.content must be a text or a list of parts.", param=where)
    texts, media = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("video_url", "image_url", "input_video", "input_image"):
            value = part.get(kind, part.get(f"{kind.removeprefix('input_')}_url"))
            value = value.get("url") if isinstance(value, dict) else value
            if not isinstance(value, str) or not value:
                raise ApiError(400, f"{where}: {kind} needs a url.", param=where)
            media.append(value)
        elif kind == "file" and isinstance(part.get("file"), dict):
            value = part["file"].get("file_id") or part["file"].get("file_data")
            if not isinstance(value, str) or not value:
                raise ApiError(400, f"{where}: file needs a file_id or file_data.", param=where)
            media.append(value)
        else:
            raise ApiError(
                400, f"{where} has a part that is not text, video_url, image_url or file.", param=where
            )
    return "\n".join(texts), media


@dataclass
class TextFilter:
    """What may leave the server of the text made so far: no blanks around it, nothing from a stop text on.

    `push` pieces as they come, `flush` at the end; the joined results are the answer. done: a stop text came.
    """

    stops: tuple[str, ...] = ()
    done: bool = False
    _held: str = field(default="", repr=False)
    _begun: bool = field(default=False, repr=False)

    def push(self, piece: str) -> str:
        """The part of the text so far that is certain to belong to the answer, and new."""
        if self.done:
            return ""
        text = self._held + piece
        if not self._begun:
            text = text.lstrip()
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.done, self._held = True, ""
            return text[: min(found)].rstrip()
        keep = len(text.rstrip())
        for stop in self.stops:
            keep = min(keep, self._begins(text, stop))
        # A blank before what may become a stop text would be the answer's last.
        keep = len(text[:keep].rstrip())
        self._held, out = text[keep:], text[:keep]
        self._begun = self._begun or bool(out)
        return out

    def flush(self) -> str:
        """The rest."""
        rest, self._held = self._held.rstrip(), ""
        return rest

    @staticmethod
    def _begins(text: str, stop: str) -> int:
        """Where a beginning of `stop` at the end of the text starts, or the text's length."""
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                return len(text) - size
        return len(text)


class Reply:
    """The objects that answer one request, in OpenAI's shape."""

    def __init__(self) -> None:
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        """The answer in one object."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(answer)}
        return {**self._head("chat.completion"), "choices": [choice], **self._costs(answer)}

    def chunk(self, delta: dict[str, Any], answer: Answer | None = None) -> dict[str, Any]:
        """A piece of a streamed answer; the last one has the whole `answer`."""
        finish = None if answer is None else _finish(answer)
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """What stream_options.include_usage asks for."""
        return {**self._head("chat.completion.chunk"), "choices": [], **self._costs(answer)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": MODEL}

    @staticmethod
    def _costs(answer: Answer) -> dict[str, Any]:
        usage, timings = answer.usage, answer.timings
        return {
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "prompt_tokens_details": {
                    "cached_tokens": usage.cached_tokens,
                    "visual_tokens": usage.visual_tokens,
                },
                "seen_tokens": usage.seen_tokens,
                "kept_tokens": usage.kept_tokens,
            },
            "timings": {
                name: round(getattr(timings, name), 6)
                for name in ("decode_s", "encode_s", "prefill_s", "first_token_s", "total_s", "tokens_per_s")
            },
        }


def _finish(answer: Answer) -> str:
    return "length" if answer.finish == "length" else "stop"
