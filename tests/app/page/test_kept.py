"""What the browser is sent of a conversation, and what it may send back."""

from __future__ import annotations

import json
import re
from html import unescape
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.page.handlers import Handlers
from app.page.kept import Kept, record
from app.page.sessions import Session
from encoder.errors import ConfigError
from tests.app.conftest import SHORT
from tests.app.page.test_page import PLAIN, ask

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "turns", "media"]), inner)
    ),
    max_leaves=8,
)


def sent(session: Session, *fresh: str) -> dict[str, Any]:
    """The record as the browser reads it."""
    found = re.fullmatch(r'<div hidden data-record="([^"]*)"></div>', record(session, "a model", fresh))
    assert found is not None
    values: dict[str, Any] = json.loads(unescape(found[1]))
    return values


def kept(values: dict[str, Any]) -> dict[str, Any]:
    """A record as the browser sends it back."""
    return {**values, "media": [medium["name"] for medium in values["media"]]}


def test_what_was_sent_reopens_and_the_model_remembers(handlers: Handlers) -> None:
    first = handlers.sessions.get("first")
    assert handlers.add(first, [str(SHORT)]) == ""
    for question in ('Is it "one" <b>&?', "Two?"):
        ask(handlers, first, question)
    values = sent(first, first.turns[0].key)
    assert "fc-details" in values["turns"][0]["details"]
    assert "details" not in values["turns"][1]
    assert sent(first)["number"] == values["number"] + 1
    assert values["media"][0]["thumbnail"].startswith("data:image/jpeg")

    second = handlers.sessions.get("second")
    assert handlers.reopen(second, kept(values), [str(SHORT)])
    assert [(t.question, t.text, t.key) for t in second.turns] == [
        (t.question, t.text, t.key) for t in first.turns
    ]
    assert second.conversation == first.conversation
    assert [medium.path for medium in second.turns[0].media] == [str(SHORT)]
    assert "fc-details" not in json.dumps(sent(second, *(turn.key for turn in second.turns)))
    ask(handlers, first, "Three?")
    ask(handlers, second, "Three?")
    assert second.turns[2].text == first.turns[2].text  # the same prompt, the video in the same turn


def test_without_its_video_the_words_stay(handlers: Handlers) -> None:
    session = handlers.sessions.get("one")
    assert handlers.add(session, [str(SHORT)]) == ""
    ask(handlers, session, "One?")
    values = kept(sent(session))
    values["turns"].append({**values["turns"][0], "key": "f" * 16, "text": ""})
    for paths in ([None], []):
        assert handlers.reopen(session, values, paths)
        assert not session.media
        assert [turn.done for turn in session.turns] == [True, True]
        assert len(session.history) == 1
        assert "ask it again" in session.turns[1].error


def test_answers_are_never_replaced_without_a_branch(handlers: Handlers) -> None:
    session = handlers.sessions.get("one")
    ask(handlers, session, "One?")
    ask(handlers, session, "Two?")
    name = session.conversation
    handlers.begin(session, "Two?", None, 1)  # the last one again: nothing else goes
    assert session.conversation == name
    list(handlers.run(session, PLAIN))
    handlers.begin(session, "One?", None, 0)  # the first one again: the second would go
    assert (session.parent, session.conversation != name) == (name, True)
    list(handlers.run(session, PLAIN))
    name = session.conversation
    handlers.begin(session, "Other?", None, 0)
    assert (session.parent, session.conversation != name) == (name, True)
    handlers.clear(session)
    assert session.parent == ""


TURN = {"key": "a" * 16, "question": "?", "text": "!", "thinking": "", "error": "", "media": []}
WHOLE = {"id": "abcdefgh", "parent": "", "media": ["b.mp4"], "turns": [TURN]}


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../../etc"},
        {"id": 'x" onload="'},
        {"id": None},
        {"parent": 3},
        {"media": [3]},
        {"turns": {}},
        {"turns": [None]},
        {"turns": [{**TURN, "key": '"><script>'}]},
        {"turns": [{**TURN, "text": None}]},
        {"turns": [{**TURN, "media": [{"medium": 1, "start": 0, "end": None, "region": None}]}]},
        {"turns": [{**TURN, "media": [{"medium": True, "start": 0, "end": None, "region": None}]}]},
        {"turns": [{**TURN, "media": [{"medium": 0, "start": 5, "end": 2, "region": None}]}]},
        {"turns": [TURN] * 101},
        {"turns": [{**TURN, "text": "x" * 2_000_001}]},
    ],
)
def test_what_comes_back_is_checked(handlers: Handlers, change: dict[str, Any]) -> None:
    session = handlers.sessions.get("one")
    ask(handlers, session, "Before?")
    assert not handlers.reopen(session, {**WHOLE, **change}, [])
    assert "cannot be opened" in session.problem
    assert session.turns[0].question == "Before?"


@settings(max_examples=40)
@given(JSON)
def test_anything_else_is_one_sentence(values: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        Kept.of(values)
    with pytest.raises(ConfigError, match="cannot be opened"):
        Kept.of({**WHOLE, "turns": [{**TURN, "media": [values]}]})
