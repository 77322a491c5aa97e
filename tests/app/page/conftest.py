"""What the page's tests share: its handlers without a browser, and an answer that is known beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.chat import VideoChat
from app.page.handlers import Handlers
from app.page.sessions import Sessions
from llm_bridge.generation import Generation


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
