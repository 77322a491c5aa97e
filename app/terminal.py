"""The conversation of `fluxchat chat`: streaming answers in a terminal, Ctrl-C stops one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from app.long_video import LongPrice, price
from app.printed import in_terminal, on_a_line
from app.streaming import Step
from encoder.errors import ConfigError, FluxChatError, VideoError
from encoder.video.clock import clock
from encoder.video.part import Part

if TYPE_CHECKING:
    from app.answer import Answer
    from app.chat import VideoChat
    from app.estimate import Estimate
    from app.messages import Media
    from app.streaming import AnswerStream

HELP = """\
Ask anything about the video. Commands:
  /budget N      tokens the encoder may keep: a number, full, auto or auto:SECONDS
  /video PATH    talk about another video or image
  /add PATH      another video or image beside it, for the next question
  /part FROM TO  ask about a part of the first video from now on, as 1:02 1:10; alone: about all of it again
  /estimate      what the budget costs on this video
  /new           forget the conversation
  /save FILE     keep it as JSON; /load FILE goes on with it
  /export FILE   write it to be read, as .md or .json, with the frames
  /help          these commands
  /quit          leave (or Ctrl-D, or Ctrl-C twice); Ctrl-C stops an answer"""
QUIT = ("quit", "exit", "q")


def converse(chat: VideoChat, video: Any, options: dict[str, Any]) -> int:
    """Read questions until /quit or end of input; returns the exit status. video: as `ask` takes it."""
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if interactive:
        print(f"{chat.name} on {chat.device}. {HELP}\n")
        _line_editing()
    terminal = Terminal(chat, video, options)
    terminal.introduce()
    leaving = False
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, RuntimeError):  # RuntimeError: there is no standard input
            return 0
        except KeyboardInterrupt:
            if interactive and _typed():  # it takes back the line
                print(flush=True)
                leaving = False
                continue
            if leaving or not interactive:
                return 0
            leaving = True
            print("\nCtrl-C again leaves.", flush=True)
            continue
        leaving = False
        if not line:
            continue
        if not interactive:
            print("> " + on_a_line(line))
        name, _, value = line[1:].partition(" ")
        if line.startswith("/") and name in QUIT:
            return 0
        try:
            if line.startswith("/"):
                terminal.command(name, value.strip())
            else:
                terminal.ask(line)
        except FluxChatError as error:
            print(f"! {on_a_line(' '.join(str(error).split()))}", flush=True)
        except KeyboardInterrupt:
            print("\n! Stopped.", flush=True)


def _line_editing() -> None:
    """Arrow keys and a history of this session's lines, where Python was built with them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is imported


def _typed() -> str:
    """What was typed of the line that Ctrl-C ended, where that is known."""
    return sys.modules["readline"].get_line_buffer() if "readline" in sys.modules else ""


class Terminal:
    """The state of a conversation in the terminal. A command that fails changes nothing."""

    def __init__(self, chat: VideoChat, video: Any, options: dict[str, Any]) -> None:
        self.chat = chat
        self.options = {"parts": True, "progress": _tell_part, **options}
        # Held, so that parts of it are known to be of one video.
        self.medium = None if video is None else chat.keep(video)
        self.conversation = chat.conversation(self.medium, **self.options)

    def introduce(self) -> None:
        """Print the video's name and the price of a question; raises FluxChatError."""
        if self.medium is not None:
            print(f"Video: {self.medium.label()}\n{self._price(self.medium)}\n", flush=True)

    def command(self, name: str, value: str) -> None:
        """Run a command; raises FluxChatError."""
        if name == "budget":
            self._set_budget(value)
        elif name == "video":
            self._show(_path(value, name))
        elif name == "add":
            medium = self.chat.keep(_path(value, name))
            cost = self.chat.estimate(medium, self.options["budget"])
            self.conversation.add(medium)
            print(f"{cost}\nIt comes with the next question.", flush=True)
        elif name == "part":
            self._set_part(value)
        elif name == "save":
            self.conversation.save(_path(value, name))
            print("Saved.", flush=True)
        elif name == "load":
            self._load(_path(value, name))
        elif name == "export":
            self.conversation.export(_path(value, name))
            print("Exported.", flush=True)
        elif name == "new":
            self.conversation = self.chat.conversation(self.medium, **self.options)
            print("A new conversation.", flush=True)
        elif name == "estimate":
            print(self._price(self._shown()), flush=True)
        elif name in ("help", "?", ""):
            print(HELP, flush=True)
        else:
            raise ConfigError(f"There is no command /{name}: /help lists those that there are.")

    def ask(self, question: str) -> None:
        """Print the answer as it is made; raises FluxChatError."""
        answer = _print_stream(self.conversation.stream(question))
        print(f"   [{_figures(answer)}]\n", flush=True)

    def _set_part(self, value: str) -> None:
        """Ask about another part of the video from now on; raises FluxChatError."""
        medium = self._shown()
        if len(times := value.split()) not in (0, 2):
            raise ConfigError("Say from when to when, as /part 1:02 1:10, or /part alone for all of it.")
        start, end = times or (None, None)
        try:
            new = replace(medium, part=Part.of(start, end, medium.part.region))
            cost = self._price(new)
        except VideoError as error:
            raise VideoError(f"{error} Questions are still about {self._looked_at()}.") from None
        self.conversation.look_at(new, start, end, new.part.region)
        self.medium = new
        print(f"Questions are now about {self._looked_at()}.\n{cost}", flush=True)

    def _shown(self) -> Media:
        if self.medium is None:
            raise ConfigError("There is no video yet: /video PATH takes one.")
        return self.medium

    def _price(self, medium: Media, budget: str | None = None) -> LongPrice | Estimate:
        """What a question about a video costs, in parts where it is long; decodes nothing."""
        return price(self.chat, medium, budget or self.options["budget"])

    def _looked_at(self) -> str:
        """The times that questions are about."""
        part = self._shown().part
        if not part.timed:
            return "all of it"
        return f"{clock(part.start_s)} to {'its end' if part.end_s is None else clock(part.end_s)}"

    def _load(self, path: str) -> None:
        from app.conversation import Conversation

        conversation = Conversation.load(self.chat, path)
        self.conversation = conversation
        part = {name: conversation.options.pop(name, None) for name in ("start", "end", "region")}
        self.options = {**self.options, **conversation.options}
        conversation.options = dict(self.options)
        self.medium = None
        if conversation.videos:
            first = conversation.videos[0]
            if any(value is not None for value in part.values()):
                conversation.look_at(first, **part)
            self.medium = conversation.latest(first)
        for question, answer in conversation.turns:
            print(f"> {in_terminal(question)}\n{in_terminal(answer)}\n", flush=True)

    def _set_budget(self, value: str) -> None:
        self.chat.plan_budget(value)
        cost = None if self.medium is None else self._price(self.medium, value)
        self.options["budget"] = self.conversation.options["budget"] = value
        print(f"Budget: {value}" if cost is None else cost, flush=True)

    def _show(self, path: str) -> None:
        medium = self.chat.keep(path)
        cost = self._price(medium)
        self.conversation, self.medium = self.chat.conversation(medium, **self.options), medium
        print(cost, flush=True)


def _path(value: str, command: str) -> str:
    """A path as people type or drop it: quoted, or from the home folder; raises ConfigError without one."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" and not os.path.lexists(value):
        value = value[1:-1]
    if not value:
        raise ConfigError(f"Say which file: /{command} PATH.")
    return os.path.expanduser(value)


def _tell_part(what: str, _index: int, _count: int) -> None:
    """Say in a terminal which part of a long video is looked at; on a line that the next thing takes over."""
    if not _redraws():
        return
    if isinstance(what, Step) and what.parts > 1:
        print(f"\r\x1b[KPart {what.part} of {what.parts} …", end="", flush=True)
    elif what == "prefill":
        _clear_line()


def _clear_line() -> None:
    if _redraws():
        print("\r\x1b[K", end="", flush=True)


def _redraws() -> bool:
    """Whether the output is a terminal that can write a line anew."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _print_stream(stream: AnswerStream) -> Answer:
    """Print the answer as it is made; Ctrl-C stops the computation and keeps the text so far."""
    begun = False
    try:
        with _interrupt_stops(stream):
            for piece in stream:
                print(in_terminal(piece), end="", flush=True)
                begun = True
    finally:
        if begun:
            print()
        else:
            _clear_line()
    return stream.answer


@contextmanager
def _interrupt_stops(stream: AnswerStream) -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, lambda *_: stream.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _figures(answer: Answer) -> str:
    if answer.finish == "cancelled" and not answer.text:
        return "stopped before the first word"
    usage, timings = answer.usage, answer.timings
    reused = f", {usage.cached_tokens} reused" if usage.cached_tokens else ""
    return (
        f"{usage.kept_tokens} of {usage.seen_tokens} video tokens, {usage.prompt_tokens} in{reused}; "
        f"first word after {timings.first_token_s:.2f} s, {timings.tokens_per_s:.0f} tokens/s"
    )
