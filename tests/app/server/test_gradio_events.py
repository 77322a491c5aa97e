"""Events of the page that are sent by hand and lack something end in a sentence, not in a traceback."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx
import pytest

from app.chat import VideoChat
from app.server.options import LaunchOptions
from llm_bridge.model import VideoLanguageModel
from tests.app.server.serving import running

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


def _queued(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """What an event in the queue ended in."""
    assert client.post("queue/join", json=body).status_code == 200
    with client.stream("GET", "queue/data", params={"session_hash": body["session_hash"]}) as events:
        for line in events.iter_lines():
            if line.startswith("data: ") and (message := json.loads(line[6:]))["msg"] == "process_completed":
                return dict(message)
    raise AssertionError("it did not end")
