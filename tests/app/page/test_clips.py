"""Pieces of a video, saved from the times in an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.chat import VideoChat
from app.page.handlers import Handlers
from app.server.options import LaunchOptions
from encoder.video.reader import probe
from llm_bridge.model import VideoLanguageModel
from tests.app.conftest import SHORT, WORLD
from tests.app.page.in_browser import (
    Served,
    answered,
    ask,
    browsing,
    expect,
    has,
    shoot,
    upload,
    violations,
)
from tests.app.server.serving import running


def test_a_clip_is_a_file_of_the_visitors(handlers: Handlers, tmp_path: Path) -> None:
    session = handlers.sessions.get("one")
    assert handlers.add(session, [str(WORLD)]) == ""
    html = handlers.clip(session, session.media[0].path, 3, "0:05")
    assert 'download="world-0.03-0.05.mp4"' in html
    (file,) = tmp_path.glob("*/world-0.03-0.05.mp4")
    assert 2 <= probe(file).duration_s < 12  # it begins at a key frame
    assert session.problem == ""


@pytest.mark.parametrize(("start", "end"), [(50, 60), (5, 3), ("x", 3), (None, None)])
def test_a_piece_that_is_not_there_is_one_sentence(handlers: Handlers, start: Any, end: Any) -> None:
    session = handlers.sessions.get("one")
    assert handlers.add(session, [str(WORLD)]) == ""
    assert handlers.clip(session, session.media[0].path, start, end) == ""
    assert "fc-problem" in session.problem


@pytest.fixture(scope="module")
def served(tiny_model: VideoLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page as `fluxchat web` serves it, behind its access control."""
    with pytest.MonkeyPatch.context() as patch, VideoChat(tiny_model, trusted=False) as chat:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        with running(chat, LaunchOptions(examples=[])) as (url, _):
            yield Served(None, url, chat)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("answer_with_times")
@browsing
def test_each_time_in_an_answer_is_saved_with_one_click(
    open_page: Callable[..., Any],
    tmp_path: Path,
) -> None:
    page = open_page()
    upload(page, SHORT)
    ask(page)
    answered(page)
    clips = page.locator("#fluxchat-chat .fc-clip")
    expect(clips).to_have_count(2)
    for name, seconds in (("0:01 to 0:02", (1, 2.1)), ("0:03", (2, 5.1))):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save {name} as a clip").click()
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        assert seconds[0] <= probe(file).duration_s <= seconds[1] + 2  # back to a key frame
        has(page.locator(".fc-upload"), f"Saved {file.name}")
    assert violations(page) == []
    shoot(page, "clip")
    ask(page, "Again?")
    answered(page, 2)
    expect(clips).to_have_count(4)
