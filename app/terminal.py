"""The conversation of `fluxchat chat`: streaming answers in a terminal, Ctrl-C stops one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from encoder.errors import FluxChatError

if TYPE_CHECKING:
    from app.answer import Answer
    from app.chat import VideoChat
    from app.turns import AnswerStream

HELP = """\
Ask anything about the video. Commands:
  /budget N      tokens the encoder may keep: a number, full, auto or auto:SECONDS
  /video PATH    talk about another video or image
  /estimate      what the budget costs on this video
  /new           forget the conversation
  /quit          leave (or Ctrl-D); Ctrl-C stops an answer"""


def converse(chat: VideoChat, video: str | None, options: dict[str, Any]) -> int:
    """Read questions until /quit or end of input; returns the exit status."""
    interactive = sys.stdin.isatty()
    conversation = chat.conversation(video, **options)
    if interactive:
        print(f"{chat.name} on {chat.device}. {HELP}\n")
    if video is not None:
        print(f"Video: {video}\n{chat.estimate(video, options['budget'])}\n")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        if not line:
            continue
        if not interactive:
            print(f"> {line}")
        try:
            if line.startswith("/"):
                name, _, value = line[1:].partition(" ")
                if name in ("quit", "exit", "q"):
                    return 0
                if name == "budget":
                    chat.plan_budget(value)
                    options["budget"] = value
                    conversation.options["budget"] = value
                elif name == "video":
                    video = value.strip()
                    conversation = chat.conversation(video, **options)
                elif name == "new":
                    conversation = chat.conversation(video, **options)
                elif name != "estimate":
                    print(HELP)
                    continue
                if video is not None and name != "new":
                    print(chat.estimate(video, options["budget"]))
                continue
            answer = _print_stream(conversation.stream(line))
            print(f"   [{_small_print(answer)}]\n", flush=True)
        except FluxChatError as error:
            print(f"! {error}")


def _print_stream(stream: AnswerStream) -> Answer:
    """Show the answer as it comes; Ctrl-C stops the computation and keeps what is there."""
    with _interrupt_stops(stream):
        for piece in stream:
            print(piece, end="", flush=True)
    print()
    return stream.answer


@contextmanager
def _interrupt_stops(stream: AnswerStream) -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, lambda *_: stream.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _small_print(answer: Answer) -> str:
    usage, timings = answer.usage, answer.timings
    reused = f", {usage.cached_tokens} reused" if usage.cached_tokens else ""
    return (
        f"{usage.kept_tokens} of {usage.seen_tokens} video tokens, {usage.prompt_tokens} in{reused}; "
        f"first word after {timings.first_token_s:.2f} s, {timings.tokens_per_s:.0f} tokens/s"
    )
