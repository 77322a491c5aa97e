"""What tests do in a real browser (Debian's Chromium, driven by Playwright); its fixtures are in conftest.py.

Screenshots go to $FLUXCHAT_SCREENSHOTS, or nowhere without it.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import pytest

from app.chat import VideoChat
from tests.app.conftest import SHORT

try:
    from playwright.sync_api import expect
except ImportError:  # its tests are skipped
    expect = None  # type: ignore[assignment]

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
PATIENCE_MS = 90_000  # costs nothing where a machine is quick
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
    if not any("signal is aborted" in text for text in troubles):
        return troubles
    return [t for t in troubles if "signal is aborted" not in t and "Connection errored out" not in t]


def upload(page: Any, path: Path = SHORT) -> None:
    page.locator("#fluxchat-file").set_input_files(str(path))
    has(page.locator("#fluxchat-shelf"), path.name)
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


def edit_first(chat: Any) -> None:
    """Open the editor of the first message; a late update of the chat closes it again, so more than once."""
    deadline = time.monotonic() + PATIENCE_MS / 1e3
    while not chat.locator("textarea").is_visible() and time.monotonic() < deadline:
        chat.get_by_label("Edit").first.click()
        chat.page.wait_for_timeout(500)
