"""One lock for all doors: who may come in, from where, how often, and what they find there."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from app.chat import VideoChat
from app.server.errors import ApiError
from app.server.launch import make_app
from app.server.options import LaunchOptions
from app.server.security.access_control import OPEN, AccessControl
from app.server.security.api_keys import KeyRing, read_keys
from app.server.security.authentication import Authenticator, Credentials
from app.server.security.login import FREE_ATTEMPTS, LoginThrottle, SessionCookies
from encoder.errors import ConfigError
from llm_bridge.model import VideoLanguageModel
from tests.app.server.serving import running, upload
from tests.encoder.video import video_files as vf

LOGIN = ("ann", "secret")
HTML = {"Accept": "text/html,*/*"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Says who the guard says asks."""
    await JSONResponse([scope.get("fluxchat.client"), scope.get("fluxchat.name")])(scope, receive, send)


def behind(credentials: Credentials, app: Any = echo, **options: Any) -> httpx.AsyncClient:
    """A client of an application behind the guard."""
    guard = AccessControl(app, Authenticator(credentials), options.pop("hosts", None), **options)
    return httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://localhost")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two keys, one of them hashed."""
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    hashed = hashlib.sha256(b"bobs-key").hexdigest()
    path.write_text(f"# who may ask\nann anns-key metrics\nbob sha256:{hashed} rate=5000 quota=100000\n")
    return path


@pytest.fixture(scope="module")
def locked(tiny_model: VideoLanguageModel, keys: Path) -> Iterator[str]:
    """A server with its page, behind a login and two keys."""
    options = LaunchOptions(credentials=Credentials(None, LOGIN, keys), examples=[])
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as (address, _):
        yield address


# -- every door ---------------------------------------------------------------------------------------------


def paths(app: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(method, path) of all that an application serves, mounted ones included."""
    for route in app.routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from paths(included, prefix)
        inner = getattr(route, "app", None)
        for _ in range(4):
            inner = getattr(inner, "_app", inner)
        if hasattr(inner, "routes") and inner is not app:
            yield from paths(inner, prefix)
        path = re.sub(r"\{[^}]*\}", "x", getattr(route, "path", ""))
        for method in getattr(route, "methods", None) or ():
            yield method, prefix + path


def test_every_route_but_the_open_ones_needs_credentials(
    locked: str, tiny_model: VideoLanguageModel, keys: Path
) -> None:
    with VideoChat(tiny_model) as chat:
        app = make_app(chat, LaunchOptions(credentials=Credentials("k"), examples=[]))
        doors = {(m, p) for m, p in paths(app) if m in ("GET", "POST", "DELETE", "PUT") and p.startswith("/")}
        app.state.api.close()
    assert ("POST", "/gradio_api/queue/join") in doors
    assert ("POST", "/v1/chat/completions") in doors
    doors |= {("GET", path) for path in ("/docs", "/openapi.json", "/nothing", "//v1/models", "/login/x")}

    def knock(door: tuple[str, str]) -> None:
        method, path = door
        for headers in ({}, bearer("wrong" + path)):
            asked = {**headers, "X-Forwarded-For": f"1.2.3.{len(path)}"}
            found = httpx.request(method, f"{locked}{path}", headers=asked)
            assert found.status_code in (401, 429), (method, path, found.status_code)
            assert set(found.json()) == {"error"}

    with ThreadPoolExecutor(8) as pool:  # a wrong key waits for its answer
        list(pool.map(knock, sorted(door for door in doors if door[1] not in OPEN)))


def test_each_key_and_the_login_open_every_route(locked: str) -> None:
    basic = base64.b64encode(b"anybody:anns-key").decode()
    for headers in (bearer("anns-key"), bearer("bobs-key"), {"Authorization": f"Basic {basic}"}):
        for path in ("/v1/models", "/config", "/"):
            assert httpx.get(f"{locked}{path}", headers=headers).status_code == 200
    assert httpx.get(f"{locked}/v1/models", auth=LOGIN).status_code == 200
    assert httpx.get(f"{locked}/healthz").status_code == 200


def test_metrics_need_a_key_with_that_right(locked: str) -> None:
    assert httpx.get(f"{locked}/metrics", auth=LOGIN).status_code == 200
    told = httpx.get(f"{locked}/metrics", headers=bearer("anns-key"))
    assert told.status_code == 200
    assert "anns-key" not in told.text
    for path in ("/metrics", "/metrics/"):
        refused = httpx.get(f"{locked}{path}", headers=bearer("bobs-key"))
        assert refused.status_code == 403
        assert "fluxchat_" not in refused.text


@pytest.mark.parametrize(("user", "password"), [LOGIN, ("whoever", "bobs-key")])
def test_a_browser_logs_in_and_out(locked: str, user: str, password: str) -> None:
    with httpx.Client(base_url=locked, headers=HTML) as browser:
        sent = browser.get("/?a=b")
        assert (sent.status_code, sent.headers["location"]) == (303, "/login?next=/")
        form = browser.get(sent.headers["location"])
        assert form.status_code == 200
        assert 'type="password"' in form.text
        wrong = browser.post("/login", data={"username": user, "password": "no"})
        assert wrong.status_code == 401
        assert "not right" in wrong.text
        entered = browser.post("/login?next=/config", data={"username": user, "password": password})
        assert (entered.status_code, entered.headers["location"]) == (303, "/config")
        assert "HttpOnly" in entered.headers["set-cookie"]
        assert "SameSite=Lax" in entered.headers["set-cookie"]
        assert browser.get("/config").json()["username"] == ("ann" if user == "ann" else "bob")
        assert browser.get("/logout").status_code == 303
        assert browser.get("/config").status_code == 303


@pytest.mark.parametrize(
    "target", ["//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nX: y"]
)
def test_login_redirects_to_this_server_only(locked: str, target: str) -> None:
    entered = httpx.post(
        f"{locked}/login",
        params={"next": target},
        data={"username": LOGIN[0], "password": LOGIN[1]},
        headers=HTML,
    )
    assert entered.headers["location"] == "/"


def test_gradios_client_logs_in(locked: str, tmp_path: Path) -> None:
    video = vf.write(tmp_path / "v.mp4", vf.steady(10))
    client = Client(locked, auth=LOGIN, verbose=False, download_files=tmp_path)
    assert (
        client.predict(handle_file(str(video)), "What?", "16", api_name="/ask")[1]["usage"]["kept_tokens"]
        == 16
    )
    client.close()


# -- other sites --------------------------------------------------------------------------------------------

FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:1"},
    {"Origin": "http://["},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
]


@pytest.mark.anyio
@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/form-data; boundary=x"])
async def test_cross_site_requests_are_refused(headers: dict[str, str], kind: str) -> None:
    async with behind(Credentials()) as client:
        for path in ("/", "/v1/files", "/gradio_api/upload", "/gradio_api/cancel", "/healthz", "/login"):
            sent = await client.post(path, content=b"x", headers={**headers, "Content-Type": kind})
            assert sent.status_code == 403
            assert sent.json()["error"]["code"] == "wrong_origin"


@pytest.mark.anyio
async def test_same_origin_requests_and_links_are_admitted() -> None:
    async with behind(Credentials()) as client:
        own = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
        assert (await client.post("/v1/files", headers=own)).status_code == 200
        assert (await client.post("/v1/files", headers={"Origin": "http://localhost:80"})).status_code == 200
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert (await client.get("/", headers=link)).status_code == 200
        # What computes or tells is no link.
        for path in ("/v1/models", "/gradio_api/queue/data"):
            assert (await client.get(path, headers=link)).status_code == 403


@pytest.mark.anyio
async def test_the_host_header_is_checked_on_every_path() -> None:
    async with behind(Credentials(), hosts=["localhost"]) as client:
        for path in ("/", "/healthz", "/login", "/gradio_api/upload"):
            found = await client.post(path, headers={"Host": "evil.example"})
            assert (found.status_code, found.json()["error"]["code"]) == (403, "wrong_host")


@pytest.mark.anyio
async def test_websockets_need_credentials_too() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    guard = AccessControl(echo, Authenticator(Credentials("k")), None)
    scope = {"type": "websocket", "path": "/gradio_api/ws", "headers": [], "query_string": b""}
    await guard(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.anyio
async def test_exceptions_of_the_application_are_json_errors() -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    async with behind(Credentials(), fail) as client:
        found = await client.get("/x")
    assert found.status_code == 500
    assert "secret" not in found.text
    async with behind(Credentials(), closing=lambda: True) as client:
        found = await client.post("/gradio_api/queue/join")
    assert (found.status_code, found.json()["error"]["code"]) == (503, "shutting_down")


# -- who is who ---------------------------------------------------------------------------------------------


def state(connection: str) -> dict[str, Any]:
    return {"fluxchat.connection": connection}


def test_client_ids_are_unguessable_and_distinct() -> None:
    from starlette.datastructures import Headers

    lock = Authenticator(Credentials("k", LOGIN))
    key = lock.client(Headers(bearer("k")), "1", "c1")
    again = lock.client(Headers(bearer("k")), "2", "c2")
    login = lock.client(Headers({"Authorization": httpx.BasicAuth(*LOGIN)._auth_header}), "1", "c1")
    other = Authenticator(Credentials("k")).client(Headers(bearer("k")), "1", "c1")
    assert key is not None
    assert login is not None
    assert key == again
    assert len({key.id, login.id, other.id if other else ""}) == 3
    assert min(len(key.id), len(login.id)) >= 32

    free = Authenticator(Credentials())
    one, same, two = (free.client(Headers({}), "1", name) for name in ("c1", "c1", "c2"))
    assert one == same
    assert one != two
    # Behind a proxy a connection is nobody's in particular.
    forwarded = [free.client(Headers({"X-Forwarded-For": "9.9.9.9"}), "1", "c1") for _ in range(2)]
    assert forwarded[0] != forwarded[1]


def test_caches_are_not_shared_between_clients(tiny_model: VideoLanguageModel) -> None:
    with (
        VideoChat(tiny_model, trusted=False) as chat,
        running(chat) as (address, _),
        httpx.Client(base_url=address) as first,
        httpx.Client(base_url=address) as second,
    ):
        turns = ["The PIN is 4719. " * 4, "Good.", "What is it?"]
        roles = ("user", "assistant", "user")
        asked = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]

        def cached(client: httpx.Client, count: int) -> int:
            body = {"max_tokens": 1, "user": "u", "messages": asked[:count]}
            usage = client.post("/v1/chat/completions", json=body).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        cached(first, 1)
        assert cached(first, 3) > 16
        assert cached(second, 3) == 0


def test_a_visitor_is_recognised_on_the_next_connection(tiny_model: VideoLanguageModel) -> None:
    """OpenAI's clients close the connection after each streamed answer."""
    turns = ["The PIN is 4719. " * 4, "Good.", "What is it?"]
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant", "user"), turns, strict=True)
    ]
    with VideoChat(tiny_model, trusted=False) as chat, running(chat) as (address, _):

        def sent(
            asked: list[Any], cookies: Any = None, headers: dict[str, str] | None = None
        ) -> tuple[int, httpx.Response]:
            answer = httpx.post(
                f"{address}/v1/chat/completions",
                json={"max_tokens": 1, "messages": asked},
                cookies=cookies,
                headers=headers,
            )
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]), answer

        _, first = sent(messages[:1])
        (name,) = first.cookies
        again, second = sent(messages, first.cookies)
        assert again > 16
        assert not second.cookies
        assert sent(messages)[0] == 0
        assert sent(messages, {name: "made-up"})[0] == 0
        # Behind a proxy, where a connection is nobody's, it holds as well.
        forwarded = {"X-Forwarded-For": "9.9.9.9"}
        assert sent(messages, headers=forwarded)[0] == 0
        assert sent(messages, first.cookies, forwarded)[0] > 16


def test_files_and_sessions_are_accessible_to_their_owners_only(locked: str, tmp_path: Path) -> None:
    video = vf.write(tmp_path / "v.mp4", vf.steady(10))
    file = upload(locked, video, **bearer("anns-key"))
    for key, status in (("anns-key", 200), ("bobs-key", 404)):
        assert httpx.get(f"{locked}/v1/files/{file}", headers=bearer(key)).status_code == status
    assert httpx.delete(f"{locked}/v1/files/{file}", headers=bearer("bobs-key")).status_code == 404
    body = {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": file}}]}]}
    body["messages"][0]["content"].append({"type": "text", "text": "What?"})  # type: ignore[attr-defined]
    for key, status in (("bobs-key", 404), ("anns-key", 200)):
        sent = httpx.post(f"{locked}/v1/chat/completions", json=body, headers=bearer(key))
        assert sent.status_code == status

    files = {"files": ("v.mp4", video.read_bytes())}
    [path] = httpx.post(f"{locked}/gradio_api/upload", files=files, headers=bearer("anns-key")).json()
    named = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for key, status in (("bobs-key", 404), ("anns-key", 200)):
        got = httpx.get(f"{locked}/gradio_api/file={path}", headers=bearer(key))
        assert got.status_code == status
        for data in (named, {"path": f"{locked}/gradio_api/file={path}"}, {"x": path + "/../v.mp4"}, [path]):
            sent = httpx.post(
                f"{locked}/gradio_api/call/estimate", json={"data": [data, "16"]}, headers=bearer(key)
            )
            assert sent.status_code == status or (status == 200 and sent.status_code in (200, 404)), data

    join = {"data": [], "fn_index": 0, "event_id": "x", "session_hash": "a-session"}
    mine = httpx.post(f"{locked}/gradio_api/reset", json=join, headers=bearer("anns-key"))
    assert mine.status_code == 200
    theirs = bearer("bobs-key")
    for path in ("/gradio_api/heartbeat/a-session", "/gradio_api/queue/data?session_hash=a-session"):
        assert httpx.get(f"{locked}{path}", headers=theirs).status_code == 404
    for path in ("queue/join", "cancel", "reset", "run/predict"):
        assert httpx.post(f"{locked}/gradio_api/{path}", json=join, headers=theirs).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/file=http://127.0.0.1:1/x",
        "/gradio_api/process_recording",
        "/gradio_api/component_server",
        "/gradio_api/vibe-code",
        "/gradio_api/stream/x",
        "/gradio_api/deep_link?session_hash=x",
        "/gradio_api/dev/reload",
        "/monitoring",
        "/gradio_api/run-history/buckets",
    ],
)
def test_gradio_routes_that_the_page_does_not_need_are_404(locked: str, path: str) -> None:
    for method in ("GET", "POST"):
        found = httpx.request(method, f"{locked}{path}", headers=bearer("anns-key"))
        assert found.status_code == 404


# -- keys ---------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when told to."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_rate_and_quota(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock(10 * 86400.0)
    path.write_text("ann anns-key rate=2 quota=4\nbob bobs-key\n")
    ring = KeyRing(file=path, clock=clock)
    ann, bob = ring.find("anns-key"), ring.find("bobs-key")
    assert ann is not None
    assert bob is not None
    assert ring.find("other") is None
    for _ in range(2):
        ring.spend(ann)
    with pytest.raises(ApiError, match="2 requests a minute") as refused:
        ring.spend(ann)
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "30")
    assert refused.value.body["error"]["code"] == "rate_limit_exceeded"
    clock.now += 60
    for _ in range(2):
        ring.spend(ann)
    clock.now += 60
    with pytest.raises(ApiError, match="4 requests a day"):
        ring.spend(ann)
    clock.now += 86400
    ring.spend(ann)
    for _ in range(100):
        ring.spend(bob)
    assert ring.requests() == {"ann": 5, "bob": 100}
    assert ring.refusals()["ann"] == 2


def test_a_changed_keys_file_is_reloaded_and_an_invalid_one_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text("ann anns-key\n")
    ring = KeyRing(file=path, clock=clock)
    path.write_text("ann anns-key\nbob bobs-key\n")
    clock.now += 10
    assert ring.find("bobs-key") is not None
    path.write_text("ann\n")
    clock.now += 10
    assert ring.find("bobs-key") is not None
    assert "Line 1" in caplog.text
    path.write_text("bob bobs-key\n")
    clock.now += 10
    assert ring.find("anns-key") is None
    assert ring.named("ann") is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("ann", 1),
        ("# x\n\nann key\nbob key rate=0", 4),
        ("ann key rate=fast", 1),
        ("ann key speed=3", 1),
        ("ann key rate=1 rate=2", 1),
        ("ann key\nann other", 2),
        ("ann key\nbob key", 2),
        ("an/n key", 1),
        ("ann sha256:abc", 1),
        ("ann key quota=-1", 1),
    ],
)
def test_a_wrong_file_of_keys_names_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^Line {line} of ") as error:
        read_keys(path)
    assert "\n" not in str(error.value)
    assert "key2" not in str(error.value)


def test_invalid_keys_files(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# nobody\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("empty", "binary", "missing", "."):
        with pytest.raises(ConfigError):
            read_keys(tmp_path / name)


@pytest.mark.anyio
async def test_past_the_rate_is_429_on_every_route(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("ann anns-key rate=1\n")
    async with behind(Credentials(keys_file=path)) as client:
        first, second = [
            await client.post(path, headers=bearer("anns-key"))
            for path in ("/v1/chat/completions", "/gradio_api/queue/join")
        ]
        assert first.status_code == 200
        assert first.json()[1] == "ann"
        assert (second.status_code, second.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(second.headers["Retry-After"]) >= 1
        assert (await client.get("/v1/models", headers=bearer("anns-key"))).status_code == 200


# -- guessing -----------------------------------------------------------------------------------------------


def test_wrong_guesses_slow_an_address_down() -> None:
    clock = Clock()
    failures = LoginThrottle(clock)
    waits = []
    for count in range(12):
        try:
            failures.check("1.1.1.1")
        except ApiError as error:
            waits.append(int(error.headers["Retry-After"]))
            clock.now += waits[-1]
            failures.check("1.1.1.1")
        failures.add("1.1.1.1")
        assert count >= FREE_ATTEMPTS or not waits
    assert waits == [1, 2, 4, 8, 16, 32, 60]
    failures.check("2.2.2.2")


@pytest.mark.anyio
async def test_a_right_key_does_not_end_the_wait() -> None:
    async with behind(Credentials("k")) as client:
        for _ in range(FREE_ATTEMPTS):
            assert (await client.get("/v1/models", headers=bearer("x"))).status_code == 401
        assert (await client.get("/v1/models", headers=bearer("k"))).status_code == 429
        assert (await client.post("/login", data={"password": "k"})).status_code == 429


def test_cookies_expire_and_are_revoked() -> None:
    clock = Clock()
    cookies = SessionCookies(clock)
    value = cookies.issue("login ann")
    assert cookies.subject(value) == "login ann"
    assert cookies.subject(value[:-1]) is None
    cookies.revoke(value)
    assert cookies.subject(value) is None
    late = cookies.issue("login ann")
    clock.now += 8 * 86400
    assert cookies.subject(late) is None
    assert value not in json.dumps(str(vars(cookies)))


def test_an_api_key_needs_no_cookie(locked: str) -> None:
    sent = httpx.post(
        f"{locked}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "What?"}], "max_tokens": 2},
        headers=bearer("bobs-key"),
    )
    assert sent.status_code == 200
    assert (
        'fluxchat_key_requests_total{key="bob"}'
        in httpx.get(f"{locked}/metrics", headers=bearer("anns-key")).text
    )
