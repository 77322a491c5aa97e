"""The Gradio page: `build` makes the Blocks and connects the events of its controls to their handlers.

    page = build(VideoChat())
    page.launch(**page_options())

A video on the left, a conversation about it on the right, and the cost before every question. `fluxchat web`
serves it together with the API (app/server/launch.py).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Iterator
from typing import Any

import gradio as gr

from app.chat import VideoChat
from app.library.library import Library
from app.model_slot import ModelSlot
from app.page.handlers import Handlers
from app.page.html import notice, part_chips, path_of, shelf, taken
from app.page.kept import record
from app.page.layout import SAME, Controls, Examples, default_examples, page_options
from app.page.library_search import LibrarySearch
from app.page.model_events import connect_models
from app.page.sessions import Session, Sessions
from app.page.settings import Settings
from app.server.media.store import MediaStore
from encoder.errors import FluxChatError

__all__ = ["build", "page_options"]


def build(
    chat: VideoChat | ModelSlot,
    examples: Examples | None = None,
    *,
    workers: int = 1,
    store: MediaStore | None = None,
    login: bool = False,
    loads: bool = False,
    library: Library | None = None,
) -> gr.Blocks:
    """The page around one model, not launched.

    examples: (file, question) pairs to start from; None takes those that ship with the model. workers:
    answers computed at the same time. store: where uploads are, when a server receives them. login: whether
    visitors have logged in, so that the page offers to log out. loads: whether they may load another model
    in this one's place, where `chat` is a slot that can. library: may be searched, and its videos be opened,
    by every visitor. The page's attribute `sessions` holds the visitors' sessions.
    """
    slot = ModelSlot.of(chat)
    loads = loads and slot.can_load
    sessions = Sessions(slot.forget, store=store)
    handlers = Handlers(slot, sessions, None if library is None else LibrarySearch(library))
    # Gradio deletes files by age, also those in use: the sessions delete them instead.
    page = gr.Blocks(title="FluxChat", analytics_enabled=False, delete_cache=None, fill_width=True)
    with page:
        examples = default_examples() if examples is None else examples
        controls = Controls(slot, examples, login=login, loads=loads, library=library is not None)
        refresh = _connect_events(controls, handlers, examples, workers)
        if loads:
            connect_models(page, controls, handlers, examples, refresh)
        _add_api_endpoints(handlers)
        page.unload(_on_unload(sessions))
        if login:
            page.load(_owner, None, controls.owner, api_visibility="private", queue=False)
    page.queue(max_size=16, default_concurrency_limit=workers)
    page.sessions = sessions  # type: ignore[attr-defined]
    return page


def _connect_events(
    controls: Controls, handlers: Handlers, examples: Examples, workers: int
) -> Callable[[Any], Any]:
    """Connect the events of the controls to the handlers; what makes the price anew after another event."""
    sessions = handlers.sessions
    # Of an event that carries data, Gradio's "once" drops the next and "always_last" sends the first again.
    quick: dict[str, Any] = {
        "api_visibility": "private",
        "concurrency_limit": 4,
        "show_progress": "hidden",
        "trigger_mode": "multiple",
    }
    # Of one that only reads the controls.
    last: dict[str, Any] = {**quick, "trigger_mode": "always_last"}
    slow: dict[str, Any] = {
        "api_visibility": "private",
        "concurrency_id": "model",
        "concurrency_limit": workers,
        "show_progress": "hidden",
    }

    def session_of(request: gr.Request) -> Session:
        return sessions.get(str(request.session_hash))

    def media_updates(session: Session) -> list[Any]:
        return [
            shelf(session.media, session.shown, session.next_revision()),
            session.problem,
            *handlers.pricing(session),
            notice("Reading the frames …") if session.media else "",
            handlers.suggestions(session),
            part_chips(session.media, clearable=True),
            handlers.chapters(session),
        ]

    media_outputs = [
        controls.shelf,
        controls.problem,
        controls.presets,
        controls.cost,
        controls.strip,
        controls.suggestions,
        controls.parts,
        controls.chapters,
    ]

    def on_files(event: gr.EventData, request: gr.Request) -> list[Any]:
        session = session_of(request)
        handlers.add(session, sessions.uploaded(event.files))
        return media_updates(session)

    def on_refused(event: gr.EventData, request: gr.Request) -> str:
        return handlers.refuse(session_of(request), str(event.text))

    controls.shelf.refused(on_refused, None, controls.problem, **quick)

    def on_medium_select(event: gr.EventData, request: gr.Request) -> list[Any]:
        session = session_of(request)
        session.show(path_of(event.source))
        return media_updates(session)

    def on_medium_remove(event: gr.EventData, request: gr.Request) -> list[Any]:
        session = session_of(request)
        sessions.remove(session, path_of(event.source))
        return media_updates(session)

    def on_part(event: gr.EventData, request: gr.Request) -> list[Any]:
        session, path = session_of(request), path_of(event.source)
        handlers.look_at(session, path, event.start, event.end, event.region, int(event.turn))
        return media_updates(session)

    def on_overtaken(request: gr.Request) -> list[Any]:
        session = session_of(request)
        updates = media_updates(session)  # first: what is read after its number is drawn is no older than it
        return [*updates, handlers.messages(session)]

    def on_search(event: gr.EventData, request: gr.Request) -> str:
        return handlers.search(session_of(request), str(event.text), int(event.turn))

    def on_hit(event: gr.EventData, request: gr.Request) -> list[Any]:
        session, where = session_of(request), (int(event.index), int(event.search), int(event.turn))
        handlers.open_hit(session, *where, _client_id(request))
        return media_updates(session)

    def on_clip(event: gr.EventData, request: gr.Request) -> list[str]:
        session = session_of(request)
        made = handlers.clip(session, path_of(event.source), event.start, event.end, _client_id(request))
        return [made, session.problem]

    controls.shelf.clip(on_clip, None, [controls.made, controls.problem], **quick)

    def newest(compute: Callable[[Session, Settings], Any], session: Session, values: Any) -> Any:
        """What it computes; None if it was asked for again meanwhile: that result may be there."""
        session.asked_for[compute.__name__] += 1
        number = session.asked_for[compute.__name__]
        computed = compute(session, Settings(*values))
        return computed if number == session.asked_for[compute.__name__] else None

    def cost(request: gr.Request, *values: Any) -> list[Any]:
        return newest(handlers.cost, session_of(request), values) or [gr.skip(), gr.skip()]

    def strip(request: gr.Request, *values: Any) -> Any:
        frames = newest(handlers.strip, session_of(request), values)
        return gr.skip() if frames is None else frames

    prices = [controls.presets, controls.cost]

    def refresh(event: Any) -> Any:
        priced = event.then(cost, controls.settings, prices, **last)
        return priced.then(strip, controls.settings, controls.strip, **last)

    for event in (
        controls.shelf.files(on_files, None, media_outputs, **quick),
        controls.shelf.select(on_medium_select, None, media_outputs, **quick),
        controls.shelf.delete(on_medium_remove, None, media_outputs, **quick),
        controls.shelf.part(on_part, None, media_outputs, **quick),
        controls.shelf.overtaken(on_overtaken, None, [*media_outputs, controls.chat], **quick),
    ):
        refresh(event)

    if controls.found is not None:
        controls.shelf.search(on_search, None, controls.found, **quick)
        refresh(controls.shelf.hit(on_hit, None, media_outputs, **quick))

    at_once: dict[str, Any] = {
        "queue": False,
        "api_visibility": "private",
        "show_progress": "hidden",
        "trigger_mode": "multiple",
    }

    controls.budget.input(cost, controls.settings, prices, **last)
    controls.budget.release(strip, controls.settings, controls.strip, **last)
    # An update of a component's properties would make it anew, with Gradio's own reading of numbers.
    controls.auto.change(
        None, controls.auto, None, js="(auto) => { document.querySelector('#fluxchat-budget').inert = auto; }"
    )
    for control in (controls.auto, controls.seconds, controls.selector, controls.frames, controls.resolution):
        control.change(cost, controls.settings, prices, **last)
        control.change(strip, controls.settings, controls.strip, **last)

    idle = [gr.update(visible=True), gr.update(visible=False)]
    buttons = [controls.send, controls.stop]

    def buttons_of(session: Session) -> list[Any]:
        # A question can be sent at any time: it waits behind the one that is answered.
        return [gr.update(visible=True), gr.update(visible=session.waiting is not None)]

    asking = [controls.taken, controls.chat, controls.problem, controls.record, *buttons]

    def recorded(session: Session, fresh: Collection[str] = ()) -> str:
        return record(session, handlers.chat.name, fresh)

    def asked(session: Session, question: str = "") -> list[Any]:
        """Updates of `asking` after a question. question: as its box held it, which the page then empties."""
        said = [handlers.messages(session), session.problem, recorded(session)]
        done = taken(question, session.next_revision()) if question else gr.skip()
        return [done, *said, *buttons_of(session)]

    def on_ask(question: str, request: gr.Request, *values: Any) -> list[Any]:
        session = session_of(request)
        begun = handlers.begin(session, question, Settings(*values))
        return asked(session, question if begun else "")

    def on_suggestion(event: gr.EventData, request: gr.Request, *values: Any) -> list[Any]:
        session = session_of(request)
        handlers.begin(session, str(event.text), Settings(*values))
        return asked(session)

    def on_example(event: gr.EventData, request: gr.Request) -> list[Any]:
        session = session_of(request)
        path, question = examples[int(event.index) % len(examples)]
        handlers.start_example(session, path, question, _client_id(request))
        shelf, _, *others = media_updates(session)
        return [*asked(session), shelf, *others]

    def on_retry(request: gr.Request, event: gr.RetryData, *values: Any) -> list[Any]:
        session = session_of(request)
        turn = min(_turn_of(event.index), len(session.turns) - 1)
        if turn >= 0:
            handlers.begin(session, session.turns[turn].question, Settings(*values), turn)
        return asked(session)

    def on_edit(request: gr.Request, event: gr.EditData, *values: Any) -> list[Any]:
        session = session_of(request)
        turn = _turn_of(event.index)
        if turn < len(session.turns):
            handlers.begin(session, str(event.value), Settings(*values), turn)
        return asked(session)

    def stream_answer(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        session = session_of(request)
        before = {turn.key for turn in session.turns if turn.done}
        for messages in handlers.run(session, Settings(*values)):
            done = {turn.key for turn in session.turns if turn.done}
            kept = gr.skip() if done <= before else recorded(session, done - before)
            before |= done
            yield [messages, kept, *buttons_of(session)]
        yield [gr.skip(), gr.skip(), *buttons_of(session)]

    def then_answer(event: Any) -> Any:
        answer = event.then(
            stream_answer,
            controls.settings,
            [controls.chat, controls.record, *buttons],
            trigger_mode="multiple",
            **slow,
        )
        # What follows is cheaper, and what was foretold has been corrected.
        return answer.then(cost, controls.settings, prices, **last)

    settings = controls.settings
    sends = [controls.question.submit, controls.send.click]
    then_answer(gr.on(sends, on_ask, [controls.question, *settings], asking, **at_once))
    then_answer(controls.shelf.suggest(on_suggestion, settings, asking, **at_once))
    then_answer(controls.chat.retry(on_retry, settings, asking, **at_once))
    then_answer(controls.chat.edit(on_edit, settings, asking, **at_once))
    rest = [media_outputs[0], *media_outputs[2:]]
    example = controls.shelf.example(on_example, None, [*asking, *rest], **at_once)
    # Its price would come after the answer anyway, and measuring the machine would keep the answer waiting.
    then_answer(example).then(strip, settings, controls.strip, **last)

    def on_stop(request: gr.Request) -> None:
        handlers.stop(session_of(request))

    def on_clear(request: gr.Request) -> list[Any]:
        session = session_of(request)
        handlers.clear(session)
        return [[], session.problem, recorded(session), *idle]

    def on_reopen(event: gr.EventData, request: gr.Request) -> list[Any]:
        session = session_of(request)
        files = event.files if isinstance(event.files, list) else []
        paths = [next(iter(sessions.uploaded([file])), None) for file in files]
        reopened = handlers.reopen(session, event.kept, paths, int(event.turn))
        if int(event.turn) < session.opening:  # what is there now is half of another one
            return [gr.skip()] * (2 + len(buttons) + len(media_outputs))
        updates = media_updates(session)  # first, as in on_overtaken
        said = [handlers.messages(session), recorded(session) if reopened else gr.skip()]
        return [*said, *buttons_of(session), *updates]

    def on_dismiss(request: gr.Request) -> str:
        handlers.dismiss(session_of(request))
        return ""

    def on_chapters(event: gr.EventData, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        session = session_of(request)
        for found in handlers.find_chapters(session, path_of(event.source), Settings(*values)):
            yield [gr.skip() if found is None else found, session.problem]

    # Beside the answers, which they would hold up for as long as the list takes.
    beside = {**slow, "concurrency_id": "chapters", "trigger_mode": "multiple"}
    listed = [controls.chapters, controls.problem]
    controls.shelf.chapters(on_chapters, settings, listed, **beside)

    def on_chapters_stop(request: gr.Request) -> None:
        handlers.stop_chapters(session_of(request))

    controls.shelf.chapters_stop(on_chapters_stop, None, None, **at_once)
    controls.stop.click(on_stop, None, None, **at_once)
    controls.shelf.dismiss(on_dismiss, None, controls.problem, **at_once)
    for clear in (controls.chat.clear, controls.shelf.fresh):
        event = clear(on_clear, None, [controls.chat, controls.problem, controls.record, *buttons], **at_once)
        event.then(cost, controls.settings, prices, **last)
    refresh(
        controls.shelf.reopen(
            on_reopen, None, [controls.chat, controls.record, *buttons, *media_outputs], **quick
        )
    )

    def on_compare(
        request: gr.Request,
        question: str,
        first: int,
        one: Any,
        second: int,
        two: Any,
        model: str,
        *values: Any,
    ) -> Iterator[Any]:
        session, sides = session_of(request), [(first, one), (second, two)]
        other = None if model == SAME else model
        for panels in handlers.compare(session, question, Settings(*values), sides, other):
            yield [*panels, gr.update(visible=False), gr.update(visible=True)]
        yield [gr.skip(), gr.skip(), *idle]

    controls.go.click(
        on_compare,
        [
            controls.both,
            controls.first,
            controls.first_selector,
            controls.second,
            controls.second_selector,
            controls.other,
            *controls.settings,
        ],
        [controls.left, controls.right, controls.go, controls.halt],
        **slow,
    )
    controls.halt.click(on_stop, None, None, **at_once)
    return refresh


def _turn_of(index: Any) -> int:
    """The turn of a chat message by its index: each turn has two."""
    return int(index[0] if isinstance(index, (tuple, list)) else index) // 2


def _add_api_endpoints(handlers: Handlers) -> None:
    """Endpoints of Gradio's own API: /ask and /estimate, without a session."""
    video, question = gr.File(label="video", visible=False), gr.Textbox(label="question", visible=False)
    budget = gr.Textbox(label="budget", visible=False)
    text, facts = gr.Textbox(label="answer", visible=False), gr.JSON(label="facts", visible=False)

    def ask(
        video: str | None, question: str, budget: str = "", request: gr.Request | None = None
    ) -> tuple[str, dict[str, Any]]:
        try:
            return handlers.api_ask(video, question, budget, scope=_client_id(request))
        except FluxChatError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def estimate(video: str | None, budget: str = "") -> dict[str, Any]:
        try:
            return handlers.api_estimate(video, budget)
        except FluxChatError as error:
            raise gr.Error(str(error), print_exception=False) from error

    ask.__doc__, estimate.__doc__ = handlers.api_ask.__doc__, handlers.api_estimate.__doc__
    ask_button, estimate_button = gr.Button(visible=False), gr.Button(visible=False)
    ask_button.click(ask, [video, question, budget], [text, facts], api_name="ask", concurrency_id="model")
    estimate_button.click(estimate, [video, budget], facts, api_name="estimate", concurrency_limit=4)


def _client_id(request: gr.Request | None) -> str:
    """The client id, the scope of caches; a random one where there is none."""
    scope = getattr(getattr(request, "request", None), "scope", {})
    return str(scope.get("fluxchat.client") or secrets.token_urlsafe(16))


def _owner(request: gr.Request) -> str:
    """Whose conversations the browser is to show: a name of its own for each login and each key."""
    scope = getattr(request.request, "scope", {})
    # A login's is that of its name alone, as ever; no name that somebody chose begins with NUL.
    name = ("\0key " if scope.get("fluxchat.key") else "") + str(scope.get("fluxchat.name") or "")
    return f'<div hidden data-owner="{hashlib.sha256(name.encode()).hexdigest()[:24]}"></div>'


def _on_unload(sessions: Sessions) -> Any:
    def leave(request: gr.Request) -> None:
        sessions.close(str(request.session_hash))

    return leave
