"""Events of the page that somebody sends by hand: what is wrong with one is a sentence for its sender.

Gradio tells the sender nothing and leaves a traceback in the log, as of a fault of the server's.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

from app.server.errors import ApiError
from encoder.errors import FluxChatError

_BY_NAME = re.compile(r"/gradio_api/(?:run|api|call|call/v2)/([\w-]+)/?")
_QUEUED = "/gradio_api/queue/join"


def check_event(page: Any, path: str, body: Any) -> None:
    """Raises ApiError for an event that the page (gradio.Blocks) does not have, or that has no inputs."""
    named = _BY_NAME.fullmatch(path)
    if named is None and path != _QUEUED:
        return
    if not isinstance(body, dict):
        raise ApiError(400, "An event is a JSON object.")
    name, number = named and named[1], body.get("fn_index")
    known = number in page.fns if type(number) is int else name in {fn.api_name for fn in page.fns.values()}
    if number is None and name is None:
        raise ApiError(400, "Say which event it is: fn_index.", param="fn_index")
    if not known:
        shown = repr(number if number is not None else name)[:100]
        raise ApiError(404, f"The page has no event {shown}.", code="unknown_event")
    if not path.startswith("/gradio_api/call/v2/") and not isinstance(body.get("data"), list):
        raise ApiError(400, "An event needs data, a list of its inputs.", param="data")


def tell_senders(page: Any) -> None:
    """Make the page (gradio.Blocks) tell senders what is wrong with the inputs of an event."""
    page.preprocess_data = _told(_with_texts(page.preprocess_data), _of_inputs)
    page.call_function = _told(page.call_function, _of_event_data)


Method = Callable[..., Awaitable[Any]]


def _told(method: Method, sentence: Callable[[Any, Exception], str | None]) -> Method:
    """The method, whose errors that have a sentence gradio tells the sender and does not log."""
    import gradio

    async def telling(block_fn: Any, *args: Any, **options: Any) -> Any:
        try:
            return await method(block_fn, *args, **options)
        except Exception as error:
            told = sentence(block_fn, error)
            if told is None:
                raise
            raise gradio.Error(told, print_exception=False) from error

    return telling


def _with_texts(preprocess: Method) -> Method:
    """The same with the empty text for a text that is null."""
    import gradio

    async def preprocessing(block_fn: Any, inputs: list[Any], *args: Any, **options: Any) -> Any:
        is_text = [isinstance(block, gradio.Textbox) for block in block_fn.inputs]
        is_text += [False] * (len(inputs) - len(is_text))
        inputs = [
            "" if text and value is None else value for text, value in zip(is_text, inputs, strict=False)
        ]
        if len(inputs) < len(block_fn.inputs):
            raise _Short(f"it needs {len(block_fn.inputs)} inputs in data, not {len(inputs)}")
        return await preprocess(block_fn, inputs, *args, **options)

    return preprocessing


class _Short(Exception):
    """Fewer inputs than an event has."""


def _of_inputs(block_fn: Any, error: Exception) -> str | None:
    """What is wrong with the inputs of an event; None where the machine refused."""
    import gradio

    if any(isinstance(one, (OSError, MemoryError)) for one in (error, error.__cause__)):
        return None
    if isinstance(error, (FluxChatError, ApiError)):
        return str(error)
    why = {_Short: str(error), gradio.Error: getattr(error, "message", "")}.get(type(error))
    why = why or "its data are not of the kinds of its inputs"
    return f"The event {block_fn.name} cannot be taken: {' '.join(why.split())[:300].rstrip('.')}."


def _of_event_data(block_fn: Any, error: Exception) -> str | None:
    """What is wrong with an event itself; None where the error is none of the sender's."""
    if not block_fn.fn:
        return "This event is the browser's alone."
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is not None and place.tb_frame.f_globals.get("__name__") == "gradio.events":
        return f"The event {block_fn.name} cannot be taken: it lacks event_data, or a field of it."
    return None
