"""What the page's tests share: its handlers without a browser, and an answer that is known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
