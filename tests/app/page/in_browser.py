"""What tests do in a real browser (Debian's Chromium, driven by Playwright); its fixtures are in conftest.py.

Screenshots go to $FLUXCHAT_SCREENSHOTS, or nowhere without it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import pytest

from app.chat import VideoChat
from tests.app.conftest import SHORT
from tests.patience import PATIENCE_S, until

PATIENCE_MS = 1000 * PATIENCE_S

try:
    from playwright.sync_api import expect
except ImportError:  # its tests are skipped
    expect = None  # type: ignore[assignment]
else:
    expect.set_options(timeout=PATIENCE_MS)

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
browsing = pytest.mark.skipif(
    expect is None or not Path(CHROMIUM).exists(), reason="there is no Playwright or no Chromium here"
)
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
STOCK = ("smolvlm", "qwen3_vl")  # kinds of stock models that the page is tried with


class Served(NamedTuple):
    """A page, its address and the chat behind it."""

    page: gr.Blocks
    url: str
    chat: VideoChat

    def kept(self, budget: int) -> str:
        """What the page says of a budget spent on SHORT."""
        return f"{self.chat.plan(SHORT, budget).keep} of"


def unexpected(troubles: list[str]) -> list[str]:
    """Without what Gradio says of its requests when a page is left in their middle."""
    aborted = [text for text in troubles if "signal is aborted" in text or "was aborted" in text]
    return [t for t in troubles if not (aborted and (t in aborted or "Connection errored out" in t))]


def upload(page: Any, path: Path = SHORT) -> None:
    page.locator("#fluxchat-file").set_input_files(str(path))
    has(page.locator("#fluxchat-shelf"), path.name)
    has(page.locator("#fluxchat-strip"), "What the model will look at")
    has(page.locator("#fluxchat-cost"), "to first word")


def ask(page: Any, question: str = "What is there?") -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.locator("#fluxchat-send").click()


def answered(page: Any, count: int = 1) -> None:
    expect(page.locator("#fluxchat-chat .fc-small")).to_have_count(count)
    expect(page.locator("#fluxchat-send")).to_be_visible()
    expect(page.locator("#fluxchat-stop")).to_be_hidden()


def has(place: Any, text: str | re.Pattern[str]) -> None:
    expect(place).to_contain_text(text)


def plays_at(page: Any, low: float, high: float) -> None:
    page.wait_for_function(
        "([low, high]) => { const v = document.querySelector('#fluxchat-video video');"
        " return v && v.currentTime >= low && v.currentTime <= high; }",
        arg=[low, high],
    )


def violations(page: Any) -> Any:
    """What axe finds wrong with the page as it is: rules, with the elements that break them."""
    if not page.evaluate("'axe' in window"):
        page.evaluate((Path(__file__).parent / "axe" / "axe.min.js").read_text())
    return page.evaluate(
        "axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 160))]))"
    )


def shoot(page: Any, name: str) -> None:
    if folder := os.environ.get("FLUXCHAT_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png")


def edit_first(chat: Any) -> None:
    """Open the editor of the first message; a late update of the chat closes it again, so more than once."""

    def opened() -> bool:
        chat.get_by_label("Edit").first.click()
        chat.page.wait_for_timeout(500)
        return bool(chat.locator("textarea").is_visible())

    until(opened)
