"""A conversation changes only when a question is answered; media stay where their message put them."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from app.chat import Media, Message, VideoChat, Videos
from app.conversation import Conversation
from encoder.errors import BudgetError, ConfigError, ContextError, FluxChatError, ModelError, VideoError
from llm_bridge.generation import Generation
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import render
from tests.app.conftest import SHORT, WORLD
from tests.patience import PATIENCE_S

GREY = torch.full((4, 32, 32, 3), 90, dtype=torch.uint8)
RED = Image.new("RGB", (40, 40), "red")


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every prompt that is answered, in order."""
    seen: list[Any] = []

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(render(*args, **options))
        return seen[-1]

    monkeypatch.setattr("app.chat.render", noted)
    return seen


def state(talk: Conversation) -> tuple[Any, ...]:
    return talk.turns, list(map(id, talk.videos)), dict(talk.options)


REFUSED: dict[str, tuple[Callable[[Conversation], object], type[FluxChatError]]] = {
    "too long": (lambda talk: talk.ask("word " * 3000), ContextError),
    "no words": (lambda talk: talk.ask(" "), ConfigError),
    "not a text": (lambda talk: talk.ask(None), ConfigError),  # type: ignore[arg-type]
    "half a character": (lambda talk: talk.ask("Why \ud83d?"), ConfigError),
    "wrong budget": (lambda talk: talk.ask("Why?", budget="lots"), BudgetError),
    "too long an answer": (lambda talk: talk.ask("Why?", max_new_tokens=1000), ContextError),
    "wrong temperature": (lambda talk: talk.ask("Why?", temperature=-1), ConfigError),
    "wrong selector": (lambda talk: talk.ask("Why?", selector="best"), BudgetError),
    "wrong system": (lambda talk: talk.ask("Why?", system=5), ConfigError),
    "own history": (lambda talk: talk.ask("Why?", history=[("a", "b")]), ConfigError),
    "missing video": (lambda talk: talk.add("nowhere.mp4"), VideoError),
    "no video": (lambda talk: talk.add(Videos([SHORT, None])), VideoError),
    "text file": (lambda talk: talk.add(io.StringIO("x")), VideoError),
    "not in it": (lambda talk: talk.drop("nowhere.mp4"), ConfigError),
    "a part of what is not in it": (lambda talk: talk.look_at("nowhere.mp4", 1, 2), ConfigError),
    "a part beyond its end": (lambda talk: talk.look_at(GREY, 1000), VideoError),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_changes_nothing(chat: VideoChat, kind: str) -> None:
    call, error = REFUSED[kind]
    talk = chat.conversation(GREY, budget=16, max_new_tokens=4)
    talk.ask("What is it?")
    talk.add(RED)
    before = state(talk)
    with pytest.raises(error) as caught:
        call(talk)
    assert "\n" not in str(caught.value)
    assert state(talk) == before
    assert talk.ask("And now?").usage.visual_tokens == 32
    assert len(talk.turns) == 2


def test_a_video_that_went_away_is_not_the_end(chat: VideoChat, tmp_path: Path) -> None:
    path = tmp_path / "gone.mp4"
    path.write_bytes(SHORT.read_bytes())
    talk = chat.conversation(GREY, budget=16, max_new_tokens=4)
    talk.add(path)
    path.unlink()
    with pytest.raises(VideoError, match=r"video 2 of 2 \('gone.mp4'\).*no such file"):
        talk.ask("What is it?")
    talk.drop(str(path))
    assert talk.ask("What is it?").usage.visual_tokens == 16


def test_an_error_in_the_middle_of_an_answer_is_no_turn(
    chat: VideoChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = chat.conversation(GREY, budget=16, max_new_tokens=8)

    class Breaking(Generation):
        def __iter__(self) -> Any:
            yield "It "
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("app.chat.Generation", Breaking)
        stream = talk.stream("What is it?")
        with pytest.raises(MemoryError):
            list(stream)
        with pytest.raises(FluxChatError, match="not there"):
            _ = stream.answer
    assert talk.turns == []
    talk.ask("What is it?")
    assert len(talk.turns) == 1


def test_a_stop_keeps_what_was_said(chat: VideoChat) -> None:
    talk = chat.conversation(GREY, budget=16, max_new_tokens=200)
    stream = talk.stream("What is it?")
    for _ in stream:
        stream.stop()
    assert stream.answer.finish == "cancelled"
    assert talk.turns == [("What is it?", stream.answer.text)]
    left = iter(talk.stream("Why?"))
    first = next(left)
    left.close()  # type: ignore[attr-defined]
    assert talk.turns[1] == ("Why?", first.strip())


def test_a_stop_before_the_first_word_leaves_no_half_turn(chat: VideoChat) -> None:
    talk = chat.conversation(GREY, budget=16, max_new_tokens=8)
    never = talk.stream("Never read")
    del never
    stopped = talk.stream("What is it?")
    stopped.stop()
    assert list(stopped) == []
    event = threading.Event()
    event.set()
    assert talk.ask("What is it?", stop=event).finish == "cancelled"
    assert talk.turns == []


def test_a_stream_is_read_once(chat: VideoChat) -> None:
    talk = chat.conversation(GREY, budget=16, max_new_tokens=4)
    stream = talk.stream("What is it?")
    list(stream)
    with pytest.raises(FluxChatError, match="read already"):
        list(stream)
    assert len(talk.turns) == 1


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_later_video_leaves_the_earlier_turns_as_they_are(
    chat: VideoChat, prompts: list[Any], system: str | None
) -> None:
    talk = chat.conversation(SHORT, budget=16, max_new_tokens=4, system=system)
    talk.ask("What is it?")
    talk.add(WORLD)
    talk.ask("And this?")
    talk.add(Videos([RED, GREY]))
    answer = talk.ask("Which is red?")
    assert [len(prompt.visuals) for prompt in prompts] == [1, 2, 4]
    assert answer.usage.visual_tokens == 64
    for earlier, later in pairwise(prompts):
        assert later.cache_keys[: len(earlier)] == earlier.cache_keys
    assert answer.usage.cached_tokens >= len(prompts[1])
    assert talk.videos == [SHORT, WORLD, RED, GREY]
    talk.drop(WORLD)
    talk.ask("Without it?")
    assert len(prompts[3].visuals) == 3
    assert prompts[3].cache_keys[: prompts[1].spans[1][0]] == prompts[1].cache_keys[: prompts[1].spans[1][0]]


def test_media_stand_where_the_message_put_them(chat: VideoChat, prompts: list[Any]) -> None:
    first, second = Media(SHORT, "a.mp4"), Media(RED)
    messages: list[Message[Media]] = [
        Message.of("system", "Be brief."),
        Message.of("user", "Before:", first, "After:", second, "Which?"),
        Message.of("assistant", "The first."),
        Message.of("user", "Why?", first),
    ]
    stream = chat.stream_messages(messages, budget=16, max_new_tokens=2)
    list(stream)
    [prompt] = prompts
    decode = chat.model.llm.tokenizer.decode
    texts, end = [], 0
    for start, count in prompt.spans:
        texts.append(decode(prompt.ids[end:start]))
        end = start + count
    texts.append(decode(prompt.ids[end:]))
    assert texts[0].endswith("Before:\n")
    assert texts[1].startswith("\nThe video lasts for")  # the sentence stays with its video
    assert texts[1].endswith("After:\n")
    assert texts[2].startswith("\nWhich?")
    assert texts[2].endswith("Why?\n")
    assert texts[3].startswith("\nThe video lasts for")
    assert [len(kept.times_s) > 0 for kept in stream.answer.kept] == [True, False, True]


def test_videos_of_a_history_stand_before_its_first_turn(chat: VideoChat, prompts: list[Any]) -> None:
    chat.ask(SHORT, "Why?", budget=16, max_new_tokens=2, history=[("What is it?", "A dog.")], system="Hm.")
    text = chat.model.llm.tokenizer.decode(prompts[0].ids[prompts[0].spans[0][0] + 16 :])
    assert text.index("The video lasts") < text.index("What is it?") < text.index("A dog.")


def test_file_objects_are_read_once_for_all_turns(chat: VideoChat) -> None:
    expected = chat.ask(SHORT, "What is it?", budget=16, max_new_tokens=8).text
    reading, writing = os.pipe()

    def feed() -> None:
        with os.fdopen(writing, "wb") as file:
            file.write(SHORT.read_bytes())

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(reading, "rb") as pipe:
        assert chat.estimate(pipe, 16).kept_tokens == 16
        assert chat.ask(pipe, "What is it?", budget=16, max_new_tokens=8).text == expected
        talk = chat.conversation(pipe, budget=16, max_new_tokens=8)
    thread.join()
    assert talk.ask("What is it?").text == expected
    assert talk.ask("Why?").usage.visual_tokens == 16
    with SHORT.open("rb") as file:
        opened = chat.conversation(file, budget=16, max_new_tokens=8)
    assert opened.ask("What is it?").text == expected
    assert (
        chat.ask(io.BytesIO(SHORT.read_bytes()), "What is it?", budget=16, max_new_tokens=8).text == expected
    )


def test_a_fifo_is_read_once_for_a_conversation(chat: VideoChat, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: path.write_bytes(SHORT.read_bytes()))
    thread.start()
    talk = chat.conversation(path, budget=16, max_new_tokens=4)
    thread.join()
    assert talk.ask("What is it?").usage.visual_tokens == 16
    assert talk.ask("Why?").usage.visual_tokens == 16


def test_closing_ends_answers_in_a_sentence(tiny_model: VideoLanguageModel, steps: list[float]) -> None:
    chat = VideoChat(tiny_model)
    errors: list[BaseException] = []
    begun = threading.Semaphore(0)

    def ask(question: str) -> None:
        try:
            for _ in chat.stream(GREY, question, budget=16, max_new_tokens=500):
                begun.release()
        except FluxChatError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(question,)) for question in ("What?", "Why?")]
    for thread in threads:
        thread.start()
    for _ in threads:
        begun.acquire()
    chat.close()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [str(error) for error in errors] == ["This VideoChat was closed: make a new one."] * 2


def test_what_fails_because_of_closing_says_that(
    tiny_model: VideoLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = VideoChat(tiny_model)
    encode = chat._vision.encode

    def late(*args: Any, **options: Any) -> Any:
        chat.close()
        return encode(*args, **options)

    monkeypatch.setattr(chat._vision, "encode", late)
    with pytest.raises(ModelError, match=r"^This VideoChat was closed: make a new one\.$"):
        chat.ask(GREY, "What?", budget=16)
