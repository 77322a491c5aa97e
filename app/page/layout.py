"""The layout of the page: its controls, theme and examples. Their behaviour is in events.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app.chat import SHIPPED, VideoChat
from app.note import REAL_MODEL
from app.page.handlers import EMPTY_COST
from app.page.html import examples as examples_html
from app.page.html import notice
from app.page.settings import CHOOSE, Range

THEME = Path(__file__).parent / "theme"
MEDIA = ["video", "image"]
QUESTION = "What happens in the video?"
Examples = Sequence[tuple[str, str]]
PLAIN: dict[str, Any] = {"js_on_load": None, "apply_default_css": False}
PLACEHOLDER = """\
### Ask about a video
Add one, choose how many tokens to look at, and ask.
"""


def page_options() -> dict[str, Any]:
    """Arguments of `launch` and `mount_gradio_app` for the page's theme and CSS, from local files only."""
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
        button_primary_background_fill_hover="#0d9488",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#0d9488",
    )
    return {"theme": theme, "css_paths": [THEME / "page.css"], "footer_links": [], "run_history": False}


def default_examples() -> Examples:
    """The clips that ship with the model, each with its question."""
    folder = SHIPPED / "examples"
    try:
        rows = json.loads((folder / "examples.json").read_text())
    except (OSError, ValueError):
        return [(str(path), QUESTION) for path in sorted(folder.glob("*.mp4"))]
    return [(str(folder / row["file"]), row["question"]) for row in rows]


class Controls:
    """All controls of the page."""

    def __init__(self, chat: VideoChat, examples: Examples, *, login: bool = False) -> None:
        budgets = Range.of(chat.model)
        gr.HTML(header(chat, login=login), **PLAIN, elem_id="fluxchat-header")
        if chat.model.tower.familiarity is not None:
            gr.HTML(banner(chat.model.tower.familiarity.things), **PLAIN, elem_id="fluxchat-banner")
        with gr.Row(elem_id="fluxchat-main", equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._media(examples)
            with gr.Column(scale=6, min_width=320):
                self._conversation(budgets, chat)
                self._advanced(chat)
        self._compare(budgets)

    def _media(self, examples: Examples) -> None:
        self.video = gr.Video(
            label="Video",
            sources=["upload", "webcam"],
            include_audio=True,
            webcam_options=gr.WebcamOptions(mirror=False),
            buttons=[],
            height=340,
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
                js_on_load=(THEME / "page.js").read_text(), apply_default_css=False, elem_id="fluxchat-shelf"
            )
            self.more = gr.UploadButton(
                "Add video or image",
                file_types=MEDIA,
                file_count="multiple",
                size="sm",
                scale=0,
                min_width=150,
                elem_id="fluxchat-add",
            )
        self.problem = gr.HTML(**PLAIN, elem_id="fluxchat-problem")
        self.strip = gr.HTML(**PLAIN, elem_id="fluxchat-strip")
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
            gr.HTML(examples_html(examples), elem_id="fluxchat-examples", **PLAIN)

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
                budgets.near(chat.model.default_tokens),
                step=budgets.step,
                label="Token budget per video",
                scale=1,
                buttons=[],
                elem_id="fluxchat-budget",
            )
            with gr.Column(scale=0, min_width=150):
                self.auto = gr.Checkbox(label="auto, by time", elem_id="fluxchat-auto")
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
        self.cost = gr.HTML(notice(EMPTY_COST), **PLAIN, elem_id="fluxchat-cost")

    def _advanced(self, chat: VideoChat) -> None:
        with gr.Accordion("Advanced", open=False, elem_id="fluxchat-advanced"):
            self.system = gr.Textbox(chat.model.system or "", label="System prompt", lines=1, max_lines=4)
            with gr.Row():
                self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", buttons=[])
                self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", buttons=[])
                self.longest = gr.Slider(8, 1024, 128, step=8, label="Longest answer", buttons=[])
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
                    [
                        ("flux: what changes", "flux"),
                        ("uniform: evenly", "uniform"),
                        ("random", "random"),
                        ("tube: random places", "tube"),
                        ("evs: unlike the frame before", "evs"),
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
                self.halt = gr.Button("Stop", variant="stop", scale=0, min_width=110, visible=False)
            with gr.Row():
                self.left = gr.HTML(**PLAIN, elem_classes="fc-panel", elem_id="fluxchat-first")
                self.right = gr.HTML(**PLAIN, elem_classes="fc-panel", elem_id="fluxchat-second")

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


def header(chat: VideoChat, *, login: bool = False) -> str:
    """Name of the page and of the model. login: with a way to log out."""
    out = '<a href="/logout">Log out</a>' if login else ""
    return (
        "<header><h1>Flux<b>Chat</b></h1><p>Ask about videos within a token budget.</p>"
        f"<span>{escape(chat.name)} · {chat.device}</span>{out}"
        '<button type="button" id="fluxchat-dark" aria-label="Light or dark">◐</button></header>'
    )
