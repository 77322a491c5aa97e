"""What the page's tests share: the page in a browser, its handlers without one, and answers known before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch

from app.chat import VideoChat
from app.page.events import build, page_options
from app.page.handlers import Handlers
from app.page.sessions import Sessions
from llm_bridge.chat_model import load_chat_model
from llm_bridge.generation import Generation
from llm_bridge.model import VideoLanguageModel
from tests import tiny_video_models
from tests.app.conftest import WORLD
from tests.app.page.in_browser import ARGUMENTS, CHROMIUM, PATIENCE_MS, STOCK, Served, expect, unexpected
from tests.passes import never_ends, slow_passes


@pytest.fixture
def handlers(chat: VideoChat, tmp_path: Path) -> Iterator[Handlers]:
    sessions = Sessions(chat.forget, uploads=tmp_path)
    yield Handlers(chat, sessions)
    sessions.close_all()


@pytest.fixture
def answer_with_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is "It turns at 0:03, from 0:01 to 0:02 it stops.", in two pieces."""

    class Scripted(Generation):
        def __iter__(self) -> Iterator[str]:
            yield "It turns at 0:03, from 0:01 "
            yield "to 0:02 it stops."

    monkeypatch.setattr("app.chat.Generation", Scripted)


@pytest.fixture
def slowed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[float]], None]:
    """Makes the handler of that name wait: so many seconds at the first call, and so on; then no more."""

    def slow(name: str, seconds: list[float]) -> None:
        quick = getattr(Handlers, name)

        def late(*arguments: Any, **options: Any) -> Any:
            time.sleep(seconds.pop(0) if seconds else 0)
            return quick(*arguments, **options)

        monkeypatch.setattr(Handlers, name, late)

    return slow


@pytest.fixture(
    scope="module", params=["flux", *(pytest.param(kind, marks=pytest.mark.slow) for kind in STOCK)]
)
def served(
    request: pytest.FixtureRequest, tiny_model: VideoLanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The page on a free port, with one example; around each kind of model."""
    model: Any = tiny_model
    if request.param != "flux":
        folder = tiny_video_models.make(tmp_path_factory.mktemp("stock") / request.param, request.param)
        model = load_chat_model(folder, device="cpu", dtype=torch.float32)
        never_ends(model.llm)
    with VideoChat(model, trusted=False, dtype="float32") as chat:
        page = build(chat, [(str(WORLD), "What turns?")], workers=2)
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, max_file_size="5mb", **page_options())
        yield Served(page, url, chat)
        page.close()


@pytest.fixture
def slow_answers(served: Served) -> Iterator[None]:
    """An answer takes a minute if nobody stops it."""
    with slow_passes(served.chat.model.llm):
        yield


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def new_context(browser: Any) -> Iterator[Callable[..., Any]]:
    """Makes a profile that nobody has used."""
    contexts = []

    def make(**options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(PATIENCE_MS)
        return contexts[-1]

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def open_page(new_context: Callable[..., Any], served: Served) -> Iterator[Callable[..., Any]]:
    """Opens a tab of its own; at the end nothing may have been logged as an error or asked of elsewhere."""
    troubles: list[str] = []

    def watch(request: Any) -> None:
        address = urlparse(request.url)
        if address.scheme not in ("data", "blob") and address.hostname not in ("127.0.0.1", "localhost"):
            troubles.append(f"asked {request.url}")

    def make(width: int = 1280, height: int = 800, **options: Any) -> Any:
        page = new_context(viewport={"width": width, "height": height}, **options).new_page()
        page.on("console", lambda m: troubles.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", watch)
        page.goto(served.url)
        expect(page.locator("#fluxchat-cost")).to_contain_text("Add a video")
        expect(page.locator("#fluxchat-question textarea")).to_be_visible()
        expect(page.locator("#fluxchat-large")).to_be_attached()  # page.js has run
        return page

    yield make
    assert unexpected(troubles) == []
