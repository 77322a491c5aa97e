"""The page: a video on the left, a conversation about it on the right, and its price before every question.

    page = build(VideoChat())
    page.launch(**page_options())

`fluxchat web` serves it together with the API for programs (launch.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.chat import VideoChat
from app.page.handlers import Handlers
from app.page.html import notice, shelf
from app.page.layout import Examples, View, default_examples, page_options
from app.page.sessions import Session, Sessions
from app.page.settings import Settings
from app.server.media.store import MediaStore
from encoder.errors import FluxChatError

__all__ = ["build", "page_options"]


def build(
    chat: VideoChat,
    examples: Examples | None = None,
    *,
    workers: int = 1,
    store: MediaStore | None = None,
    login: bool = False,
) -> gr.Blocks:
    """The page around one model, not launched.

    examples: (file, question) pairs to start from; None takes those that ship with the model. workers:
    answers computed at the same time. store: where uploads are, when a server receives them. login: whether
    people had to log in, so that they can log out. The page's attribute `sessions` holds what its visitors
    have.
    """
    sessions = Sessions(chat.forget, store=store)
    handlers = Handlers(chat, sessions)
    # Gradio would delete by age what somebody still talks about: the sessions delete instead.
    page = gr.Blocks(title="FluxChat", analytics_enabled=False, delete_cache=None, fill_width=True)
    with page:
        examples = default_examples() if examples is None else examples
        view = View(chat, examples, login=login)
        _wire(view, handlers, examples, workers)
        _programs(handlers)
        page.unload(_leave(sessions))
    page.queue(max_size=16, default_concurrency_limit=workers)
    page.sessions = sessions  # type: ignore[attr-defined]
    return page


def _wire(view: View, handlers: Handlers, examples: Examples, workers: int) -> None:
    """Which event does what."""
    sessions = handlers.sessions
    quick: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 4, "show_progress": "hidden"}
    slow: dict[str, Any] = {
        "api_visibility": "private",
        "concurrency_id": "model",
        "concurrency_limit": workers,
        "show_progress": "hidden",
    }

    def session_of(request: gr.Request) -> Session:
        return sessions.get(str(request.session_hash))

    def media_changed(session: Session, error: str, time_s: float = 0) -> list[Any]:
        current = session.current
        image = current is not None and current.is_image
        path = None if current is None else current.path
        video = None if image else path
        return [
            gr.Video(value=video, playback_position=time_s, visible=not image),
            gr.Image(value=path if image else None, visible=image),
            shelf(session.media, session.shown) if session.media else "",
            error,
            handlers.pricing(session),
            notice("Reading the frames …") if session.media else "",
        ]

    media_outputs = [view.video, view.image, view.shelf, view.problem, view.cost, view.strip]

    def video_changed(path: str | None, request: gr.Request) -> list[Any]:
        session = session_of(request)
        if path == (session.current and session.current.path):
            # The player tells what it was told to show (or to let go of): any error stays to be read.
            return [gr.skip()] * len(media_outputs)
        error = handlers.show(session, path)
        # The player shows its file already; setting it again would load it twice.
        shown = media_changed(session, error)
        current = session.current
        same = current is not None and current.path == path
        return [gr.skip() if same else shown[0], *shown[1:]]

    def more_added(paths: list[str] | None, request: gr.Request) -> list[Any]:
        session = session_of(request)
        return media_changed(session, handlers.add(session, paths or []))

    def medium_shown(event: gr.EventData, request: gr.Request) -> list[Any]:
        session = session_of(request)
        if 0 <= int(event.index) < len(session.media):
            session.shown = int(event.index)
        return media_changed(session, "", float(event.time))

    def medium_removed(event: gr.EventData, request: gr.Request) -> list[Any]:
        session = session_of(request)
        if 0 <= int(event.index) < len(session.media):
            sessions.remove(session, int(event.index))
        return media_changed(session, "")

    def example_chosen(event: gr.EventData, request: gr.Request) -> list[Any]:
        session = session_of(request)
        path, question = examples[int(event.index) % len(examples)]
        error = handlers.add_copy(session, path, _client_of(request))
        return [*media_changed(session, error), question]

    def cost(request: gr.Request, *values: Any) -> str:
        return handlers.cost(session_of(request), Settings(*values))

    def strip(request: gr.Request, *values: Any) -> str:
        return handlers.strip(session_of(request), Settings(*values))

    def refresh(event: Any) -> None:
        event.then(cost, view.settings, view.cost, **quick)
        event.then(strip, view.settings, view.strip, **quick)

    for event in (
        view.video.change(video_changed, view.video, media_outputs, **quick),
        view.more.upload(more_added, view.more, media_outputs, **quick),
        view.shelf.select(medium_shown, None, media_outputs, **quick),
        view.shelf.delete(medium_removed, None, media_outputs, **quick),
        view.shelf.example(example_chosen, None, [*media_outputs, view.question], **quick),
    ):
        refresh(event)

    view.budget.input(cost, view.settings, view.cost, trigger_mode="always_last", **quick)
    view.budget.release(strip, view.settings, view.strip, trigger_mode="always_last", **quick)
    view.auto.change(
        lambda auto: [gr.Slider(interactive=not auto), gr.Number(visible=auto)],
        view.auto,
        [view.budget, view.seconds],
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )
    for control in (view.auto, view.seconds, view.selector, view.frames, view.resolution):
        control.change(cost, view.settings, view.cost, trigger_mode="always_last", **quick)
        control.change(strip, view.settings, view.strip, trigger_mode="always_last", **quick)

    idle = [gr.update(visible=True), gr.update(visible=False)]
    working = [gr.update(visible=False), gr.update(visible=True)]
    buttons = [view.send, view.stop]
    at_once: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}

    def asked(question: str, request: gr.Request) -> list[Any]:
        session = session_of(request)
        if not handlers.begin(session, question):
            return [gr.skip(), gr.skip(), gr.skip(), gr.skip()]
        return ["", handlers.messages(session), *working]

    def again(request: gr.Request, event: gr.RetryData) -> list[Any]:
        session = session_of(request)
        turn = min(_turn_of(event.index), len(session.turns) - 1)
        if turn < 0 or not handlers.begin(session, session.turns[turn].question, turn):
            return [gr.skip(), gr.skip(), gr.skip()]
        return [handlers.messages(session), *working]

    def edited(request: gr.Request, event: gr.EditData) -> list[Any]:
        session = session_of(request)
        turn = _turn_of(event.index)
        if turn >= len(session.turns) or not handlers.begin(session, str(event.value), turn):
            return [handlers.messages(session), gr.skip(), gr.skip()]
        return [handlers.messages(session), *working]

    def answered(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        session = session_of(request)
        for messages in handlers.run(session, Settings(*values)):
            yield [messages, gr.skip(), gr.skip()]
        yield [gr.skip(), *idle]

    def run(event: Any) -> None:
        event.then(answered, view.settings, [view.chat, *buttons], **slow)

    asking = [view.question, view.chat, *buttons]
    run(gr.on([view.question.submit, view.send.click], asked, view.question, asking, **at_once))
    run(view.chat.retry(again, None, [view.chat, *buttons], **at_once))
    run(view.chat.edit(edited, None, [view.chat, *buttons], **at_once))

    def stopped(request: gr.Request) -> None:
        handlers.stop(session_of(request))

    def cleared(request: gr.Request) -> list[Any]:
        handlers.clear(session_of(request))
        return [[], *idle]

    view.stop.click(stopped, None, None, **at_once)
    view.chat.clear(cleared, None, [view.chat, *buttons], **at_once)
    view.clear.click(cleared, None, [view.chat, *buttons], **at_once)

    def compared(request: gr.Request, question: str, first: int, second: int, *values: Any) -> Iterator[Any]:
        session = session_of(request)
        for panels in handlers.compare(session, question, Settings(*values), [first, second]):
            yield [*panels, *working]
        yield [gr.skip(), gr.skip(), *idle]

    view.go.click(
        compared,
        [view.both, view.first, view.second, *view.settings],
        [view.left, view.right, view.go, view.halt],
        **slow,
    )
    view.halt.click(stopped, None, None, **at_once)


def _turn_of(index: Any) -> int:
    """Which turn a message of the chat belongs to: each has two."""
    return int(index[0] if isinstance(index, (tuple, list)) else index) // 2


def _programs(handlers: Handlers) -> None:
    """Gradio's own API: /ask and /estimate, without a session."""
    video, question = gr.File(label="video", visible=False), gr.Textbox(label="question", visible=False)
    budget = gr.Textbox(label="budget", visible=False)
    text, facts = gr.Textbox(label="answer", visible=False), gr.JSON(label="facts", visible=False)

    def ask(
        video: str | None, question: str, budget: str = "", request: gr.Request | None = None
    ) -> tuple[str, dict[str, Any]]:
        try:
            return handlers.api_ask(video, question, budget, scope=_client_of(request))
        except FluxChatError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def estimate(video: str | None, budget: str = "") -> dict[str, Any]:
        try:
            return handlers.api_estimate(video, budget)
        except FluxChatError as error:
            raise gr.Error(str(error), print_exception=False) from error

    ask.__doc__, estimate.__doc__ = handlers.api_ask.__doc__, handlers.api_estimate.__doc__
    asked, priced = gr.Button(visible=False), gr.Button(visible=False)
    asked.click(ask, [video, question, budget], [text, facts], api_name="ask", concurrency_id="model")
    priced.click(estimate, [video, budget], facts, api_name="estimate", concurrency_limit=4)


def _client_of(request: gr.Request | None) -> str:
    """Whose answers may share what is kept: one client's, else nobody's."""
    scope = getattr(getattr(request, "request", None), "scope", {})
    return str(scope.get("fluxchat.client") or secrets.token_urlsafe(16))


def _leave(sessions: Sessions) -> Any:
    def leave(request: gr.Request) -> None:
        sessions.close(str(request.session_hash))

    return leave
