"""The page in a real browser (Debian's Chromium, driven by Playwright), around a tiny model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.page.handlers import Handlers
from app.page.sessions import Sessions
from app.page.settings import Range
from tests.app.conftest import SHORT, WORLD
from tests.app.page.in_browser import (
    Served,
    answered,
    ask,
    browsing,
    edit_first,
    expect,
    has,
    plays_at,
    shoot,
    upload,
    violations,
)
from tests.patience import until

pytestmark = browsing


def test_price_first_then_a_question_then_a_fast_one(open_page: Callable[..., Any], served: Served) -> None:
    budgets, page = Range.of(served.chat.model), open_page()
    upload(page)
    cost, strip = page.locator("#fluxchat-cost"), page.locator("#fluxchat-strip")
    default = served.kept(budgets.near(served.chat.model.default_tokens))
    has(cost, default)
    has(strip, default)
    page.locator("[data-settings]").click()
    slider = page.locator("#fluxchat-budget input[type=range]")
    slider.focus()
    slider.press("Home")
    least = re.compile(rf"\b{served.kept(budgets.step)}")
    has(cost, least)
    has(strip, least)

    ask(page)
    answered(page)
    shoot(page, "page")
    small = page.locator("#fluxchat-chat .fc-small")
    has(small, least)
    has(small, "tokens/s")
    ask(page, "And then?")
    answered(page, 2)
    has(small.nth(1), "decode reused")
    has(small.nth(1), "prompt tokens reused")

    frame = strip.locator("[data-seek]").last
    time_s = float(frame.get_attribute("data-seek"))
    frame.click()
    plays_at(page, time_s - 0.1, time_s + 0.1)


@pytest.mark.slow
def test_numbers_out_of_range_count_as_the_nearest(open_page: Callable[..., Any], served: Served) -> None:
    page = open_page()
    upload(page)
    page.locator("[data-settings]").click()
    page.get_by_label("auto, by time").check()
    seconds, cost = page.locator("#fluxchat-seconds input"), page.locator("#fluxchat-cost")
    for typed in (
        "600",
        "",
        "99999",
    ):  # what is out of range, or no number, counts as the nearest that is one
        seconds.fill("0.1")
        seconds.press("Tab")
        has(cost, "to first word")
        seconds.fill(typed)
        seconds.press("Tab")
        has(cost, re.compile("(99|100) %") if typed else "to first word")
    assert page.evaluate("document.querySelector('#fluxchat-budget').inert")
    page.get_by_label("auto, by time").uncheck()
    number = page.locator("#fluxchat-budget input[type=number]")
    number.fill("999999")
    number.press("Tab")
    has(cost, served.kept(Range.of(served.chat.model).largest))
    expect(page.locator(".toast-body")).to_have_count(0)


@pytest.mark.slow
def test_what_is_typed_while_a_question_is_taken_stays(
    open_page: Callable[..., Any], slowed: Callable[[str, list[float]], None]
) -> None:
    page = open_page()
    slowed("begin", [2.0, 0.0])
    box = page.get_by_label("Question", exact=True)
    ask(page, "One?")
    page.wait_for_timeout(500)
    box.fill("Two?")
    answered(page)
    expect(box).to_have_value("Two?")
    for number in (2, 3):  # the same one twice is taken twice
        ask(page, "Two?")
        answered(page, number)
        expect(box).to_have_value("")
    ask(page, "   ")
    page.wait_for_timeout(500)
    expect(box).to_have_value("   ")
    box.fill("")
    page.locator("#fluxchat-send").click()
    page.wait_for_timeout(500)
    expect(page.locator("#fluxchat-chat .user.message")).to_have_count(3)


@pytest.mark.slow
def test_the_slider_keeps_where_it_was_moved_after_a_preset(
    open_page: Callable[..., Any], served: Served
) -> None:
    budgets, page = Range.of(served.chat.model), open_page()
    upload(page)
    page.locator("[data-settings]").click()
    page.get_by_label("auto, by time").check()
    held: list[Any] = []

    def slow(route: Any) -> None:  # what the page sends to the server for a preset, if it does
        if not held:
            held.append(route)
            page.wait_for_timeout(1000)
        route.continue_()

    page.route("**/gradio_api/run/**", slow)
    slider, cost = page.locator("#fluxchat-budget input[type=range]"), page.locator("#fluxchat-cost")
    page.get_by_role("button", name="Thorough").click()
    slider.focus()
    slider.press("Home")
    page.wait_for_timeout(2000)
    expect(slider).to_have_value(str(budgets.step))
    least = re.compile(rf"\b{served.kept(budgets.step)}")
    has(cost, least)
    expect(page.get_by_label("auto, by time")).not_to_be_checked()
    page.get_by_role("button", name="Thorough").click()
    has(cost, served.kept(budgets.largest))
    has(page.locator("#fluxchat-strip"), served.kept(budgets.largest))
    expect(page.get_by_role("button", name="Thorough")).to_have_attribute("aria-pressed", "true")


@pytest.mark.usefixtures("slow_answers")
def test_stop_keeps_the_text_so_far(open_page: Callable[..., Any]) -> None:
    page = open_page()
    ask(page, "Say something long.")
    expect(page.locator("#fluxchat-send")).to_be_hidden()
    bot = page.locator("#fluxchat-chat .bot.message")
    has(bot, re.compile(r"\w+ \w+"))  # it streams
    page.locator("#fluxchat-stop").click()
    answered(page)
    has(page.locator("#fluxchat-chat .fc-small"), "stopped")
    has(bot, re.compile(r"\w+ \w+"))


@pytest.mark.slow
def test_regenerate_edit_and_clear(open_page: Callable[..., Any]) -> None:
    page = open_page()
    ask(page, "One?")
    answered(page)
    ask(page, "Two?")
    answered(page, 2)
    chat = page.locator("#fluxchat-chat")
    # The old answer is taken away first: until then the page looks as if it had answered already.
    taken_away = chat.locator(".fc-small").last.element_handle()
    page.get_by_label("Retry").last.click()
    taken_away.wait_for_element_state("hidden")
    answered(page, 2)
    edit_first(chat)
    chat.locator("textarea").fill("Three?")
    chat.get_by_label("Submit").click()
    answered(page, 1)
    has(chat, "Three?")
    expect(chat).not_to_contain_text("Two?")
    page.get_by_role("button", name="New conversation").click()
    expect(chat.locator(".message")).to_have_count(0)
    expect(page.locator("#fluxchat-examples")).to_be_visible()


@pytest.mark.usefixtures("answer_with_times")
@pytest.mark.slow
def test_a_time_in_an_answer_moves_the_player(open_page: Callable[..., Any]) -> None:
    page = open_page()
    upload(page)
    ask(page)
    answered(page)
    page.locator("#fluxchat-chat").get_by_role("link", name="0:03").click()
    plays_at(page, 2.9, 3.1)
    page.locator("#fluxchat-chat").get_by_role("link", name="0:01 to 0:02").click()
    page.wait_for_function("!document.querySelector('#fluxchat-video video').paused")
    page.wait_for_function("document.querySelector('#fluxchat-video video').paused")
    plays_at(page, 1.95, 2.05)
    has(page.locator(".fc-piece"), "0:01 – 0:02")


@pytest.mark.slow
def test_two_budgets_side_by_side(open_page: Callable[..., Any], served: Served) -> None:
    budgets = Range.of(served.chat.model)
    page = open_page()
    upload(page)
    page.locator("[data-settings]").click()
    box = page.locator("#fluxchat-compare")
    box.get_by_role("button", name="Compare two budgets").click()
    box.get_by_label("Question for both").fill("Who?")
    box.get_by_role("button", name="Compare", exact=True).click()
    for side, tokens in (("first", budgets.near(budgets.largest // 8)), ("second", budgets.largest)):
        panel = page.locator(f"#fluxchat-{side}")
        has(panel.locator("h3"), f"{tokens} tokens")
        has(panel.locator(".fc-small"), served.kept(tokens))
    shoot(page, "compare")


@pytest.mark.slow
def test_several_videos_and_images(open_page: Callable[..., Any], tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (80, 60), "red").save(picture)
    page = open_page()
    upload(page)
    with page.expect_file_chooser() as chooser:
        page.locator("#fluxchat-add").click()
    chooser.value.set_files(str(picture))
    shelf = page.locator("#fluxchat-shelf .fc-medium")
    expect(shelf).to_have_count(2)
    expect(page.locator("#fluxchat-image img")).to_be_visible()
    expect(page.locator("#fluxchat-video")).to_be_hidden()
    has(page.locator("#fluxchat-cost"), "various sizes")
    ask(page)
    answered(page)
    expect(page.locator("#fluxchat-chat .fc-frames")).to_have_count(2)

    # A frame of the video brings the video back, at its time.
    page.locator("#fluxchat-chat summary").click()
    frame = page.locator("#fluxchat-chat [data-seek]").nth(2)
    time_s = float(frame.get_attribute("data-seek"))
    frame.click()
    expect(page.locator("#fluxchat-video")).to_be_visible()
    plays_at(page, time_s - 0.15, time_s + 0.15)
    page.get_by_label("Remove red.png").click()
    expect(shelf).to_have_count(1)
    page.get_by_label("Remove b.mp4").click()
    expect(shelf).to_have_count(0)
    has(page.locator("#fluxchat-cost"), "Add a video")


@pytest.mark.slow
def test_a_frame_of_another_video_shows_it_at_its_time(open_page: Callable[..., Any]) -> None:
    page = open_page()
    upload(page)
    upload(page, WORLD)
    ask(page)
    answered(page)
    page.locator("#fluxchat-chat summary").click()
    frame = page.locator('#fluxchat-chat [data-medium="0"]').nth(3)
    time_s = float(frame.get_attribute("data-seek"))
    frame.hover()
    expect(page.locator("#fluxchat-large")).to_be_visible()
    frame.click()
    has(page.locator("#fluxchat-shelf [aria-current]"), SHORT.name)
    page.wait_for_function("document.querySelector('#fluxchat-video video').duration < 10")
    plays_at(page, time_s - 0.15, time_s + 0.15)


@pytest.mark.slow
def test_an_example_starts_a_conversation_of_its_own(open_page: Callable[..., Any]) -> None:
    page = open_page()
    upload(page)
    ask(page, "Something else?")
    answered(page)
    page.get_by_role("button", name="New conversation").click()
    users = page.locator("#fluxchat-chat .user.message")
    expect(users).to_have_count(0)
    ask(page, "And this?")
    has(users.first, "And this?")
    page.evaluate("document.querySelector('[data-example]').click()")  # while that is answered
    has(page.locator("#fluxchat-shelf"), "world.mp4")
    has(users.first, "What turns?")
    answered(page)
    expect(users).to_have_count(1)
    expect(page.locator("#fluxchat-shelf .fc-medium")).to_have_count(1)
    page.wait_for_function("document.querySelector('#fluxchat-video video').duration > 29")


@pytest.mark.usefixtures("slow_answers")
@pytest.mark.slow
def test_questions_during_an_answer_wait_behind_it(open_page: Callable[..., Any]) -> None:
    page = open_page()
    box = page.get_by_label("Question", exact=True)
    box.fill("One?")
    box.press("Enter")
    expect(page.locator("#fluxchat-stop")).to_be_visible()
    for question in ("Two,", "Three?"):
        box.fill(question)
        box.press("Shift+Enter")
        box.type("more")
        box.press("Enter")
        expect(box).to_have_value("")
    users = page.locator("#fluxchat-chat .user.message")
    expect(users).to_have_count(3)
    for number in range(3):
        expect(page.locator("#fluxchat-chat .fc-small")).to_have_count(number)
        has(
            page.locator("#fluxchat-chat .bot.message").nth(number),
            re.compile(r"^\s*(?!Wait|Read|Look|Think)\S+ \S"),
        )
        expect(box).to_be_focused()
        page.keyboard.press("Escape")  # ends the answer under way, not those that wait
    answered(page, 3)
    for number, question in enumerate(("One?", "Two,", "Three?")):
        has(users.nth(number), question)
    has(users.nth(1), re.compile("Two,\\s*more"))
    assert "Two,\nmore" in users.nth(1).inner_text()


@pytest.mark.slow
def test_a_model_that_knows_only_videos_asks_for_one(
    open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handlers, "needs_video", True)
    page = open_page()
    ask(page, "What is there?")
    has(page.locator("#fluxchat-problem"), "there is none yet")
    expect(page.get_by_label("Question", exact=True)).to_have_value("What is there?")
    expect(page.locator("#fluxchat-chat .message")).to_have_count(0)
    upload(page)
    expect(page.locator("#fluxchat-problem [role=alert]")).to_have_count(0)
    page.get_by_role("button", name="How many objects").click()  # a suggestion
    answered(page)


@pytest.mark.slow
def test_webcam(open_page: Callable[..., Any]) -> None:
    page = open_page(permissions=["camera", "microphone"])
    page.get_by_label("Record with the camera").click()
    page.wait_for_function("document.querySelector('.fc-camera video').videoWidth > 0")
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Stop recording").click()
    has(page.locator("#fluxchat-shelf"), "camera-")
    has(page.locator("#fluxchat-cost"), "to first word")
    has(page.locator("#fluxchat-strip"), "What the model will look at")


@pytest.mark.parametrize("loaded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_refused_file_is_one_sentence_until_dismissed(
    open_page: Callable[..., Any], tmp_path: Path, loaded: bool
) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"<html>not a video</html>" * 50)
    page = open_page()
    problem = page.locator("#fluxchat-problem [role=alert]")
    if loaded:
        upload(page)
    page.locator("#fluxchat-file").set_input_files(str(bad))
    has(problem, "Cannot read 'bad.mp4'")
    ask(page, "   ")
    page.wait_for_timeout(700)
    has(problem, "Cannot read 'bad.mp4'")
    expect(problem).to_have_count(1)
    expect(page.locator(".toast-body")).to_have_count(0)
    expect(page.locator("#fluxchat-chat .message")).to_have_count(0)
    expect(page.locator("#fluxchat-shelf .fc-medium")).to_have_count(int(loaded))
    problem.get_by_label("Dismiss").click()
    expect(problem).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_the_page_is_accessible(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    expect(page.locator("p.loading")).to_have_count(0)  # Gradio's own, while its parts come
    assert violations(page) == []
    upload(page)
    ask(page)
    answered(page)
    page.locator("#fluxchat-chat summary").click()
    page.locator("[data-settings]").click()
    page.wait_for_timeout(300)
    assert violations(page) == []
    page.locator("[data-models]").click()
    assert violations(page) == []
    small = page.evaluate(
        "[...document.querySelectorAll('button, summary')].filter(e => e.checkVisibility()).filter(e =>"
        " e.getBoundingClientRect().height < 24).map(e => e.outerHTML.slice(0, 120))"
    )
    assert small == []


@pytest.mark.slow
def test_nothing_moves_while_the_page_loads(open_page: Callable[..., Any]) -> None:
    for width in (1440, 390):
        page = open_page(width, 844)
        shift = page.evaluate(
            """() => new Promise((done) => {
                let sum = 0;
                new PerformanceObserver((list) => { for (const e of list.getEntries())
                    if (!e.hadRecentInput) sum += e.value;
                }).observe({ type: "layout-shift", buffered: true });
                setTimeout(() => done(sum), 300);
            })"""
        )
        assert shift < 0.05


@pytest.mark.slow
def test_files_are_pasted_and_dropped(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 48 });
            canvas.getContext("2d").fillRect(0, 0, 20, 20);
            const blob = await new Promise((done) => canvas.toBlob(done));
            const data = new DataTransfer();
            data.items.add(new File([blob], "pasted.png", { type: "image/png" }));
            const box = document.querySelector("#fluxchat-question textarea");
            box.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
            window.data = data;
        }"""
    )
    shelf = page.locator("#fluxchat-shelf .fc-medium")
    has(shelf, "pasted.png")
    page.evaluate(
        """async () => {
            const bytes = new Uint8Array(await window.data.files[0].arrayBuffer());
            const data = new DataTransfer();
            data.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
        }"""
    )
    has(shelf.last, "dropped.png")
    expect(shelf).to_have_count(2)


@pytest.mark.slow
def test_two_tabs_see_nothing_of_each_other(
    open_page: Callable[..., Any], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.5")  # how often Gradio looks who is still there
    sessions: Sessions = served.page.sessions  # type: ignore[attr-defined]
    first, second = open_page(), open_page()
    upload(first)
    ask(first, "A secret?")
    ask(second, "Another one?")
    answered(first)
    answered(second)
    expect(second.locator("#fluxchat-chat")).not_to_contain_text("A secret?")
    expect(second.locator("#fluxchat-shelf .fc-medium")).to_have_count(0)
    before = len(sessions)
    first.close()
    until(lambda: len(sessions) < before)


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_phone(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(390, 844, color_scheme=scheme)
    upload(page)
    expect(page.locator("#fluxchat-examples")).to_be_hidden()  # they would cover the question
    page.get_by_role("button", name="Fast").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    page.get_by_label("Question", exact=True).fill("What?")
    page.keyboard.press("Enter")
    answered(page)
    page.get_by_role("button", name="New conversation").click()
    page.get_by_label("Remove b.mp4").click()
    page.get_by_role("button", name="Example: What turns?").click()
    answered(page)
    for place in ("#fluxchat-question textarea", "#fluxchat-send", "#fluxchat-video"):
        box = page.locator(place).bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 844
    chat, video = (
        page.locator("#fluxchat-chat").bounding_box(),
        page.locator("#fluxchat-video").bounding_box(),
    )
    assert chat["height"] > video["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    unlabelled = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => e.offsetParent &&"
        " !(e.labels && e.labels.length) && !e.ariaLabel && !e.title && !e.textContent.trim())"
        ".map(e => e.outerHTML.slice(0, 120))"
    )
    assert unlabelled == []
    shoot(page, f"phone-{scheme}")


COVERED = """
    () => {
        const {left, right, top, bottom} = document.querySelector(".fc-problem").getBoundingClientRect();
        const points = [[left + 20, top + 3], [left + 20, bottom - 3], [right - 30, top + 20]];
        const there = points.map(([x, y]) => document.elementFromPoint(x, y));
        return there.filter((e) => !e?.closest(".fc-problem")).map((e) => e?.outerHTML.slice(0, 100));
    }
"""


@pytest.mark.slow
def test_nothing_lies_over_a_problem_on_a_small_screen(
    open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handlers, "needs_video", True)
    page = open_page(390, 480)
    expect(page.get_by_role("button", name="Example: What turns?")).to_be_visible()
    ask(page)  # there is no video yet
    expect(page.locator(".fc-problem")).to_be_visible()
    assert page.evaluate(COVERED) == []


EARLY = """
    const remove = window.removeEventListener;
    window.removeEventListener = (...values) => {
        if (values[1] !== window.fluxchatEarly?.click) return remove.apply(window, values);
        window.removeEventListener = remove; // the first thing that the page's script does
        document.querySelector("[data-models]").click();
        window.wasEarly = !document.querySelector("dialog[open]");
        window.removeEventListener(...values);
    };
"""


@pytest.mark.slow
def test_a_click_before_the_script_of_the_page_has_run_counts(
    new_context: Callable[..., Any], served: Served
) -> None:
    page = new_context().new_page()
    page.add_init_script(EARLY)
    page.goto(served.url)
    expect(page.locator("#fluxchat-models")).to_be_visible()
    assert page.evaluate("window.wasEarly")


# From `isLate` on the page reads of the end of a stream of events when it is told to.
END_IS_READ_LATE = """
const send = window.fetch;
window.isLate = false;
window.joined = 0;
window.streams = 0;
window.endHasCome = false;
window.endIsRead = new Promise((done) => { window.readEnd = done; });
window.fetch = async (...request) => {
  const reply = await send(...request), address = String(request[0].url ?? request[0]);
  window.joined += address.includes("/queue/join");
  if (!address.includes("/queue/data")) return reply;
  window.streams += 1;
  let line = "";
  const late = new TransformStream({
    async transform(text, out) {
      const lines = (line + text).split("\\n");
      line = lines.pop();
      for (const whole of lines) {
        if (whole.includes("close_stream")) {
          window.streams -= 1;
          window.endHasCome = window.isLate;
          if (window.isLate) await window.endIsRead;
        }
        out.enqueue(whole + "\\n");
      }
    },
  });
  const [decode, encode] = [new TextDecoderStream(), new TextEncoderStream()];
  return new Response(reply.body.pipeThrough(decode).pipeThrough(late).pipeThrough(encode), reply);
};
"""


def test_what_is_asked_before_the_end_of_a_stream_of_events_is_read_is_answered(
    new_context: Callable[..., Any], served: Served
) -> None:
    page = new_context().new_page()
    page.add_init_script(END_IS_READ_LATE)
    page.goto(served.url)
    upload(page)
    page.wait_for_function("window.streams === 0")
    before = page.evaluate("window.isLate = true, window.joined")
    ask(page)
    answered(page)
    page.wait_for_function(f"window.endHasCome && window.joined >= {before + 2}")  # the price comes last
    ask(page)
    page.wait_for_function(f"window.joined >= {before + 3}")
    page.evaluate("window.readEnd()")
    answered(page, 2)
