"""Times as people write them: seconds, or "1:02" and "1:23:45.5" as a player shows them."""

from __future__ import annotations

import math
import re
from typing import Any

from encoder.errors import VideoError

LONGEST_S = 1e7  # some months: a longer time is a mistake
_CLOCK = re.compile(r"(?:(\d{1,5}):)?(\d{1,5}):(\d{1,2}(?:\.\d{1,9})?)", re.ASCII)
_PLAIN = re.compile(r"\d{1,8}(?:\.\d{0,9})?|\.\d{1,9}", re.ASCII)


def seconds(value: Any, what: str = "The time") -> float:
    """Seconds from 0 up: a number of them, or a text as "62", "62.5", "1:02" or "1:23:45.5".

    what: what errors call it. Raises VideoError.
    """
    time_s = _number(value)
    if time_s is None or not math.isfinite(time_s) or not 0 <= time_s <= LONGEST_S:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        raise VideoError(f'{what} cannot be {shown}; give seconds from 0 up, or "1:02" or "1:23:45.5".')
    return time_s


def interval(start: Any, end: Any) -> tuple[float, float]:
    """Start and end as `seconds` reads them; raises VideoError, also for an end that is not later."""
    start_s, end_s = seconds(start, "The start"), seconds(end, "The end")
    if end_s <= start_s:
        raise VideoError(f"The end ({clock(end_s, 2)}) must be after the start ({clock(start_s, 2)}).")
    return start_s, end_s


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if not isinstance(value, str):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            return None
    text = value.strip()
    if _PLAIN.fullmatch(text):
        return float(text)
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    hours, minutes, rest = int(match[1] or 0), int(match[2]), float(match[3])
    if rest >= 60 or (match[1] is not None and minutes >= 60):
        return None  # no clock shows that: more likely something else was meant
    return 3600 * hours + 60 * minutes + rest


def clock(time_s: float, places: int = 1) -> str:
    """The time as `seconds` reads it, to the tenth, or to more places: "0:05", "1:02.5", "1:23:45"."""
    unit = 10**places
    minutes, rest = divmod(round(unit * time_s), 60 * unit)
    hours, minutes = divmod(minutes, 60)
    whole, part = divmod(rest, unit)
    tail = f"{whole:02d}" + (f".{part:0{places}d}".rstrip("0") if part else "")
    return f"{hours}:{minutes:02d}:{tail}" if hours else f"{minutes}:{tail}"
