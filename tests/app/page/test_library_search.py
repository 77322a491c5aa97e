"""Searching a library on the page: hits with picture, name, time and score; a click asks about that part."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.chat import VideoChat
from app.library.library import Found, Hit, Library
from app.page.events import build, page_options
from app.page.handlers import Handlers
from app.page.library_search import LibrarySearch, results
from app.page.sessions import Sessions
from app.server.media.store import MediaStore
from app.server.options import LaunchOptions
from app.server.security.authentication import Credentials
from encoder.video.part import WHOLE, Part
from llm_bridge.model import VideoLanguageModel
from tests.app.library.conftest import ColourEmbedder, film
from tests.app.page.in_browser import (
    Served,
    answered,
    ask,
    browsing,
    expect,
    has,
    plays_at,
    shoot,
    violations,
)
from tests.app.server.serving import running

pytestmark = pytest.mark.skipif(find_spec("lancedb") is None, reason="LanceDB is not installed")


def make_library(folder: Path) -> Library:
    """Three videos of one colour, and one that is white, red and green for two seconds each."""
    videos = folder / "videos"
    for colour in ("red", "green", "blue"):
        film(videos / f"{colour}.mp4", [colour])
    film(videos / "three <b>.mp4", ["white", "red", "green"])
    library = Library(folder / "index", embedder=ColourEmbedder(), seconds=2)
    library.index([videos])
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return make_library(tmp_path_factory.mktemp("library"))


@pytest.fixture
def searching(chat: VideoChat, library: Library, tmp_path: Path) -> Iterator[Handlers]:
    store = MediaStore()
    sessions = Sessions(chat.forget, uploads=tmp_path / "uploads", store=store)
    yield Handlers(chat, sessions, LibrarySearch(library))
    sessions.close_all()
    store.close()


@pytest.mark.slow
def test_a_hit_opens_a_copy_of_its_video_with_its_part_chosen(searching: Handlers, library: Library) -> None:
    session = searching.sessions.get("one")
    html = searching.search(session, "white", 1)
    assert "three &lt;b&gt;.mp4" in html
    assert "0:00 – 0:02 · 1.0" in html
    assert html.count("data:image/jpeg;base64,") == 6
    assert str(library.folder.parent) not in html
    assert searching.open_hit(session, 0, 1, 2, "ann") == ""
    medium = session.media[0]
    assert (medium.name, medium.part) == ("three _b_.mp4", Part(0.0, 2.0))
    store = searching.sessions.store
    assert store is not None
    assert store.touch(medium.path, "ann")  # a file of hers, as if she had uploaded it
    assert not store.touch(medium.path, "bob")

    # Another part of the same video is no second copy; its last part ends where it does.
    searching.search(session, "green", 3)
    hits = [(Path(hit.path).name, hit.start_s) for hit in session.found[1]]
    assert searching.open_hit(session, hits.index(("three <b>.mp4", 4.0)), 3, 4, "ann") == ""
    assert [m.part for m in session.media] == [Part(4.0, None)]
    searching.sessions.remove(session, medium.path)
    assert not Path(medium.path).exists()
    assert searching.open_hit(session, hits.index(("green.mp4", 0.0)), 3, 5, "ann") == ""
    assert [(m.name, m.part) for m in session.media] == [("green.mp4", WHOLE)]


@pytest.mark.parametrize(("index", "search"), [(6, 1), (-1, 1), (0, 2), (0, 0)])
def test_only_hits_of_the_last_search_are_opened(searching: Handlers, index: int, search: int) -> None:
    session = searching.sessions.get("one")
    searching.search(session, "red", 1)
    assert "search again" in searching.open_hit(session, index, search, 5)
    assert session.media == []
    other = searching.sessions.get("two")
    assert "search again" in searching.open_hit(other, 0, 1, 5)


def test_a_search_that_answers_late_does_not_take_the_place_of_a_later_one(searching: Handlers) -> None:
    session = searching.sessions.get("one")
    searching.search(session, "blue", 2)
    searching.search(session, "red", 1)
    assert Path(session.found[1][0].path).name == "blue.mp4"


def test_what_goes_wrong_is_a_sentence_without_folders(chat: VideoChat, tmp_path: Path) -> None:
    library = make_library(tmp_path)
    handlers = Handlers(chat, Sessions(chat.forget, uploads=tmp_path / "uploads"), LibrarySearch(library))
    session = handlers.sessions.get("one")
    assert "Say what" in handlers.search(session, " ", 1)
    assert "at most 500" in handlers.search(session, "x" * 501, 1)
    handlers.search(session, "blue", 2)
    (tmp_path / "videos" / "blue.mp4").unlink()
    problem = handlers.open_hit(session, 0, 2, 3)
    assert "blue.mp4" in problem
    assert str(tmp_path) not in problem
    assert session.media == []
    assert "1 file was left out" in handlers.search(session, "blue", 4)
    handlers.search(session, "red", 5)
    red = tmp_path / "videos" / "red.mp4"
    red.unlink()
    red.symlink_to(film(tmp_path / "secret.mp4", ["green", "white"]))
    assert "red.mp4 is gone or has changed" in handlers.open_hit(session, 0, 5, 3)
    assert session.media == []
    (library.folder / "library.json").unlink()
    problem = handlers.search(session, "blue", 6)
    assert "fc-failed" in problem
    assert str(tmp_path) not in problem
    handlers.sessions.close_all()


def test_a_picture_in_the_library_has_no_times() -> None:
    html = results(Found((Hit("/a/sun.png", 0.0, 0.0, 0.5, None),)), 1)
    assert "picture · 0.500" in html
    assert "/a/" not in html


def test_a_server_gives_no_file_of_the_library_by_its_path(
    tiny_model: VideoLanguageModel, library: Library
) -> None:
    options = LaunchOptions(library=library, credentials=Credentials(api_key="secret"))
    files = [library.folder / "library.json", *library.folder.parent.glob("videos/*")]
    assert len(files) == 5
    login = {"Authorization": "Bearer secret"}
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as (address, _):
        assert httpx.get(f"{address}/", headers=login).status_code == 200
        for path in files:
            response = httpx.get(f"{address}/gradio_api/file={path}", headers=login)
            assert response.status_code == 404
            assert str(library.folder.parent) not in response.text


@pytest.fixture(scope="module")
def served(tiny_model: VideoLanguageModel, library: Library) -> Iterator[Served]:
    with VideoChat(tiny_model, trusted=False, dtype="float32") as chat:
        page = build(chat, [], workers=2, library=library)
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **page_options())
        yield Served(page, url, chat)
        page.close()


def look_for(page: Any, text: str) -> Any:
    """Search, and give the hits."""
    page.get_by_role("button", name="Search the library").click()
    page.get_by_role("searchbox", name="What to look for").fill(text)
    page.keyboard.press("Enter")
    has(page.locator("#fluxchat-find [role=status]"), "6 clips")
    hits = page.locator("#fluxchat-find [data-hit]")
    expect(hits).to_have_count(6)
    return hits


@browsing
@pytest.mark.slow
def test_search_click_and_ask_about_the_hit(open_page: Callable[..., Any]) -> None:
    page = open_page(1440, 900)
    hits = look_for(page, "red")
    has(hits.first, re.compile(r"red\.mp4.*1\.000|three.*1\.000"))
    shoot(page, "library-1440-light")
    hits.filter(has_text="0:02 – 0:04").first.click()
    has(page.locator("#fluxchat-shelf"), "three _b_.mp4")
    expect(page.locator("#fluxchat-find")).to_be_hidden()
    has(page.locator("#fluxchat-parts .fc-chip"), "0:02 – 0:04")
    plays_at(page, 1.95, 2.05)
    expect(page.locator("#fluxchat-question textarea")).to_be_focused()
    ask(page)
    answered(page)
    has(page.locator("#fluxchat-chat .user.message"), "0:02 – 0:04")

    # Another part of the video that is shown already, and another video.
    hits = look_for(page, "green")
    hits.filter(has_text="0:04 – 0:06").first.click()
    has(page.locator("#fluxchat-parts .fc-chip"), "0:04 – 0:06")
    plays_at(page, 3.95, 4.05)
    expect(page.locator("#fluxchat-shelf .fc-medium")).to_have_count(1)
    look_for(page, "blue").first.click()
    has(page.locator("#fluxchat-shelf [aria-current]"), "blue.mp4")
    expect(page.locator("#fluxchat-shelf .fc-medium")).to_have_count(2)


@browsing
@pytest.mark.slow
def test_a_search_that_fails_says_so(open_page: Callable[..., Any], library: Library) -> None:
    page = open_page()
    page.get_by_role("button", name="Search the library").click()
    settings = library.folder / "library.json"
    kept = settings.read_text()
    settings.unlink()
    try:
        page.get_by_role("searchbox", name="What to look for").fill("red")
        page.get_by_role("button", name="Search", exact=True).click()
        has(page.locator("#fluxchat-find [role=status]"), "There is no library")
    finally:
        settings.write_text(kept)
    page.keyboard.press("Escape")
    expect(page.locator("#fluxchat-find")).to_be_hidden()


@browsing
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.slow
def test_searching_is_accessible(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(390, 844, color_scheme=scheme)
    look_for(page, "white")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    shoot(page, f"library-390-{scheme}")
    page.set_viewport_size({"width": 1440, "height": 900})
    assert violations(page) == []
    shoot(page, f"library-1440-{scheme}")
    page.locator("#fluxchat-find [data-hit]").first.click()
    has(page.locator("#fluxchat-shelf"), "three _b_.mp4")
    page.set_viewport_size({"width": 390, "height": 844})
    has(page.locator("#fluxchat-cost"), "to first word")
    assert violations(page) == []
    shoot(page, f"library-hit-{scheme}")


def test_without_a_library_there_is_no_search(chat: VideoChat) -> None:
    assert "data-find aria-haspopup" not in str(build(chat, []).get_config_file())


@pytest.mark.parametrize("what", ["missing", "other model"])
def test_a_library_that_cannot_be_searched_is_a_sentence_before_the_page(what: str, tmp_path: Path) -> None:
    from app.cli import main

    folder = tmp_path / "index"
    if what == "other model":
        make_library(tmp_path)
        (folder / "library.json").write_text((folder / "library.json").read_text().replace('"colours"', '""'))
    assert main(["web", "--library", str(folder), "--no-browser", "--port", "0"]) == 2
