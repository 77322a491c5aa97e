"""A running server in a thread, for tests and benchmarks; and what they send to it."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from app.chat import VideoChat
from app.model_slot import ModelSlot
from app.server.launch import bind, make_server
from app.server.options import LaunchOptions
from app.server.routes import Api
from tests.patience import PATIENCE_S


@contextmanager
def running(
    chat: VideoChat | ModelSlot, options: LaunchOptions | None = None, port: int = 0
) -> Iterator[tuple[str, Api]]:
    """(address, Api) of a server that answers, without the page unless the options say so; port: 0 is any."""
    options = options or LaunchOptions(page=False)
    listener = bind("127.0.0.1", port)
    server = make_server(chat, options, listener)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server.api
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def question(text: str, *urls: str, **options: Any) -> dict[str, Any]:
    """The body of a request about videos."""
    parts: list[dict[str, Any]] = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": text}]
    return {"model": "fluxchat", "messages": [{"role": "user", "content": content}], **options}


def ask(
    address: str, text: str, *urls: str, headers: dict[str, str] | None = None, **options: Any
) -> httpx.Response:
    """One question, one response."""
    body = question(text, *urls, **options)
    return httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE_S)


def answer(response: httpx.Response) -> str:
    """The text of a response that must be an answer."""
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def data_url(path: Path, kind: str = "video/mp4") -> str:
    """A file's content as a URL."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def upload(address: str, path: Path, **headers: str) -> str:
    """Upload a file; its id."""
    with path.open("rb") as file:
        response = httpx.post(
            f"{address}/v1/files", files={"file": file}, headers=headers, timeout=PATIENCE_S
        )
    assert response.status_code == 200, response.text
    return str(response.json()["id"])
