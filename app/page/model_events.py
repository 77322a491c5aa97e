"""Events of the list of models: another model is loaded while the page runs, and its controls follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from app.model_slot import ModelSlot
from app.page import html as markup
from app.page.handlers import Handlers
from app.page.layout import SAME, Controls, Examples, about, header, others, welcome
from app.page.model_dialog import confirmation, price, progress
from app.page.settings import CHOOSE, Range
from encoder.errors import FluxChatError, ModelError
from llm_bridge.model_files.checks import free_memory, missing_bytes
from llm_bridge.model_files.hub import check_room

REPORT_S = 1.0


def connect_models(
    page: gr.Blocks,
    controls: Controls,
    handlers: Handlers,
    examples: Examples,
    refresh: Callable[[Any], Any],
) -> None:
    """Let the visitor load another model. refresh: makes the price anew after an event."""
    slot, sessions = handlers.slot, handlers.sessions
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    fields = _fields(controls)

    def on_load(event: gr.EventData, request: gr.Request) -> Iterator[list[Any]]:
        session, before = sessions.get(str(request.session_hash)), slot.exchanges
        for line, problem in load(slot, str(event.name), event._data.get("bytes")):
            session.problem = markup.problem(problem) if problem else ""
            yield [line, session.problem, *[gr.skip()] * (1 + len(fields))]
        changed = slot.exchanges != before
        said = handlers.suggestions(session) if changed else gr.skip()
        yield [
            gr.skip(),
            gr.skip(),
            said,
            *(_values(slot, examples) if changed else [gr.skip()] * len(fields)),
        ]

    outputs = [controls.loading, controls.problem, controls.suggestions, *fields]
    refresh(
        controls.shelf.model(on_load, None, outputs, trigger_mode="multiple", concurrency_limit=4, **private)
    )

    at_once: dict[str, Any] = {"queue": False, **private}
    controls.shelf.model_not(lambda: "", None, controls.loading, trigger_mode="multiple", **at_once)

    def on_page() -> list[Any]:
        """A page that is opened after an exchange was laid out for the model before it."""
        return _values(slot, examples) if slot.exchanges else [gr.skip()] * len(fields)

    page.load(on_page, None, fields, **at_once)

    def on_other(name: str) -> str:
        if name == SAME:
            return ""
        try:
            choice = slot.choice(name)
            slot.check_room(choice)
        except FluxChatError as error:
            return markup.problem(str(error))
        return price(choice, free_memory(slot.chat.device))

    controls.other.change(on_other, controls.other, controls.other_price, **private)


def load(slot: ModelSlot, name: str, confirmed: Any) -> Iterator[tuple[str, str]]:
    """Load the choice of that name: yields what is said meanwhile, as HTML, and a problem at the end.

    confirmed: bytes that the visitor agreed to download; where others are needed, they are asked for.
    """
    try:
        choice, size = slot.choice(name), 0
        slot.check_room(choice)
        if not choice.on_disk:
            if not (size := missing_bytes(choice.name)):
                raise ModelError(
                    f"huggingface.co cannot be reached to download {choice.name}: try again later."
                )
            check_room(choice.name, size)
            if confirmed != size:
                yield confirmation(choice, size), ""
                return
        loading = slot.load(choice, size)
    except FluxChatError as error:
        yield "", " ".join(str(error).split())
        return
    yield progress(loading), ""
    while not loading.done.wait(REPORT_S):
        yield progress(loading), ""
    yield "", f"{loading.problem} {slot.chat.name} stays loaded." if loading.problem else ""


def _fields(controls: Controls) -> list[gr.components.Component]:
    """The controls that a model decides, in the order of `_values`."""
    return [
        controls.header,
        controls.welcome,
        controls.about,
        controls.budget,
        controls.first,
        controls.second,
        controls.other,
        controls.other_price,
        controls.system,
        controls.think,
        controls.frames,
        controls.resolution,
    ]


def _values(slot: ModelSlot, examples: Examples) -> list[Any]:
    """What `_fields` become for the model in use."""
    chat = slot.chat
    budgets, space = Range.of(chat.model), chat.model.tower.space
    limits: dict[str, Any] = {"minimum": budgets.step, "maximum": budgets.largest, "step": budgets.step}
    return [
        header(slot, loads=True),
        welcome(chat, examples),
        about(chat),
        gr.update(value=budgets.near(chat.model.default_tokens), **limits),
        gr.update(value=budgets.near(budgets.largest // 8), **limits),
        gr.update(value=budgets.largest, **limits),
        gr.update(choices=others(slot), value=SAME),
        "",
        chat.model.system or "",
        gr.update(value=False, visible=chat.model.llm.thinking_marks is not None),
        gr.update(choices=[CHOOSE, *map(str, space.frames)], value=CHOOSE),
        gr.update(choices=[CHOOSE, *map(str, space.sides)], value=CHOOSE),
    ]
