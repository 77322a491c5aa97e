"""The page in a real browser (Debian's Chromium, driven by Playwright), around a tiny model.

Screenshots go to $FLUXCHAT_SCREENSHOTS, or nowhere without it.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import gradio as gr
import pytest
from PIL import Image

from app.chat import VideoChat
from app.page.events import build, page_options
from app.page.sessions import Sessions
from app.page.settings import Range
from llm_bridge.generation import Generation
from llm_bridge.model import VideoLanguageModel
from tests import tiny_video_models
from tests.app.conftest import SHORT, WORLD

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no Chromium here")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
PATIENCE_MS = 40_000
STOCK = ("smolvlm", "qwen3_vl")  # kinds of stock models that the page is tried with


class Served(NamedTuple):
    """A page, its address and the chat behind it."""

    page: gr.Blocks
    url: str
    chat: VideoChat

    def kept(self, budget: int) -> str:
        """What the page says of a budget spent on SHORT."""
        return f"{self.chat.plan(SHORT, budget).keep} of"


@pytest.fixture(
    scope="module", params=["flux", *(pytest.param(kind, marks=pytest.mark.slow) for kind in STOCK)]
)
def served(
    request: pytest.FixtureRequest, tiny_model: VideoLanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The page on a free port, with one example; around each kind of model."""
    model: Any = tiny_model
    if request.param != "flux":
        model = tiny_video_models.make(tmp_path_factory.mktemp("stock") / request.param, request.param)
    with VideoChat(model, trusted=False, dtype="float32") as chat:
        page = build(chat, [(str(WORLD), "What turns?")], workers=2)
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, max_file_size="5mb", **page_options())
        yield Served(page, url, chat)
        page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, served: Served) -> Iterator[Callable[..., Any]]:
    """Opens a tab of its own; at the end nothing may have been logged as an error or asked of elsewhere."""
    contexts, troubles = [], []

    def watch(request: Any) -> None:
        address = urlparse(request.url)
        if address.scheme not in ("data", "blob") and address.hostname not in ("127.0.0.1", "localhost"):
            troubles.append(f"asked {request.url}")

    def make(width: int = 1280, height: int = 800, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda m: troubles.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", watch)
        page.goto(served.url)
        expect(page.locator("#fluxchat-cost")).to_contain_text("Add a video", timeout=PATIENCE_MS)
        return page

    yield make
    for context in contexts:
        context.close()
    assert troubles == []


def upload(page: Any, path: Path = SHORT) -> None:
    page.locator("#fluxchat-video input[type=file]").set_input_files(str(path))
    has(page.locator("#fluxchat-strip"), "What the model will look at")
    has(page.locator("#fluxchat-cost"), "to first word")


def ask(page: Any, question: str = "What is there?") -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.locator("#fluxchat-send").click()


def answered(page: Any, count: int = 1) -> None:
    expect(page.locator("#fluxchat-chat .fc-small")).to_have_count(count, timeout=PATIENCE_MS)
    expect(page.locator("#fluxchat-send")).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator("#fluxchat-stop")).to_be_hidden(timeout=PATIENCE_MS)


def has(place: Any, text: str | re.Pattern[str]) -> None:
    expect(place).to_contain_text(text, timeout=PATIENCE_MS)


def plays_at(page: Any, low: float, high: float) -> None:
    page.wait_for_function(
        "([low, high]) => { const v = document.querySelector('#fluxchat-video video');"
        " return v && v.currentTime >= low && v.currentTime <= high; }",
        arg=[low, high],
    )


def shoot(page: Any, name: str) -> None:
    if folder := os.environ.get("FLUXCHAT_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_price_first_then_a_question_then_a_fast_one(open_page: Callable[..., Any], served: Served) -> None:
    budgets, page = Range.of(served.chat.model), open_page()
    upload(page)
    cost, strip = page.locator("#fluxchat-cost"), page.locator("#fluxchat-strip")
    default = served.kept(budgets.near(served.chat.model.default_tokens))
    has(cost, default)
    has(strip, default)
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


def test_auto_budget_meets_the_seconds(open_page: Callable[..., Any]) -> None:
    page = open_page()
    upload(page)
    page.get_by_label("auto, by time").check()
    seconds = page.locator("#fluxchat-seconds input")
    seconds.fill("600")
    seconds.press("Tab")
    has(page.locator("#fluxchat-cost"), "100 %")
    expect(page.locator("#fluxchat-budget input[type=range]")).to_be_disabled()


@pytest.mark.usefixtures("steps")
def test_stop_keeps_the_text_so_far(open_page: Callable[..., Any]) -> None:
    page = open_page()
    ask(page, "Say something long.")
    expect(page.locator("#fluxchat-send")).to_be_hidden(timeout=PATIENCE_MS)
    bot = page.locator("#fluxchat-chat .bot.message")
    has(bot, re.compile(r"\w+ \w+"))  # it streams
    page.locator("#fluxchat-stop").click()
    answered(page)
    has(page.locator("#fluxchat-chat .fc-small"), "stopped")
    has(bot, re.compile(r"\w+ \w+"))


def edit_first(chat: Any) -> None:
    """Open the editor of the first message; a late update of the chat closes it again, so more than once."""
    deadline = time.monotonic() + PATIENCE_MS / 1e3
    while not chat.locator("textarea").is_visible() and time.monotonic() < deadline:
        chat.get_by_label("Edit").first.click()
        chat.page.wait_for_timeout(500)


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
    page.get_by_label("Clear").last.click()
    expect(chat.locator(".message")).to_have_count(0)
    has(chat, "Ask about a video")


def test_a_time_in_an_answer_moves_the_player(
    open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scripted(Generation):
        def __iter__(self) -> Iterator[str]:
            yield "It turns at 0:03 "
            yield "and stops."

    monkeypatch.setattr("app.chat.Generation", Scripted)
    page = open_page()
    upload(page)
    ask(page)
    answered(page)
    page.locator("#fluxchat-chat").get_by_role("link", name="0:03").click()
    plays_at(page, 2.9, 3.1)


def test_two_budgets_side_by_side(open_page: Callable[..., Any], served: Served) -> None:
    budgets = Range.of(served.chat.model)
    page = open_page()
    upload(page)
    box = page.locator("#fluxchat-compare")
    box.get_by_role("button", name="Compare two budgets").click()
    box.get_by_label("Question for both").fill("Who?")
    box.get_by_role("button", name="Compare", exact=True).click()
    for side, tokens in (("first", budgets.near(budgets.largest // 8)), ("second", budgets.largest)):
        panel = page.locator(f"#fluxchat-{side}")
        has(panel.locator("h3"), f"{tokens} tokens")
        has(panel.locator(".fc-small"), served.kept(tokens))
    shoot(page, "compare")


def test_several_videos_and_images(open_page: Callable[..., Any], tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (80, 60), "red").save(picture)
    page = open_page()
    upload(page)
    with page.expect_file_chooser() as chooser:
        page.locator("#fluxchat-add").click()
    chooser.value.set_files(str(picture))
    shelf = page.locator("#fluxchat-shelf .fc-medium")
    expect(shelf).to_have_count(2, timeout=PATIENCE_MS)
    expect(page.locator("#fluxchat-image img")).to_be_visible()
    expect(page.locator("#fluxchat-video")).to_be_hidden()
    has(page.locator("#fluxchat-cost"), "various sizes")
    ask(page)
    answered(page)
    expect(page.locator("#fluxchat-chat .fc-frames")).to_have_count(2)

    # A frame of the video brings the video back, at its time.
    frame = page.locator("#fluxchat-chat [data-seek]").nth(2)
    time_s = float(frame.get_attribute("data-seek"))
    frame.click()
    expect(page.locator("#fluxchat-video")).to_be_visible()
    plays_at(page, time_s - 0.15, time_s + 0.15)
    page.get_by_label("Remove red.png").click()
    expect(shelf).to_have_count(1, timeout=PATIENCE_MS)
    page.get_by_label("Remove b.mp4").click()
    expect(shelf).to_have_count(0, timeout=PATIENCE_MS)
    has(page.locator("#fluxchat-cost"), "Add a video")


def test_example_brings_video_and_question(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.get_by_role("button", name="Example: What turns?").click()
    has(page.locator("#fluxchat-shelf"), "world.mp4")
    has(page.locator("#fluxchat-cost"), "to first word")
    expect(page.get_by_label("Question", exact=True)).to_have_value("What turns?")
    page.wait_for_function("document.querySelector('#fluxchat-video video').duration > 29")


def test_webcam(open_page: Callable[..., Any]) -> None:
    page = open_page(permissions=["camera", "microphone"])
    video = page.locator("#fluxchat-video")
    video.get_by_label("Capture from camera").click()
    video.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#fluxchat-video video').videoWidth > 0")
    # Gradio sends what has arrived when it is stopped; on a busy machine that takes its time.
    page.evaluate(
        """() => {
            const start = MediaRecorder.prototype.start;
            window.parts = [];
            MediaRecorder.prototype.start = function (...rest) {
                this.addEventListener("dataavailable", (event) => window.parts.push(event.data.size));
                return start.apply(this, rest);
            };
        }"""
    )
    video.get_by_title("start recording").click()
    page.wait_for_function("window.parts.filter((size) => size > 0).length >= 5")
    video.get_by_title("stop recording").click()
    has(page.locator("#fluxchat-shelf"), ".webm")
    has(page.locator("#fluxchat-cost"), "to first word")
    has(page.locator("#fluxchat-strip"), "What the model will look at")


def test_bad_file_is_one_sentence(open_page: Callable[..., Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"<html>not a video</html>" * 50)
    page = open_page()
    page.locator("#fluxchat-video input[type=file]").set_input_files(str(bad))
    has(page.locator("#fluxchat-problem"), "Cannot read 'bad.mp4'")
    expect(page.locator("#fluxchat-video input[type=file]")).to_be_attached()  # the player is empty again
    expect(page.locator("#fluxchat-problem [role=alert]")).to_have_count(1)
    expect(page.locator("#fluxchat-shelf .fc-medium")).to_have_count(0)
    ask(page, "   ")
    expect(page.locator("#fluxchat-chat .message")).to_have_count(0)
    has(page.locator("#fluxchat-problem"), "Cannot read 'bad.mp4'")


def test_a_refused_file_beside_a_video_shows_its_error(open_page: Callable[..., Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"<html>not a video</html>" * 50)
    page = open_page()
    upload(page)
    with page.expect_file_chooser() as chooser:
        page.locator("#fluxchat-add").click()
    chooser.value.set_files(str(bad))
    has(page.locator("#fluxchat-problem"), "Cannot read 'bad.mp4'")
    has(page.locator("#fluxchat-cost"), "to first word")
    has(page.locator("#fluxchat-strip"), "What the model will look at")
    page.wait_for_timeout(500)  # the player tells of the video that it was given again
    has(page.locator("#fluxchat-problem"), "Cannot read 'bad.mp4'")
    expect(page.locator("#fluxchat-shelf .fc-medium")).to_have_count(1)


def test_two_tabs_see_nothing_of_each_other(open_page: Callable[..., Any], served: Served) -> None:
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
    deadline = time.monotonic() + PATIENCE_MS / 1e3
    while len(sessions) >= before and time.monotonic() < deadline:
        second.wait_for_timeout(100)
    assert len(sessions) < before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(390, 844, color_scheme=scheme)
    upload(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    page.get_by_label("Question", exact=True).fill("What?")
    page.keyboard.press("Enter")
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    unlabelled = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => e.offsetParent &&"
        " !(e.labels && e.labels.length) && !e.ariaLabel && !e.title && !e.textContent.trim())"
        ".map(e => e.outerHTML.slice(0, 120))"
    )
    assert unlabelled == []
    shoot(page, f"phone-{scheme}")
