"""A model in the place of another while questions are asked."""

from __future__ import annotations

import argparse
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from app.chat import VideoChat
from app.model_choices import SHIPPED_NAME, Choice
from app.model_slot import Beside, Loading, ModelSlot
from encoder.errors import ConfigError, ModelError
from tests import tiny_video_models
from tests.app.hub_cache import put
from tests.patience import PATIENCE_S


def open_tiny(name: str, quantize: str | None = None) -> VideoChat:
    return VideoChat(name, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_video_models.make(tmp_path_factory.mktemp("made") / "smol", "smolvlm")


@pytest.fixture
def cache(tmp_path: Path, smol: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with two models that can be loaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    put(tmp_path, "tiny/one", smol)
    put(tmp_path, "tiny/two", smol)
    return tmp_path


@pytest.fixture
def slot(cache: Path) -> Iterator[ModelSlot]:
    with ModelSlot(open_tiny("tiny/one"), lambda name, quantize: open_tiny(name or "tiny/one")) as made:
        yield made


def arrived(loading: Loading) -> Loading:
    assert loading.done.wait(PATIENCE_S)
    return loading


def test_what_is_on_disk_can_be_loaded_and_nothing_else(slot: ModelSlot, cache: Path) -> None:
    (cut,) = (put(cache, "tiny/cut", cache / "models--tiny--one" / "snapshots" / ("a" * 40)),)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = {choice.name: choice for choice in slot.choices()}
    assert [name for name, choice in found.items() if choice.on_disk] == ["", "tiny/one", "tiny/two"]
    assert any(not choice.on_disk for choice in found.values())  # the catalog
    numbers = sum(parameter.numel() for parameter in slot.chat.model.llm.model.parameters())
    assert found["tiny/two"].memory_bytes >= 2 * numbers
    with pytest.raises(ConfigError, match="choose one of the list"):
        slot.choice("/etc")
    assert ModelSlot(slot.chat).choices() == []


def test_beside_another_first_model_the_shipped_one_is_offered(
    slot: ModelSlot, llm_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.page.model_dialog import dialog

    assert SHIPPED_NAME not in {choice.name for choice in slot.choices()}  # `slot` could have it first
    opened: list[str] = []

    def open_model(name: str, quantize: str | None) -> VideoChat:
        opened.append(name)
        return open_tiny("tiny/two")

    def missing() -> Path:
        raise ModelError("It was not fetched.")

    with ModelSlot(open_tiny("tiny/one"), open_model, offers_shipped=True) as other:
        monkeypatch.setattr("app.model_choices.default_llm_path", missing)
        assert SHIPPED_NAME not in {choice.name for choice in other.choices()}
        assert "<code>fluxchat fetch</code>" in dialog(other, loads=True)
        assert "<code>fluxchat web</code>" in dialog(other, loads=False)
        monkeypatch.setattr("app.model_choices.default_llm_path", lambda: llm_folder("llama"))
        choice = other.choice(SHIPPED_NAME)
        assert choice.on_disk
        assert choice.memory_bytes > 2 * 10**6
        assert f'data-load="{SHIPPED_NAME}"' in dialog(other, loads=True)
        with pytest.raises(ModelError, match="end this page and start `fluxchat web`"):
            other.check_room(replace(choice, memory_bytes=2**50))
        with pytest.raises(ModelError, match="end this page and start it again as before"):
            other.check_room(replace(other.choice(""), memory_bytes=2**50))
        assert arrived(other.load(choice)).problem == ""
        assert (opened, other.name) == ([SHIPPED_NAME], SHIPPED_NAME)
        assert 'data-load=""' in dialog(other, loads=True)
        assert f'data-load="{SHIPPED_NAME}"' not in dialog(other, loads=True)


def test_the_page_of_another_model_opens_the_shipped_one_without_its_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from app import cli

    opened: list[argparse.Namespace] = []
    monkeypatch.setattr(cli, "open_chat", lambda args, **_: opened.append(args))
    args = cli.build_parser().parse_args(["web", "--model", "tiny/one", "--llm", "x", "--select", "before"])
    open_model = cli._opener(args, {})
    for name in (SHIPPED_NAME, ""):
        open_model(name, None)
    shipped, first = opened
    assert (shipped.model, shipped.llm, shipped.select) == (None, None, None)
    assert (first.model, first.llm, first.select) == ("tiny/one", "x", "before")


def test_another_model_takes_the_place_and_the_first_is_freed(slot: ModelSlot) -> None:
    old = weakref.ref(slot.chat.model.llm.model)
    loading = arrived(slot.load(slot.choice("tiny/two")))
    assert (loading.problem, slot.name, slot.loading) == ("", "tiny/two", None)
    assert slot.chat.ask(None, "What?", max_new_tokens=2).text is not None
    for _ in range(100):
        gc.collect()
        if old() is None:
            break
        threading.Event().wait(0.05)
    assert old() is None


def test_an_answer_under_way_keeps_its_model_and_later_ones_wait(slot: ModelSlot) -> None:
    held, waits = threading.Event(), threading.Event()
    opener, used = slot._open, []

    def slow(name: str, quantize: str | None) -> VideoChat:
        assert held.wait(PATIENCE_S)
        assert opener is not None
        return opener(name, quantize)

    slot._open = slow
    with slot.using() as before:
        loading = slot.load(slot.choice("tiny/two"))

        def ask() -> None:
            waits.set()
            with slot.using(after_loading=True) as chat:
                used.append(chat)

        asking = threading.Thread(target=ask)
        asking.start()
        assert waits.wait(PATIENCE_S)
        with slot.using() as chat:  # what is no question does not wait
            assert chat is before
        assert used == []
        with pytest.raises(ConfigError, match="is being loaded"):
            slot.load(slot.choice("tiny/one"))
        held.set()
        arrived(loading)
        asking.join(PATIENCE_S)
        assert used == [slot.chat]
        assert slot.chat is not before
        assert before.ask(None, "What?", max_new_tokens=2).usage.completion_tokens == 2


def test_a_question_that_is_stopped_waits_no_more(slot: ModelSlot) -> None:
    slot._loading = Loading(slot.choice("tiny/two"))
    stop = threading.Event()
    stop.set()
    with slot.using(stop, after_loading=True) as chat:
        assert chat is slot.chat
    slot._loading = None


def test_where_it_fails_the_first_stays_and_a_sentence_says_why(slot: ModelSlot, cache: Path) -> None:
    before, choice = slot.chat, slot.choice("tiny/two")
    config = cache / "models--tiny--two" / "snapshots" / ("a" * 40) / "config.json"
    config.write_text(config.read_text().replace('"smolvlm"', '"florence2"'))
    problem = arrived(slot.load(choice)).problem
    assert "florence2" in problem
    assert "\n" not in problem
    assert slot.chat is before
    assert before.ask(None, "What?", max_new_tokens=2).usage.completion_tokens == 2


def test_an_unforeseen_error_leaves_the_first_too(slot: ModelSlot) -> None:
    def broken(name: str, quantize: str | None) -> VideoChat:
        raise RuntimeError("unforeseen")

    slot._open, before = broken, slot.chat
    assert "server's log" in arrived(slot.load(slot.choice("tiny/two"))).problem
    assert slot.chat is before


def test_without_room_for_both_nothing_is_loaded(slot: ModelSlot) -> None:
    large = replace(slot.choice("tiny/two"), memory_bytes=2**50)
    for load in (slot.load, slot.open):
        with pytest.raises(ModelError, match=r"GiB are free: end this page .*--model tiny/two"):
            load(large)
    assert slot.loading is None


def test_a_second_model_beside_the_first_is_freed_at_the_end(slot: ModelSlot) -> None:
    with Beside(slot, slot.choice("tiny/two")) as beside:
        while not beside.ready(0.1):
            pass
        assert beside.chat is not slot.chat
        second = weakref.ref(beside.chat.model.llm.model)
    gc.collect()
    assert second() is None
    with slot.using() as chat:
        assert chat.ask(None, "What?", max_new_tokens=2).usage.completion_tokens == 2


def test_a_model_that_comes_after_the_end_is_closed(slot: ModelSlot) -> None:
    come: list[VideoChat] = []
    opener, go = slot._open, threading.Event()
    assert opener is not None

    def late(name: str, quantize: str | None) -> VideoChat:
        assert go.wait(PATIENCE_S)
        come.append(opener(name, quantize))
        return come[0]

    slot._open = late
    loading = slot.load(slot.choice("tiny/two"))
    slot.close()
    go.set()
    assert arrived(loading).problem
    with pytest.raises(ModelError, match="closed"):
        come[0].ask(None, "What?")


def test_the_weights_of_what_is_loaded_are_counted(slot: ModelSlot) -> None:
    model = slot.chat.model
    language = sum(p.numel() * p.element_size() for p in model.llm.model.parameters())
    assert language < Choice.of(slot.chat).memory_bytes
    assert model.tower.dtype == torch.float32


def test_a_server_for_many_has_no_button(slot: ModelSlot) -> None:
    from app.page.model_dialog import dialog
    from app.server.options import LaunchOptions
    from app.server.security.authentication import Credentials

    assert "data-load" in dialog(slot, loads=True)
    assert "data-load" not in dialog(slot, loads=False)
    assert "fluxchat web --model" in dialog(slot, loads=False)
    assert LaunchOptions().for_one
    shared: list[Callable[[], LaunchOptions]] = [
        lambda: LaunchOptions(credentials=Credentials("key")),
        lambda: LaunchOptions(host="0.0.0.0", public=True),
        lambda: LaunchOptions(public=True),
        lambda: LaunchOptions(hosts=("films.example",)),
    ]
    assert not any(options().for_one for options in shared)
