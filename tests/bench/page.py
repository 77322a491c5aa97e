"""The page from the address to the first question: paint, readiness, layout shift, bytes, in a real browser.

    python -m tests.bench.page [--n 5] [--url http://127.0.0.1:7860/] [--widths 1440 1280 390] [--smallest]

Around the model in the box, unless --url names a page that is served already. Each visit has an empty cache,
the widths take turns. paint_ms: the first thing drawn (first contentful paint). ready_ms: the question can
be typed and the main thread has been free for a quarter of a second. shift: the cumulative layout shift until
then; shift_with_video: until the price of an added video stands there. A shift within half a second of what
the visitor did does not count, as everywhere. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio
from playwright.sync_api import Browser, sync_playwright

from tests.bench.common import arguments, environment, print_json

WIDTHS = {1440: 900, 1280: 800, 390: 844}
VIDEO = Path(gradio.__file__).parent / "media_assets" / "videos" / "b.mp4"
PATIENCE_MS = 60_000
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
WATCH = """
window.shift = 0; window.busyUntil = 0; window.moved = [];
new PerformanceObserver((list) => { for (const e of list.getEntries()) if (!e.hadRecentInput) {
  window.shift += e.value;
  window.moved.push([Math.round(e.startTime), +e.value.toFixed(4),
    ...e.sources.slice(0, 3).map((s) => s.node && (s.node.id || s.node.className || s.node.nodeName))]);
} }).observe({ type: "layout-shift", buffered: true });
new PerformanceObserver((list) => { for (const e of list.getEntries())
  window.busyUntil = Math.max(window.busyUntil, e.startTime + e.duration); })
  .observe({ type: "longtask", buffered: true });
"""
READY = """() => {
  const box = document.querySelector("#fluxchat-question textarea");
  if (!box || box.disabled || !box.offsetParent) { window.there = undefined; return null; }
  window.there ??= performance.now();
  const ready = Math.max(window.there, window.busyUntil);
  return performance.now() - ready > 250 ? ready : null;
}"""


@contextlib.contextmanager
def served(url: str | None) -> Iterator[str]:
    """The address of the page."""
    if url:
        yield url
        return
    from app.chat import VideoChat
    from app.page.events import build, page_options

    with VideoChat() as chat:
        chat.calibration  # noqa: B018 - measured before the browser takes its share of the machine
        page = build(chat)
        _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **page_options())
        yield address
        page.close()


def visit(browser: Browser, url: str, width: int, *, shifts: bool = False) -> dict[str, Any]:
    """Figures of one visit. shifts: also what moved, for who looks for the cause."""
    context = browser.new_context(viewport={"width": width, "height": WIDTHS[width]})
    try:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.add_init_script(WATCH)
        page.goto(url, wait_until="commit")
        ready = page.wait_for_function(READY, polling=50).json_value()
        found = page.evaluate(
            """() => ({
              paint_ms: performance.getEntriesByName("first-contentful-paint")[0].startTime,
              kib: performance.getEntriesByType("resource").reduce((n, e) => n + e.transferSize, 0) / 1024,
              requests: performance.getEntriesByType("resource").length,
              shift: window.shift,
            })"""
        )
        page.locator("#fluxchat-file").first.set_input_files(str(VIDEO))
        page.wait_for_function(
            "/to (the )?first word/.test(document.querySelector('#fluxchat-cost').textContent)"
        )
        page.wait_for_timeout(1500)  # the strip comes last
        found |= {"ready_ms": ready, "shift_with_video": page.evaluate("window.shift")}
        return found | ({"moved": page.evaluate("window.moved")} if shifts else {})
    finally:
        context.close()


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=5, help="visits at each width, in turn")
    parser.add_argument("--url", help="of a page that is served already")
    parser.add_argument("--shifts", action="store_true", help="say what moved")
    parser.add_argument("--widths", type=int, nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    args = arguments(parser, argv, n=0, widths=[1280])
    rows: dict[int, list[dict[str, Any]]] = {width: [] for width in args.widths}
    with served(args.url) as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for repeat in range(-1, args.n):  # the first round warms the server
            for width, found in rows.items():
                row = visit(browser, url, width, shifts=args.shifts)
                if repeat >= 0 or args.n == 0:
                    found.append(row)
        browser.close()
    result = {
        str(width): {
            name: [row[name] for row in found] if name == "moved" else _middle([row[name] for row in found])
            for name in found[0]
        }
        for width, found in rows.items()
    }
    print_json({"bench": "page", **environment(), "n": args.n, **result}, smallest=args.smallest)


def _middle(values: list[float]) -> float:
    middle = statistics.median(values)
    return round(middle) if middle > 10 else round(middle, 4)


if __name__ == "__main__":
    main()
