"""The pictures of the page in docs/: six of its states, and an animated one for the README.

    python -m tests.pictures        # writes docs/page.webp and docs/page/*.webp; some minutes

They show the real page around the model in the box, in a real browser; nothing is drawn by hand.
"""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import gradio
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from tests.bench.page import CHROMIUM, PATIENCE_MS, served

DOCS = Path(__file__).parents[1] / "docs"
WORLD = Path(gradio.__file__).parent / "media_assets" / "videos" / "world.mp4"
LARGEST, LARGEST_ANIMATION = 150_000, 1_500_000  # bytes
WIDTH, HEIGHT = 1280, 800
ANIMATED = (1000, 640)  # pixels of the window; the picture is as large


class Film:
    """An animated picture that is taken of a page, frame by frame."""

    def __init__(self, page: Any) -> None:
        self.page, self.frames = page, list[Image.Image]()
        self.lengths: list[int] = []

    def shoot(self, milliseconds: int, most: int = 10_000) -> None:
        """What is on the page now, for so long; unchanged, the frame before lasts longer, up to `most`."""
        frame = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        if self.frames and frame.tobytes() == self.frames[-1].tobytes():
            self.lengths[-1] = max(self.lengths[-1], min(most, self.lengths[-1] + milliseconds))
            return
        self.frames.append(frame)
        self.lengths.append(milliseconds)

    def type(self, text: str) -> None:
        """Text typed into the question."""
        for start in range(0, len(text), 6):
            self.page.keyboard.type(text[start : start + 6])
            self.shoot(140)

    def until(self, there: str, longest_s: float = 60) -> None:
        """Frames until something is there."""
        end = time.monotonic() + longest_s
        while not self.page.locator(there).count() and time.monotonic() < end:
            self.shoot(120, most=500)  # nobody wants to wait
            self.page.wait_for_timeout(60)
        self.page.wait_for_timeout(300)

    def save(self, path: Path) -> None:
        """Write it, as good as fits."""
        for quality in (80, 65, 50, 35):
            self.frames[0].save(
                path,
                save_all=True,
                append_images=self.frames[1:],
                duration=self.lengths,
                loop=0,
                quality=quality,
                method=4,
            )
            if path.stat().st_size < LARGEST_ANIMATION:
                return
        raise SystemExit(f"{path.name} has {path.stat().st_size} bytes: shoot fewer frames.")


def opened(browser: Browser, url: str, width: int, height: int, scheme: Any = "light") -> Any:
    """The page in a window of its own."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(url)
    page.locator("#fluxchat-large").wait_for(state="attached")
    page.locator("#fluxchat-examples img").first.wait_for()
    page.wait_for_timeout(500)
    return page


def answered(page: Any, count: int = 1) -> None:
    """Waits for so many answers and the price of the next question."""
    page.wait_for_function(
        "n => document.querySelectorAll('#fluxchat-chat .fc-small').length === n", arg=count
    )
    page.wait_for_function("document.querySelector('#fluxchat-strip').textContent.includes('look at')")
    page.wait_for_timeout(1000)


def still(page: Any, name: str) -> None:
    """Write what is on the page, as good as fits."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    path = DOCS / "page" / f"{name}.webp"
    path.parent.mkdir(exist_ok=True)
    for quality in (85, 70, 50, 30):
        picture.save(path, quality=quality, method=6)
        if path.stat().st_size < LARGEST:
            print(f"{path.relative_to(DOCS)}: {path.stat().st_size / 1000:.0f} kB")
            return
    raise SystemExit(f"{path.name} has {path.stat().st_size} bytes: make the window smaller.")


def stills(browser: Browser, url: str) -> None:
    """The six states."""
    page = opened(browser, url, WIDTH, HEIGHT)
    still(page, "welcome")
    page.locator("[data-example]").first.click()
    answered(page)
    page.locator("#fluxchat-chat summary").click()
    page.wait_for_timeout(300)
    still(page, "answer")
    page.locator("#fluxchat-chat summary").click()

    page.locator("[data-settings]").click()
    compare = page.locator("#fluxchat-compare")
    compare.get_by_role("button", name="Compare two budgets or selectors").click()
    compare.get_by_role("button", name="Compare", exact=True).click()
    page.wait_for_function("document.querySelectorAll('#fluxchat-compare .fc-small').length === 2")
    page.wait_for_timeout(500)
    page.locator("#fluxchat-settings").evaluate("box => box.scrollTo(0, box.scrollHeight)")
    page.wait_for_timeout(300)
    still(page, "compare")
    page.locator("[data-settings]").click()

    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("button", name="Remove").click()
    page.locator(".fc-medium").wait_for(state="detached")
    page.locator("#fluxchat-file").set_input_files(str(WORLD))
    page.locator("#fluxchat-shelf").get_by_text("world.mp4").wait_for()
    page.locator(".fc-range").wait_for()
    page.get_by_label("From", exact=True).focus()
    page.keyboard.press("PageUp")
    page.keyboard.press("PageUp")
    page.get_by_role("button", name="Box", exact=True).click()
    page.locator(".fc-chip", has_text="a box").wait_for()
    page.wait_for_timeout(3000)
    still(page, "part")
    page.get_by_label("Question", exact=True).fill("What happens in the video?")
    page.keyboard.press("Enter")
    answered(page)
    page.get_by_role("button", name="Conversations").click()
    page.locator("[data-menu]").first.click()
    page.wait_for_timeout(500)
    still(page, "conversations")

    phone = opened(browser, url, 390, 844, "dark")
    phone.locator("[data-example]").nth(1).click()
    answered(phone)
    still(phone, "phone")


def animation(browser: Browser, url: str) -> None:
    """A question, its answer, what that looked at; a closer look; a part; the conversation that stays."""
    page = opened(browser, url, *ANIMATED)
    film = Film(page)
    film.shoot(1200)
    page.locator("[data-example]").first.click()
    film.until("#fluxchat-chat .fc-small")
    answered(page)
    film.shoot(1500)
    page.locator("#fluxchat-chat summary").click()
    page.wait_for_timeout(300)
    film.shoot(1600)
    page.get_by_role("button", name="Thorough").click()
    page.wait_for_timeout(1500)
    film.shoot(1200)
    page.get_by_label("Question", exact=True).click()
    film.type("What happens in the video?")
    page.keyboard.press("Enter")
    film.until("#fluxchat-chat .message-row:nth-child(4) .fc-small")
    answered(page, 2)
    film.shoot(1800)
    page.get_by_role("button", name="Box", exact=True).click()
    page.locator(".fc-chip").wait_for()
    page.wait_for_timeout(1500)
    film.shoot(1800)
    page.locator("[data-whole]").click()
    page.get_by_role("button", name="Conversations").click()
    page.wait_for_timeout(800)
    film.shoot(2500)
    film.save(DOCS / "page.webp")
    size = (DOCS / "page.webp").stat().st_size
    print(f"page.webp: {len(film.frames)} frames, {sum(film.lengths) / 1000:.0f} s, {size / 1000:.0f} kB")


def main() -> None:
    """Command line."""
    with served(None) as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        stills(browser, url)
        animation(browser, url)
        browser.close()


if __name__ == "__main__":
    main()
