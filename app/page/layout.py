"""The layout of the page: its controls, theme and examples. Their behaviour is in events.py."""

from __future__ import annotations

import json
from abc import ABCMeta
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app.chat import SHIPPED, VideoChat
from app.estimate import Estimate
from app.model_slot import ModelSlot
from app.note import REAL_MODEL
from app.page import library_search
from app.page.handlers import EMPTY_COST
from app.page.html import examples as examples_html
from app.page.html import notice, presets
from app.page.model_dialog import dialog
from app.page.settings import CHOOSE, Range

THEME = Path(__file__).parent / "theme"
MEDIA = ["video", "image"]
QUESTION = "What happens in the video?"
Examples = Sequence[tuple[str, str]]
PLAIN: dict[str, Any] = {"js_on_load": None, "apply_default_css": False}
PLACEHOLDER = "## Ask about a video"
SAME = "="  # as the second model of a comparison: the one in use
TITLE, SUMMARY = "FluxChat", "Ask questions about videos, and choose how closely the model looks."
ICON = THEME / "icon.svg"
SCRIPTS = ("opening.js", "page.js", "part.js", "conversations.js", "library.js")  # in one scope
# Drawn by conversations.js, from what this browser keeps.
KEPT_VIDEO_MIB = 1024
SIDE = (
    f'<div class="fc-list" data-quota="{KEPT_VIDEO_MIB}">'
    '<input type="search" id="fluxchat-search" placeholder="Search" '
    'aria-label="Search conversations"><ul aria-label="Conversations"></ul>'
    '<p class="fc-undo" role="status"></p><p class="fc-note" id="fluxchat-kept"></p></div>'
)
SELECTORS = [
    ("flux: what changes", "flux"),
    ("uniform: evenly", "uniform"),
    ("random", "random"),
    ("tube: random places", "tube"),
    ("evs: unlike the frame before", "evs"),
]
HEAD = f"""\
<meta name="description" content="{SUMMARY}">
<meta property="og:title" content="{TITLE}">
<meta property="og:description" content="{SUMMARY}">
<meta property="og:type" content="website">
<meta name="theme-color" media="(prefers-color-scheme: light)" content="#f4f6f8">
<meta name="theme-color" media="(prefers-color-scheme: dark)" content="#0c1116">
"""
# Before anything is drawn, so that nothing moves.
SIDE_OPEN = (
    'try { document.documentElement.classList.toggle("fc-side-open", '
    'innerWidth > 1100 && localStorage.getItem("fluxchat-side") === "true"); } catch {}'
)
HEAD_SCRIPTS = ("early.js", "event_stream.js")


def page_options() -> dict[str, Any]:
    """Arguments of `launch` and `mount_gradio_app` for the page's theme and CSS, from local files only."""
    scripts = "\n".join((THEME / name).read_text() for name in HEAD_SCRIPTS)
    font = ["ui-sans-serif", "system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=font,
        font_mono=mono,
    ).set(
        body_background_fill="#f4f6f8",
        body_background_fill_dark="#0c1116",
        block_background_fill="#ffffff",
        block_background_fill_dark="#151c23",
        block_border_color="#e1e7ec",
        block_border_color_dark="#24303a",
        background_fill_primary_dark="#151c23",
        background_fill_secondary_dark="#1b242c",
        border_color_primary_dark="#24303a",
        button_secondary_background_fill="#e9eef2",
        button_secondary_background_fill_dark="#24303a",
        button_secondary_background_fill_hover="#dde5eb",
        button_secondary_background_fill_hover_dark="#2d3b47",
        block_label_text_size="*text_xs",
        input_background_fill="#ffffff",
        input_background_fill_dark="#10171d",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#115e59",
    )
    return {
        "theme": theme,
        # In the head the page has it before Gradio's parts are there, so that nothing moves when they come.
        "head": f"{HEAD}<script>{SIDE_OPEN}\n{scripts}</script>"
        f"<style>{(THEME / 'page.css').read_text()}</style>",
        "favicon_path": str(ICON),
        "footer_links": [],
        "run_history": False,
    }


def default_examples() -> Examples:
    """The clips that ship with the model, each with its question; those that it answers wrongly stay away."""
    folder = SHIPPED / "examples"
    try:
        rows = json.loads((folder / "examples.json").read_text())
    except (OSError, ValueError):
        return [(str(path), QUESTION) for path in sorted(folder.glob("*.mp4"))]
    return [(str(folder / row["file"]), row["question"]) for row in rows if row.get("right", True)]


def _lenient(kind: Any) -> Any:
    """The component, taking whatever is typed: the nearest allowed number counts, its first where it is none.

    Gradio would refuse it, once in each event that reads the field. Made without `class`, for which Gradio
    would write a stub file beside this one.
    """

    def preprocess(self: Any, payload: Any) -> float:
        least, most = float(self.minimum), float(self.maximum)
        first = least if self.value is None else float(self.value)
        try:
            value = float(payload)
        except (TypeError, ValueError):
            return first
        return min(most, max(least, value)) if value == value else first

    return ABCMeta.__new__(type(kind), kind.__name__, (kind,), {"preprocess": preprocess})


_lenient_number, _slider = _lenient(gr.Number), _lenient(gr.Slider)


class Controls:
    """All controls of the page: a place for a list at the side, the stage with the video, the talk."""

    def __init__(
        self,
        slot: ModelSlot,
        examples: Examples,
        *,
        login: bool = False,
        loads: bool = False,
        library: bool = False,
    ) -> None:
        chat = slot.chat
        budgets = Range.of(chat.model)
        self.header = gr.HTML(
            header(slot, login=login, loads=loads, library=library), **PLAIN, elem_id="fluxchat-header"
        )
        self.found = gr.HTML(**PLAIN, elem_id="fluxchat-found") if library else None
        with gr.Row(elem_id="fluxchat-main", equal_height=False):
            with gr.Column(scale=0, min_width=0, elem_id="fluxchat-side"):
                gr.HTML(SIDE, **PLAIN, elem_id="fluxchat-list")
                self.owner = gr.HTML(**PLAIN, elem_id="fluxchat-owner")
                self.record = gr.HTML(**PLAIN, elem_id="fluxchat-record")
                self.taken = gr.HTML(**PLAIN, elem_id="fluxchat-taken")
            with gr.Column(scale=5, min_width=0, elem_id="fluxchat-stage"):
                self._stage()
            with gr.Column(scale=6, min_width=0, elem_id="fluxchat-talk"):
                self._conversation(chat, examples)
                with gr.Column(elem_id="fluxchat-settings"):
                    self._price(budgets, chat)
                    self._advanced(chat)
                    self._compare(budgets, slot if loads else None)
                self._composer(chat, budgets)

    def _stage(self) -> None:
        gr.HTML(player(), **PLAIN, elem_id="fluxchat-player")
        self.shelf = gr.HTML(
            js_on_load="\n".join((THEME / name).read_text() for name in SCRIPTS),
            apply_default_css=False,
            elem_id="fluxchat-shelf",
        )
        self.strip = gr.HTML(**PLAIN, elem_id="fluxchat-strip")
        self.chapters = gr.HTML(**PLAIN, elem_id="fluxchat-chapters")
        self.made = gr.HTML(**PLAIN, elem_id="fluxchat-made")

    def _conversation(self, chat: VideoChat, examples: Examples) -> None:
        self.chat = gr.Chatbot(
            label="Conversation",
            show_label=False,
            height="100%",
            editable="user",
            buttons=["copy"],
            feedback_options=None,
            placeholder=PLACEHOLDER,
            elem_id="fluxchat-chat",
        )
        self.welcome = gr.HTML(welcome(chat, examples), **PLAIN, elem_id="fluxchat-welcome")
        self.problem = gr.HTML(**PLAIN, elem_id="fluxchat-problem")
        self.loading = gr.HTML(**PLAIN, elem_id="fluxchat-loading")
        self.suggestions = gr.HTML(**PLAIN, elem_id="fluxchat-suggestions")

    def _composer(self, chat: VideoChat, budgets: Range) -> None:
        with gr.Column(elem_id="fluxchat-ask"):
            self.parts = gr.HTML(**PLAIN, elem_id="fluxchat-parts")
            self.question = gr.Textbox(
                label="Question",
                placeholder="Ask about the video",
                lines=1,
                max_lines=6,
                container=False,
                show_label=False,
                elem_id="fluxchat-question",
            )
            with gr.Row(elem_id="fluxchat-tools"):
                gr.HTML(tools(), **PLAIN, elem_id="fluxchat-attach")
                choices: list[tuple[str, int, list[Estimate]]] = [
                    (name, tokens, []) for name, tokens in budgets.presets(chat.model.default_tokens)
                ]
                self.presets = gr.HTML(
                    presets(choices, budgets.near(chat.model.default_tokens)),
                    **PLAIN,
                    elem_id="fluxchat-presets",
                )
                self.stop = gr.Button(
                    "Stop", variant="stop", scale=0, min_width=72, visible=False, elem_id="fluxchat-stop"
                )
                self.send = gr.Button(
                    "Send", variant="primary", scale=0, min_width=72, elem_id="fluxchat-send"
                )

    def _price(self, budgets: Range, chat: VideoChat) -> None:
        with gr.Row(elem_id="fluxchat-price"):
            self.budget = _slider(
                budgets.step,
                budgets.largest,
                budgets.near(chat.model.default_tokens),
                step=budgets.step,
                label="Token budget per video",
                scale=1,
                buttons=[],
                elem_id="fluxchat-budget",
            )
            with gr.Column(scale=0, min_width=150):
                self.auto = gr.Checkbox(label="auto, by time", elem_id="fluxchat-auto")
                self.seconds = _lenient_number(
                    2.0,
                    label="seconds",
                    minimum=0.1,
                    maximum=600,
                    step=0.1,
                    show_label=False,
                    container=False,
                    elem_id="fluxchat-seconds",
                )
        self.cost = gr.HTML(notice(EMPTY_COST), **PLAIN, elem_id="fluxchat-cost")

    def _advanced(self, chat: VideoChat) -> None:
        with gr.Accordion("Advanced", open=False, elem_id="fluxchat-advanced"):
            self.system = gr.Textbox(chat.model.system or "", label="System prompt", lines=1, max_lines=4)
            with gr.Row():
                self.temperature = _slider(0, 2, 0, step=0.05, label="Temperature", buttons=[])
                self.top_p = _slider(0.05, 1, 1, step=0.05, label="Top-p", buttons=[])
                self.longest = _slider(8, 1024, 128, step=8, label="Longest answer", buttons=[])
            self.think = gr.Checkbox(
                chat.think,
                label="Think before answering",
                visible=chat.model.llm.thinking_marks is not None,
                elem_id="fluxchat-think",
            )
            with gr.Row():
                frames = [str(count) for count in chat.model.tower.space.frames]
                sides = [str(side) for side in chat.model.tower.space.sides]
                self.frames = gr.Dropdown([CHOOSE, *frames], value=CHOOSE, label="Frames")
                self.resolution = gr.Dropdown([CHOOSE, *sides], value=CHOOSE, label="Resolution (pixels)")
                self.selector = gr.Dropdown(
                    SELECTORS,
                    value="flux",
                    label="Which tokens stay",
                )
            self.about = gr.Markdown(about(chat))

    def _compare(self, budgets: Range, slot: ModelSlot | None) -> None:
        what = (
            "Compare two budgets or selectors" if slot is None else "Compare two budgets, selectors or models"
        )
        with gr.Accordion(what, open=False, elem_id="fluxchat-compare"):
            with gr.Row(elem_classes="fc-tight"):
                self.both = gr.Textbox(QUESTION, label="Question for both", scale=3)
                self.go = gr.Button("Compare", variant="primary", scale=0, min_width=110)
                self.halt = gr.Button("Stop", variant="stop", scale=0, min_width=110, visible=False)
            with gr.Row():
                low, high = budgets.near(budgets.largest // 8), budgets.largest
                with gr.Column(min_width=200):
                    self.first, self.first_selector = self._side("First", budgets, low)
                    self.left = gr.HTML(**PLAIN, elem_classes="fc-panel", elem_id="fluxchat-first")
                with gr.Column(min_width=200):
                    self.second, self.second_selector = self._side("Second", budgets, high)
                    self.other = gr.Dropdown(
                        others(slot), value=SAME, label="Second: model", visible=slot is not None
                    )
                    self.other_price = gr.HTML(**PLAIN)
                    self.right = gr.HTML(**PLAIN, elem_classes="fc-panel", elem_id="fluxchat-second")

    def _side(self, name: str, budgets: Range, tokens: int) -> tuple[Any, gr.Dropdown]:
        """Budget and selector of one side of a comparison."""
        limits = (budgets.step, budgets.largest)
        budget = _slider(*limits, tokens, step=budgets.step, label=f"{name} budget", buttons=[])
        return budget, gr.Dropdown(SELECTORS, value="flux", label=f"{name}: which tokens stay")

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
            self.think,
        ]


def banner(things: int) -> str:
    """What a model can be asked about that knows only so many drawn things."""
    return (
        f'<p class="fc-note">This small model knows {things} drawn things; about other videos it guesses. '
        f"For real ones: <code>fluxchat web --model {escape(REAL_MODEL)}</code></p>"
    )


def welcome(chat: VideoChat, examples: Examples) -> str:
    """What stands in the conversation before its first question."""
    familiarity = chat.model.tower.familiarity
    note = "" if familiarity is None else banner(familiarity.things)
    return f'{note}<div id="fluxchat-examples">{examples_html(examples) if examples else ""}</div>'


def player() -> str:
    """The stage: a player, a picture, a camera, and where nothing is there, where to put it."""
    return (
        '<div class="fc-stage" data-empty>'
        '<div id="fluxchat-video" hidden><video controls playsinline preload="metadata"></video></div>'
        '<div id="fluxchat-image" hidden><img alt=""></div>'
        '<button type="button" class="fc-drop" data-attach><b>Add a video or an image</b>'
        "<span>Drop it anywhere, paste it, or choose a file</span></button>"
        '<div class="fc-camera" hidden><video muted playsinline aria-label="Camera"></video>'
        '<div><button type="button" data-record>Record</button>'
        '<button type="button" data-camera-off>Cancel</button></div></div>'
        '<p class="fc-unplayable" hidden>This browser cannot play it; the model can look at it, though.</p>'
        '<div class="fc-piece" hidden><span></span><button type="button" data-again>Play again</button>'
        "</div>"
        '<div class="fc-area" hidden><button type="button" class="fc-box" aria-label="Box on the picture: '
        'arrow keys move it, with Shift they change its size, Delete removes it"></button></div>'
        '<div class="fc-part" hidden><div class="fc-range" role="group" aria-label="Part of the video">'
        '<div class="fc-line"><input type="range" min="0" value="0" data-edge="start" aria-label="From">'
        '<input type="range" min="0" value="0" data-edge="end" aria-label="To"></div><output></output></div>'
        '<button type="button" data-box aria-pressed="false" title="Ask about a box of the picture">Box'
        "</button></div>"
        '<div class="fc-missing" hidden></div>'
        '<p class="fc-upload" role="status" hidden><span></span></p></div>'
    )


def tools() -> str:
    """What brings something into the question: a file, the camera; and what shows all settings."""
    return (
        '<input type="file" id="fluxchat-file" accept="video/*,image/*" multiple hidden aria-label="Files">'
        '<button type="button" data-attach id="fluxchat-add" title="Add a video or image" '
        f'aria-label="Add a video or image">{_icon("M12 5v14M5 12h14")}</button>'
        '<button type="button" data-camera title="Record with the camera" '
        f'aria-label="Record with the camera">{_icon("M3 7h11v10H3zM14 11l6-3v8l-6-3")}</button>'
        '<button type="button" data-settings title="Budget, figures and more" aria-expanded="false" '
        'aria-controls="fluxchat-settings" aria-label="Budget, figures and more">'
        f"{_icon('M4 7h9M17 7h3M15 5v4M4 17h3M11 17h9M9 15v4')}</button>"
    )


def _icon(path: str) -> str:
    """A drawing of lines on 24 x 24, hidden from screen readers: its button has a name."""
    return f'<svg viewBox="0 0 24 24" aria-hidden="true"><path d="{path}"/></svg>'


def about(chat: VideoChat) -> str:
    """What is computed with."""
    llm = chat.model.llm
    dtype = str(llm.dtype).removeprefix("torch.")
    name, quantised = Path(llm.name).name, llm.quantize or "no"
    return f"Language model: {name}, {dtype}, quantised: {quantised}; on {chat.device}."


def others(slot: ModelSlot | None) -> list[tuple[str, str]]:
    """The second models of a comparison: the one in use, as SAME, and the others on disk."""
    same = [("the same", SAME)]
    if slot is None:
        return same
    return same + [(c.title, c.name) for c in slot.choices() if c.on_disk and c.name != slot.name]


def header(slot: ModelSlot, *, login: bool = False, loads: bool = False, library: bool = False) -> str:
    """Name of the page and of the model, which opens the list of models. login: with a way to log out.
    loads: another model can be loaded from the list. library: with a search of it."""
    chat = slot.chat
    out = '<a href="/logout">Log out</a>' if login else ""
    return (
        '<header><button type="button" data-side aria-label="Conversations" aria-expanded="false">☰</button>'
        "<h1>Flux<b>Chat</b></h1>"
        f'<button type="button" data-models aria-haspopup="dialog"><span>{escape(chat.name)}</span>'
        f"<small> · {chat.device}</small> ▾</button>{library_search.opener() if library else ''}"
        '<button type="button" id="fluxchat-clear" data-fresh>New conversation</button>'
        f'{out}<button type="button" id="fluxchat-dark" aria-label="Light or dark">◐</button></header>'
        f"{dialog(slot, loads=loads)}{library_search.dialog() if library else ''}"
    )
