"""What is wrong with a question is said in one sentence that names the cure, and the user's own file."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app.chat import Media, Message, VideoChat, Videos
from encoder.budget import Budget
from encoder.errors import BudgetError, ConfigError, ContextError, FluxChatError, VideoError
from encoder.video.reader import read_clip
from tests.app.conftest import SHORT

GREY = torch.full((4, 32, 32, 3), 90, dtype=torch.uint8)
RED = Image.new("RGB", (40, 40), "red")
BAD_BYTES = "caf\udce9.mp4"  # what Python makes of a name that is not UTF-8


def told(call: Callable[[], object], kind: type[FluxChatError] = FluxChatError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def closed() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


SOURCES: dict[str, tuple[Any, str]] = {
    "list of paths": ([str(SHORT), str(SHORT)], r"Videos\(\[...\]\)"),
    "list of files": ([io.BytesIO(b"x")], r"Videos\(\[...\]\)"),
    "list in Videos": (Videos([[SHORT, SHORT], RED]), r"video 1 of 2.*Videos\(\[...\]\)"),
    "none in a list": ([RED, None], "picture 2 of 2 is None"),
    "none in Videos": (Videos([RED, None]), "video 2 of 2: it is None"),
    "address": ("https://example.com/a.mp4", "'a.mp4'.*address.*download the video first"),
    "stream address": ("rtsp://camera/1", "address.*download"),
    "file address": (f"file://{SHORT}", "without file://"),
    "data address": ("data:video/mp4;base64,AAAA", "decode it and give the bytes"),
    "empty name": ("", "name of the video is empty"),
    "blank name": (Path(" "), "name of the video is empty"),
    "path as bytes": (os.fsencode(SHORT), "os.fsdecode"),
    "directory": (SHORT.parent, f"'{SHORT.parent.name}': it is a directory"),
    "name with NUL": ("a\0.mp4", "no such file"),
    "number": (7, "cannot be a int"),
    "text file": (io.StringIO("x"), "binary mode"),
    "closed file": (closed(), "closed file"),
    "missing, second": (Videos([SHORT, "nowhere.mp4"]), r"video 2 of 2 \('nowhere.mp4'\): there is no such"),
    "named by the caller": (Media(b"not a video", "holiday.mp4"), "Cannot read 'holiday.mp4': it is not a"),
    "pictures, second": (
        Videos([RED, [RED, RED.resize((8, 8))]]),
        "video 2 of 2: the images.*differ in size",
    ),
    "number, second": (Videos([RED, 7]), "video 2 of 2: a video cannot be a int"),
    "named pictures": (Media([], "trip"), "'trip': the list of images is empty"),
    "named, of three": (Videos(RED, Media(b"x" * 99, "b.mp4"), RED), r"video 2 of 3 \('b.mp4'\): it is not"),
    "not UTF-8": (BAD_BYTES, r"caf\\udce9.mp4.*no such file"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_that_is_no_video(chat: VideoChat, kind: str) -> None:
    source, words = SOURCES[kind]
    message = told(lambda: chat.ask(source, "What?", budget=16, max_new_tokens=2), VideoError)
    assert re.search(words, message), message
    assert "/tmp" not in message
    if not isinstance(source, Videos):
        for call in (chat.probe, chat.estimate, chat.preview):
            assert told(lambda call=call: call(source)) == message  # type: ignore[misc]


def test_videos_of_one_or_more() -> None:
    clip = read_clip(SHORT, 2)
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    for one in ("a.mp4", Path("a.mp4"), b"abc", io.BytesIO(b"a\nb"), clip, GREY, pixels, RED, Media("a")):
        assert list(map(id, Videos(one))) == [id(one)]
    assert Videos("a", "b") == Videos(["a", "b"]) == Videos(name for name in "ab") == ["a", "b"]
    assert Videos() == Videos([]) == []
    assert Videos([RED], [RED]) == [[RED], [RED]]


def test_one_path_in_videos_is_one_video(chat: VideoChat) -> None:
    assert chat.ask(Videos(str(SHORT)), "What?", budget=16, max_new_tokens=2).usage.visual_tokens == 16


def test_a_name_that_is_not_utf8_is_a_name(chat: VideoChat, tmp_path: Path) -> None:
    path = os.path.join(tmp_path, BAD_BYTES)
    with open(path, "wb") as file:
        file.write(SHORT.read_bytes())
    assert chat.ask(path, "What?", budget=16, max_new_tokens=2).usage.visual_tokens == 16


QUESTIONS: dict[str, tuple[dict[str, Any], type[FluxChatError], str]] = {
    "number": ({"question": 5}, ConfigError, "question must be a text.*int"),
    "bytes": ({"question": b"What?"}, ConfigError, "question must be a text.*bytes"),
    "half a character": (
        {"question": "Why \ud83d?"},
        ConfigError,
        "question is not valid Unicode.*position 4",
    ),
    "escaped byte": ({"question": "Why \udcff?"}, ConfigError, "question is not valid Unicode"),
    "NUL": ({"question": "Why\0?"}, ConfigError, "NUL character at position 3"),
    "system": ({"system": "\udcff"}, ConfigError, "system prompt is not valid Unicode"),
    "system number": ({"system": 3}, ConfigError, "system prompt must be a text"),
    "old question": ({"history": [("a \ud83d", "b")]}, ConfigError, "question of the history is not valid"),
    "old answer": ({"history": [("a", "b \ud83d")]}, ConfigError, "answer of the history is not valid"),
    "history text": ({"history": "ab"}, ConfigError, "history must be a list"),
    "history of texts": ({"history": ["ab"]}, ConfigError, "history must be a list"),
    "history of dicts": ({"history": [{"role": "user"}]}, ConfigError, "history must be a list"),
    "history of triples": ({"history": [("a", "b", "c")]}, ConfigError, "history must be a list"),
    "selector": ({"selector": "best"}, BudgetError, "no selector 'best'; use one of 'flux'"),
    "selector list": ({"selector": ["flux"]}, BudgetError, "no selector"),
    "stop": ({"stop": True}, ConfigError, "stop must be a threading.Event"),
    "progress": ({"progress": 1}, ConfigError, "progress must be a function"),
    "scope": ({"scope": 1}, ConfigError, "scope must be a text"),
}


@pytest.mark.parametrize("kind", QUESTIONS)
def test_a_question_that_is_none(chat: VideoChat, kind: str) -> None:
    options, error, words = QUESTIONS[kind]
    with pytest.raises(error, match=words):
        chat.ask(GREY, **{"question": "What?", "budget": 16, "max_new_tokens": 2, **options})


def test_swapped_arguments(chat: VideoChat) -> None:
    assert "video comes first" in told(lambda: chat.ask("What is it?", str(SHORT)), ConfigError)


@pytest.mark.parametrize(
    "budget",
    [[16], 3.5, True, "", "many", "0", 0, -1, "1e3", "auto:x", "auto:nan", "9" * 5000, b"16", "\ud83d", {}],
)
def test_a_budget_that_is_none(chat: VideoChat, budget: Any) -> None:
    message = told(lambda: chat.ask(GREY, "What?", budget=budget), BudgetError)
    assert len(message) < 200


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": "5"},
        {"tokens": 2.5},
        {"seconds": "1"},
        {"frames": 1.5},
        {"frames": True},
        {"resolution": "x"},
    ],
)
def test_a_budget_of_wrong_types(fields: dict[str, Any]) -> None:
    assert "must" in told(lambda: Budget(**fields), BudgetError)


MESSAGES: dict[str, tuple[Any, str]] = {
    "none": ([], "at least one Message"),
    "one message": (Message.of("user", "What?"), "list of at least one Message"),
    "dicts": ([{"role": "user", "content": "What?"}], "must be a Message"),
    "role": ([Message.of("robot", "What?")], "system, the user or the assistant"),  # type: ignore[arg-type]
    "no question": ([Message.of("user", "What?"), Message.of("assistant", "It.")], "must be the user's"),
    "no words": ([Message.of("user", Media(GREY))], "question is empty"),
    "bare video": ([Message.of("user", GREY, "What?")], r"not a Tensor: wrap it in Media\(...\)"),
    "half a character": ([Message.of("user", "\ud83d", "What?")], "question is not valid Unicode"),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_messages_that_are_no_question(chat: VideoChat, kind: str) -> None:
    messages, words = MESSAGES[kind]
    with pytest.raises(ConfigError, match=words):
        chat.stream_messages(messages)


def test_the_advice_is_about_what_is_too_long(chat: VideoChat) -> None:
    words, many = "word " * 1500, "word " * 30
    question = told(lambda: chat.ask(GREY, words, budget=16), ContextError)
    assert "question is" in question
    assert "shorten the question" in question
    talk = told(lambda: chat.ask(GREY, "Why?", budget=16, history=[(many, many)] * 40), ContextError)
    assert "conversation is" in talk
    assert "start a new conversation" in talk
    answer = told(lambda: chat.ask(GREY, "Why?", budget=16, max_new_tokens=5000), ContextError)
    assert "lower max_new_tokens" in answer
    videos = Videos([torch.full((8, 64, 64, 3), shade, dtype=torch.uint8) for shade in (1, 2, 3)])
    visual = told(lambda: chat.ask(videos, "Why?", budget=400, max_new_tokens=8), ContextError)
    assert "lower the token budget" in visual
    for message in (question, talk, answer, visual):
        assert chat.model.llm.name not in message


def test_a_question_as_long_as_the_context_fits_and_one_more_does_not(chat: VideoChat) -> None:
    room = chat.model.llm.context_length
    assert room is not None
    used = chat.ask(None, "a", max_new_tokens=1).usage.prompt_tokens
    words = " a" * (room - used - 4)
    assert chat.ask(None, "a" + words, max_new_tokens=4).usage.prompt_tokens == room - 4
    assert "is 1 token too long" in told(lambda: chat.ask(None, "a" + words + " a", max_new_tokens=4))


def test_a_text_that_cannot_fit_is_not_tokenised(chat: VideoChat, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised")

    chat.ask(GREY, "Why?", budget=16, max_new_tokens=1)
    monkeypatch.setattr(type(chat.model.llm.tokenizer), "__call__", refuse)
    message = told(lambda: chat.ask("nowhere.mp4", "many words " * 20_000), ContextError)
    assert "shorten the question" in message
