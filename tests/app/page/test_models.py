"""Another model is loaded from the page, in a real browser: from the disk, from the hub, and in vain."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from app.chat import VideoChat
from app.model_slot import ModelSlot
from app.server.options import LaunchOptions
from llm_bridge.model import VideoLanguageModel
from tests import tiny_video_models
from tests.app.hub_cache import put
from tests.app.page.in_browser import (
    answered,
    ask,
    browsing,
    expect,
    has,
    shoot,
    upload,
)
from tests.app.server.serving import running
from tests.passes import never_ends
from tests.patience import PATIENCE_S

pytestmark = browsing


class Page:
    """A served page whose model can be exchanged. held: while it is clear, no model is opened."""

    def __init__(self, slot: ModelSlot, url: str, cache: Path, held: threading.Event) -> None:
        self.slot, self.url, self.cache, self.held = slot, url, cache, held


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_video_models.make(tmp_path_factory.mktemp("made") / "smol", "smolvlm")


@pytest.fixture
def served(
    tiny_model: VideoLanguageModel, smol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Page]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    put(tmp_path, "tiny/smol", smol)
    held = threading.Event()
    held.set()

    def open_model(name: str, quantize: str | None) -> VideoChat:
        assert held.wait(PATIENCE_S)
        if not name:
            return VideoChat(tiny_model, trusted=False)
        made = VideoChat(name, device="cpu", dtype="float32", trusted=False)
        never_ends(made.model.llm)
        return made

    first = ModelSlot(open_model("", None), open_model)
    with first as slot, running(slot, LaunchOptions(examples=[])) as (url, _):
        yield Page(slot, url, tmp_path, held)


def choose(page: Any, name: str) -> None:
    page.locator("[data-models]").click()
    page.locator(f'[data-load="{name}"]').click()
    expect(page.locator("#fluxchat-models")).to_be_hidden()


@pytest.mark.slow
def test_a_model_on_disk_is_loaded_and_the_conversation_goes_on(
    open_page: Callable[..., Any],
    served: Page,
) -> None:
    page = open_page(1280, 800)
    upload(page)
    ask(page, "What is first?")
    answered(page)
    before, largest = (
        served.slot.chat.name,
        page.locator("#fluxchat-budget input[type=range]").get_attribute("max"),
    )
    served.held.clear()
    choose(page, "tiny/smol")
    has(page.locator("#fluxchat-loading"), "Loading smol")
    shoot(page, "loading")
    ask(page, "What is second?")
    has(page.locator("#fluxchat-chat"), "Waiting for smol to load")
    served.held.set()
    answered(page, 2)
    expect(page.locator("#fluxchat-loading")).to_have_text("")
    has(page.locator("[data-models]"), served.slot.chat.name)
    assert served.slot.chat.name != before
    has(page.locator("#fluxchat-chat"), "What is first?")
    has(page.locator("#fluxchat-cost"), "to first word")
    slider = page.locator("#fluxchat-budget input[type=range]")
    assert slider.get_attribute("max") != largest
    assert slider.input_value() == str(served.slot.chat.model.default_tokens)
    # What is typed past the new range counts as its end, without a complaint.
    number = page.locator("#fluxchat-settings #fluxchat-budget input[type=number]")
    page.locator("[data-settings]").click()
    number.fill("999999")
    number.press("Enter")
    has(page.locator("#fluxchat-cost"), "to first word")
    expect(page.locator(".toast-body")).to_have_count(0)
    # A tab that is opened later is laid out for the new model, and leads back to the first.
    other = open_page(1280, 800)
    has(other.locator("[data-models]"), served.slot.chat.name)
    choose(other, "")
    has(other.locator("[data-models]"), before)
    assert served.slot.chat.name == before


@pytest.mark.slow
def test_where_it_cannot_be_loaded_the_old_one_stays(
    open_page: Callable[..., Any],
    served: Page,
) -> None:
    page = open_page(1280, 800)
    before = served.slot.chat
    (config,) = served.cache.glob("models--tiny--smol/snapshots/*/config.json")
    config.write_text(config.read_text().replace('"hidden_size"', '"hidden_sizes"'))
    choose(page, "tiny/smol")
    has(page.locator("#fluxchat-problem [role=alert]"), "stays loaded")
    assert "Traceback" not in page.locator("#fluxchat-problem").inner_text()
    assert served.slot.chat is before
    upload(page)
    ask(page)
    answered(page)


@pytest.mark.slow
def test_a_download_is_asked_for_and_followed(
    open_page: Callable[..., Any],
    served: Page,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size, arrives = 123_000, threading.Event()
    name = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
    blobs = served.cache / f"models--{name.replace('/', '--')}" / "blobs"

    def fetch(wanted: str) -> Path:
        assert wanted == name
        blobs.mkdir(parents=True)
        (blobs / "weights.incomplete").write_bytes(bytes(size // 3))
        assert arrives.wait(PATIENCE_S)
        return Path(wanted)

    monkeypatch.setattr("app.page.model_events.missing_bytes", lambda _: size)
    monkeypatch.setattr("app.model_slot.local_folder", fetch)
    page = open_page(1280, 800)
    choose(page, name)
    line = page.locator("#fluxchat-loading")
    has(line, re.compile(r"0\.00 GB come from huggingface.co, [\d.]+ GB are free"))
    assert not blobs.exists()
    line.get_by_role("button", name="Cancel").click()
    expect(line).to_have_text("")
    choose(page, name)
    has(line, "come from huggingface.co")
    line.get_by_role("button", name="Download and load").click()
    expect(line.locator("progress")).to_have_attribute("max", str(size))
    expect(line.locator("progress")).to_have_attribute("value", str(size // 3))
    arrives.set()  # nothing that could be loaded has come
    has(page.locator("#fluxchat-problem [role=alert]"), "stays loaded")


@pytest.mark.slow
def test_without_the_hub_a_download_is_one_sentence(
    open_page: Callable[..., Any],
    served: Page,
) -> None:
    page = open_page(1280, 800)
    choose(page, "HuggingFaceTB/SmolVLM2-256M-Video-Instruct")
    has(page.locator("#fluxchat-problem [role=alert]"), "cannot be reached to download")


@pytest.mark.slow
def test_two_models_side_by_side(
    open_page: Callable[..., Any],
    served: Page,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = open_page(1440, 900)
    upload(page)
    page.locator("[data-settings]").click()
    box = page.locator("#fluxchat-compare")
    box.get_by_role("button", name="Compare two budgets, selectors or models").click()
    box.get_by_label("Question for both").fill("Who?")
    box.get_by_label("Second: model").click()
    page.get_by_role("option", name="smol").click()
    has(box, re.compile(r"smol takes [\d.e-]+ GiB of memory beside the model in use, of [\d.]+ free"))
    first = served.slot.chat
    box.get_by_role("button", name="Compare", exact=True).click()
    names = []
    for side in ("first", "second"):
        panel = page.locator(f"#fluxchat-{side}")
        expect(panel.locator(".fc-small")).to_have_count(1)
        names.append(panel.locator("h3").inner_text().split(" · ")[0])
        expect(panel.locator("mark").first).to_be_visible()
    shoot(page, "compare-models")
    assert names[0] == first.name != names[1]
    assert served.slot.chat is first
    monkeypatch.setattr("app.model_slot.free_memory", lambda _: 0)
    box.get_by_role("button", name="Compare", exact=True).click()
    has(page.locator("#fluxchat-second"), "GiB are free: end this page and start")
