"""The Gradio page: `build` makes the Blocks and connects the events of its controls to their handlers.

    page = build(VideoChat())
    page.launch(**page_options())

A video on the left, a conversation about it on the right, and the cost before every question. `fluxchat web`
serves it together with the API (app/server/launch.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.chat import VideoChat
from app.page.handlers import Handlers
from app.page.html import notice, shelf
from app.page.layout import Controls, Examples, default_examples, page_options
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
    visitors have logged in, so that the page offers to log out. The page's attribute `sessions` holds the
    visitors' sessions.
    """
    sessions = Sessions(chat.forget, store=store)
    handlers = Handlers(chat, sessions)
    # Gradio deletes files by age, also those in use: the sessions delete them instead.
    page = gr.Blocks(title="FluxChat", analytics_enabled=False, delete_cache=None, fill_width=True)
    with page:
        examples = default_examples() if examples is None else examples
        controls = Controls(chat, examples, login=login)
        _connect_events(controls, handlers, examples, workers)
        _add_api_endpoints(handlers)
        page.unload(_on_unload(sessions))
    page.queue(max_size=16, default_concurrency_limit=workers)
    page.sessions = sessions  # type: ignore[attr-defined]
    return page


def _connect_events(controls: Controls, handlers: Handlers, examples: Examples, workers: int) -> None:
    """Connect the events of the controls to the handlers."""
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

    def media_updates(session: Session, error: str, time_s: float = 0) -> list[Any]:
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

    media_outputs = [
        controls.video,
        controls.image,
        controls.shelf,
        controls.problem,
        controls.cost,
        controls.strip,
    ]

    def on_video_change(path: str | None, request: gr.Request) -> list[Any]:
        session = session_of(request)
        if path == (session.current and session.current.path):
            # The event of a change that the server made itself: an error message stays.
            return [gr.skip()] * len(media_outputs)
        error = handlers.show(session, path)
        # The player shows its file already; setting it again would load it twice.
        shown = media_updates(session, error)
        current = session.current
        same = current is not None and current.path == path
        return [gr.skip() if same else shown[0], *shown[1:]]

    def on_files_added(paths: list[str] | None, request: gr.Request) -> list[Any]:
        session = session_of(request)
        return media_updates(session, handlers.add(session, paths or []))

    def on_medium_select(event: gr.EventData, request: gr.Request) -> list[Any]:
        session = session_of(request)
        if 0 <= int(event.index) < len(session.media):
            session.shown = int(event.index)
        return media_updates(session, "", float(event.time))

    def on_medium_remove(event: gr.EventData, request: gr.Request) -> list[Any]:
        session = session_of(request)
        if 0 <= int(event.index) < len(session.media):
            sessions.remove(session, int(event.index))
        return media_updates(session, "")

    def on_example(event: gr.EventData, request: gr.Request) -> list[Any]:
        session = session_of(request)
        path, question = examples[int(event.index) % len(examples)]
        error = handlers.add_copy(session, path, _client_id(request))
        return [*media_updates(session, error), question]

    def cost(request: gr.Request, *values: Any) -> str:
        return handlers.cost(session_of(request), Settings(*values))

    def strip(request: gr.Request, *values: Any) -> str:
        return handlers.strip(session_of(request), Settings(*values))

    def refresh(event: Any) -> None:
        event.then(cost, controls.settings, controls.cost, **quick)
        event.then(strip, controls.settings, controls.strip, **quick)

    for event in (
        controls.video.change(on_video_change, controls.video, media_outputs, **quick),
        controls.more.upload(on_files_added, controls.more, media_outputs, **quick),
        controls.shelf.select(on_medium_select, None, media_outputs, **quick),
        controls.shelf.delete(on_medium_remove, None, media_outputs, **quick),
        controls.shelf.example(on_example, None, [*media_outputs, controls.question], **quick),
    ):
        refresh(event)

    controls.budget.input(cost, controls.settings, controls.cost, trigger_mode="always_last", **quick)
    controls.budget.release(strip, controls.settings, controls.strip, trigger_mode="always_last", **quick)
    controls.auto.change(
        lambda auto: [gr.Slider(interactive=not auto), gr.Number(visible=auto)],
        controls.auto,
        [controls.budget, controls.seconds],
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )
    for control in (controls.auto, controls.seconds, controls.selector, controls.frames, controls.resolution):
        control.change(cost, controls.settings, controls.cost, trigger_mode="always_last", **quick)
        control.change(strip, controls.settings, controls.strip, trigger_mode="always_last", **quick)

    idle = [gr.update(visible=True), gr.update(visible=False)]
    working = [gr.update(visible=False), gr.update(visible=True)]
    buttons = [controls.send, controls.stop]
    at_once: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}

    def on_ask(question: str, request: gr.Request) -> list[Any]:
        session = session_of(request)
        if not handlers.begin(session, question):
            return [gr.skip(), gr.skip(), gr.skip(), gr.skip()]
        return ["", handlers.messages(session), *working]

    def on_retry(request: gr.Request, event: gr.RetryData) -> list[Any]:
        session = session_of(request)
        turn = min(_turn_of(event.index), len(session.turns) - 1)
        if turn < 0 or not handlers.begin(session, session.turns[turn].question, turn):
            return [gr.skip(), gr.skip(), gr.skip()]
        return [handlers.messages(session), *working]

    def on_edit(request: gr.Request, event: gr.EditData) -> list[Any]:
        session = session_of(request)
        turn = _turn_of(event.index)
        if turn >= len(session.turns) or not handlers.begin(session, str(event.value), turn):
            return [handlers.messages(session), gr.skip(), gr.skip()]
        return [handlers.messages(session), *working]

    def stream_answer(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        session = session_of(request)
        for messages in handlers.run(session, Settings(*values)):
            yield [messages, gr.skip(), gr.skip()]
        yield [gr.skip(), *idle]

    def then_answer(event: Any) -> None:
        event.then(stream_answer, controls.settings, [controls.chat, *buttons], **slow)

    asking = [controls.question, controls.chat, *buttons]
    then_answer(
        gr.on([controls.question.submit, controls.send.click], on_ask, controls.question, asking, **at_once)
    )
    then_answer(controls.chat.retry(on_retry, None, [controls.chat, *buttons], **at_once))
    then_answer(controls.chat.edit(on_edit, None, [controls.chat, *buttons], **at_once))

    def on_stop(request: gr.Request) -> None:
        handlers.stop(session_of(request))

    def on_clear(request: gr.Request) -> list[Any]:
        handlers.clear(session_of(request))
        return [[], *idle]

    controls.stop.click(on_stop, None, None, **at_once)
    controls.chat.clear(on_clear, None, [controls.chat, *buttons], **at_once)
    controls.clear.click(on_clear, None, [controls.chat, *buttons], **at_once)

    def on_compare(
        request: gr.Request, question: str, first: int, second: int, *values: Any
    ) -> Iterator[Any]:
        session = session_of(request)
        for panels in handlers.compare(session, question, Settings(*values), [first, second]):
            yield [*panels, *working]
        yield [gr.skip(), gr.skip(), *idle]

    controls.go.click(
        on_compare,
        [controls.both, controls.first, controls.second, *controls.settings],
        [controls.left, controls.right, controls.go, controls.halt],
        **slow,
    )
    controls.halt.click(on_stop, None, None, **at_once)


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


def _on_unload(sessions: Sessions) -> Any:
    def leave(request: gr.Request) -> None:
        sessions.close(str(request.session_hash))

    return leave
