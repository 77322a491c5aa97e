"""What programs get from the server: OpenAI's chat completions, whole or in pieces, and its errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.answer import Answer
from app.server.schemas import MODEL
from encoder.errors import BudgetError, ContextError, FluxChatError, ModelError, VideoError

LONGEST = 1000  # characters of an error's sentence


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape. message: one line, always valid Unicode."""

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
        message, param = _one_line(message), None if param is None else _one_line(param)
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body: dict[str, dict[str, Any]] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }

    def told(self, scrub: Callable[[str], str]) -> ApiError:
        """The same with its sentence and field as `scrub` leaves them."""
        for key in ("message", "param"):
            if isinstance(text := self.body["error"][key], str):
                self.body["error"][key] = scrub(text)
        return self

    def about(self, param: str, what: str = "") -> ApiError:
        """The same, about one field of the request; what: added to the sentence in brackets."""
        detail = self.body["error"]
        message = f"{detail['message'].removesuffix('.')} ({what})." if what else detail["message"]
        kind, code = detail["type"], detail["code"]
        return ApiError(self.status, message, kind=kind, code=code, param=param, headers=self.headers)

    @staticmethod
    def of(error: BaseException) -> ApiError:
        """The same for what asking can raise; what nobody foresaw is a 500 without details."""
        if isinstance(error, ApiError):
            return error
        message = str(error)
        if isinstance(error, VideoError):
            return ApiError(400, message, code="invalid_media", param="messages")
        if isinstance(error, ContextError):
            return ApiError(400, message, code="context_length_exceeded", param="messages")
        if isinstance(error, BudgetError):
            return ApiError(400, message, code="invalid_budget", param="token_budget")
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            text = "The server ran out of memory: lower token_budget, or try again later."
            return ApiError(
                503, text, kind="server_error", code="out_of_memory", headers={"Retry-After": "10"}
            )
        if isinstance(error, ModelError):
            if type(error.__cause__).__module__.startswith("jinja2"):  # it refuses these roles in this order
                return ApiError(400, message, code="unsupported_conversation", param="messages")
            return ApiError(503, message, kind="server_error", code="model_unavailable")
        if isinstance(error, FluxChatError):
            return ApiError(400, message)
        return ApiError(500, "The server failed; its log says why.", kind="server_error")


def _one_line(text: str) -> str:
    """A text that fits one line of JSON: no line breaks, no halves of characters, not endless."""
    line = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


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
