"""Two answers to one question side by side, in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_bridge.generation import Generation
from tests.app.page.in_browser import (
    browsing,
    expect,
    has,
    shoot,
    upload,
)

pytestmark = browsing


@pytest.mark.slow
def test_two_selectors_side_by_side_with_what_differs_marked(
    open_page: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    animals = iter(("cat", "dog"))

    class Scripted(Generation):
        def __iter__(self) -> Iterator[str]:
            yield f"A {next(animals)} "
            yield "sits at 0:03."

    monkeypatch.setattr("app.chat.Generation", Scripted)
    page = open_page(1440, 900)
    upload(page)
    page.locator("[data-settings]").click()
    box = page.locator("#fluxchat-compare")
    box.get_by_role("button", name="Compare two budgets or selectors").click()
    box.get_by_label("Question for both").fill("Who?")
    box.get_by_label("Second: which tokens stay").click()
    page.get_by_role("option", name="uniform: evenly").click()
    box.get_by_role("button", name="Compare", exact=True).click()
    marked = []
    for side, selector in (("first", "flux"), ("second", "uniform")):
        panel = page.locator(f"#fluxchat-{side}")
        has(panel.locator("h3"), f"tokens · {selector}")
        has(panel.locator("p").first, "sits at 0:03.")
        expect(panel.locator("mark")).to_have_count(1)
        expect(panel.get_by_role("link", name="0:03")).to_be_visible()
        marked.append(panel.locator("mark").inner_text().strip())
    assert sorted(marked) == ["cat", "dog"]
    shoot(page, "compare")
