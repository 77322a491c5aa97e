"""Limits: slow clients, connections, request bodies, stored files, and the end of the process."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from app.chat import VideoChat
from app.page.handlers import Handlers
from app.page.sessions import Sessions
from app.server.chat_request import check_text, longest_text
from app.server.errors import ApiError
from app.server.launch import bind
from app.server.limits import BodyLimits, ConnectionLimits, Connections
from app.server.media.store import MediaStore
from app.server.media.uploads import file_name
from app.server.options import LaunchOptions
from app.server.request_body import read_json
from app.server.routes import Api, ServerSettings
from app.server.security.access_control import AccessControl
from app.server.security.authentication import Authenticator, Credentials
from llm_bridge.model import VideoLanguageModel
from tests.app.conftest import SHORT
from tests.app.server.serving import ask, running
from tests.encoder.video import video_files as vf
from tests.patience import PATIENCE_S

Serving = tuple[str, Api]
PARTS = 250_000  # more than a body may have
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def connect(address: str) -> socket.socket:
    """A connection to a server."""
    return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=PATIENCE_S)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    got = b""
    try:
        while block := connection.recv(65536):
            got += block
    except ConnectionResetError:
        pass
    connection.close()
    return got


# -- connections --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(tiny_model: VideoLanguageModel) -> Iterator[Serving]:
    """A server with no patience and little room."""
    limits = ConnectionLimits(total=20, head_s=0.3, body_s=0.3, send_s=0.3, send_rate=2**30)
    options = LaunchOptions(page=False, connections=limits)
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as pair:
        yield pair


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b"408"),
        (b"POST /v1", b"408"),
        (HEAD + b"X-A: ", b"408"),
        (HEAD + b"Content-Length: 100\r\n\r\n{", b"408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"408"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /healthz HT", b"200"),
    ],
)
def test_incomplete_requests_time_out(impatient: Serving, sent: bytes, status: bytes) -> None:
    connection = connect(impatient[0])
    connection.sendall(sent)
    reply = rest(connection)  # ends: the server closes it
    assert reply.split(b" ")[1] == status
    if status == b"408":
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_a_dripping_body_times_out(impatient: Serving) -> None:
    connection = connect(impatient[0])
    connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.05):
            try:
                connection.sendall(b" ")
            except OSError:
                return

    thread = threading.Thread(target=drip)
    thread.start()
    reply = rest(connection)
    stop.set()
    thread.join()
    assert reply == b"" or b" 408 " in reply


def test_a_client_that_reads_nothing_is_disconnected() -> None:
    done = threading.Event()

    async def much(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})
        done.set()

    connections = Connections(ConnectionLimits(send_s=0.2, send_rate=2**40))

    class Swept(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            connections.sweep()
            return await super().on_tick(counter)

    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(much, http=connections.protocol, lifespan="off", log_level="critical")  # type: ignore[arg-type]
    server = Swept(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    connection = connect(f"http://127.0.0.1:{listener.getsockname()[1]}")
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert done.wait(PATIENCE_S)  # what is sent to who is gone goes nowhere
    assert len(connections) == 0
    server.should_exit = True
    thread.join()
    connection.close()


def test_health_is_answered_beyond_the_connection_limit(impatient: Serving) -> None:
    held = [connect(impatient[0]) for _ in range(40)]
    for connection in held:
        try:
            connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        except OSError:
            continue
    assert httpx.get(f"{impatient[0]}/healthz").status_code == 200
    for connection in held:
        connection.close()


def test_busy_connections_are_not_closed_for_new_ones(tiny_model: VideoLanguageModel) -> None:
    options = LaunchOptions(page=False, connections=ConnectionLimits(total=4))
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as (address, server):
        busy = []
        for _ in range(4):
            connection = connect(address)
            connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n")
            assert b" 100 " in connection.recv(1000)  # its request is being read
            busy.append(connection)
        # Beyond the limit with nobody idle: /healthz and a word to everybody else.
        assert httpx.get(f"{address}/healthz").status_code == 200
        found = httpx.get(f"{address}/v1/models")
        assert (found.status_code, found.json()["error"]["code"]) == (503, "too_many_connections")
        for connection in busy:
            connection.close()
        assert server is not None


class Held:
    """A connection as `Connections` sees it."""

    def __init__(self, since: float, waiting: bool = True) -> None:
        self.waiting_since, self.waiting, self.ended = since, waiting, False

    def end(self, _: object) -> None:
        self.ended = True


def test_the_longest_idle_connection_of_the_same_address_is_closed_first() -> None:
    connections = Connections(ConnectionLimits(total=6, per_address=2), proxies=["9.9.9.9"])

    def come(held: Held, address: str) -> Any:
        return connections.add(held, address)  # type: ignore[arg-type]

    old, first, second, third = Held(0), Held(1), Held(2), Held(3)
    for held, address in ((old, "1.1.1.1"), (first, "2.2.2.2"), (second, "2.2.2.2"), (third, "2.2.2.2")):
        assert come(held, address)
    assert [held.ended for held in (old, first, second, third)] == [False, True, False, False]
    connections.remove(first)  # type: ignore[arg-type]
    second.waiting = third.waiting = False
    refused = Held(4)
    assert not come(refused, "2.2.2.2")
    connections.remove(refused)  # type: ignore[arg-type]
    # A proxy's and this machine's own are limited together with all others only.
    assert all(come(Held(5, waiting=False), "9.9.9.9") for _ in range(3))
    assert not connections.full()
    assert come(Held(6, waiting=False), "127.0.0.1")
    assert old.ended
    assert connections.full()


# -- bodies -------------------------------------------------------------------------------------------------


async def reads(scope: Any, receive: Any, send: Any) -> None:
    """Reads a JSON body; answers when told to go on."""
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    body = await read_json(Request(scope, receive), 64 << 20)
    go = scope.get("fluxchat.go")
    if go is not None:
        await go.wait()
    await JSONResponse(len(body))(scope, receive, send)


@pytest.mark.anyio
async def test_bodies_are_bounded_together_until_they_are_answered() -> None:
    import asyncio

    go, arrived = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def told() -> Any:
            message = await receive()
            if not message.get("more_body"):
                arrived.set()
            return message

        await reads({**scope, "fluxchat.go": go}, told, send)

    bodies = BodyLimits(app, limit=8 << 20, uploads=1)
    guard = AccessControl(bodies, Authenticator(Credentials()), None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://x") as client:
        large, small = [" " * (4 << 20)], ["x"]
        first = asyncio.ensure_future(client.post("/v1/chat/completions", json=large))
        await arrived.wait()
        refused = await client.post("/v1/chat/completions", json=large)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert "Retry-After" in refused.headers

        async def unsaid() -> Any:
            for _ in range(8):
                yield b" " * (1 << 20)

        headers = {"Content-Type": "application/json"}
        refused = await client.post("/v1/chat/completions", content=unsaid(), headers=headers)
        assert refused.status_code == 503
        second = asyncio.ensure_future(client.post("/v1/chat/completions", json=small))
        go.set()
        assert [(await first).json(), (await second).json()] == [1, 1]
        assert (await client.post("/v1/chat/completions", json=large)).json() == 1
    assert bodies.large.used == bodies.small.used == bodies.uploads.used == 0


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b"[" + b"[]," * (PARTS + 1) + b"[]]",
        b"[" + b"1," * (PARTS + 1) + b"1]",
        b'{"messages": ' + b"9" * 100_000 + b"}",
        b'{"a":' * 50_000,
        b"{" + b"".join(b'"%d":0,' % n for n in range(PARTS)) + b'"x":0}',
    ],
    ids=["depth", "lists", "numbers", "digits", "objects", "keys"],
)
def test_json_bombs_are_400(impatient: Serving, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    sent = httpx.post(f"{impatient[0]}/v1/chat/completions", content=body, headers=headers)
    assert sent.status_code == 400
    assert sent.json()["error"]["type"] == "invalid_request_error"


def test_text_is_measured_before_it_is_tokenised(impatient: Serving, chat: VideoChat) -> None:
    limit = longest_text(chat)
    texts: list[Any] = [
        "word " * (limit // 5 + 1),
        [{"type": "text", "text": "x" * (limit // 2 + 1)}] * 2,
        ["y" * (limit + 1)],
    ]
    for content in texts:
        body = {"messages": [{"role": "user", "content": content}]}
        with pytest.raises(ApiError, match="at most"):
            check_text(body, limit)
    for odd in (None, [], {"messages": 3}, {"messages": [3, None, {"content": 3}]}):
        check_text(odd, limit)
    sent = ask(impatient[0], texts[0])
    assert (sent.status_code, sent.json()["error"]["code"]) == (400, "context_length_exceeded")


# -- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[MediaStore]:
    made = MediaStore(limit_bytes=1000)
    yield made
    made.close()


def leftovers(store: MediaStore) -> list[str]:
    return os.listdir(store.folder)


def test_incoming_bytes_count_until_the_upload_is_aborted(store: MediaStore) -> None:
    coming = store.receive("a")
    coming.write(b"x" * 900)
    with pytest.raises(ApiError, match="store of files is full"):
        store.add_bytes(b"y" * 200)
    coming.drop()
    coming.drop()
    assert leftovers(store) == []
    assert store.size == (0, 0)
    store.add_bytes(b"y" * 1000)


def test_a_full_disk_is_507(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    coming = store.receive("a")

    def full(_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Disk(io.RawIOBase):
        write = staticmethod(full)  # type: ignore[assignment]

    monkeypatch.setattr(coming, "_file", Disk())
    with pytest.raises(ApiError, match="disk is full") as error:
        coming.write(b"x")
    coming.drop()
    assert error.value.status == 507
    assert (leftovers(store), store.size) == ([], (0, 0))


def test_a_file_in_use_stays_and_counts(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = store.add(io.BytesIO(b"x" * 800), "a", page=store.folder)
    assert store.hold(stored.path)
    monkeypatch.setattr(store, "keep_s", 0.0)
    store.sweep()
    store.delete(stored.id)
    assert Path(stored.path).exists()
    with pytest.raises(ApiError):
        store.add_bytes(b"y" * 300)
    assert store.release(stored.path)
    assert not Path(stored.path).parent.exists()
    store.add_bytes(b"y" * 300)


def test_page_uploads_without_a_session_are_swept_soon(
    store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.server.media.store.PAGE_KEEP_S", 0.0)
    named = store.add(io.BytesIO(b"1"), "a")
    page = store.add(io.BytesIO(b"2"), "b", page=store.folder)
    store.sweep()
    assert store.find(named.id) is named
    assert not Path(page.path).exists()


def test_files_are_accessible_to_their_client(store: MediaStore) -> None:
    mine = store.add(io.BytesIO(b"1"), "a", "key-1")
    shared = store.add(io.BytesIO(b"2"), "b", "anonymous-1")
    for client, file, found in (
        ("key-1", mine, True),
        ("key-2", mine, False),
        ("", mine, False),
        ("anonymous-2", mine, False),
        ("anonymous-2", shared, True),
        ("key-1", shared, False),
    ):
        assert store.touch(file.path, client) is found
        if not found:
            with pytest.raises(ApiError):
                store.delete(file.id, client)
    assert store.files("key-1") == [mine]
    assert store.files("anonymous-2") == []


def test_a_session_keeps_its_videos_until_it_ends(
    chat: VideoChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MediaStore(keep_s=0.0)
    sessions = Sessions(chat.forget, uploads=tmp_path, store=store)
    handlers = Handlers(chat, sessions)
    first, second = sessions.get("first"), sessions.get("second")
    with SHORT.open("rb") as file:
        path = store.add(file, "clip.mp4", page=tmp_path).path
    for session in (first, second):
        assert handlers.add(session, [path]) == ""
    store.sweep()
    sessions.close("first")
    assert Path(path).exists()
    sessions.remove(second, second.media[0].path)
    assert not Path(path).exists()
    assert handlers.add_copy(second, str(SHORT)) == ""
    assert store.size[0] == 1
    monkeypatch.setattr(store, "limit_bytes", 10)
    assert "full" in handlers.add_copy(second, str(SHORT))
    with pytest.raises(ApiError):
        store.add(io.BytesIO(b"x" * 100), "no-video.mp4", page=tmp_path)
    monkeypatch.setattr(store, "limit_bytes", 10**9)
    bad = store.add(io.BytesIO(b"x" * 100), "no-video.mp4", page=tmp_path)
    assert handlers.add(second, [bad.path]) != ""
    assert not Path(bad.path).exists()  # what was refused is not kept
    sessions.close_all()
    assert store.size == (0, 0)
    store.close()


@pytest.fixture(scope="module")
def small_store(tiny_model: VideoLanguageModel) -> Iterator[Serving]:
    """A server with its page and room for 2 MiB of files."""
    options = LaunchOptions(server=ServerSettings(upload_mib=1, store_mib=2, uploads=2), examples=[])
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as pair:
        yield pair


def test_api_and_page_share_one_store_limit(small_store: Serving, tmp_path: Path) -> None:
    address, server = small_store
    video = vf.write(tmp_path / "v.mp4", vf.steady(5)).read_bytes()
    page = [
        httpx.post(f"{address}/gradio_api/upload", files={"files": ("x", b"\0" * 2**20)}) for _ in range(3)
    ]
    assert [sent.status_code for sent in page] == [200, 200, 429]
    assert page[2].json()["error"]["code"] == "storage_full"
    assert httpx.post(f"{address}/v1/files", files={"file": ("v.mp4", video)}).status_code == 429
    for sent in page[:2]:
        [path] = sent.json()
        assert server.store.hold(path)
        assert server.store.release(path)  # deletes it
        assert not Path(path).parent.exists()
    assert httpx.post(f"{address}/v1/files", files={"file": ("v.mp4", video)}).status_code == 200


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/v1/files"])
def test_an_interrupted_upload_leaves_nothing(small_store: Serving, path: str) -> None:
    address, server = small_store
    before, folders = server.store.size, _folders(server)
    field = b"files" if "gradio" in path else b"file"
    part = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="x.mp4"\r\n\r\n' % field
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    connection = connect(address)
    connection.sendall(f"{head}Content-Length: 900000\r\n\r\n".encode() + part + b"x" * 600_000)
    while not server.store.incoming_bytes:  # until some of it is on the disk
        threading.Event().wait(0.01)
    connection.close()
    while server.store.incoming_bytes:
        threading.Event().wait(0.01)
    assert (server.store.size, _folders(server)) == (before, folders)
    # Said to be complete, and it is not.
    for body in (
        part + b"xyz",
        part[:30],
        b"",
        b"--b--\r\n",
        b"rubbish",
        part.replace(b"name", b"nom") + b"x\r\n--b--",
    ):
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        sent = httpx.post(f"{address}{path}", content=body, headers=headers)
        assert sent.status_code == 400, body
    assert (server.store.size, _folders(server), server.store.incoming_bytes) == (before, folders, 0)


def _folders(server: Api) -> set[str]:
    from gradio.utils import get_upload_folder

    page = Path(get_upload_folder())
    return {*os.listdir(server.store.folder), *(os.listdir(page) if page.is_dir() else ())}


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("clip.mp4", "clip.mp4"),
        ("../../etc/passwd", "passwd"),
        ("C:\\videos\\my clip (1).MP4", "my clip (1).MP4"),
        ("..", "file"),
        ("", "file"),
        ("a\r\nX: 1\0.mp4", "a__X_ 1_.mp4"),
        ("視頻.mp4", "視頻.mp4"),
        ("\ud800.mp4", "_.mp4"),
    ],
)
def test_names_of_files(sent: str, kept: str) -> None:
    assert file_name(sent) == kept
    assert len(file_name(sent * 300).encode()) <= 240


# -- the end ------------------------------------------------------------------------------------------------

STUCK = """
import sys, threading
from app.chat import VideoChat
from app.server.launch import bind, serve
from app.server.options import LaunchOptions
chat = VideoChat(sys.argv[1], trusted=False)

class Stuck:
    answer = None
    def stop(self): pass
    def on_thinking(self, _): pass
    def __iter__(self):
        print("stuck", flush=True)
        threading.Event().wait(100)  # as a thread in a library that knows no stopping
        yield "x"

chat.stream_messages = lambda *_, **__: Stuck()
with chat:
    serve(chat, LaunchOptions(page=False, port=0), bind("127.0.0.1", 0))
"""


@pytest.mark.slow
def test_a_second_signal_ends_it_whatever_its_threads_do(
    tiny_model: VideoLanguageModel, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "temp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", STUCK, str(tmp_path / "model")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "temp")},
    )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().split()[-1]
        with ThreadPoolExecutor(2) as pool:
            asked = pool.submit(ask, address, "What?")
            assert process.stdout.readline() == "stuck\n"
            process.send_signal(signal.SIGINT)
            while httpx.get(f"{address}/healthz").status_code != 503:
                continue
            late = httpx.post(f"{address}/v1/chat/completions", json={})
            assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 130
            reply = asked.result()
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
        assert list((tmp_path / "temp").glob("fluxchat-*")) == []
    finally:
        process.kill()
        process.wait()


def test_queued_requests_get_503_at_shutdown(tiny_model: VideoLanguageModel) -> None:
    options = LaunchOptions(page=False, server=ServerSettings(slots=1))
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as (address, server):
        go, inside = threading.Event(), threading.Event()

        def wait(*_: Any) -> None:
            inside.set()
            go.wait(PATIENCE_S)

        handle = chat.model.llm.model.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, address, "What?", max_tokens=3)
            assert inside.wait(PATIENCE_S)
            second = pool.submit(ask, address, "What?", max_tokens=3)
            while server.scheduler.waiting < 1:
                threading.Event().wait(0.01)
            _in_loop(server, server.scheduler.close)
            waiting = second.result()
            assert (waiting.status_code, waiting.json()["error"]["code"]) == (503, "shutting_down")
            _in_loop(server, server.scheduler.abandon)
            assert first.result().status_code == 503
            go.set()
        handle.remove()


def _in_loop(server: Api, call: Any) -> None:
    """Do it in the server's event loop, where it belongs."""
    job = next(iter(server.scheduler.jobs), None)
    assert job is not None
    job.loop.call_soon_threadsafe(call)
