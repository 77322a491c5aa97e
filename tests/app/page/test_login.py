"""Conversations that stay in the browser, behind a login: their links, and a store for each who logs in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app.chat import VideoChat
from app.server.options import LaunchOptions
from app.server.security.authentication import Credentials
from llm_bridge.model import VideoLanguageModel
from tests.app.page.in_browser import (
    answered,
    ask,
    browsing,
    expect,
    has,
)
from tests.app.page.test_conversations import kept, side, talks
from tests.app.server.serving import running

pytestmark = browsing

LOGIN = ("ann", "secret")
KEY, KEY_OF_ANN = "a-long-random-text", "another-long-random-text"


@pytest.fixture(scope="module")
def locked(tiny_model: VideoLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page behind a login and two keys, one of the login's name."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"ben {KEY}\nann {KEY_OF_ANN}\n")
    options = LaunchOptions(credentials=Credentials(None, LOGIN, keys), examples=[])
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as (address, _):
        yield address


@pytest.fixture
def page(new_context: Callable[..., Any]) -> Iterator[Any]:
    """A tab of a browser that nobody has used; what its pages complain of fails the test."""
    troubles: list[str] = []
    page = new_context().new_page()
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda m: troubles.append(m.text) if "Security Policy" in m.text else None)
    yield page
    assert troubles == []


def log_in(page: Any, user: str, password: str) -> None:
    page.get_by_label("User").fill(user)
    page.get_by_label(re.compile("^Password")).fill(password)
    page.get_by_role("button", name="Log in").click()


def entered(page: Any) -> None:
    expect(page.locator("#fluxchat-large")).to_be_attached()
    has(page.locator("#fluxchat-kept"), "Kept in this browser only")  # the list was drawn


def log_out(page: Any) -> None:
    page.get_by_role("link", name="Log out").click()
    expect(page.get_by_label("User")).to_be_visible()


@pytest.mark.slow
def test_the_link_of_a_conversation_survives_the_login(page: Any, locked: str) -> None:
    page.goto(locked)
    log_in(page, *LOGIN)
    entered(page)
    assert "#" not in page.url
    ask(page, "What was it?")
    answered(page)
    kept(page, 1)
    link = page.url
    log_out(page)
    page.goto(link)
    log_in(page, LOGIN[0], "wrong")
    has(page.get_by_role("alert"), "That is not right")
    log_in(page, *LOGIN)
    entered(page)
    answered(page)
    has(page.locator("#fluxchat-chat"), "What was it?")
    assert page.url == link


@pytest.mark.slow
def test_two_logins_on_one_browser_have_a_store_each(page: Any, locked: str) -> None:
    page.goto(locked)
    for user, password in (LOGIN, ("ben", KEY)):
        log_in(page, user, password)
        entered(page)
        expect(talks(page)).to_have_count(0)
        ask(page, f"A secret of {user}?")
        answered(page)
        kept(page, 1)
        link = page.url
        log_out(page)
    page.goto(link)
    log_in(page, *LOGIN)  # with the other's link
    entered(page)
    has(page.locator("#fluxchat-problem"), "not kept in this browser")
    side(page)
    expect(talks(page)).to_have_count(1)
    has(talks(page), "A secret of ann?")
    expect(page.locator("#fluxchat-chat .message")).to_have_count(0)


@pytest.mark.slow
def test_a_login_and_a_key_of_one_name_have_a_store_each(page: Any, locked: str) -> None:
    page.goto(locked)
    for count, password in ((0, LOGIN[1]), (0, KEY_OF_ANN), (1, LOGIN[1])):
        log_in(page, "ann", password)
        entered(page)
        expect(talks(page)).to_have_count(count)
        if not count:
            ask(page)
            answered(page)
            kept(page, 1)
        log_out(page)
    # A login's store has the name that it had before keys had stores of their own.
    name = hashlib.sha256(b"ann").hexdigest()[:24]
    found = page.evaluate("async () => (await indexedDB.databases()).map((one) => one.name)")
    assert f"fluxchat-{name}" in found
    assert len(found) == 2


@pytest.mark.slow
def test_a_question_asked_before_the_list_is_drawn_is_answered_and_kept(page: Any, locked: str) -> None:
    page.goto(locked)
    held: list[Any] = []

    def hold(route: Any) -> None:
        """Whose page it is is told late."""
        if (route.request.post_data_json or {}).get("data") == []:
            held.append(route)
        else:
            route.continue_()

    page.route("**/gradio_api/run/predict", hold)
    log_in(page, *LOGIN)
    ask(page, "Already?")
    answered(page)
    for route in held:
        route.continue_()
    page.unroute_all()
    entered(page)
    kept(page, 1)
    ask(page, "And now?")
    answered(page, 2)  # the first answer is still there
    kept(page, 1)
