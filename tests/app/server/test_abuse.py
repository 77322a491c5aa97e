"""Requests meant to exhaust the server or to learn of other clients: each is refused with an error."""

from __future__ import annotations

import difflib
import io
import os
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from fastapi import Request

from app.chat import VideoChat
from app.page.handlers import MAX_TURNS, Handlers
from app.page.sessions import Sessions, Turn
from app.server.chat_request import MAX_COMPARED, longest_text, parse_chat
from app.server.errors import ApiError
from app.server.gradio_mount import MAX_NAMED_FILES, PATH_LENGTH, GradioAccess, PageUploads
from app.server.limits import BodyClock, ConnectionLimits
from app.server.media import store as media
from app.server.media.store import MediaStore
from app.server.request_body import decode_json
from app.server.security.authentication import ANONYMOUS
from llm_bridge.model import VideoLanguageModel
from tests.app.server.serving import running


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def store() -> Any:
    store = MediaStore()
    yield store
    store.close()


# -- time ---------------------------------------------------------------------------------------------------


def test_a_huge_field_name_is_not_copied_for_each_nested_value() -> None:
    long = b'{"' + b"k" * 2**22 + b'": [' + b"0," * 90_000 + b"%s]}"
    assert len(decode_json(long % b"0")) == 1
    with pytest.raises(ApiError) as caught:
        decode_json(long % rb'"\ud800"')
    assert caught.value.body["error"]["param"] == "k" * 80 + "[90000]"


def test_few_of_many_unknown_fields_are_compared_with_known_ones() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], **{f"x{n}": 0 for n in range(5000)}}
    with (
        mock.patch.object(difflib, "get_close_matches", wraps=difflib.get_close_matches) as compared,
        pytest.raises(ApiError, match="x0"),
    ):
        parse_chat(body)
    assert compared.call_count <= MAX_COMPARED + 1


def test_overlong_paths_are_not_resolved(store: MediaStore, tmp_path: Path) -> None:
    door = GradioAccess(mock.Mock(), mock.Mock(), store, tmp_path, (), mcp=False)
    with mock.patch.object(os.path, "realpath", wraps=os.path.realpath) as resolved:
        for path in ("/a" * PATH_LENGTH, "http://localhost/gradio_api/file=" + "/a" * PATH_LENGTH):
            with pytest.raises(ApiError) as caught:
                door.check_body({"data": [{"path": path}]}, "me")
            assert caught.value.status == 404
    assert not resolved.called


def test_a_request_names_a_limited_number_of_files(store: MediaStore, tmp_path: Path) -> None:
    door = GradioAccess(mock.Mock(), mock.Mock(), store, tmp_path, (), mcp=False)
    mine = store.add(io.BytesIO(b"x"), "a.mp4", "me", page=tmp_path)
    door.check_body({"path": [mine.path] * MAX_NAMED_FILES}, "me")
    with pytest.raises(ApiError, match="files"):
        door.check_body({"path": [mine.path] * (MAX_NAMED_FILES + 1)}, "me")


def test_a_fast_start_of_a_body_does_not_pay_for_drops() -> None:
    """16 MiB at once, then a byte now and then: a thousand seconds by the average, ten by the clock."""
    clock = BodyClock(ConnectionLimits(body_s=10, body_rate=16 * 1024))
    clock.start(0.0)
    clock.received(0.0, 2**24)
    for now in (3.0, 6.0, 9.0):
        clock.received(now, 1)
        assert not clock.overdue(now)
    clock.received(11.0, 1)
    assert clock.overdue(11.0)
    clock.pause(15.0)
    assert not clock.overdue(14.0)


# -- room ---------------------------------------------------------------------------------------------------


def test_files_are_counted_whatever_their_size(
    store: MediaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "MAX_FILES", 3)
    for _ in range(3):
        store.add(io.BytesIO(b""), "a.mp4", page=tmp_path)
    with pytest.raises(ApiError) as caught:
        store.add(io.BytesIO(b""), "a.mp4", page=tmp_path)
    assert caught.value.body["error"]["code"] == "storage_full"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_conversation_does_not_keep_overlong_questions(tiny_model: VideoLanguageModel) -> None:
    with VideoChat(tiny_model, trusted=False) as chat:
        sessions = Sessions(chat.forget)
        session = sessions.get("a")
        handlers = Handlers(chat, sessions)
        assert handlers.begin(session, "why " * longest_text(chat))
        assert "too long" in session.turns[-1].error
        assert len(session.turns[-1].question) < 1000
        session.turns = [Turn(str(n), error="x") for n in range(500)]
        assert handlers.begin(session, "last")
        assert len(session.turns) == MAX_TURNS
        assert session.turns[-1].question == "last"
        assert not session.turns[-1].done
        sessions.close_all()


# -- others -------------------------------------------------------------------------------------------------


def test_equal_data_of_two_clients_is_stored_twice(store: MediaStore) -> None:
    first, other = store.add_bytes(b"x" * 100, "ann"), store.add_bytes(b"x" * 100, "bob")
    assert first.path != other.path
    assert store.size == (2, 200)
    assert store.add_bytes(b"x" * 100, "ann") is first


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("ours", "query", "theirs", "heard"),
    [
        ("ann", "upload_id=a1", "ann", True),
        ("ann", "upload_id=a1", "bob", False),
        (f"{ANONYMOUS}1", "upload_id=a1", f"{ANONYMOUS}2", True),
        (f"{ANONYMOUS}1", "", f"{ANONYMOUS}2", False),
    ],
)
async def test_upload_progress_is_visible_to_its_owner_only(
    store: MediaStore, tmp_path: Path, ours: str, query: str, theirs: str, heard: bool
) -> None:
    uploads = PageUploads(store, tmp_path, 1000)

    def request(client: str, **more: Any) -> Request:
        scope = {"type": "http", "headers": [], "query_string": query.encode(), "fluxchat.client": client}
        return Request({**scope, **more})

    with pytest.raises(ApiError, match="multipart"):
        await uploads.upload(request(ours))
    with mock.patch("app.server.gradio_mount.asyncio.sleep"):
        if heard:
            assert (await uploads.progress(request(theirs))).status_code == 200
            return
        with pytest.raises(ApiError, match="no such upload"):
            await uploads.progress(request(theirs))


def test_connect_is_refused(tiny_model: VideoLanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    with VideoChat(tiny_model, trusted=False) as chat, running(chat) as (address, _):
        url = httpx.URL(address)
        with socket.create_connection((url.host, url.port), 10) as connection:
            connection.sendall(b"CONNECT /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 405 " in connection.recv(65536)
        assert httpx.get(f"{address}/healthz").status_code == 200
    assert not caplog.records
