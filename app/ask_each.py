"""One question about each of many files: an answer, or what went wrong, per file, in order, as they come.

    failed = ask_each(chat, ["a.mp4", "b.mp4"], "What moves?", print, budget=64)

An outcome is plain values: file, question, answer (with a schema, its value), familiar (as of `Answer`),
price (predicted) and actual, or file, question and error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from app.long_video import price
from app.messages import Media
from app.note import without_guess
from app.printed import on_a_line
from encoder.errors import FluxChatError
from encoder.video.part import WHOLE, Part

if TYPE_CHECKING:
    from app.chat import VideoChat

BAR = 24  # characters
Outcome = dict[str, Any]


def ask_each(
    chat: VideoChat,
    files: Sequence[str],
    question: str,
    told: Callable[[Outcome], None],
    *,
    part: Part = WHOLE,
    progress: TextIO | None = None,
    **options: Any,
) -> int:
    """Ask about each file by itself; returns how many failed, which ends nothing.

    Raises FluxChatError, before any is asked about, for a question or options that fit no video.
    told: called with each outcome. progress: a terminal for a bar. options: as in `VideoChat.ask`.
    """
    chat.check(question, **options)
    failed = 0
    for index, file in enumerate(files):
        with _bar(progress, index, len(files), file):
            outcome = _outcome(chat, Media(file, part=part), question, options)
        failed += "error" in outcome
        told({"file": file, "question": question, **outcome})
    return failed


def _outcome(chat: VideoChat, medium: Media, question: str, options: dict[str, Any]) -> Outcome:
    try:
        priced = price(chat, medium, options.get("budget"))
        answer = chat.ask(medium, question, parts=True, **options)
        said = without_guess(answer.text) if options.get("schema") is None else answer.json()
    except FluxChatError as error:
        return {"error": " ".join(str(error).split())}
    actual = {**asdict(answer.usage), **asdict(answer.timings)}
    return {"answer": said, "familiar": answer.familiar, "price": asdict(priced), "actual": actual}


@contextmanager
def _bar(out: TextIO | None, index: int, count: int, file: str) -> Iterator[None]:
    """A bar while one file is asked about, which leaves no trace."""
    if out is None:
        yield
        return
    full = BAR * index // count
    name = on_a_line(file)
    name = name if len(name) <= 32 else f"...{name[-29:]}"
    line = f"[{'#' * full}{'.' * (BAR - full)}] {index + 1} of {count}  {name}"
    print(f"\r{line}", end="", file=out, flush=True)
    try:
        yield
    finally:
        print(f"\r{' ' * len(line)}\r", end="", file=out, flush=True)


def terminal(stream: TextIO | None = None) -> TextIO | None:
    """The stream for people (standard error by default) where that is a terminal, else None."""
    stream = sys.stderr if stream is None else stream
    return stream if stream is not None and stream.isatty() else None
