"""Handlers of the page's events, as functions of a session, independent of the layout.

Every generator may be closed at any yield (the tab was closed): generation then stops within one token.
"""

from __future__ import annotations

import logging
import queue
import shlex
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.chatbot import ComponentMessage
from PIL import Image
from torch import Tensor

from app.answer import Answer, KeptTokens
from app.chat import Message, VideoChat
from app.estimate import QUESTION_TOKENS, Estimate
from app.long_video import LONG_S, Chapter, LongVideo, Showing, long_video, price, showings
from app.messages import Media as ShownMedia
from app.messages import question_text
from app.model_slot import Beside, ModelSlot
from app.page import html as markup
from app.page import library_search
from app.page.kept import Kept
from app.page.library_search import LibrarySearch
from app.page.overlay import data_url
from app.page.sessions import Media, Session, Sessions, Turn
from app.page.settings import Range, Settings
from app.server.chat_request import longest_text
from app.server.errors import ApiError
from app.server.media.uploads import file_name
from app.streaming import Step, Stopped, StopSignal, Thought
from encoder.errors import ConfigError, FluxChatError
from encoder.selection import Selector
from encoder.video.clock import clock, interval
from encoder.video.part import Part
from encoder.video.remux import MUXERS

LOG = logging.getLogger("fluxchat")
YIELD_S = 0.05  # at most 20 updates a second
THUMBNAIL = 208  # pixels
EMPTY_COST = "Add a video or an image: its price appears here before you ask."
NO_VIDEO = (
    "This model knows videos only, and there is none yet: drop one here, paste it, or take an example. "
    "Your question stays."
)
VIDEO_QUESTIONS = (
    "What happens in the video?",
    "Who or what is in it?",
    "What changes from beginning to end?",
)
DRAWN_QUESTIONS = (
    "What happens in the video?",
    "How many objects does the clip contain?",
    "Which object is the final one to show up?",
)
IMAGE_QUESTIONS = ("What is in the picture?", "Describe it in detail.", "What stands out?")
WAITS = "Waits for the answer before it"
PHASES = {"decode": "Reading the frames", "encode": "Looking", "prefill": "Thinking"}
MAX_TURNS = 100  # that a conversation keeps, with what was looked at in each
SHOWN = 200  # characters of a question that is too long
LONG_NOTE = "It is long: a question looks at it in parts, or at a time that it names."
UNEXPECTED_ERROR = "Something went wrong that should not have; the server's log says what."


@dataclass(frozen=True)
class _Side:
    """One answer of a comparison, as far as it is."""

    text: str = ""
    thinking: str = ""
    phase: str = ""
    details: str = ""
    problem: str = ""


class Handlers:
    """The event handlers around one VideoChat. library: what visitors may search, and open videos of."""

    def __init__(
        self, chat: VideoChat | ModelSlot, sessions: Sessions, library: LibrarySearch | None = None
    ) -> None:
        self.slot, self.sessions, self.library = ModelSlot.of(chat), sessions, library
        self._range: tuple[int, Range] | None = None  # of which exchange of the model
        # Made here, since inside an event a Gradio component is only an update.
        self._html = gr.HTML("", js_on_load=None, apply_default_css=False, render=False).get_config()

    @property
    def chat(self) -> VideoChat:
        """The model in use."""
        return self.slot.chat

    @property
    def range(self) -> Range:
        """The budgets of the model in use."""
        if self._range is None or self._range[0] != self.slot.exchanges:
            self._range = self.slot.exchanges, Range.of(self.chat.model)
        return self._range[1]

    # -- videos ---------------------------------------------------------------------------------------------

    def add(self, session: Session, paths: Sequence[str]) -> str:
        """More videos or images; returns the first error as HTML, which stays until one is added or it is
        dismissed, empty when there is none."""
        errors = []
        for path in paths:
            if session.show(path):
                continue
            try:
                with self.slot.using() as chat:
                    medium = Media(path, Path(path).name, chat.probe(path))
                self.sessions.add(session, medium)
            except FluxChatError as error:
                self.sessions.discard(path)
                sentence = _sentence(error)
                errors.append(markup.problem(sentence, way_out(sentence, Path(path).name)))
        session.problem = errors[0] if errors else ""
        return session.problem

    def refuse(self, session: Session, text: str) -> str:
        """Something was not taken, for a reason that the browser knows; returns it as HTML."""
        session.problem = markup.problem(text[:SHOWN])
        return session.problem

    def add_copy(self, session: Session, path: str, client: str = "") -> str:
        """One of our own files, as if that client had uploaded it; returns an error as HTML."""
        try:
            return self.add(session, [self.sessions.copy(path, client)])
        except (ApiError, OSError) as error:  # no room for it
            session.problem = markup.problem(_sentence(error))
            return session.problem

    def start_example(self, session: Session, path: str, question: str, client: str = "") -> bool:
        """A new conversation about one of our own files, its question asked; False with a problem shown."""
        self.empty(session)
        return not self.add_copy(session, path, client) and self.begin(session, question)

    def look_at(self, session: Session, path: str, start: Any, end: Any, region: Any, turn: int = 0) -> str:
        """The next question is about that part of a video or image (see `Part.of`), None for all of it;
        returns an error as HTML, with nothing changed. turn: what was chosen before it comes too late."""
        with session.lock:
            index = session.index(path)
            if index is None or turn < session.media[index].turn:
                return ""
            session.media[index] = medium = replace(session.media[index], turn=turn)
            session.problem = ""
            try:
                part = Part.of(start, end, region)
                part.range_s(medium.info)
            except FluxChatError as error:
                session.problem = markup.problem(_sentence(error))
            else:
                session.media[index] = replace(medium, part=part)
            return session.problem

    def clip(self, session: Session, path: str, start: Any, end: Any, client: str = "") -> str:
        """A part of a video as a file of that client's: HTML that names it, empty with a problem shown."""
        index = session.index(path)
        if index is None:
            return ""
        medium = session.media[index]
        suffix = Path(medium.path).suffix.lower()
        try:
            start_s, end_s = interval(start, end)
            times = "-".join(clock(time_s).replace(":", ".") for time_s in (start_s, end_s))
            name = f"{Path(medium.name).stem[:60]}-{times}{suffix if suffix in MUXERS else '.mkv'}"
            with tempfile.TemporaryDirectory(prefix="fluxchat-") as folder, self.slot.using() as chat:
                done = chat.cut(medium.asked, start_s, end_s, Path(folder) / name)
                copy = self.sessions.copy(Path(folder) / name, client)
        except (FluxChatError, ApiError, OSError) as error:
            session.problem = markup.problem(_sentence(error))
            return ""
        return markup.made(copy, name, f"Saved {name}: {clock(done.start_s)} to {clock(done.end_s)}")

    # -- the library ----------------------------------------------------------------------------------------

    def search(self, session: Session, text: str, turn: int) -> str:
        """What in the library fits a text, as HTML. turn: grows with each search in the browser."""
        if self.library is None:
            return ""
        try:
            found = self.library.find(text)
        except FluxChatError as error:
            return library_search.failed(_sentence(error), turn)
        if turn >= session.found[0]:
            session.found = turn, found.hits
        return library_search.results(found, turn)

    def open_hit(self, session: Session, index: int, search: int, turn: int, client: str = "") -> str:
        """Show a hit of the session's last search: its video, that part of it chosen; an error as HTML.

        The visitor gets a copy, a file like those that are uploaded. search: that the hit is one of. turn: of
        the choice of a part (see `look_at`).
        """
        number, hits = session.found
        if number != search or not 0 <= index < len(hits):
            session.problem = markup.problem("That search is over: search again.")
            return session.problem
        hit = hits[index]
        if not session.show(session.opened.get(hit.path, "")):
            name = file_name(Path(hit.path).name)
            if self.library is None or not self.library.has(hit):
                session.problem = markup.problem(f"{name} is gone or has changed: search again.")
                return session.problem
            try:
                with self.slot.using() as chat:
                    chat.probe(ShownMedia(hit.path, name))  # too large or too long: before it is copied
                copy = self.sessions.copy(hit.path, client)
            except OSError:
                session.problem = markup.problem(f"{name} is not there any more: search again.")
                return session.problem
            except (FluxChatError, ApiError) as error:
                session.problem = markup.problem(_sentence(error))
                return session.problem
            if problem := self.add(session, [copy]):
                return problem
            session.opened[hit.path] = copy
        assert session.current is not None
        if session.current.is_image:
            return self.look_at(session, session.current.path, 0, None, None, turn)
        end = None if hit.end_s >= session.current.info.duration_s else hit.end_s
        return self.look_at(session, session.current.path, hit.start_s, end, None, turn)

    # -- cost -----------------------------------------------------------------------------------------------

    def pricing(self, session: Session) -> list[str]:
        """The two pieces of `cost` while the cost is being estimated."""
        choices = markup.presets(self._presets(), self.chat.model.default_tokens)
        if not session.media:
            return [choices, markup.notice(EMPTY_COST)]
        if self.chat.calibrated:
            return [choices, markup.notice("Working out the price …")]
        return [choices, markup.notice("Measuring how fast this machine is: some seconds, once …")]

    def cost(self, session: Session, settings: Settings) -> list[str]:
        """What the session's next question costs: the three choices in plain words, and the figures."""
        chosen = None if settings.auto else self._tokens(settings)
        media = tuple(session.media)  # another event may remove one meanwhile
        if not media:
            return [markup.presets(self._presets(), chosen), markup.notice(EMPTY_COST)]
        try:
            budget = settings.budget
            with self.slot.using() as chat:
                choices = [
                    (
                        name,
                        tokens,
                        self._estimates(chat, session, replace(settings, tokens=tokens, auto=False), media),
                    )
                    for name, tokens, _ in self._presets()
                ]
                estimates = self._estimates(chat, session, settings, media)
        except FluxChatError as error:
            return [markup.presets(self._presets(), chosen), markup.problem(_sentence(error))]
        return [markup.presets(choices, chosen), markup.cost_line(estimates, budget.seconds)]

    def _presets(self) -> list[tuple[str, int, list[Estimate]]]:
        return [(name, tokens, []) for name, tokens in self.range.presets(self.chat.model.default_tokens)]

    def _tokens(self, settings: Settings) -> int | None:
        """The slider's place; None where its field holds no number."""
        try:
            return self.range.near(int(settings.tokens))
        except (TypeError, ValueError, OverflowError):
            return None

    def _estimates(
        self,
        chat: VideoChat,
        session: Session,
        settings: Settings,
        media: Sequence[Media] | None = None,
        question: str = "",
    ) -> list[Estimate]:
        """The price of each medium (default: the session's) for the next question; raises FluxChatError.

        After an answer about the same media within the same budget, only what is new is read. A long video
        is priced in parts where it is asked about so; question: may name a time, whose surroundings are
        looked at instead, or besides.
        """
        media = tuple(session.media) if media is None else media
        budget, selector = settings.budget, settings.selector
        last = session.history[-1] if session.history else None
        new: int | None = None
        if last is not None and last.answer is not None and last.settings is not None:
            before = last.settings
            if (before.budget, before.selector, last.media) == (budget, selector, tuple(media)):
                new = QUESTION_TOKENS + last.answer.usage.completion_tokens
        first, film = self._film(chat, session, media)
        if film is not None and question and len(media) == 1:
            around = [
                chat.estimate(one.medium, budget, selector, scope=session.scope)
                for one in film.around(question, budget)
            ]
            if around and not session.history:
                return around
            return [film.estimate(budget, selector, new), *around]
        return [
            film.estimate(budget, selector, new if new is None or index == 0 else 0)
            if film is not None and medium == first
            else chat.estimate(
                medium.asked,
                budget,
                selector,
                scope=session.scope,
                new_tokens=new if new is None or index == 0 else 0,
            )
            for index, medium in enumerate(media)
        ]

    def _film(
        self, chat: VideoChat, session: Session, media: Sequence[Media]
    ) -> tuple[Media | None, LongVideo | None]:
        """The one that is shown first and alone, and it as a long video where it is shown in parts."""
        first: list[Media] = []
        for turn in session.history:
            if first := [medium for medium in media if medium in turn.media]:
                break
        first = first or list(media)
        if len(first) != 1 or first[0].is_image:
            return None, None
        return first[0], long_video(chat, first[0].asked, session.scope)

    def strip(self, session: Session, settings: Settings) -> str:
        """The frames of the shown video with the patches that the budget keeps, before any question."""
        medium = session.current
        if medium is None:
            return ""
        index = session.index(medium.path) or 0
        try:
            with self.slot.using() as chat:
                first, film = self._film(chat, session, tuple(session.media))
                film = film if medium == first else None
                shown = [Showing(medium.asked, 0, settings.budget)]
                parts = shown if film is None else film.shown(settings.budget)
                seen = [
                    chat.preview(one.medium, one.budget, settings.selector, scope=session.scope)
                    for one in parts
                ]
        except FluxChatError as error:
            return markup.problem(_sentence(error))
        kept = sum(len(one.kept.indices) for one in seen)
        size = sum(one.kept.grid.size for one in seen)
        in_parts = "" if film is None else f" in {_parts_of(len(parts))}"
        label = f"What the model will look at{in_parts}: {kept} of {size} patches"
        frames = markup.strip([(one.frames, one.kept) for one in seen], index, side=THUMBNAIL, label=label)
        return f"<h2>{label}</h2>{frames}"

    # -- chapters -------------------------------------------------------------------------------------------

    def chapters(self, session: Session) -> str:
        """The chapters of the video in the player as far as they are known, or what offers them, as HTML;
        empty where it is not long."""
        medium = session.current
        if medium is None or medium.is_image:
            return ""
        start_s, end_s = medium.part.range_s(medium.info)
        if end_s - start_s < LONG_S:
            return ""
        found = session.chapters.get((medium.path, medium.part))
        if found is None:
            return markup.long_note(LONG_NOTE)
        return markup.chapters(found, session.index(medium.path) or 0)

    def find_chapters(self, session: Session, path: str, settings: Settings) -> Iterator[str | None]:
        """Describe the chapters of a video: yields `chapters` as each is there, None where the player shows
        something else meanwhile."""
        index = session.index(path)
        if index is None or session.listing is not None:
            return
        medium = session.media[index]
        place = medium.path, medium.part
        stop = session.listing = StopSignal()
        session.problem = ""
        session.busy += 1
        found: list[Chapter] = []

        def shown(phase: str = "") -> str | None:
            current = session.current
            if current is None or (current.path, current.part) != place:
                return None
            return markup.chapters(found, session.index(path) or 0, phase=phase)

        try:
            yield shown("Finding where the picture changes")
            with self.slot.using(stop, after_loading=True) as chat:
                options: dict[str, Any] = {
                    "selector": settings.selector,
                    "scope": session.scope,
                    "stop": stop,
                }
                film = LongVideo(chat, medium.asked, session.scope, stop.check)
                for chapter in film.chapters(budget=settings.budget, **options):
                    stop.check()
                    found.append(chapter)
                    yield shown(f"Looking at chapter {len(found) + 1}")
                session.chapters[place] = tuple(found)
        except Stopped:
            if found:
                session.chapters[place] = tuple(found)
        except FluxChatError as error:
            session.problem = markup.problem(_sentence(error))
        finally:
            session.listing = None
            session.busy -= 1
            if session.closed:
                self.chat.forget(session.scope)
        current = session.current
        yield self.chapters(session) if current and (current.path, current.part) == place else None

    def stop_chapters(self, session: Session) -> None:
        """No more chapters; those that are there stay."""
        if (listing := session.listing) is not None:
            listing.set()

    def suggestions(self, session: Session) -> str:
        """Three questions that fit the model and what is shown; nothing without media."""
        medium = session.current
        if medium is None:
            return ""
        if medium.is_image:
            return markup.suggestions(IMAGE_QUESTIONS)
        return markup.suggestions(DRAWN_QUESTIONS if self.needs_video else VIDEO_QUESTIONS)

    # -- asking ---------------------------------------------------------------------------------------------

    @property
    def needs_video(self) -> bool:
        """Whether this model was taught about videos alone, and invents one where there is none."""
        return self.chat.model.tower.familiarity is not None

    def begin(
        self, session: Session, question: str, settings: Settings | None = None, at: int | None = None
    ) -> bool:
        """Put a question behind those that wait, or in place of turn `at` and all that was answered after it.

        Nothing that was asked is lost: an answer under way goes on, unless it is replaced, and where answers
        would go, the conversation branches: the browser keeps the old one. False, with nothing changed but
        `session.problem`, if the question is empty or there is nothing to ask about.
        """
        if not question.strip():
            return False
        if self.needs_video and not session.media:
            session.problem = markup.problem(NO_VIDEO)
            return False
        turn = Turn(question.strip(), settings, phase=WAITS, parts={m.path: m.part for m in session.media})
        try:
            self._check_length(turn.question)
        except ConfigError as error:  # a long text must not stay in the session
            turn = Turn(f"{turn.question[:SHOWN]} …", error=_sentence(error))
        with session.lock:
            current = session.waiting
            if at is None:
                session.turns.append(turn)
            else:
                replaced, after = session.turns[at], session.turns[at + 1 :]
                replaced.stop.set()
                if replaced.done and (turn.question != replaced.question or any(t.done for t in after)):
                    session.rename(session.conversation)
                if replaced.done or replaced is current:
                    queued = [later for later in after if not later.done and later is not current]
                    if current is not None and current in after:
                        current.stop.set()
                    session.turns[at:] = [turn, *queued]
                else:  # it waits still: those around it are not touched
                    session.turns[at] = turn
            if session.waiting is turn:
                turn.phase = "Waiting for its turn"
            del session.turns[: max(0, len(session.turns) - MAX_TURNS)]
        return True

    def run(self, session: Session, settings: Settings) -> Iterator[list[dict[str, Any]]]:
        """Answer what waits, one question after the other: yields the messages as they grow.

        settings: for questions that were begun without. Where the session's questions are being answered
        already, they are answered there.
        """
        with session.lock:
            if session.answering:
                yield self.messages(session)
                return
            session.answering = True
        session.busy += 1
        try:
            yield self.messages(session)
            while (turn := session.next_turn()) is not None:
                yield from self._run_turn(session, turn, turn.settings or settings)
        finally:
            session.answering = False
            session.busy -= 1
            if session.closed:
                self.chat.forget(session.scope)

    def _run_turn(self, session: Session, turn: Turn, settings: Settings) -> Iterator[list[dict[str, Any]]]:
        turn.media = tuple(
            replace(medium, part=turn.parts.get(medium.path, medium.part)) for medium in session.media
        )
        turn.settings = settings
        if (loading := self.slot.loading) is not None:
            turn.phase = f"Waiting for {loading.choice.title} to load"
            yield self.messages(session)
        with self.slot.using(turn.stop, after_loading=True) as chat:
            yield from self._answer_turn(chat, session, turn, settings)

    def _answer_turn(
        self, chat: VideoChat, session: Session, turn: Turn, settings: Settings
    ) -> Iterator[list[dict[str, Any]]]:
        turn.phase = "Waiting for its turn"
        history = [earlier for earlier in session.history if earlier is not turn]
        try:
            turn.predicted_s = self._predicted_s(chat, session, settings, turn.media, turn.question)
            for text, thinking, phase, answer in self._answer(
                chat, session, turn.media, turn.question, settings, turn.stop, history
            ):
                if answer is not None:
                    turn.details = self._details(
                        chat, session, turn.media, settings, answer, turn.question, history, turn.predicted_s
                    )
                turn.text, turn.thinking, turn.phase, turn.answer = text, thinking, phase, answer
                yield self.messages(session)
        except FluxChatError as error:
            turn.error, turn.phase = _sentence(error), ""
            yield self.messages(session)
        finally:
            if not turn.done:  # the tab was closed
                turn.error, turn.phase = "Stopped.", ""

    def _predicted_s(
        self,
        chat: VideoChat,
        session: Session,
        settings: Settings,
        media: Sequence[Media],
        question: str,
    ) -> float | None:
        """Seconds to the first word that the page has foretold; None before the machine was measured."""
        if not (media and chat.calibrated):
            return None
        estimates = self._estimates(chat, session, settings, media, question)
        return sum(estimate.first_token_s for estimate in estimates)

    def stop(self, session: Session) -> None:
        """End the answer under way within one token, or the comparison; what waits is answered next."""
        session.stop.set()
        if (turn := session.waiting) is not None:
            turn.stop.set()

    def clear(self, session: Session) -> None:
        """A new conversation about the same videos."""
        session.cleared += 1
        self._clear(session)

    def _clear(self, session: Session) -> None:
        session.halt()
        with session.lock:
            session.turns.clear()
            session.rename()
        session.problem = ""

    def empty(self, session: Session) -> None:
        """A new conversation about nothing yet."""
        self.clear(session)
        self._remove_media(session)

    def _remove_media(self, session: Session) -> None:
        while session.media:
            self.sessions.remove(session, session.media[0].path)

    def reopen(self, session: Session, kept: Any, paths: Sequence[str | None], turn: int = 0) -> bool:
        """Go on with a conversation that the browser kept; False, with a problem shown, when it is none.

        paths: where its videos and images are now, in its order; None for those that are gone. turn: grows
        with each conversation that the browser asks for; one that was asked for before another gives way to
        it, and False is returned. One that is begun anew meanwhile stays without its turns.
        """
        try:
            conversation = Kept.of(kept)
        except ConfigError as error:
            session.problem = markup.problem(_sentence(error))
            return False
        with session.lock:
            session.opening = max(session.opening, turn)
            cleared = session.cleared
        with session.reopening:
            return self._reopen(session, conversation, paths, turn, cleared)

    def _reopen(
        self, session: Session, conversation: Kept, paths: Sequence[str | None], turn: int, cleared: int
    ) -> bool:
        if turn < session.opening:
            return False
        self._clear(session)
        self._remove_media(session)
        found: list[Media | None] = []
        for path in (*paths, *[None] * len(conversation.media))[: len(conversation.media)]:
            if turn < session.opening:
                return False
            if path is None:
                found.append(None)
                continue
            problem = self.add(session, [path])
            found.append(None if problem else session.current)
            if problem:
                break
        with session.lock:
            if turn < session.opening or cleared != session.cleared:
                return False
            session.turns[:] = conversation.turns_about(found)
            session.conversation, session.parent = conversation.id, conversation.parent
        session.shown = 0
        return True

    def dismiss(self, session: Session) -> None:
        """Take the problem away."""
        session.problem = ""

    def compare(
        self,
        session: Session,
        question: str,
        settings: Settings,
        sides: Sequence[tuple[int, Selector]],
        other: str | None = None,
    ) -> Iterator[list[str]]:
        """The same question at several budgets, with several selectors or models, answered at the same time:
        yields one piece of HTML for each. At the end, words that the others did not say are marked.

        sides: tokens and selector of each. other: the model that answers the last, by the name of its choice;
        it is loaded for this comparison.
        """
        if not question.strip():
            yield [markup.problem("The question is empty: ask something in words.") for _ in sides]
            return
        if not session.media:
            yield [markup.problem("There is no video yet: add one first.") for _ in sides]
            return
        session.halt()
        stop = session.stop = threading.Event()
        with self.slot.using(stop, after_loading=True) as chat:
            if other is None:
                yield from self._compare(session, question, settings, sides, [chat] * len(sides))
            else:
                yield from self._compare_beside(session, question, settings, sides, chat, other)

    def _compare_beside(
        self,
        session: Session,
        question: str,
        settings: Settings,
        sides: Sequence[tuple[int, Selector]],
        chat: VideoChat,
        other: str,
    ) -> Iterator[list[str]]:
        """A comparison whose last side another model answers, which is loaded first and freed at the end."""
        stop, begun = session.stop, time.monotonic()
        try:
            choice = self.slot.choice(other)
            with Beside(self.slot, choice) as beside:
                while not beside.ready(YIELD_S * 10):
                    if stop.is_set():
                        return
                    waiting = f"Loading {choice.title}, {time.monotonic() - begun:.0f} s"
                    yield [f'<p class="fc-phase">{escape(waiting)} …</p>'] * len(sides)
                chats = [*[chat] * (len(sides) - 1), beside.chat]
                yield from self._compare(session, question, settings, sides, chats)
                chats.clear()
        except FluxChatError as error:
            yield [*[""] * (len(sides) - 1), markup.problem(_sentence(error))]

    def _compare(
        self,
        session: Session,
        question: str,
        settings: Settings,
        sides: Sequence[tuple[int, Selector]],
        chats: Sequence[VideoChat],
    ) -> Iterator[list[str]]:
        """chats: the model of each side."""
        stop, media = session.stop, tuple(session.media)
        names = [chat.name if len({id(c) for c in chats}) > 1 else "" for chat in chats]
        sides = [
            (tokens if chat is self.chat else Range.of(chat.model).near(int(tokens)), selector)
            for (tokens, selector), chat in zip(sides, chats, strict=True)
        ]
        chosen = [
            replace(settings, tokens=int(tokens), auto=False, selector=selector) for tokens, selector in sides
        ]
        updates: queue.Queue[tuple[int, _Side | None]] = queue.Queue()

        def work(index: int) -> None:
            side = _Side()
            try:
                chat = chats[index]
                for text, thinking, phase, answer in self._answer(
                    chat, session, media, question, chosen[index], stop, []
                ):
                    details = (
                        ""
                        if answer is None
                        else self._details(chat, session, media, chosen[index], answer, question, [])
                    )
                    side = _Side(text, thinking, phase, details)
                    updates.put((index, side))
            except FluxChatError as error:
                updates.put((index, replace(side, phase="", problem=_sentence(error))))
            finally:
                updates.put((index, None))

        session.busy += 1
        workers = [
            threading.Thread(target=work, args=(i,), name="fluxchat-compare") for i in range(len(sides))
        ]
        shown, running = [_Side(phase="Waiting for its turn") for _ in sides], len(sides)
        try:
            for worker in workers:
                worker.start()
            while running:
                index, side = updates.get()
                if side is None:
                    running -= 1
                else:
                    shown[index] = side
                    yield self._panels(session, shown, sides, names)
            yield self._panels(session, shown, sides, names, marked=True)
        finally:
            stop.set()
            for worker in workers:
                worker.join()
            session.busy -= 1
            if session.closed:
                self.chat.forget(session.scope)

    def _panels(
        self,
        session: Session,
        shown: Sequence[_Side],
        sides: Sequence[tuple[int, Selector]],
        names: Sequence[str],
        *,
        marked: bool = False,
    ) -> list[str]:
        panels = []
        for side, (tokens, selector), name in zip(shown, sides, names, strict=True):
            others = [other.text for other in shown if other is not side] if marked else []
            said = markup.said_alone(side.text, others, session.duration_s)
            head = " · ".join(filter(None, (name, f"{int(tokens)} tokens", selector)))
            waiting = f'<p class="fc-phase">{side.phase} …</p>' if side.phase else ""
            problem = markup.problem(side.problem) if side.problem else ""
            panels.append(
                f"<h3>{escape(head)}</h3>{markup.thoughts(side.thinking)}"
                f"<p>{said}</p>{waiting}{problem}{side.details}"
            )
        return panels

    def messages(self, session: Session) -> list[dict[str, Any]]:
        """The conversation for the chat display: two messages for every turn."""
        shown: list[dict[str, Any]] = []
        for turn in session.turns:
            chips = markup.part_chips([replace(m, part=turn.parts.get(m.path, m.part)) for m in turn.media])
            asked = [self._component(chips), turn.question] if chips else turn.question
            shown.append({"role": "user", "content": asked})
            text = markup.link_times(turn.text, session.duration_s)
            if turn.phase:
                text = f"{text}\n\n*{turn.phase} …*" if text else f"*{turn.phase} …*"
            if turn.error:
                text = f"{text}\n\n**{turn.error}**" if text else f"**{turn.error}**"
            content: list[Any] = [markup.thoughts(turn.thinking) + (text or "*No words came.*")]
            if turn.details:
                content.append(self._component(turn.details))
            shown.append({"role": "assistant", "content": content})
        return shown

    def _component(self, html: str) -> ComponentMessage:
        """HTML as a component inside a chat message."""
        return ComponentMessage(
            component="html", value=html, constructor_args={}, props={**self._html, "value": html}
        )

    def _answer(
        self,
        chat: VideoChat,
        session: Session,
        media: Sequence[Media],
        question: str,
        settings: Settings,
        stop: threading.Event,
        history: Sequence[Turn],
    ) -> Iterator[tuple[str, str, str, Answer | None]]:
        """Yields (text so far, thoughts so far, current phase, the answer at the end), at most every YIELD_S
        seconds."""
        self._check_length(question, settings.system, chat=chat)
        updates: queue.Queue[str | None] = queue.Queue()
        phase = ""

        def report(what: str, index: int, count: int) -> None:
            nonlocal phase
            phase = PHASES[what] + (f" of video {index + 1}" if count > 1 and what == "decode" else "")
            if isinstance(what, Step) and what.parts > 1:
                phase += f", part {what.part} of {what.parts}"
            updates.put("")

        options = settings.options()
        system = options.pop("system")
        messages = conversation_messages(media, history, question)
        if system:
            messages.insert(0, Message.of("system", system))
        stream = chat.stream_messages(
            messages, scope=session.scope, progress=report, stop=stop, parts=True, **options
        )
        if not history and self._film(chat, session, media)[1] is not None:
            phase = "Finding where the picture changes"
            updates.put("")
        failed: list[BaseException] = []

        def work() -> None:
            try:
                stream.on_thinking(lambda piece: updates.put(Thought(piece)))
                for piece in stream:
                    updates.put(piece)
            except BaseException as error:  # noqa: BLE001 - raised again by the reader below
                failed.append(error)
            finally:
                updates.put(None)

        worker = threading.Thread(target=work, name="fluxchat-answer", daemon=True)
        worker.start()
        text, thinking, shown, unseen = "", "", 0.0, False
        try:
            while True:
                try:
                    piece = updates.get(timeout=YIELD_S if unseen else None)
                except queue.Empty:
                    piece = ""
                if piece is None:
                    break
                if isinstance(piece, Thought):
                    thinking, phase = thinking + piece, "Thinking"
                elif piece:
                    text, phase = text + piece, ""
                unseen = True
                if (now := time.monotonic()) - shown >= YIELD_S:
                    shown, unseen = now, False
                    yield text, thinking, phase, None
        except GeneratorExit:  # the tab was closed
            stream.stop()
            raise
        finally:
            worker.join()
        if failed:
            if isinstance(failed[0], FluxChatError):
                raise failed[0]
            LOG.error("An answer failed", exc_info=failed[0])
            raise FluxChatError(UNEXPECTED_ERROR)
        yield stream.answer.text, stream.answer.thinking, "", stream.answer

    def _check_length(self, *texts: str, chat: VideoChat | None = None) -> None:
        """Raises ConfigError for texts too long for the model, before they are tokenised."""
        limit = longest_text(chat or self.chat)
        if sum(map(len, texts)) > limit:
            raise ConfigError(f"That is too long: a question has at most {limit} characters.")

    def _details(
        self,
        chat: VideoChat,
        session: Session,
        media: Sequence[Media],
        settings: Settings,
        answer: Answer,
        question: str,
        history: Sequence[Turn],
        predicted_s: float | None = None,
    ) -> str:
        """HTML under an answer, folded into one line: strips of frames with kept patches, tokens, times.

        Of a long video the strip has the frames of all parts that were looked at.
        """
        asked = conversation_messages(media, history, question) if answer.kept else []
        views = [
            one
            for message in showings(chat, asked, settings.budget, parts=True, scope=session.scope)[0]
            for one in message.content
            if isinstance(one, Showing)
        ]
        seen: dict[int, list[tuple[Tensor, KeptTokens]]] = {}
        places = {medium.path: index for index, medium in enumerate(media)}
        for view, kept in zip(views, answer.kept, strict=False):
            frames = chat.preview(view.medium, view.budget, settings.selector, scope=session.scope).frames
            path = str(view.medium.source)
            session.thumbnails.setdefault(path, data_url(Image.fromarray(frames[0].numpy()), 96))
            if len(frames) == kept.grid.frames:
                seen.setdefault(places[path], []).append((frames, kept))
        strips = [
            markup.strip(
                seen[index], index, side=THUMBNAIL, label=f"What it looked at in {media[index].name}"
            )
            for index in sorted(seen)
        ]
        return markup.evidence(answer, strips, predicted_s)

    # -- API endpoints --------------------------------------------------------------------------------------

    def api_ask(
        self, video: str | None, question: str, budget: str = "", *, scope: str = ""
    ) -> tuple[str, dict[str, Any]]:
        """Answer one question about a video or image.

        Args:
            video: the video or image file
            question: what you want to know
            budget: tokens to keep: a number, "full", "auto" or "auto:SECONDS"; empty: the model's own
        """
        self._check_length(question)
        with self.slot.using(after_loading=True) as chat:
            answer = chat.ask(video, question, budget=budget.strip() or None, scope=scope, parts=True)
        return answer.text, answer.to_dict()

    def api_estimate(self, video: str | None, budget: str = "") -> dict[str, Any]:
        """What a token budget costs on a video, before anything runs.

        Args:
            video: the video or image file
            budget: tokens to keep: a number, "full", "auto" or "auto:SECONDS"; empty: the model's own
        """
        if video is None:
            raise ConfigError("An estimate needs a video: give one.")
        with self.slot.using() as chat:
            return asdict(price(chat, video, budget.strip() or None))


def conversation_messages(
    media: Sequence[Media], history: Sequence[Turn], question: str
) -> list[Message[ShownMedia]]:
    """The messages of a question after earlier turns. Each medium stands in the turn that first asked about
    it, so that the KV cache of earlier turns stays valid when another is added; removed media are left out.

    Raises ConfigError for an empty question.
    """
    waiting = list(media)
    messages: list[Message[ShownMedia]] = []
    for turn in history:
        new = [medium for medium in waiting if medium in turn.media]
        waiting = [medium for medium in waiting if medium not in new]
        messages.append(Message("user", (*_parts(new), turn.question)))
        messages.append(Message.of("assistant", turn.text))
    messages.append(Message("user", (*_parts(waiting), question_text(question))))
    return messages


def _parts_of(count: int) -> str:
    return "1 part" if count == 1 else f"{count} parts"


def way_out(sentence: str, name: str) -> str:
    """The command that makes a readable file of one whose codec is refused; empty for other errors."""
    if "codec" not in sentence:
        return ""
    made = shlex.quote(f"{Path(name).stem}-h264.mp4")
    return f"ffmpeg -i {shlex.quote(name)} -c:v libx264 -pix_fmt yuv420p -c:a aac {made}"


def _parts(media: Sequence[Media]) -> tuple[ShownMedia, ...]:
    return tuple(medium.asked for medium in media)


def _sentence(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())
