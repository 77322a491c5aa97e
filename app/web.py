"""The page: a video on the left, a conversation about it on the right, and its price before every question.

    page = build(VideoChat())
    page.launch(**page_options())

`fluxchat web` serves it together with the API for programs (launch.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app.chat import SHIPPED, VideoChat
from app.handlers import EMPTY_COST, Handlers
from app.markup import notice, shelf
from app.sessions import Session, Sessions
from app.settings import CHOOSE, Range, Settings
from encoder.errors import FluxChatError

THEME = Path(__file__).parent / "theme"
MEDIA = ["video", "image"]
QUESTION = "What happens in the video?"
Examples = Sequence[tuple[str, str]]
PLACEHOLDER = """\
### Ask about a video
Add one on the left, choose how many tokens to look at, and ask.
"""


def page_options() -> dict[str, Any]:
    """Arguments of `launch` and `mount_gradio_app` that give the page its looks, from local files only."""
    font = ["ui-sans-serif", "system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=font,
        font_mono=mono,
    )
    return {"theme": theme, "css_paths": [THEME / "page.css"], "footer_links": [], "run_history": False}


def default_examples() -> Examples:
    """Videos that ship with the model, each with a question."""
    return [(str(path), QUESTION) for path in sorted((SHIPPED / "examples").glob("*.mp4"))]


def build(chat: VideoChat, examples: Examples | None = None, *, workers: int = 1) -> gr.Blocks:
    """The page around one model, not launched.

    examples: (file, question) pairs to start from; None takes those that ship with the model. workers: answers
    computed at the same time. The page's `sessions` attribute holds what its visitors have (see `Sessions`).
    """
    sessions = Sessions(chat.forget)
    handlers = Handlers(chat, sessions)
    page = gr.Blocks(title="FluxChat", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True)
    with page:
        view = _View(chat, default_examples() if examples is None else examples)
        _wire(view, handlers, workers)
        _programs(handlers)
        page.unload(_leave(sessions))
    page.queue(max_size=16, default_concurrency_limit=workers)
    page.sessions = sessions
    return page


class _View:
    """Every control of the page, laid out."""

    def __init__(self, chat: VideoChat, examples: Examples) -> None:
        budgets = Range.of(chat.model)
        config = chat.model.encoder.config
        gr.HTML(_header(chat), js_on_load=None, elem_id="fluxchat-header")
        with gr.Row(elem_id="fluxchat-main", equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._media(examples)
            with gr.Column(scale=6, min_width=320):
                self._conversation(budgets, chat)
                self._advanced(config, chat)
        self._compare(budgets)

    def _media(self, examples: Examples) -> None:
        self.video = gr.Video(
            label="Video",
            sources=["upload", "webcam"],
            include_audio=True,
            webcam_options=gr.WebcamOptions(mirror=False),
            buttons=[],
            height=300,
            elem_id="fluxchat-video",
        )
        self.image = gr.Image(
            label="Image",
            type="filepath",
            interactive=False,
            visible=False,
            buttons=[],
            height=300,
            elem_id="fluxchat-image",
        )
        with gr.Row(elem_classes="fc-tight"):
            self.shelf = gr.HTML(
                js_on_load=(THEME / "page.js").read_text(), elem_id="fluxchat-shelf", min_width=0
            )
            self.more = gr.UploadButton(
                "Add another",
                file_types=MEDIA,
                file_count="multiple",
                size="sm",
                scale=0,
                min_width=120,
                elem_id="fluxchat-add",
            )
        self.problem = gr.HTML(js_on_load=None, elem_id="fluxchat-problem")
        self.strip = gr.HTML(js_on_load=None, elem_id="fluxchat-strip")
        self.question = gr.Textbox(
            label="Question",
            placeholder="Ask about the video",
            lines=1,
            max_lines=4,
            scale=1,
            container=False,
            show_label=False,
            elem_id="fluxchat-question",
            render=False,
        )
        if examples:
            gr.Examples(
                [list(example) for example in examples],
                [self.video, self.question],
                cache_examples=False,
                api_visibility="private",
                elem_id="fluxchat-examples",
            )

    def _conversation(self, budgets: Range, chat: VideoChat) -> None:
        self.chat = gr.Chatbot(
            label="Conversation",
            show_label=False,
            height="clamp(320px, calc(100vh - 350px), 900px)",
            editable="user",
            buttons=["copy"],
            feedback_options=None,
            placeholder=PLACEHOLDER,
            elem_id="fluxchat-chat",
        )
        with gr.Row(elem_classes="fc-tight", elem_id="fluxchat-ask"):
            self.question.render()
            self.send = gr.Button("Send", variant="primary", scale=0, min_width=88, elem_id="fluxchat-send")
            self.stop = gr.Button(
                "Stop", variant="stop", scale=0, min_width=88, visible=False, elem_id="fluxchat-stop"
            )
        with gr.Row(elem_classes="fc-tight", elem_id="fluxchat-price"):
            self.budget = gr.Slider(
                budgets.step,
                budgets.largest,
                budgets.near(chat.model.config.default_tokens),
                step=budgets.step,
                label="Token budget",
                info="per video: fewer is faster, more sees finer",
                scale=1,
                buttons=[],
                elem_id="fluxchat-budget",
            )
            with gr.Column(scale=0, min_width=170):
                self.auto = gr.Checkbox(label="auto: answer within", elem_id="fluxchat-auto")
                self.seconds = gr.Number(
                    2.0,
                    label="seconds",
                    minimum=0.1,
                    maximum=600,
                    step=0.1,
                    show_label=False,
                    container=False,
                    visible=False,
                    elem_id="fluxchat-seconds",
                )
        self.cost = gr.HTML(notice(EMPTY_COST), js_on_load=None, elem_id="fluxchat-cost")

    def _advanced(self, config: Any, chat: VideoChat) -> None:
        with gr.Accordion("Advanced", open=False, elem_id="fluxchat-advanced"):
            self.system = gr.Textbox(chat.model.config.system or "", label="System prompt", lines=2)
            with gr.Row():
                self.temperature = gr.Slider(
                    0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest word"
                )
                self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                self.longest = gr.Slider(8, 1024, 128, step=8, label="Longest answer (tokens)")
            with gr.Row():
                frames = [str(count) for count in range(*config.frames_range)]
                sides = [str(side) for side in range(*config.resolution_range)]
                self.frames = gr.Dropdown([CHOOSE, *frames], value=CHOOSE, label="Frames")
                self.resolution = gr.Dropdown([CHOOSE, *sides], value=CHOOSE, label="Resolution (pixels)")
                self.selector = gr.Dropdown(
                    [
                        ("flux: what changes", "flux"),
                        ("uniform: evenly", "uniform"),
                        ("random", "random"),
                        ("tube: random places", "tube"),
                    ],
                    value="flux",
                    label="Which tokens stay",
                )
            llm = chat.model.llm
            dtype = str(llm.dtype).removeprefix("torch.")
            gr.Markdown(
                f"Language model: {Path(llm.name).name}, {dtype}, quantised: {llm.quantize or 'no'}; "
                f"on {chat.device}."
            )
            self.clear = gr.Button("New conversation", size="sm", elem_id="fluxchat-clear")

    def _compare(self, budgets: Range) -> None:
        with gr.Accordion("Compare two budgets", open=False, elem_id="fluxchat-compare"):
            with gr.Row(elem_classes="fc-tight"):
                self.both = gr.Textbox(QUESTION, label="Question for both", scale=3)
                low, high = budgets.near(budgets.largest // 8), budgets.largest
                limits = (budgets.step, budgets.largest)
                self.first = gr.Slider(
                    *limits, low, step=budgets.step, label="First budget", buttons=[], scale=2
                )
                self.second = gr.Slider(
                    *limits, high, step=budgets.step, label="Second budget", buttons=[], scale=2
                )
                self.go = gr.Button("Compare", variant="primary", scale=0, min_width=110)
            with gr.Row():
                self.left = gr.HTML(js_on_load=None, elem_classes="fc-panel", elem_id="fluxchat-first")
                self.right = gr.HTML(js_on_load=None, elem_classes="fc-panel", elem_id="fluxchat-second")

    @property
    def settings(self) -> list[gr.components.Component]:
        """The controls behind `Settings`, in its order."""
        return [
            self.budget,
            self.auto,
            self.seconds,
            self.selector,
            self.frames,
            self.resolution,
            self.system,
            self.temperature,
            self.top_p,
            self.longest,
        ]


def _wire(view: _View, handlers: Handlers, workers: int) -> None:
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
        ]

    media_outputs = [view.video, view.image, view.shelf, view.problem]

    def video_changed(path: str | None, request: gr.Request) -> list[Any]:
        session = session_of(request)
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

    idle = [gr.Button(visible=True), gr.Button(visible=False)]
    working = [gr.Button(visible=False), gr.Button(visible=True)]
    buttons = [view.send, view.stop]
    at_once: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}

    def asked(question: str, request: gr.Request) -> list[Any]:
        session = session_of(request)
        if not handlers.begin(session, question):
            return [gr.skip(), gr.skip(), gr.skip(), gr.skip()]
        return ["", handlers.messages(session), *working]

    def again(request: gr.Request, event: gr.RetryData) -> list[Any]:
        session = session_of(request)
        turn = min(int(event.index) // 2, len(session.turns) - 1)
        if turn < 0 or not handlers.begin(session, session.turns[turn].question, turn):
            return [gr.skip(), gr.skip(), gr.skip()]
        return [handlers.messages(session), *working]

    def edited(request: gr.Request, event: gr.EditData) -> list[Any]:
        session = session_of(request)
        turn = int(event.index) // 2
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
        yield from handlers.compare(session_of(request), question, Settings(*values), [first, second])

    view.go.click(
        compared,
        [view.both, view.first, view.second, *view.settings],
        [view.left, view.right],
        **slow,
    )


def _programs(handlers: Handlers) -> None:
    """Gradio's own API: /ask and /estimate, without a session."""
    video, question = gr.File(label="video", visible=False), gr.Textbox(label="question", visible=False)
    budget = gr.Textbox(label="budget", visible=False)
    text, facts = gr.Textbox(label="answer", visible=False), gr.JSON(label="facts", visible=False)

    def ask(video: str | None, question: str, budget: str = "") -> tuple[str, dict[str, Any]]:
        try:
            return handlers.api_ask(video, question, budget)
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


def _leave(sessions: Sessions) -> Any:
    def leave(request: gr.Request) -> None:
        sessions.close(str(request.session_hash))

    return leave


def _header(chat: VideoChat) -> str:
    return (
        "<header><h1>Flux<b>Chat</b></h1><p>Ask about videos within a token budget.</p>"
        f"<span>{escape(chat.name)} · {chat.device}</span>"
        '<button type="button" id="fluxchat-dark" aria-label="Light or dark">◐</button></header>'
    )
