"""Error responses: JSON in OpenAI's shape, with the server's own paths removed from their messages."""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from encoder.errors import BudgetError, ContextError, FluxChatError, ModelError, VideoError

LONGEST = 1000  # characters of an error's sentence
A_FILE = "a file of the server"
# A path goes on to the end of its quotation, or to what ends a word.
_REST = r"(?:[\\/][^\s'\"<>|,;:()]*)?"
_OBJECT = re.compile(r"<[^<>]{0,200} at 0x[0-9a-fA-F]+>")


class ApiError(Exception):
    """An HTTP error response in OpenAI's shape. message: one line, always valid Unicode."""

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

    def redacted(self, redact: Callable[[str], str]) -> ApiError:
        """The same with `redact` applied to its message and param."""
        for key in ("message", "param"):
            if isinstance(text := self.body["error"][key], str):
                self.body["error"][key] = redact(text)
        return self

    def about(self, param: str, what: str = "") -> ApiError:
        """The same, about one field of the request; what: added to the sentence in brackets."""
        detail = self.body["error"]
        message = f"{detail['message'].removesuffix('.')} ({what})." if what else detail["message"]
        kind, code = detail["type"], detail["code"]
        return ApiError(self.status, message, kind=kind, code=code, param=param, headers=self.headers)

    @staticmethod
    def of(error: BaseException) -> ApiError:
        """The response for an exception of a question; an unexpected one is a 500 without details."""
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
    """A text as one line: no line breaks, no lone surrogates, at most LONGEST characters."""
    line = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def error_response(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body, error.status, error.headers)


def shutting_down() -> ApiError:
    """503: the server is about to end."""
    return ApiError(
        503,
        "The server is shutting down: ask it again in a moment.",
        kind="server_error",
        code="shutting_down",
        headers={"Retry-After": "5", "Connection": "close"},
    )


def invalid_media(message: str) -> ApiError:
    """400: a video or image of the messages cannot be had."""
    return ApiError(400, message, code="invalid_media", param="messages")


def too_large(limit: int) -> ApiError:
    """413: larger than `limit` bytes."""
    return ApiError(
        413,
        f"That is more than {limit / 2**20:g} MiB: cut or compress it.",
        code="request_too_large",
        headers={"Connection": "close"},  # the rest is not read
    )


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns an OSError of the disk into an ApiError: 507 when it is full, else 503."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        text = "The server's disk is full" if full else "The server cannot keep files now"
        raise ApiError(
            507 if full else 503,
            f"{text}: try again later.",
            kind="server_error",
            code="storage_full" if full else "storage_failed",
            headers={"Retry-After": "60"},
        ) from error


class ClientDisconnected(Exception):
    """The client closed the connection: nobody reads the response."""


class PathRedactor:
    """Replaces the server's paths in texts.

    PathRedactor({"/srv/models/qwen": "the model"})("positions but /srv/models/qwen has 1024")
    # "positions but the model has 1024"

    named: what to call certain paths. folders: paths below these are called "a file of the server",
    as are those below the temporary, home, working, interpreter and program folders.
    """

    def __init__(self, named: Mapping[str, str], folders: Iterable[str | Path | None] = ()) -> None:
        usual = [tempfile.gettempdir(), _home(), os.getcwd(), sys.prefix, sys.base_prefix, _program()]
        known = dict.fromkeys(_spellings([*usual, *(str(f) for f in folders if f is not None)]), A_FILE)
        for path, name in named.items():
            known |= dict.fromkeys(_spellings([path]), name)
        self._names = known
        longest_first = sorted(known, key=len, reverse=True)
        self._paths = re.compile(
            r"(?<![\w./])(?:file://)?(" + "|".join(map(re.escape, longest_first)) + rf")(?![\w.-]){_REST}"
        )

    def __call__(self, text: str) -> str:
        """The text without the server's paths, and without addresses of its memory."""
        return _OBJECT.sub("it", self._paths.sub(lambda match: self._names[match[1]], text))


def _spellings(paths: Iterable[str]) -> list[str]:
    """Absolute paths as they are and with their links resolved; none that is the root itself."""
    both = [spelling for path in paths for spelling in (os.path.abspath(path), os.path.realpath(path))]
    return [path for path in both if len(Path(path).parts) > 1]


def _home() -> str:
    return os.path.expanduser("~")


def _program() -> str:
    return str(Path(__file__).resolve().parents[2])
