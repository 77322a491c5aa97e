"""Long videos on the page: priced, asked about in parts, stopped, with chapters that seek."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.chat import VideoChat
from app.long_video import Chapter, LongVideo
from app.note import note_for
from app.page import html as markup
from app.page.handlers import Handlers
from app.page.sessions import Session
from app.page.settings import CHOOSE, Settings
from app.streaming import Step, StopSignal
from tests.app.conftest import SHORT
from tests.app.page.in_browser import (
    Served,
    answered,
    ask,
    browsing,
    expect,
    has,
    plays_at,
    shoot,
    upload,
)
from tests.bench.long_video import loop
from tests.passes import held, slow_passes
from training.synthetic.export import write_video

PLAIN = Settings(64, False, 2.0, "flux", CHOOSE, CHOOSE, max_new_tokens=6)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An hour and ten minutes: one minute of three colours, seventy times."""
    folder = tmp_path_factory.mktemp("long")
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]
    shots = [np.full((48, 64, 3), colours[second // 20], np.uint8) for second in range(60)]
    write_video(folder / "minute.mp4", np.stack(shots), 1)
    loop(folder / "minute.mp4", folder / "film.mp4", 70)
    return folder / "film.mp4"


@pytest.fixture
def session(handlers: Handlers, film: Path) -> Session:
    session = handlers.sessions.get("one")
    assert handlers.add(session, [str(film)]) == ""
    handlers.chat.calibration  # noqa: B018 - measured here
    return session


def answer(handlers: Handlers, session: Session, question: str) -> list[list[dict[str, Any]]]:
    assert handlers.begin(session, question)
    return list(handlers.run(session, PLAIN))


def test_the_price_is_that_of_the_parts_and_what_the_answer_takes(
    handlers: Handlers, session: Session, film: Path
) -> None:
    price = LongVideo(handlers.chat, film).price(64)
    presets, line = handlers.cost(session, PLAIN)
    assert f"<b>{price.kept_tokens}</b> of" in line
    assert f"{price.parts} × {price.frames // price.parts} ×" in line
    assert "to find the parts" in line
    assert "of detail" in presets
    strip = handlers.strip(session, PLAIN)
    assert f"in {price.parts} parts: {price.kept_tokens} of" in strip
    answer(handlers, session, "What is there?")
    [turn] = session.turns
    assert turn.answer is not None
    assert (len(turn.answer.kept), turn.answer.usage.kept_tokens) == (price.parts, price.kept_tokens)
    shown = re.findall(r'data-seek="([\d.]+)"', turn.details)
    assert shown == re.findall(r'data-seek="([\d.]+)"', strip)
    assert [float(time_s) for time_s in shown] == pytest.approx(
        [time_s for kept in turn.answer.kept for time_s in kept.times_s], abs=1e-3
    )
    assert turn.details.count('class="fc-frames"') == 1  # an export takes one row as one video
    assert re.search(r"<span>1:0\d:\d\d ", turn.details)  # hours


def test_a_follow_up_costs_what_is_new_and_one_with_a_time_looks_there(
    handlers: Handlers, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def price(question: str = "") -> list[Any]:
        return handlers._estimates(handlers.chat, session, PLAIN, None, question)

    [before] = price()
    answer(handlers, session, "What is there?")
    first = session.turns[0]
    assert first.predicted_s == pytest.approx(before.first_token_s)
    [after] = price()
    assert (after.decode_s, after.encode_s, after.survey_s) == (0, 0, 0)
    assert after.first_token_s < before.first_token_s
    monkeypatch.setattr(VideoChat, "frames_at", None)  # the survey is kept
    answer(handlers, session, "And then?")
    second = session.turns[1].answer
    assert first.answer is not None
    assert second is not None
    assert second.usage.cached_tokens >= first.answer.usage.prompt_tokens
    assert len(price("What is it at 1:00:00?")) == 2
    answer(handlers, session, "What is it at 1:00:00?")
    third = session.turns[2].answer
    assert third is not None
    assert [kept.times_s for kept in third.kept[:-1]] == [kept.times_s for kept in first.answer.kept]
    assert 3585 <= min(third.kept[-1].times_s) < max(third.kept[-1].times_s) <= 3615
    answer(handlers, session, "And at 1:30:00?")
    beyond = session.turns[3]
    assert not beyond.error
    assert beyond.answer is not None
    assert "1:30:00" in beyond.answer.note
    assert beyond.text.startswith(beyond.answer.note)


def test_a_first_question_about_a_time_is_priced_as_that(handlers: Handlers, session: Session) -> None:
    around = handlers.chat.estimate(session.media[0].asked, 64, start=15, end=45)
    answer(handlers, session, "What is it at 0:30?")
    [turn] = session.turns
    assert turn.answer is not None
    assert len(turn.answer.kept) == 1
    assert turn.predicted_s == pytest.approx(around.first_token_s)


def test_beside_another_video_and_short_it_is_looked_at_as_one(handlers: Handlers, session: Session) -> None:
    handlers.add(session, [str(SHORT)])
    assert "parts" not in handlers.cost(session, PLAIN)[1]
    answer(handlers, session, "Which is red?")
    turn = session.turns[0]
    assert turn.answer is not None
    assert len(turn.answer.kept) == 2
    handlers.look_at(session, session.media[0].path, 0, 60, None, 1)
    handlers.sessions.remove(session, session.media[1].path)
    assert "parts" not in handlers.cost(session, PLAIN)[1]
    assert handlers.chapters(session) == ""


def test_progress_names_the_part_and_stop_ends_it_between_two(handlers: Handlers, session: Session) -> None:
    looked: list[str] = []
    assert handlers.begin(session, "What is there?")
    phases = []
    encode = handlers.chat._vision.encode

    def slow(*arguments: Any, **options: Any) -> Any:
        looked.append("part")
        encoded = encode(*arguments, **options)
        time.sleep(0.2)
        return encoded

    handlers.chat._vision.encode = slow  # type: ignore[method-assign]
    for messages in handlers.run(session, PLAIN):
        phases.append(messages[-1]["content"][0])
        if "part 1 of 2" in phases[-1]:
            handlers.stop(session)
    handlers.chat._vision.encode = encode  # type: ignore[method-assign]
    assert any("Finding where the picture changes" in phase for phase in phases)
    assert len(looked) == 1
    [turn] = session.turns
    assert turn.done
    assert turn.answer is not None
    assert (turn.answer.finish, turn.answer.kept) == ("cancelled", ())
    assert "stopped" in turn.details
    assert session.history == []


def test_every_caller_is_told_of_parts_by_the_same_progress(chat: VideoChat, film: Path) -> None:
    told: list[Any] = []
    chat.ask(film, "What?", parts=True, budget=64, max_new_tokens=1, progress=lambda *what: told.append(what))
    steps = [what for what, *_ in told if isinstance(what, Step)]
    assert [(step, step.part, step.parts) for step in steps if step == "decode"] == [
        ("decode", 1, 2),
        ("decode", 2, 2),
    ]


def test_the_survey_ends_when_the_answer_is_stopped(chat: VideoChat, film: Path) -> None:
    stop, read = threading.Event(), []
    glance = chat.frames_at

    def watched(*arguments: Any) -> Any:
        read.append(arguments)
        stop.set()
        return glance(*arguments)

    chat.frames_at = watched  # type: ignore[method-assign]
    stopped = chat.ask(film, "What?", parts=True, budget=512, stop=stop)
    assert (stopped.finish, stopped.text, len(read)) == ("cancelled", "", 1)


def test_chapters_come_one_by_one_and_stop(handlers: Handlers, session: Session) -> None:
    path = session.media[0].path
    offered = handlers.chapters(session)
    assert "data-chapters>" in offered
    for count, html in enumerate(handlers.find_chapters(session, path, PLAIN)):
        assert html is not None
        if "data-chapters-stop" in html:
            assert html.count("<li>") == count
        if count == 3:
            handlers.stop_chapters(session)
    listed = handlers.chapters(session)
    assert listed == html
    assert listed.count("<li>") == 3
    assert 'data-seek="0.000" data-medium="0"' in listed
    assert session.listing is None
    handlers.add(session, [str(SHORT)])
    assert handlers.chapters(session) == ""  # of what is in the player
    session.show(path)
    assert handlers.chapters(session) == listed


def test_chapters_of_what_is_not_in_the_player_any_more_are_kept_not_shown(
    handlers: Handlers, session: Session
) -> None:
    path = session.media[0].path
    for count, html in enumerate(handlers.find_chapters(session, path, PLAIN)):
        if count == 1:
            handlers.add(session, [str(SHORT)])
        if count > 1:
            assert html is None
        if count == 2:
            handlers.stop(session)  # of the answer: not of this
        if count == 3:
            session.halt()
    assert len(next(iter(session.chapters.values()))) == 3


def test_the_note_of_chapters_stands_before_them(chat: VideoChat) -> None:
    first = Chapter(0.0, 9.0, "It moves.", False, note_for(236).strip())
    listed = markup.chapters([first, Chapter(9.0, 20.0, "It <stays>.", False)], 0)
    assert "<b>0:00</b> It moves.</button>" in listed
    assert "<b>0:09</b> It &lt;stays&gt;.</button>" in listed
    assert listed.index("236 drawn things") < listed.index("<ol")
    assert "<code>fluxchat web" in listed


def test_times_with_hours_are_links() -> None:
    linked = markup.link_times("At 1:05:00, then from 0:59:30 to 1:02:03.5.", 4200.0)
    assert linked == "At [1:05:00](#t=3900), then from [0:59:30 to 1:02:03.5](#t=3570,3723.5)."
    assert markup.link_times("At 1:05:00 and 2:00:00.", 4000.0) == "At [1:05:00](#t=3900) and 2:00:00."
    assert markup.clock(3900) == "1:05:00"


@pytest.fixture
def two_chapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two chapters nothing comes until the list is stopped."""
    all_of_them = LongVideo.chapters

    def chapters(film: LongVideo, *, stop: StopSignal, **options: Any) -> Iterator[Chapter]:
        yield from islice(all_of_them(film, stop=stop, **options), 2)
        while True:
            stop.check()
            time.sleep(0.05)

    monkeypatch.setattr(LongVideo, "chapters", chapters)


@pytest.mark.slow
@browsing
@pytest.mark.usefixtures("two_chapters")
def test_a_long_video_in_the_browser(open_page: Callable[..., Any], film: Path, served: Served) -> None:
    page = open_page()
    upload(page, film)
    has(page.locator("#fluxchat-strip"), re.compile(r"in \d parts"))
    shoot(page, "long")
    with held(served.chat.model.llm):
        ask(page)
        has(page.locator("#fluxchat-chat"), re.compile(r"part \d of \d|Thinking|…"))
    answered(page)
    page.locator("#fluxchat-chat summary").click()
    frames = page.locator("#fluxchat-chat .fc-frame")
    assert frames.count() >= 4
    late = float(frames.last.get_attribute("data-seek"))
    assert late > 3000
    frames.last.click()
    plays_at(page, late - 1, late + 1)
    with slow_passes(served.chat.model.llm):
        ask(page, "And then?")
        has(page.locator("#fluxchat-chat"), "And then?")
        page.locator("#fluxchat-stop").click()
        answered(page, 2)
    page.get_by_role("button", name="List chapters").click()
    rows = page.locator(".fc-chapters li")
    expect(rows.nth(1)).to_be_visible()
    page.get_by_role("button", name="Stop", exact=True).locator("visible=true").first.click()
    expect(page.locator("[data-chapters-stop]")).to_have_count(0)
    begin = float(rows.nth(1).locator("button").get_attribute("data-seek"))
    rows.nth(1).locator("button").click()
    plays_at(page, begin - 1, begin + 1)
    shoot(page, "long-chapters")
