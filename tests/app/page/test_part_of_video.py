"""A part of the video as part of the question: a range on the timeline and a box on the picture."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.chat import VideoChat
from app.page.handlers import Handlers, conversation_messages
from app.page.html import part_chips, shelf
from encoder.video.part import WHOLE, Part
from tests.app.conftest import SHORT, WORLD
from tests.app.page.in_browser import (
    answered,
    ask,
    browsing,
    expect,
    has,
    plays_at,
    shoot,
    upload,
    violations,
)
from tests.app.page.test_page import PLAIN
from tests.app.page.test_page import ask as answer
from tests.encoder.video import video_files as vf


def test_a_part_is_asked_about_priced_and_looked_at(handlers: Handlers, chat: VideoChat) -> None:
    session = handlers.sessions.get("one")
    assert handlers.add(session, [str(WORLD)]) == ""
    assert handlers.look_at(session, str(WORLD), 10, 12.5, [0.5, 0, 1, 1]) == ""
    answer(handlers, session, "What is there?")
    answer_text = session.turns[0].text
    direct = chat.ask(
        str(WORLD), "What is there?", start=10, end=12.5, region=(0.5, 0, 1, 1), **PLAIN.options()
    )
    assert answer_text == direct.text
    kept = session.turns[0].answer.kept[0]  # type: ignore[union-attr]
    assert all(10 <= time_s <= 12.5 for time_s in kept.times_s)
    assert "0:10 – 0:12.5 · a box of the picture" in str(handlers.messages(session)[0]["content"])
    assert "0:1" in handlers.strip(session, PLAIN)
    assert "0:29" not in handlers.strip(session, PLAIN)

    # The whole again is another thing to look at; the first question keeps what it was about.
    assert handlers.look_at(session, str(WORLD), 0, None, None) == ""
    answer(handlers, session, "And in all of it?")
    assert [turn.media[0].part.whole for turn in session.turns] == [False, True]
    assert max(session.turns[1].answer.kept[0].times_s) > 25  # type: ignore[union-attr]


def test_a_part_stands_in_the_question_that_chose_it(handlers: Handlers) -> None:
    session = handlers.sessions.get("one")
    assert handlers.add(session, [str(WORLD)]) == ""
    answer(handlers, session, "One?")
    handlers.look_at(session, str(WORLD), 3, 5, None)
    messages = conversation_messages(session.media, session.history, "Two?")
    assert messages[0].content == ("One?",)
    assert messages[-1].content[0].part == Part(3.0, 5.0)  # type: ignore[union-attr]


def test_a_waiting_question_keeps_its_part(handlers: Handlers) -> None:
    session = handlers.sessions.get("one")
    assert handlers.add(session, [str(WORLD)]) == ""
    handlers.look_at(session, str(WORLD), 3, 5, None)
    handlers.begin(session, "One?")
    handlers.look_at(session, str(WORLD), 0, None, None)
    handlers.begin(session, "Two?")
    list(handlers.run(session, PLAIN))
    assert [turn.media[0].part for turn in session.turns] == [Part(3.0, 5.0), WHOLE]


@pytest.mark.parametrize(
    "chosen", [(40, 50, None), (5, 3, None), (0, None, [0.5, 0, 0.2, 1]), ("x", None, None), (0, None, "a")]
)
def test_a_part_that_is_none_is_one_sentence(handlers: Handlers, chosen: Any) -> None:
    session = handlers.sessions.get("one")
    assert handlers.look_at(session, str(WORLD), *chosen) == ""  # there is nothing yet
    assert handlers.add(session, [str(WORLD)]) == ""
    assert "fc-problem" in handlers.look_at(session, str(WORLD), *chosen)
    assert session.media[0].part == WHOLE
    assert part_chips(session.media) == ""


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    page = open_page()
    upload(page, WORLD)
    return page


def first_time(page: Any) -> float:
    return float(page.locator("#fluxchat-strip [data-seek]").first.get_attribute("data-seek"))


@pytest.mark.slow
@browsing
def test_a_range_is_chosen_with_keys_and_cleared(page: Any) -> None:
    chip, cost = page.locator("#fluxchat-parts .fc-chip"), page.locator("#fluxchat-cost")
    page.get_by_label("From", exact=True).focus()
    for _ in range(3):
        page.keyboard.press("PageUp")
    has(chip, re.compile(r"^0:09 – 0:30"))
    plays_at(page, 8.9, 9.1)
    page.get_by_label("To", exact=True).focus()
    page.keyboard.press("PageDown")
    has(chip, re.compile(r"^0:09 – 0:27"))
    page.wait_for_function("Number(document.querySelector('#fluxchat-strip [data-seek]')?.dataset.seek) > 9")
    has(cost, "to first word")
    ask(page)
    answered(page)
    has(page.locator("#fluxchat-chat .user.message"), "0:09 – 0:27")
    seconds = page.locator("#fluxchat-chat [data-seek]").evaluate_all("all => all.map(e => +e.dataset.seek)")
    assert 9 <= min(seconds) < max(seconds) <= 27
    chip.get_by_role("button").click()
    expect(chip).to_have_count(0)
    has(page.locator(".fc-range output"), "All of it")
    page.wait_for_function("Number(document.querySelector('#fluxchat-strip [data-seek]')?.dataset.seek) < 2")
    has(page.locator("#fluxchat-chat .user.message"), "0:09 – 0:27")  # it was asked about that


@browsing
@pytest.mark.slow
def test_a_range_can_be_all_of_a_video_of_any_length_again(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    page = open_page()
    upload(page, vf.write(tmp_path / "odd.mp4", vf.steady(33)))  # 1.32 s
    chosen, to = page.locator(".fc-range output"), page.get_by_label("To", exact=True)
    has(chosen, "All of it")
    to.focus()
    page.keyboard.press("ArrowLeft")
    has(chosen, "0:00 – 0:01.2")
    page.keyboard.press("ArrowRight")
    has(chosen, "All of it")


@browsing
@pytest.mark.slow
def test_a_box_is_drawn_moved_and_taken_away(page: Any) -> None:
    chip, medium = page.locator("#fluxchat-parts .fc-chip"), page.locator("#fluxchat-shelf .fc-medium")
    page.get_by_role("button", name="Box", exact=True).click()
    has(chip, "a box of the picture")
    area = page.locator(".fc-area").bounding_box()
    page.mouse.move(area["x"] + 0.1 * area["width"], area["y"] + 0.1 * area["height"])
    page.mouse.down()
    page.mouse.move(area["x"] + 0.5 * area["width"], area["y"] + 0.6 * area["height"], steps=4)
    page.mouse.up()

    def region() -> list[float]:
        found: list[float] = page.evaluate(
            "JSON.parse(document.querySelector('#fluxchat-shelf .fc-medium').dataset.part).region"
        )
        return found

    page.wait_for_function(
        "JSON.parse(document.querySelector('#fluxchat-shelf .fc-medium').dataset.part).region[0] < 0.2"
    )
    assert region() == pytest.approx([0.1, 0.1, 0.5, 0.6], abs=0.02)
    before = region()
    page.locator(".fc-box").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    page.wait_for_function(
        "before => JSON.parse(document.querySelector('#fluxchat-shelf .fc-medium').dataset.part).region[3]"
        " > before",
        arg=before[3],
    )
    assert region() == pytest.approx(
        [before[0] + 0.02, before[1], before[2] + 0.02, before[3] + 0.02], abs=0.002
    )
    shoot(page, "box")
    ask(page)
    answered(page)
    has(page.locator("#fluxchat-chat .user.message"), "a box of the picture")
    page.locator(".fc-box").focus()
    page.keyboard.press("Delete")
    expect(chip).to_have_count(0)
    expect(page.locator(".fc-area")).to_be_hidden()
    expect(page.get_by_role("button", name="Box", exact=True)).to_have_attribute("aria-pressed", "false")
    expect(medium).to_have_count(1)


@browsing
@pytest.mark.slow
def test_each_medium_has_its_own_part(page: Any, tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (160, 120), "red").save(picture)
    page.get_by_label("From", exact=True).focus()
    page.keyboard.press("PageUp")
    chips = page.locator("#fluxchat-parts .fc-chip")
    has(chips, "0:03 – 0:30")
    page.locator("#fluxchat-file").set_input_files(str(picture))
    has(page.locator("#fluxchat-shelf"), "red.png")
    expect(page.locator(".fc-range")).to_be_hidden()
    page.get_by_role("button", name="Box", exact=True).click()
    expect(chips).to_have_count(2)
    has(chips.first, "world.mp4 · 0:03 – 0:30")
    has(chips.last, "red.png · a box of the picture")
    chips.first.get_by_role("button").click()
    expect(chips).to_have_count(1)
    has(page.locator("#fluxchat-shelf [aria-current]"), "world.mp4")
    has(page.locator(".fc-range output"), "All of it")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.slow
def test_choosing_a_part_is_accessible(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(390 if scheme == "light" else 1280, 844, color_scheme=scheme)
    upload(page, SHORT)
    page.get_by_label("From", exact=True).focus()
    page.keyboard.press("PageUp")
    page.get_by_role("button", name="Box", exact=True).click()
    has(page.locator("#fluxchat-parts .fc-chip"), "a box")
    ask(page)
    answered(page)
    expect(page.locator("p.loading")).to_have_count(0)
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    shoot(page, f"part-{scheme}")


@pytest.mark.slow
def test_an_earlier_choice_that_comes_late_changes_nothing(handlers: Handlers) -> None:
    session = handlers.sessions.get("one")
    handlers.add(session, [str(WORLD)])
    handlers.look_at(session, str(WORLD), 3, 5, [0, 0, 0.5, 1], turn=2)
    chosen = session.media[0].part
    handlers.look_at(session, str(WORLD), 3, 5, None, turn=1)
    assert session.media[0].part == chosen
    handlers.look_at(session, str(WORLD), 3, 5, None, turn=3)
    assert session.media[0].part.region is None
    assert 'data-turn="3"' in shelf(session.media, 0)


BOTH = re.compile(r"0:00.* – .*a box of the picture")


@browsing
@pytest.mark.parametrize("waits", [[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
@pytest.mark.slow
def test_what_is_chosen_while_an_answer_is_late_stays(
    open_page: Callable[..., Any],
    slowed: Callable[[str, list[float]], None],
    waits: list[float],
) -> None:
    page = open_page()
    upload(page, SHORT)
    slowed("look_at", waits)
    page.get_by_label("From", exact=True).focus()
    page.keyboard.press("PageUp")
    page.wait_for_timeout(500)  # it is on its way
    page.get_by_role("button", name="Box", exact=True).click()
    has(page.locator("#fluxchat-parts .fc-chip"), BOTH)
    page.wait_for_timeout(3000 - 500)  # both answers came
    expect(page.locator(".fc-box")).to_be_visible()
    has(page.locator("#fluxchat-parts .fc-chip"), BOTH)


@browsing
@pytest.mark.slow
def test_an_older_shelf_that_comes_last_is_put_right(
    open_page: Callable[..., Any],
    slowed: Callable[[str, list[float]], None],
) -> None:
    page = open_page()
    upload(page, SHORT)
    slowed("suggestions", [2.0])  # after the shelf was drawn
    page.get_by_label("From", exact=True).focus()
    page.keyboard.press("PageUp")
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Box", exact=True).click()
    has(page.locator("#fluxchat-parts .fc-chip"), BOTH)
    page.wait_for_timeout(2000)  # the older one came
    has(page.locator("#fluxchat-parts .fc-chip"), BOTH)
    expect(page.locator(".fc-box")).to_be_visible()


@browsing
@pytest.mark.slow
def test_a_second_file_is_not_lost_while_the_first_is_opened(
    open_page: Callable[..., Any],
    slowed: Callable[[str, list[float]], None],
    tmp_path: Path,
) -> None:
    page, picture = open_page(), tmp_path / "red.png"
    Image.new("RGB", (160, 120), "red").save(picture)
    slowed("add", [1.5])
    page.locator("#fluxchat-file").set_input_files(str(SHORT))
    page.wait_for_timeout(500)
    page.locator("#fluxchat-file").set_input_files(str(picture))
    has(page.locator("#fluxchat-shelf"), SHORT.name)
    has(page.locator("#fluxchat-shelf"), "red.png")
    remove = page.get_by_role("button", name="Remove red.png")
    remove.dblclick()  # the second click is not meant for the other one
    expect(remove).to_have_count(0)
    page.wait_for_timeout(500)
    has(page.locator("#fluxchat-shelf"), SHORT.name)
