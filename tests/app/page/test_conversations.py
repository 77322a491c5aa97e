"""Conversations that stay in the browser: a list at the side that survives reload and restart."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.chat import VideoChat
from app.conversation_files import Frame, Record, Shown, to_dict, to_markdown
from app.server.options import LaunchOptions
from encoder.video.part import Part
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Message
from tests.app.conftest import SHORT, WORLD
from tests.app.page.in_browser import (
    Served,
    answered,
    ask,
    browsing,
    edit_first,
    expect,
    has,
    shoot,
    upload,
    violations,
)
from tests.app.server.serving import running
from tests.passes import held
from tests.patience import until

pytestmark = browsing

OPTIONS = LaunchOptions(examples=[(str(WORLD), "What turns?")])


@pytest.fixture(scope="module")
def served(tiny_model: VideoLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page as `fluxchat web` serves it, behind its access control."""
    with pytest.MonkeyPatch.context() as patch, VideoChat(tiny_model, trusted=False) as chat:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        with running(chat, OPTIONS) as (url, _):
            yield Served(None, url, chat)  # type: ignore[arg-type]


def talks(page: Any) -> Any:
    return page.locator("#fluxchat-list [data-conversation]")


def side(page: Any) -> None:
    page.get_by_role("button", name="Conversations").click()
    expect(page.locator("#fluxchat-side")).to_be_visible()


def menu(page: Any, choice: str, number: int = 0) -> None:
    page.locator("[data-menu]").nth(number).click()
    page.locator(".fc-menu").get_by_role("button", name=choice).click()


def fresh(page: Any) -> None:
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#fluxchat-chat .message")).to_have_count(0)


def kept(page: Any, count: int, title: str | re.Pattern[str] = "") -> None:
    """The list holds so many, the newest of that title; the open one is kept with the answers shown."""
    expect(talks(page)).to_have_count(count)
    has(talks(page).first, title)
    page.wait_for_function(
        """() => new Promise((done) => {
            const find = (selector) => document.querySelector(selector);
            const owner = find('a[href="/logout"]') ? `-${find("[data-owner]").dataset.owner}` : "";
            const request = indexedDB.open(`fluxchat${owner}`);
            request.onsuccess = () => {
                const all = request.result.transaction("conversations").objectStore("conversations").getAll();
                all.onsuccess = () => {
                    request.result.close();
                    const open = all.result.find((one) => location.hash === `#c=${one.id}`);
                    const answers = document.querySelectorAll("#fluxchat-chat .fc-small").length;
                    done(open?.turns.length === answers && open.turns.every((turn) => turn.details));
                };
            };
        })"""
    )


@pytest.mark.slow
def test_a_reload_changes_nothing_and_the_talk_goes_on(open_page: Callable[..., Any]) -> None:
    page = open_page()
    upload(page)
    ask(page, "What is <b>there</b>?")
    answered(page)
    kept(page, 1, "What is <b>there</b>?")
    chat = page.locator("#fluxchat-chat")
    before, evidence = chat.inner_text(), page.locator("#fluxchat-chat .fc-details").inner_html()
    assert re.search(r"#c=[\w-]+$", page.url)
    page.reload()
    answered(page)
    has(page.locator("#fluxchat-shelf"), SHORT.name)
    has(page.locator("#fluxchat-cost"), "to first word")
    assert chat.inner_text() == before
    assert page.locator("#fluxchat-chat .fc-details").inner_html() == evidence
    ask(page, "And then?")
    answered(page, 2)
    kept(page, 1)
    side(page)
    has(talks(page), "2 questions")
    has(page.locator("#fluxchat-kept"), re.compile(r"1 video, 0\.\d of 1024 MiB"))


@pytest.mark.slow
def test_yesterdays_conversation_is_there_after_a_restart(
    new_context: Callable[..., Any],
    tiny_model: VideoLanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    context = new_context()
    page = context.new_page()
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, OPTIONS) as (url, _):
        page.goto(url)
        upload(page)
        ask(page, "Yesterday?")
        answered(page)
        kept(page, 1, "Yesterday?")
        link = page.url
        page.close()
    port = int(url.rsplit(":", 1)[1])
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, OPTIONS, port) as (url, _):
        page = context.new_page()
        page.goto(url)
        side(page)
        talks(page).get_by_role("button", name="Yesterday?").first.click()
        answered(page)
        has(page.locator("#fluxchat-shelf"), SHORT.name)
        assert page.url == link
        page.wait_for_function("document.querySelector('#fluxchat-video video').duration > 4")


@pytest.mark.slow
def test_open_search_rename_delete_and_undo(open_page: Callable[..., Any]) -> None:
    page = open_page(1440, 900)
    upload(page)
    for number, question in enumerate(("About apples?", "About pears?")):
        fresh(page)
        ask(page, question)
        answered(page)
        kept(page, number + 1, question)
    side(page)
    talks(page).nth(1).locator("[data-open]").click()
    has(page.locator("#fluxchat-chat .user.message"), "About apples?")
    has(page.locator("#fluxchat-shelf"), SHORT.name)
    expect(page.locator("#fluxchat-list [aria-current]")).to_contain_text("About apples?")

    search = page.get_by_label("Search conversations")
    search.fill("PEARS about")
    expect(talks(page)).to_have_count(1)
    search.fill("nothing of the kind")
    has(page.locator("#fluxchat-list"), "Nothing found")
    search.fill("")
    expect(talks(page)).to_have_count(2)

    # With the keyboard alone.
    page.locator("[data-menu]").nth(1).focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.type("Orchard")
    page.keyboard.press("Enter")
    has(talks(page).nth(1), "Orchard")
    expect(page.locator("[data-menu]").nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".fc-menu")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".fc-menu")).to_have_count(0)
    shoot(page, "conversations")

    menu(page, "Delete", 1)
    expect(talks(page)).to_have_count(1)
    expect(page.locator("#fluxchat-chat .message")).to_have_count(0)  # it was the open one
    page.get_by_role("button", name="Undo").click()
    expect(talks(page)).to_have_count(2)
    has(talks(page).nth(1), "Orchard")
    menu(page, "Delete", 0)
    expect(talks(page)).to_have_count(1)
    page.reload()
    expect(talks(page)).to_have_count(1)
    has(talks(page), "Orchard")


def record_of(export: dict[str, Any]) -> Record:
    """What an export in JSON holds, as a Record."""

    def piece(part: dict[str, Any]) -> str | Shown:
        if "text" in part:
            return str(part["text"])
        frames = tuple(Frame(f["time_s"], base64.b64decode(f["jpeg"])) for f in part["frames"])
        return Shown(part["name"], part["duration_s"], Part(**part["part"]), frames)

    messages = (Message(m["role"], tuple(map(piece, m["content"]))) for m in export["messages"])
    return Record(export["model"], tuple(messages))


@pytest.mark.slow
def test_exports_have_the_form_of_the_programs_own(
    open_page: Callable[..., Any],
    served: Served,
    tmp_path: Path,
) -> None:
    page = open_page()
    upload(page)
    for number, question in enumerate(("# What is *this* & <b>that</b>?", "- And\nthen?")):
        ask(page, question)
        answered(page, number + 1)
    kept(page, 1)
    side(page)
    files = {}
    for kind in ("JSON", "Markdown"):
        with page.expect_download() as download:
            menu(page, f"Export {kind}")
        files[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[kind])
        page.keyboard.press("Escape")
    assert (files["JSON"].suffix, files["Markdown"].suffix) == (".json", ".md")
    export = json.loads(files["JSON"].read_text())
    record = record_of(export)
    assert to_dict(record) == export
    assert record.model == served.chat.name
    shown, question = record.messages[0].content
    assert isinstance(shown, Shown)
    assert (shown.name, question) == (SHORT.name, "# What is *this* & <b>that</b>?")
    assert len(shown.frames) == served.chat.plan(SHORT, served.chat.model.default_tokens).frames
    assert all(frame.jpeg.startswith(b"\xff\xd8") for frame in shown.frames)
    assert [message.role for message in record.messages] == ["user", "assistant"] * 2
    assert files["Markdown"].read_bytes().decode() == to_markdown(record)


@pytest.mark.slow
def test_an_edited_turn_makes_a_branch(open_page: Callable[..., Any]) -> None:
    page = open_page()
    for number, question in enumerate(("One?", "Two?")):
        ask(page, question)
        answered(page, number + 1)
    kept(page, 1, "One?")
    chat = page.locator("#fluxchat-chat")
    edit_first(chat)
    chat.locator("textarea").fill("Three?")
    chat.get_by_label("Submit").click()
    answered(page, 1)
    kept(page, 2, "One? (branch)")
    side(page)
    talks(page).nth(1).locator("[data-open]").click()
    answered(page, 2)
    has(chat, "One?")
    has(chat, "Two?")
    expect(chat).not_to_contain_text("Three?")


@pytest.mark.slow
def test_a_talk_that_goes_on_in_two_tabs_loses_nothing(open_page: Callable[..., Any]) -> None:
    first = open_page()
    ask(first, "One?")
    answered(first)
    kept(first, 1)
    second = first.context.new_page()
    second.goto(first.url)
    answered(second)
    ask(second, "Here?")
    answered(second, 2)
    kept(second, 1)
    ask(first, "There?")
    answered(first, 2)
    kept(first, 2, "(branch)")
    second.reload()
    answered(second, 2)
    has(second.locator("#fluxchat-chat"), "Here?")


@pytest.mark.slow
def test_a_video_that_is_gone_shows_its_frames_and_is_asked_for(
    open_page: Callable[..., Any],
) -> None:
    page = open_page()
    upload(page)
    ask(page)
    answered(page)
    kept(page, 1)
    page.evaluate("document.querySelector('.fc-list').dataset.quota = '0.001'")
    ask(page, "And then?")  # after each answer, what is too much goes
    answered(page, 2)
    has(page.locator("#fluxchat-kept"), "0 videos, 0.0 of 0.001 MiB")
    kept(page, 1)
    page.reload()
    answered(page, 2)
    gone = page.locator(".fc-missing")
    has(gone, "b.mp4 is not kept any more")
    expect(page.locator("#fluxchat-chat .fc-frames")).to_have_count(2)
    expect(page.locator("#fluxchat-shelf .fc-medium")).to_have_count(0)
    for file in (WORLD, SHORT):
        with page.expect_file_chooser() as chooser:
            gone.get_by_role("button", name="Choose the file").click()
        chooser.value.set_files(str(file))
        if file == WORLD:
            has(page.locator("#fluxchat-problem"), "world.mp4 is another file than the b.mp4")
    has(page.locator("#fluxchat-shelf"), "b.mp4")
    expect(gone).to_be_hidden()
    expect(page.locator("#fluxchat-problem [role=alert]")).to_have_count(0)
    ask(page, "Again?")
    answered(page, 3)


@pytest.mark.slow
def test_another_browser_has_none_of_them(open_page: Callable[..., Any]) -> None:
    page = open_page()
    ask(page, "A secret?")
    answered(page)
    kept(page, 1)
    other = open_page()
    expect(talks(other)).to_have_count(0)
    other.goto(page.url)
    has(other.locator("#fluxchat-problem"), "not kept in this browser")
    expect(other.locator("#fluxchat-chat .message")).to_have_count(0)
    assert "#" not in other.url


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 1440),
        ("dark", 390),
        ("light", 390),
        ("dark", 1440),
    ],
)
def test_the_list_is_accessible(open_page: Callable[..., Any], scheme: str, width: int) -> None:
    page = open_page(width, 844, color_scheme=scheme)
    upload(page)
    ask(page)
    answered(page)
    kept(page, 1)
    side(page)
    page.locator("[data-menu]").click()
    expect(page.locator("p.loading")).to_have_count(0)
    page.wait_for_timeout(300)
    assert violations(page) == []
    small = page.evaluate(
        "[...document.querySelectorAll('#fluxchat-side button')].filter(e => e.checkVisibility()).filter(e =>"
        " e.getBoundingClientRect().height < 24).map(e => e.outerHTML.slice(0, 120))"
    )
    assert small == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shoot(page, f"list-{width}-{scheme}")


def two_talks(page: Any) -> None:
    """Two kept conversations about a video, "One?" the older, with the list open."""
    upload(page)
    for number, question in enumerate(("One?", "Two?")):
        fresh(page)
        ask(page, question)
        answered(page)
        kept(page, number + 1, question)
    side(page)


@pytest.mark.slow
def test_of_two_clicks_the_last_one_opens(open_page: Callable[..., Any]) -> None:
    page = open_page(1440, 900)
    two_talks(page)
    fresh(page)
    waiting: list[Any] = []

    def hold_first(route: Any) -> None:
        if waiting:
            route.continue_()
        else:
            waiting.append(route)

    page.route("**/gradio_api/upload*", hold_first)
    chat = page.locator("#fluxchat-chat")
    talks(page).nth(1).locator("[data-open]").click()
    arrived(page, waiting)
    talks(page).nth(0).locator("[data-open]").click()
    has(chat, "Two?")
    waiting[0].continue_()
    page.wait_for_timeout(1500)
    has(chat, "Two?")
    expect(chat).not_to_contain_text("One?")
    has(page.locator("#fluxchat-list [aria-current]"), "Two?")
    expect(page.locator("#fluxchat-shelf .fc-medium")).to_have_count(1)
    expect(page.locator("#fluxchat-problem [role=alert]")).to_have_count(0)


@pytest.mark.slow
def test_a_conversation_that_opens_late_does_not_come_over_a_new_one(
    open_page: Callable[..., Any],
) -> None:
    page = open_page(1440, 900)
    two_talks(page)
    waiting = held_up(page, "**/gradio_api/upload*")
    talks(page).nth(1).locator("[data-open]").click()
    arrived(page, waiting)
    fresh(page)
    waiting[0].continue_()
    page.wait_for_timeout(1500)
    expect(page.locator("#fluxchat-chat .message")).to_have_count(0)


@pytest.mark.slow
def test_an_opening_that_the_server_ends_late_gives_way(
    open_page: Callable[..., Any],
    slowed: Callable[[str, list[float]], None],
) -> None:
    page = open_page(1440, 900)
    two_talks(page)
    fresh(page)
    slowed("add", [2.0])
    chat = page.locator("#fluxchat-chat")
    talks(page).nth(1).locator("[data-open]").click()
    page.wait_for_timeout(800)  # the server opens its video
    talks(page).nth(0).locator("[data-open]").click()
    has(chat, "Two?")
    page.wait_for_timeout(2500)
    has(chat, "Two?")
    expect(chat).not_to_contain_text("One?")
    has(page.locator("#fluxchat-list [aria-current]"), "Two?")
    expect(page.locator("#fluxchat-shelf .fc-medium")).to_have_count(1)


@pytest.mark.slow
def test_a_name_that_is_being_typed_outlives_a_new_list(
    open_page: Callable[..., Any],
    served: Served,
) -> None:
    page = open_page(1440, 900)
    side(page)
    ask(page, "One?")
    answered(page)
    kept(page, 1)
    with held(served.chat.model.llm):
        ask(page, "Two?")
        menu(page, "Rename")
        field = page.get_by_label("Name of the conversation")
        field.fill("Orch")
    answered(page, 2)
    kept(page, 1)
    page.wait_for_timeout(500)  # the list was drawn anew
    expect(field).to_be_focused()
    page.keyboard.type("ard")
    page.keyboard.press("Enter")
    has(talks(page), "Orchard")


SLOW_DIGEST = """() => {
    const digest = crypto.subtle.digest.bind(crypto.subtle);
    crypto.subtle.digest = async (...all) => {
        await new Promise((done) => setTimeout(done, 3000));
        return digest(...all);
    };
}"""


@pytest.mark.slow
def test_a_name_that_is_given_while_a_video_is_kept_stays(open_page: Callable[..., Any]) -> None:
    page = open_page(1440, 900)
    side(page)
    ask(page, "One?")
    answered(page)
    kept(page, 1)
    page.evaluate(SLOW_DIGEST)  # as for a large video
    upload(page)
    ask(page, "Two?")
    page.wait_for_timeout(500)
    menu(page, "Rename")
    page.get_by_label("Name of the conversation").fill("Orchard")
    page.keyboard.press("Enter")
    has(talks(page), "Orchard")
    answered(page, 2)
    has(page.locator("#fluxchat-kept"), "1 video")
    has(talks(page), "2 questions")
    has(talks(page), "Orchard")
    page.reload()
    has(talks(page), "Orchard")


def held_up(page: Any, pattern: str) -> list[Any]:
    """Requests of that address, which wait in the list until it is said that they go on."""
    waiting: list[Any] = []
    page.route(pattern, lambda route: waiting.append(route))
    return waiting


def arrived(page: Any, waiting: list[Any], count: int = 1) -> None:
    def all_of_them() -> bool:
        page.wait_for_timeout(20)  # lets them come
        return len(waiting) >= count

    until(all_of_them)


def reopening(open_page: Callable[..., Any]) -> tuple[Any, str, list[Any]]:
    """A page that was reloaded in a conversation of one question, its address before, and the uploads that
    reopening it waits for."""
    page = open_page()
    upload(page)
    ask(page, "What is there?")
    answered(page)
    kept(page, 1)
    link = page.url
    waiting = held_up(page, "**/gradio_api/upload*")
    page.reload()
    return page, link, waiting


def go_on(page: Any, waiting: list[Any]) -> None:
    page.wait_for_timeout(300)  # what would be wrong has happened by now
    for route in waiting:
        route.continue_()
    page.unroute_all()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["enter", "click"])
def test_a_question_before_a_reload_has_brought_its_conversation_waits_for_it(
    open_page: Callable[..., Any], way: str
) -> None:
    page, link, waiting = reopening(open_page)
    field = page.get_by_label("Question", exact=True)
    field.fill("And then?")
    if way == "enter":
        field.press("Enter")
        field.press("Enter")  # asked once all the same
    else:
        page.locator("#fluxchat-send").click()
    has(page.locator(".fc-upload"), re.compile("Opening the conversation|Sending"))
    arrived(page, waiting)
    expect(page.locator("#fluxchat-chat .message")).to_have_count(0)
    go_on(page, waiting)
    answered(page, 2)
    kept(page, 1)
    has(page.locator("#fluxchat-chat"), "What is there?")
    expect(field).to_have_value("")
    assert page.url == link
    side(page)
    has(talks(page), "2 questions")


@pytest.mark.slow
def test_a_file_that_is_brought_meanwhile_waits_too(open_page: Callable[..., Any]) -> None:
    page, link, waiting = reopening(open_page)
    arrived(page, waiting)
    page.locator("#fluxchat-file").set_input_files(str(WORLD))
    arrived(page, waiting, 2)
    waiting.reverse()  # the new file is there first
    go_on(page, waiting)
    has(page.locator("#fluxchat-shelf"), WORLD.name)
    has(page.locator("#fluxchat-shelf"), SHORT.name)
    answered(page)
    assert page.url == link


@pytest.mark.slow
def test_an_example_is_begun_in_place_of_a_conversation_that_is_being_opened(
    open_page: Callable[..., Any],
) -> None:
    page, link, waiting = reopening(open_page)
    arrived(page, waiting)
    page.locator("[data-example]").click()
    has(page.locator("#fluxchat-chat"), "What turns?")
    go_on(page, waiting)
    answered(page)
    expect(page.locator("#fluxchat-chat")).not_to_contain_text("What is there?")
    assert page.url != link
