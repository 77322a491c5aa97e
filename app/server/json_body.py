"""JSON as strangers may send it: one meaning, valid Unicode, finite numbers, as many parts as a request has.

Python's json takes NaN, half emojis and a key twice (the last one counts); none of them is JSON that two
programs read alike, so each is refused with its place.
"""

from __future__ import annotations

import json
import math
from typing import Any

from app.server.replies import ApiError

MAX_PARTS = 200_000  # values of a body, an upper bound; each takes up to some 200 bytes of memory


def decode_json(body: bytes | bytearray) -> Any:
    """A body as plain values; raises ApiError 400 that says what is wrong with it."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_PARTS:
        raise ApiError(
            400,
            f"The body has too many parts: at most {MAX_PARTS} commas and brackets are read.",
            code="too_many_items",
        )
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
        _check_texts(value)
    except _Refused as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", param=error.param) from None
    except UnicodeDecodeError:
        raise ApiError(400, "The body is not valid JSON: it is not encoded as UTF-8.") from None
    except RecursionError:
        raise ApiError(400, "The body is not valid JSON: it is nested too deeply.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"The body is not valid JSON: {error.msg} at {where}.") from None
    return value


class _Refused(ValueError):
    """JSON by its syntax, but without one meaning."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the field {twice[:80]!r} is there twice", None)
    return made


def _constant(name: str) -> Any:
    raise _Refused(f"{name} is no number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused(f"the number {digits[:40]} is too large")
    return value


def _int(digits: str) -> int:
    if len(digits) > 40:
        raise _Refused(f"the number {digits[:40]}... is too large")
    return int(digits)


Steps = tuple[Any, str | int] | None  # the way to a value: (the way to what it is in, its key or place)


def _check_texts(value: Any, steps: Steps = None) -> None:
    """Raises _Refused where a text holds half of a character (a lone surrogate)."""
    if isinstance(value, str):
        if not _is_unicode(value):
            path = _path(steps)
            raise _Refused(f"{path or 'a text'} holds half of a character (a lone surrogate)", path or None)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not _is_unicode(key):
                raise _Refused(
                    "the name of a field holds half of a character (a lone surrogate)", _path(steps) or None
                )
            _check_texts(inner, (steps, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_texts(inner, (steps, index))


def _path(steps: Steps) -> str:
    """messages[1].content; made for errors only, since names can be megabytes."""
    path = ""
    while steps is not None:
        steps, step = steps
        path = f"[{step}]{path}" if isinstance(step, int) else f".{step[:80]}{path}"
    return path.removeprefix(".")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
