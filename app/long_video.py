"""Questions about videos of hours: shown in parts, each with its share of one budget by how much changes.

    film = LongVideo(chat, "film.mp4")
    print(film.price(512))                       # before anything is decoded
    print(film.ask("What happens?", 512).text)   # or "What happens at 1:23:45?": decoded only around there
    for chapter in film.chapters(): print(chapter)

`VideoChat.ask(..., parts=True)` is `ask` for a long video and changes nothing for others.

A survey of small frames says where the picture changes; parts with as much change each are looked at with the
same number of tokens, so that a part where much happens is short and one where little does is long. Frames
are sought, never decoded from the beginning, and few are held at a time: memory does not grow with length.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from app.answer import Answer
from app.estimate import Estimate, add
from app.messages import Media, as_media, part_of
from app.note import Note, guess_of, no_such_time, without_note
from encoder.budget import MIN_TOKENS, Budget
from encoder.errors import ConfigError, VideoError
from encoder.video.clock import clock, seconds
from encoder.video.part import Part
from encoder.video.reader import Clip
from llm_bridge.prompt import Message

if TYPE_CHECKING:
    from app.chat import VideoChat
    from encoder.selection import Selector

LONG_S = 600.0  # from here on a video is shown in parts
MOST_PARTS = 8
TOKENS_PER_PART = 2 * MIN_TOKENS  # at least
SAMPLES_PER_PART = 8  # frames of the survey
SURVEY_SIDE = 64  # pixels
AT_ONCE = 16  # frames of the survey that are read, and held, together: each reading opens the file
STILL = 0.5  # of the mean change: what a stretch of time counts though nothing changes in it
AROUND_S = 15.0  # before and after a time that is asked about
CHAPTER_S, LEAST_CHAPTERS, MOST_CHAPTERS = 300.0, 2, 12
SHORTEST_CHAPTER = 0.25  # of the mean one
ROUNDS, CLOSER = 2, 8  # of looking closer at where a chapter begins, and frames of each
DESCRIBE, SENTENCE_TOKENS = "Describe in one sentence what happens.", 64
_TIME = re.compile(r"(?<![\w:.])\d{1,2}:[0-5]\d(?::[0-5]\d)?(?:\.\d+)?(?![\w:])")


@dataclass(frozen=True)
class LongPrice:
    """What a question about a long video costs: parts and their tokens, seconds to the first word, of which
    survey_s before the first part is looked at, and MiB it adds at most."""

    parts: int
    frames: int
    kept_tokens: int
    llm_tokens: int
    survey_s: float
    first_token_s: float
    peak_mib: float

    def __str__(self) -> str:
        return (
            f"{self.parts} parts, {self.frames} frames, {self.kept_tokens} tokens kept, {self.llm_tokens} "
            f"into the language model, about {self.first_token_s:.2f} s to the first word "
            f"({self.survey_s:.2f} s to find the parts), {self.peak_mib:.0f} MiB"
        )


@dataclass(frozen=True)
class LongEstimate(Estimate):
    """The price of a question about a long video, all parts together: `peak_mib` is that of one, and
    `first_token_s` has the survey's seconds in it."""

    parts: int = 1
    survey_s: float = 0.0


@dataclass(frozen=True)
class Showing:
    """A medium, or a part of one, where a prompt shows it.

    index: of the medium among those asked about. budget: tokens of this alone. shares: parts that it was
    divided into, of which this is the one of that number, from 1.
    """

    medium: Media
    index: int
    budget: Budget
    shares: int = 1
    number: int = 1


@dataclass(frozen=True)
class Chapter:
    """A stretch of a video between two changes, and what is seen in it.

    familiar: as of `Answer`. note: that it is a guess, of the first that is one.
    """

    start_s: float
    end_s: float
    text: str
    familiar: bool | None = None
    note: str = ""

    def __str__(self) -> str:
        return f"{clock(self.start_s)}-{clock(self.end_s)}  {self.text}"


class LongVideo:
    """A video, or a part of one, that is asked about in parts. Raises VideoError when it cannot be read.

    scope: what the survey finds is kept for it alone. check: called between the readings of the survey, to
    end it by raising.
    """

    def __init__(
        self, chat: VideoChat, video: Any, scope: str = "", check: Callable[[], None] = lambda: None
    ) -> None:
        self._chat, self._medium, self._scope, self._check = chat, as_media(video), scope, check
        self.info = chat.probe(self._medium)
        if self.info.kind != "video":
            raise ConfigError(f"{self._medium.label()} is no video: ask about it as it is.")
        self.start_s, self.end_s = self._medium.part.range_s(self.info)

    @property
    def is_long(self) -> bool:
        """Whether it is long enough to be asked about in parts."""
        return self.end_s - self.start_s >= LONG_S

    # -- questions ------------------------------------------------------------------------------------------

    def price(self, budget: int | str | None = None) -> LongPrice:
        """What `ask` costs; decodes nothing. The parts' bounds do not change it."""
        whole = self.estimate(budget)
        return LongPrice(
            whole.parts,
            whole.frames,
            whole.kept_tokens,
            whole.llm_tokens,
            whole.survey_s,
            whole.first_token_s,
            whole.peak_mib,
        )

    def estimate(
        self,
        budget: Budget | int | str | None = None,
        selector: Selector | None = None,
        new_tokens: int | None = None,
    ) -> LongEstimate:
        """`price` with every figure of an `Estimate`, those of all parts together; decodes nothing.

        selector, new_tokens: as in `VideoChat.estimate`; what is kept counts once the parts were found.
        """
        count, share = self._shares(budget)
        found = selector is not None and self._key(count * SAMPLES_PER_PART) in self._chat.surveys
        length = (self.end_s - self.start_s) / count
        parts = self.parts(count) if found else [self._part(self.start_s, self.start_s + length)]
        ones = [
            self._chat.estimate(
                part,
                share,
                selector,
                scope=self._scope,
                new_tokens=new_tokens if new_tokens is None or index == 0 else 0,
            )
            for index, part in enumerate(parts)
        ]
        whole = add(ones if found else ones * count)
        survey_s = 0.0 if found else ones[0].decode_s / ones[0].frames * count * SAMPLES_PER_PART
        figures = {**asdict(whole), "first_token_s": survey_s + whole.first_token_s}
        return LongEstimate(**{**figures, "peak_mib": ones[0].peak_mib}, parts=count, survey_s=survey_s)

    def ask(self, question: str, budget: int | str | None = None, **options: Any) -> Answer:
        """An answer: about the time that the question names, else about all of it, in parts where it is long.

        budget: tokens of all parts together. options: as in `VideoChat.ask`. Raises as that does.
        """
        options = {"parts": True, "scope": self._scope, **options}
        return self._chat.ask(self._medium, question, budget=budget, **options)

    def shown(self, budget: Budget | int | str | None = None) -> list[Showing]:
        """All of it as a prompt shows it. Raises VideoError or BudgetError."""
        count, share = self._shares(budget)
        return [
            Showing(part, 0, Budget(share), count, number)
            for number, part in enumerate(self.parts(count), start=1)
        ]

    def around(self, question: str, budget: Budget) -> list[Showing]:
        """What the question names of it; nothing where it names no time, or one that is not there."""
        named = self._named(question)
        return [] if named is None else [Showing(named, 0, budget)]

    def parts(self, count: int) -> list[Media]:
        """The video in so many parts, in each of which about as much changes."""
        times, changes = self._survey(count * SAMPLES_PER_PART)
        weights = changes + max(STILL * float(changes.mean()), 1e-6)
        mass = torch.cat([torch.zeros(1, dtype=torch.float64), weights.cumsum(0)]) / weights.sum()
        marks = torch.tensor([self.start_s, *times[1:-1], self.end_s], dtype=torch.float64)
        edges = [
            self.start_s,
            *(_crossing(mass, marks, part / count) for part in range(1, count)),
            self.end_s,
        ]
        return [self._part(start, end) for start, end in pairwise(edges)]

    def _shares(self, budget: Budget | int | str | None) -> tuple[int, int]:
        """How many parts, and tokens of each: of what the budget buys of the whole."""
        total = self._chat.plan(self._medium, budget).keep
        count = max(1, min(MOST_PARTS, total // TOKENS_PER_PART))
        return count, max(1, total // count)

    def _named(self, question: str) -> Media | None:
        """The part around the time that a question names, or between its two times; None without one."""
        times = [seconds(text) for text in _TIME.findall(question)]
        if not times or len(times) > 2:
            return None
        first, last = min(times), max(times)
        if len(times) == 1 or last - first < 1:
            first, last = first - AROUND_S, last + AROUND_S
        elif last - first >= LONG_S:
            return None
        if not all(map(self._has, times)):
            return None
        return self._part(max(self.start_s, first), min(self.end_s, last))

    def absent(self, question: str) -> Note:
        """The sentence about the first time that a question names and that is not there; "" without one."""
        times = [seconds(text) for text in _TIME.findall(question)]
        outside = next((time_s for time_s in times if not self._has(time_s)), None)
        return Note() if outside is None else no_such_time(outside, self.start_s, self.end_s)

    def _has(self, time_s: float) -> bool:
        return self.start_s <= time_s <= self.end_s

    def _part(self, start_s: float, end_s: float) -> Media:
        return replace(self._medium, part=Part(start_s, end_s, self._medium.part.region))

    # -- chapters -------------------------------------------------------------------------------------------

    def chapters(
        self, count: int | None = None, budget: Budget | int | str | None = None, **options: Any
    ) -> Iterator[Chapter]:
        """Stretches between the largest changes, each described as it comes.

        count: how many (default: one for each five minutes, 2 to 12). budget: tokens of each. options: of
        `VideoChat.ask`; `max_new_tokens` is 64 by default.
        """
        length = self.end_s - self.start_s
        if count is None:
            count = min(MOST_CHAPTERS, max(LEAST_CHAPTERS, round(length / CHAPTER_S)))
        if not 1 <= count <= 100:
            raise ConfigError(f"There cannot be {count} chapters: ask for 1 to 100.")
        options = {"max_new_tokens": SENTENCE_TOKENS, **options}
        edges, noted = [self.start_s, *self._cuts(count), self.end_s], False
        for start, end in pairwise(edges):
            answer = self._chat.ask(self._part(start, end), DESCRIBE, budget=budget, **options)
            note = "" if noted else guess_of(answer.note)
            noted = noted or bool(note)
            text = " ".join(without_note(answer.text).split())
            yield Chapter(start, end, text, answer.familiar, note)

    def _cuts(self, count: int) -> list[float]:
        """Times of the largest changes that are not too near to each other, at most count - 1."""
        times, changes = self._survey(count * SAMPLES_PER_PART)
        apart = SHORTEST_CHAPTER * (self.end_s - self.start_s) / count
        chosen: list[float] = []
        for index in changes.argsort(descending=True).tolist():
            if len(chosen) + 1 >= count:
                break
            middle = (times[index] + times[index + 1]) / 2
            if all(abs(middle - other) >= apart for other in (*chosen, self.start_s, self.end_s)):
                chosen.append(self._closer(times[index], times[index + 1]))
        return sorted(chosen)

    def _closer(self, start_s: float, end_s: float) -> float:
        """When between two times the picture changes most."""
        for _ in range(ROUNDS):
            step = (end_s - start_s) / (CLOSER - 1)
            times = [start_s + step * index for index in range(CLOSER)]
            index = int(_differences(self._glance(times)).argmax())
            start_s, end_s = times[index], times[index + 1]
        return (start_s + end_s) / 2

    # -- the survey -----------------------------------------------------------------------------------------

    def _survey(self, samples: int) -> tuple[list[float], Tensor]:
        """(samples,) times from the beginning to the end, and (samples - 1,) how much changes between."""
        step = (self.end_s - self.start_s) / samples
        times = [self.start_s + step * (index + 0.5) for index in range(samples)]
        key = self._key(samples)
        if (changes := self._chat.surveys.get(key)) is None:
            changes = self._changes(times)
            self._chat.surveys.put(key, changes)
        return times, changes

    def _key(self, samples: int) -> str:
        return f"{self._scope}|{self._medium.part.seen(self.info).digest}|{samples}"

    def _changes(self, times: list[float]) -> Tensor:
        """How much changes from each of the times to the next, (len(times) - 1,)."""
        changes, last = [], None
        for first in range(0, len(times), AT_ONCE):
            self._check()
            frames = self._glance(times[first : first + AT_ONCE])
            frames = frames if last is None else torch.cat([last, frames])
            changes.append(_differences(frames))
            last = frames[-1:]
        return torch.cat(changes)

    def _glance(self, times: list[float]) -> Tensor:
        """Small frames at these times, float (T, H, W, 3)."""
        return self._chat.frames_at(self._medium, times, SURVEY_SIDE).float()


def long_video(
    chat: VideoChat, video: Any, scope: str = "", check: Callable[[], None] = lambda: None
) -> LongVideo | None:
    """The video where it is so long that it is asked about in parts, else None; raises VideoError."""
    film = _film(chat, video, scope, check)
    return film if film is not None and film.is_long else None


def _film(chat: VideoChat, video: Any, scope: str, check: Callable[[], None]) -> LongVideo | None:
    """A video of any length; None where there is nothing more to look at: a clip in memory, a picture."""
    medium = as_media(video)
    if isinstance(medium.source, Clip) or chat.probe(medium).kind != "video":
        return None
    return LongVideo(chat, medium, scope, check)


def price(chat: VideoChat, video: Any, budget: int | str | None = None, **part: Any) -> LongPrice | Estimate:
    """What a question with `parts=True` costs, before anything is decoded. part: start, end and region.

    Raises VideoError.
    """
    medium = as_media(video)
    medium = chat.keep(part_of(medium, **part) if medium.part.whole else medium)
    film = long_video(chat, medium)
    return chat.estimate(medium, budget) if film is None else film.price(budget)


def showings(
    chat: VideoChat,
    messages: Sequence[Message[Media]],
    budget: Budget,
    *,
    parts: bool,
    scope: str = "",
    check: Callable[[], None] = lambda: None,
) -> tuple[tuple[Message[Showing], ...], Note]:
    """The messages with their media as a prompt shows them, and what is to be said before the answer.

    parts: a long video that comes first and alone is shown in parts. A question that names a time in it is
    shown what is around that instead, also later, and the next one that names none all of it. A time that is
    not there names nothing: the sentence says so of the last message, of a video of any length. What a
    message shows depends on it and those before it, so that a follow-up question finds their prefix in the
    cache. Raises VideoError and BudgetError.
    """
    made: list[Message[Showing]] = []
    alone: LongVideo | None = None  # however long
    film: LongVideo | None = None
    note = Note()
    index, whole_shown = 0, False
    for message in messages:
        media = [piece for piece in message.content if isinstance(piece, Media)]
        if parts and index == 0 and len(media) == 1 and message.role == "user":
            media = [chat.keep(media[0])]  # what can be read only once is read here
            with contextlib.suppress(VideoError):  # said when it is opened, with its place among the others
                alone = _film(chat, media[0], scope, check)
                film = alone if alone is not None and alone.is_long else None
        elif media:
            alone = film = None
        views: list[Showing] = []
        note = Note()  # that of the last message stays
        if alone is not None and message.role == "user":
            note = alone.absent(message.text)
        if film is not None and message.role == "user":
            views = film.around(message.text, budget)
            if not views and not whole_shown:
                views, whole_shown = film.shown(budget), True
        content: list[str | Showing] = [] if media else [*views]
        waiting = iter(media)
        for piece in message.content:
            if isinstance(piece, str):
                content.append(piece)
                continue
            medium = next(waiting)
            content += [Showing(medium, index, budget)] if film is None else views
            index += 1
        made.append(Message(message.role, tuple(content)))
    return tuple(made), note


def _differences(frames: Tensor) -> Tensor:
    """Mean absolute difference of each frame (T, H, W, 3) from the one before, (T - 1,), float64."""
    return (frames[1:] - frames[:-1]).abs().mean((1, 2, 3)).double()


def _crossing(mass: Tensor, marks: Tensor, share: float) -> float:
    """The time at which that share of all change has happened. mass: ascending, at the marks, from 0 to 1."""
    index = min(int(torch.searchsorted(mass, share)), len(mass) - 1)
    low, high = float(mass[index - 1]), float(mass[index])
    part = (share - low) / (high - low) if high > low else 0.0
    return float(marks[index - 1]) + part * float(marks[index] - marks[index - 1])
