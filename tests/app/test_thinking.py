"""Thoughts in an answer, on the page, in the command and in the API."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from app.chat import VideoChat
from app.cli import build_parser
from app.page import html
from app.page.handlers import Handlers
from app.page.sessions import Sessions
from app.page.settings import CHOOSE, Settings
from app.server.chat_request import parse_chat
from app.server.errors import ApiError
from app.server.options import LaunchOptions
from app.server.routes import ServerSettings
from encoder.errors import ConfigError
from llm_bridge.model import VideoLanguageModel
from tests import tiny_families
from tests.app.conftest import SHORT
from tests.app.server.serving import question, running
from tests.llm_bridge.test_thinking import Script, qwen3
from tests.llm_bridge.tiny_vlm import tiny_vlm


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> VideoLanguageModel:
    return tiny_vlm(tiny_families.make(tmp_path_factory.mktemp("thinker"), "qwen3", tokenizer=qwen3()))


@pytest.fixture
def says(thinking_model: VideoLanguageModel) -> Iterator[Callable[[str], None]]:
    """Makes the model say a text next."""
    handles: list[Any] = []

    def say(text: str) -> None:
        while handles:
            handles.pop().remove()
        script = Script(thinking_model.llm, text + "<|im_end|>")
        thinking_model.llm.__dict__["lean"] = None  # whose passes no hook sees
        handles.append(thinking_model.language_model.register_forward_hook(script, with_kwargs=True))

    yield say
    while handles:
        handles.pop().remove()


def test_an_answer_has_its_thoughts_apart(
    thinking_model: VideoLanguageModel, says: Callable[[str], None]
) -> None:
    with VideoChat(thinking_model, think=True) as chat:
        says("<think>\nA dog?\n</think>\n\nYes, a dog.")
        conversation = chat.conversation(SHORT, budget=16)
        answer = conversation.ask("A dog?", max_new_tokens=12)
        assert (answer.text, answer.thinking) == ("Yes, a dog.", "A dog?")
        assert 0 < answer.usage.thinking_tokens < answer.usage.completion_tokens
        assert json.loads(json.dumps(answer.to_dict()))["thinking"] == "A dog?"
        assert conversation.turns == [("A dog?", "Yes, a dog.")]  # thoughts are not said
        says("Yes.")
        assert chat.ask(SHORT, "A dog?", budget=16, think=False).thinking == ""


def test_the_prompt_says_whether_to_think(
    thinking_model: VideoLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    import app.chat as module

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options["think"])
        return original(*args, **options)

    original = module.render
    monkeypatch.setattr(module, "render", spy)
    with VideoChat(thinking_model) as chat:
        for options in ({}, {"think": True}, {"think": False}):
            chat.ask(SHORT, "A dog?", budget=16, max_new_tokens=1, max_thinking_tokens=1, **options)
    assert asked == [False, True, False]


def test_a_model_that_does_not_think_says_so(tiny_model: VideoLanguageModel, chat: VideoChat) -> None:
    with pytest.raises(ConfigError, match="does not think before it answers: leave think out"):
        chat.ask(SHORT, "A dog?", think=True)
    with pytest.raises(ConfigError, match="does not think"):
        VideoChat(tiny_model, think=True)
    with pytest.raises(ConfigError, match="think must be True or False"):
        chat.ask(SHORT, "A dog?", think="yes")


def test_the_command_has_the_option() -> None:
    parse = build_parser().parse_args
    assert parse(["ask", "a.mp4", "x", "--think", "--max-thinking-tokens", "5"]).think is True
    assert "think" not in parse(["ask", "a.mp4", "x"])


def test_the_page_folds_thoughts(
    thinking_model: VideoLanguageModel, says: Callable[[str], None], tmp_path: Path
) -> None:
    assert html.thoughts(" ") == ""
    assert html.thoughts("a < b\nc").count("<") == 5  # details, summary and one line break
    with VideoChat(thinking_model) as chat:
        sessions = Sessions(chat.forget, uploads=tmp_path)
        handlers = Handlers(chat, sessions)
        session = sessions.get("one")
        handlers.add_copy(session, str(SHORT), "ann")
        says("<think>A < B?</think>Yes.")
        assert handlers.begin(session, "A dog?")
        shown = list(handlers.run(session, Settings(48, False, 2.0, "flux", CHOOSE, CHOOSE, think=True)))[-1]
        text = shown[-1]["content"][0]
        assert text.endswith("</details>\n\nYes.")
        assert "A &lt; B?" in text
        assert session.history[-1].text == "Yes."
        sessions.close_all()


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "A dog?"}], **fields}


def test_requests_say_whether_to_think() -> None:
    asked = parse_chat(body(chat_template_kwargs={"enable_thinking": True}, thinking_token_budget=7))
    assert (asked.sampling["think"], asked.sampling["max_thinking_tokens"]) == (True, 7)
    assert "think" not in parse_chat(body(chat_template_kwargs={})).sampling
    assert parse_chat(body(chat_template_kwargs={"thinking": False})).sampling["think"] is False
    with pytest.raises(ApiError) as refused:
        parse_chat(body(chat_template_kwargs={"enable_thinkin": True}))
    assert refused.value.status == 400


def test_thoughts_are_reasoning_content(
    thinking_model: VideoLanguageModel, says: Callable[[str], None]
) -> None:
    thinking: Any = {"chat_template_kwargs": {"enable_thinking": True}}
    with (
        VideoChat(thinking_model, trusted=False) as chat,
        running(chat, LaunchOptions(page=False, server=ServerSettings())) as (address, _),
    ):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def ask(extra: Any, **options: Any) -> Any:
            says("<think>\nA dog?\n</think>\n\nYes, a dog.")
            return client.chat.completions.create(**question("A dog?", **options), extra_body=extra)

        done = ask(thinking)
        message = done.choices[0].message
        assert (message.content, message.reasoning_content) == ("Yes, a dog.", "A dog?")
        assert done.usage.completion_tokens_details.reasoning_tokens > 0
        deltas = [chunk.choices[0].delta for chunk in ask(thinking, stream=True)]
        thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert thoughts.strip() == "A dog?"
        assert "".join(delta.content or "" for delta in deltas) == "Yes, a dog."
        first = [bool(getattr(delta, "reasoning_content", None)) for delta in deltas]
        assert first.index(True) < len(first) - 1 - first[::-1].index(False)
        hidden = ask({**thinking, "include_reasoning": False}).choices[0].message
        assert (hidden.content, getattr(hidden, "reasoning_content", None)) == ("Yes, a dog.", None)


def test_a_request_to_think_is_refused_where_nothing_thinks(tiny_model: VideoLanguageModel) -> None:
    with (
        VideoChat(tiny_model, trusted=False) as chat,
        running(chat, LaunchOptions(page=False, server=ServerSettings())) as (address, _),
    ):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="does not think"):
            client.chat.completions.create(
                **question("A dog?"), extra_body={"chat_template_kwargs": {"enable_thinking": True}}
            )
