"""Events of the page that are sent by hand and lack something end in a sentence, not in a traceback."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx
import pytest
from gradio.queueing import AsyncQueue, LRUCache
from gradio.server_messages import HeartbeatMessage

from app.chat import VideoChat
from app.server import gradio_mount
from app.server.options import LaunchOptions
from llm_bridge.model import VideoLanguageModel
from tests.app.server.serving import running
from tests.patience import PATIENCE_S

SENT: list[tuple[str, dict[str, Any], int, str]] = [
    ("run/ask", {}, 400, "An event needs data, a list of its inputs."),
    ("call/ask", {"data": None}, 400, "An event needs data, a list of its inputs."),
    ("api/ask", {"data": []}, 500, "The event ask cannot be taken: it needs 3 inputs in data, not 0."),
    ("run/ask", {"data": [None]}, 500, "The event ask cannot be taken: it needs 3 inputs in data, not 1."),
    ("run/ask", {"data": [None] * 3}, 500, "The question is empty: ask something in words."),
    ("run/ask", {"data": [{"path": 1}, "Why?", ""]}, 500, "its data are not of the kinds of its inputs."),
    ("run/ask", {"data": ["x", "Why?", ""]}, 500, "its data are not of the kinds of its inputs."),
    ("run/nothing", {"data": []}, 404, "The page has no event 'nothing'."),
    ("run/ask", {"data": [], "fn_index": 9999}, 404, "The page has no event 9999."),
    ("queue/join", {"data": [], "session_hash": "a"}, 400, "Say which event it is: fn_index."),
    ("queue/join", {"data": [], "session_hash": "a", "fn_index": 9999}, 404, "The page has no event 9999."),
]


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_what_is_lacking_is_told_and_nothing_is_logged(
    tiny_model: VideoLanguageModel, capfd: pytest.CaptureFixture[str], every: int
) -> None:
    with (
        VideoChat(tiny_model, trusted=False) as chat,
        running(chat, LaunchOptions(examples=[])) as (address, _),
        httpx.Client(base_url=f"{address}/gradio_api/") as client,
    ):
        for path, body, status, said in SENT:
            reply = client.post(path, json=body)
            assert (reply.status_code, said in reply.text) == (status, True), (path, body, reply.text)
        sessions = map(str, itertools.count())
        lacking = 0
        for event in client.get(f"{address}/config").json()["dependencies"][::every]:
            for data in ([], [None] * len(event["inputs"])):
                session = next(sessions)
                done = _queued(client, {"data": data, "fn_index": event["id"], "session_hash": session})
                if not done["success"]:
                    lacking += 1
                    assert done["output"]["error"].endswith("."), (event["api_name"], done)
    assert lacking > 50 // every
    assert "Traceback" not in capfd.readouterr().err


def test_events_of_a_session_that_is_not_there_are_404_and_nothing_is_logged(
    tiny_model: VideoLanguageModel, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[Any] = []
    monkeypatch.setattr(gradio_mount, "tell_senders", pages.append)
    with (
        VideoChat(tiny_model, trusted=False) as chat,
        running(chat, LaunchOptions(examples=[])) as (address, _),
        httpx.Client(base_url=f"{address}/gradio_api/", timeout=PATIENCE_S) as client,
    ):
        unknown = client.get("queue/data", params={"session_hash": "nobody"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "session_not_found")
        waiting: LRUCache[str, AsyncQueue[Any]] = pages[0]._queue.pending_messages_per_session
        waiting["a"] = AsyncQueue()
        waiting["a"].put_nowait(HeartbeatMessage())
        with client.stream("GET", "queue/data", params={"session_hash": "a"}) as events:
            lines = events.iter_lines()
            assert "heartbeat" in next(lines)
            ended = waiting["a"]  # as another stream of the session ends it
            del waiting["a"]
            ended.put_nowait(HeartbeatMessage())
            list(lines)
    assert len(capfd.readouterr().err.splitlines()) == 1  # that it is ready


def _queued(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """What an event in the queue ended in."""
    assert client.post("queue/join", json=body).status_code == 200
    with client.stream("GET", "queue/data", params={"session_hash": body["session_hash"]}) as events:
        for line in events.iter_lines():
            if line.startswith("data: ") and (message := json.loads(line[6:]))["msg"] == "process_completed":
                return dict(message)
    raise AssertionError("it did not end")
