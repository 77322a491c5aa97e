"""Bounded reading of untrusted JSON files: size, nesting and number range; else a reason why not."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

MIB = 2**20


def read_object(path: str | Path, *, limit: int = MIB, infinity: bool = False) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes.

    infinity: whether `Infinity` may stand for a number. Raises OSError, or ValueError with a reason in a few
    words: not a regular file, too large, not JSON, nested too deep, NaN, or not an object.
    """
    return parse_object(read_bytes(path, limit), infinity=infinity)


def read_bytes(path: str | Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; raises OSError, or ValueError for any other."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit / MIB:g} MiB")
    return data


def parse_object(data: bytes, *, infinity: bool = False) -> dict[str, Any]:
    """The object that JSON text holds; raises ValueError with a reason in a few words."""

    def constant(name: str) -> float:
        if name == "NaN" or not infinity:
            _refuse(name)
        return float(name.replace("Infinity", "inf"))

    def number(text: str) -> float:
        value = float(text)
        return value if abs(value) != float("inf") or infinity else _refuse(text[:20])

    try:
        values = json.loads(data.decode("utf-8-sig"), parse_constant=constant, parse_float=number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} in line {error.lineno})") from None
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    return values


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"it holds {number}, which is no number")
