"""Security of the running server: other files, other hosts, uploads, foreign origins, missing credentials."""

from __future__ import annotations

import base64
import http.server
import ipaddress
import random
import socket
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.chat import VideoChat
from app.server.chat_request import Reference
from app.server.errors import ApiError
from app.server.media import download as fetching
from app.server.media.download import download, is_public
from app.server.media.resolver import Resolver
from app.server.options import WEB_LIMITS, LaunchOptions
from app.server.routes import Api, ServerSettings
from app.server.security.authentication import Credentials
from encoder.video.reader import close_idle_workers
from llm_bridge.model import VideoLanguageModel
from tests import ROOT
from tests.app.server.serving import answer, ask, data_url, question, running, upload
from tests.encoder.video import video_files as vf
from tests.patience import PATIENCE_S, until

Serving = tuple[str, Api]
LOGIN = ("ann", "secret:with colon")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A media root with a video, links out of it, and secrets beside it."""
    outside = tmp_path_factory.mktemp("outside")
    root = outside / "root"
    (root / "sub").mkdir(parents=True)
    vf.write(root / "ok.mp4", vf.steady(10))
    vf.write(outside / "secret.mp4", vf.steady(10))
    vf.write((outside / "root-too").mkdir() or outside / "root-too" / "secret.mp4", vf.steady(10))
    (root / "link.mp4").symlink_to(outside / "secret.mp4")
    (root / "folder").symlink_to(outside)
    return root


@pytest.fixture(scope="module")
def shared(tiny_model: VideoLanguageModel, media: Path) -> Iterator[Serving]:
    """The server with its page, as strangers meet it; small limits."""
    settings = ServerSettings(media_root=media, upload_mib=1, body_mib=2)
    options = LaunchOptions(server=settings, examples=[])
    with VideoChat(tiny_model, trusted=False, limits=WEB_LIMITS) as chat, running(chat, options) as pair:
        yield pair


# -- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "file://evil.example/etc/passwd",
        "../secret.mp4",
        "sub/../../secret.mp4",
        "..%2fsecret.mp4",
        "file:../secret.mp4",
        "file:///%2e%2e/secret.mp4",
        "link.mp4",
        "folder/secret.mp4",
        "{outside}/secret.mp4",
        "{outside}/root-too/secret.mp4",
        "file://{outside}/secret.mp4",
        "sub",
        ".",
        "",
        "ok.mp4\0.png",
        "file:///ok.mp4%00",
        "/proc/self/environ",
        "~/.bashrc",
        "\\\\host\\share\\x.mp4",
        "x" * 5000,
        "file-" + "0" * 32,
        "file-../../etc/passwd",
        "ftp://example.com/x.mp4",
        "concat:ok.mp4|ok.mp4",
        "http://127.0.0.1/x.mp4",
        "rtsp://127.0.0.1/x",
    ],
)
def test_no_other_file_is_readable(shared: Serving, media: Path, url: str) -> None:
    response = ask(shared[0], "What?", url.replace("{outside}", str(media.parent)))
    assert response.status_code in (400, 404), response.text
    assert "root:" not in response.text
    assert str(media.parent) not in response.text


def test_the_root_itself_works(shared: Serving) -> None:
    assert answer(ask(shared[0], "What?", "ok.mp4", max_tokens=3)) is not None


def test_without_a_root_no_path_works(tmp_path: Path) -> None:
    from app.server.media.store import MediaStore

    path = vf.write(tmp_path / "v.mp4", vf.steady(5))
    store = MediaStore()
    named = [Reference(str(path))]
    with pytest.raises(ApiError, match="no such media"), Resolver(store).open(named):
        pass
    store.close()


@pytest.mark.parametrize(
    "name", ["../../etc/cron.d/x", "/etc/passwd", "..\\..\\x.mp4", "a\r\nX-Evil: 1.mp4", "x" * 900]
)
def test_a_file_name_is_only_a_name(shared: Serving, media: Path, name: str) -> None:
    content = (media / "ok.mp4").read_bytes()
    response = httpx.post(f"{shared[0]}/v1/files", files={"file": (name, content)})
    assert response.status_code == 200, response.text
    kept = shared[1].store.find(response.json()["id"])
    assert Path(kept.path).parent == Path(shared[1].store.folder)
    assert "/" not in response.json()["filename"]
    assert len(response.json()["filename"]) <= 200


@pytest.mark.parametrize(
    "path",
    [
        "/file=/etc/passwd",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/file={repo}/pyproject.toml",
        "/gradio_api/file={store}",
        "/static/../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/theme.css/../../etc/passwd",
    ],
)
def test_the_page_serves_no_files(shared: Serving, media: Path, path: str) -> None:
    upload(shared[0], media / "ok.mp4")
    kept = next(Path(shared[1].store.folder).iterdir())
    path = path.replace("{repo}", str(ROOT)).replace("{store}", str(kept))
    with socket.create_connection(("127.0.0.1", int(shared[0].rpartition(":")[2]))) as connection:
        # httpx would tidy the path up
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    status = int(reply.split(b" ")[1])
    assert status in (307, 400, 403, 404), reply[:200]
    assert b"root:" not in reply
    assert b"fluxchat" not in reply.lower() or status != 200


def test_a_page_upload_is_never_served_as_a_page(shared: Serving) -> None:
    html = b"<html><script>alert(1)</script></html>"
    sent = httpx.post(f"{shared[0]}/gradio_api/upload", files={"files": ("x.html", html, "text/html")})
    assert sent.status_code == 200
    got = httpx.get(f"{shared[0]}/gradio_api/file={sent.json()[0]}")
    if got.status_code == 200:
        assert "attachment" in got.headers["content-disposition"]
        assert "html" not in got.headers["content-type"]


def test_only_urls_of_uploads_resolve_to_files(shared: Serving, media: Path) -> None:
    """As MCP tools name media: they know URLs alone."""
    files = {"files": ("ok.mp4", (media / "ok.mp4").read_bytes())}
    upload = httpx.post(f"{shared[0]}/gradio_api/upload", files=files).json()[0]

    def events(url: str) -> str:
        data = [{"path": url, "meta": {"_type": "gradio.FileData"}}, "64"]
        sent = httpx.post(f"{shared[0]}/gradio_api/call/estimate", json={"data": data})
        if sent.status_code != 200:
            return sent.text
        event = sent.json()["event_id"]
        return httpx.get(f"{shared[0]}/gradio_api/call/estimate/{event}").text

    assert "event: complete" in events(f"{shared[0]}/gradio_api/file={upload}")
    for url in (
        f"{shared[0]}/gradio_api/file=/etc/passwd",
        f"{shared[0]}/gradio_api/file={upload}/../../../../etc/passwd",
        f"{shared[0]}/gradio_api/file={media / 'ok.mp4'}",
        f"{shared[0]}/metrics",
    ):
        assert "event: complete" not in events(url), url


def test_a_page_upload_is_bounded(shared: Serving) -> None:
    big = {"files": ("x.mp4", b"\0" * (2**20 + 2**16))}
    assert httpx.post(f"{shared[0]}/gradio_api/upload", files=big).status_code == 413


# -- uploads ------------------------------------------------------------------------------------------------


def test_html_is_not_a_video_whatever_its_headers_say(shared: Serving) -> None:
    files = {"file": ("clip.mp4", b"<html><script>alert(1)</script></html>", "video/mp4")}
    before = shared[1].store.size
    response = httpx.post(f"{shared[0]}/v1/files", files=files)
    assert response.status_code == 400
    assert "script" not in response.text
    assert shared[1].store.size == before


def test_an_oversized_upload_is_refused(shared: Serving) -> None:
    before = shared[1].store.size
    big = {"file": ("x.mp4", b"\0" * (2**20 + 1))}
    for files in (big, {"file": ("x.mp4", b"\0" * (3 * 2**20))}):
        response = httpx.post(f"{shared[0]}/v1/files", files=files)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
    assert shared[1].store.size == before


def test_a_body_without_length_is_bounded_too(shared: Serving) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 50 * 2**20:
            sent += 2**16
            yield b" " * 2**16

    headers = {"Content-Type": "application/json"}
    try:
        response = httpx.post(f"{shared[0]}/v1/chat/completions", content=endless(), headers=headers)
        assert response.status_code == 413
    except httpx.HTTPError:
        pass  # the connection was closed while it was still sending
    assert sent < 40 * 2**20


@pytest.mark.parametrize("length", ["99999999999", "-5", "1e3", "+10", "０"])
def test_wrong_content_lengths(shared: Serving, length: str) -> None:
    host, port = shared[0].removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(f"{head}Content-Length: {length}\r\n\r\n{{}}".encode())
        reply = connection.recv(65536)
    assert reply.split(b" ")[1] in (b"400", b"413")


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:video/mp4",
        "data:video/mp4,plain",
        "data:video/mp4;base64,",
        "data:video/mp4;base64,@@@@",
        "data:video/mp4;base64,AAA",
        "data:text/html;base64," + base64.b64encode(b"<html>" * 9).decode(),
        "data:video/mp4;base64," + "A" * (15 * 2**17),
    ],
    ids=lambda url: url[:30],
)
def test_data_urls_that_are_no_video(shared: Serving, url: str) -> None:
    assert ask(shared[0], "What?", url).status_code in (400, 413)


def test_a_wrong_duration_in_a_file_is_corrected(shared: Serving, tmp_path: Path) -> None:
    path = vf.lying_matroska(vf.write(tmp_path / "s.mkv", vf.steady(30)), tmp_path / "lie.mkv", 36_000)
    with path.open("rb") as file:
        response = httpx.post(f"{shared[0]}/v1/files", files={"file": file})
    assert response.json()["media"]["duration_s"] == pytest.approx(1.2, abs=0.05)


@pytest.mark.parametrize("excess", ["pixels", "codec", "duration"])
def test_files_beyond_the_decoding_limits(shared: Serving, tmp_path: Path, excess: str) -> None:
    if excess == "pixels":
        path = vf.huge(tmp_path / "huge.avi")
    elif excess == "duration":
        path = vf.write(tmp_path / "long.mkv", [0, 1800, 3700])
    else:
        vf.need_encoder("ffv1")
        path = vf.write(tmp_path / "ffv1.mkv", vf.steady(5), encoder="ffv1")
    with path.open("rb") as file:
        response = httpx.post(f"{shared[0]}/v1/files", files={"file": file})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_media"


def rubbish(seed: int) -> bytes:
    """Bytes that look like the beginning of a video or image, and are not."""
    chance = random.Random(seed)
    noise = chance.randbytes(chance.choice([1, 100, 5000, 60_000]))
    heads = [
        b"",
        struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"isom", 512, b"isom", b"mp41"),
        struct.pack(">I4s", 2**31 - 1, b"moov"),
        b"RIFF\xff\xff\xff\x7fAVI LIST",
        b"\x1a\x45\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff",
        b"GIF89a\xff\xff\xff\xff\xf7\x00\x00",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\x00\x00\x00",
        b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
        b"#EXTM3U\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<svg><image href='file:///etc/passwd'/></svg>",
    ]
    return heads[seed % len(heads)] + noise


@pytest.mark.quick(1)
@pytest.mark.parametrize("seeds", [range(3), range(3, 12)], ids=str)
def test_rubbish_uploads_leave_nothing(seeds: range, shared: Serving, media: Path) -> None:
    def leftovers() -> set[str]:
        return {path.name for path in Path(tempfile.gettempdir()).glob("fluxchat-*")}

    close_idle_workers()
    children = set(psutil.Process().children(recursive=True))  # of other tests
    before, size = leftovers(), shared[1].store.size
    for seed in seeds:
        response = httpx.post(f"{shared[0]}/v1/files", files={"file": ("x.mp4", rubbish(seed))})
        assert response.status_code == 400, (seed, response.text)
        assert b"root:" not in response.content
    assert shared[1].store.size == size
    assert leftovers() <= before
    close_idle_workers()  # of trusted reading
    # Who decoded a stranger's file is gone.
    until(lambda: set(psutil.Process().children(recursive=True)) <= children)
    assert answer(ask(shared[0], "What?", "ok.mp4", max_tokens=3)) is not None


# -- other machines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/x.mp4",
        "http://127.0.0.1/x.mp4",
        "http://2130706433/x.mp4",
        "http://0x7f.1/x.mp4",
        "http://[::1]/x.mp4",
        "http://videos.example@127.0.0.1/x.mp4",
        "http://127.0.0.1#videos.example",
        "https://other.example/x.mp4",
        "http://videos.example:bad/x.mp4",
        "http://user:word@videos.example/x.mp4",
        "gopher://videos.example/x",
    ],
)
def test_hosts_that_were_not_allowed(url: str) -> None:
    with pytest.raises(ApiError):
        download(url, ["videos.example"], 1000)


def test_an_allowed_name_that_points_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, 1, 6, "", (ip, 80)) for ip in ("93.184.216.34", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(ApiError, match="does not fetch from that host"):
        download("http://videos.example/x.mp4", ["videos.example"], 1000)


class _Host(http.server.BaseHTTPRequestHandler):
    seen: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.seen.append(f"{self.headers['Host']} {self.path}")
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/secret")
            self.end_headers()
            return
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", "99999" if self.path == "/large" else "5")
        self.end_headers()
        self.wfile.write(b"x" * (200_000 if self.path == "/endless" else 5))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A host on this machine that counts as videos.example, with a public address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Host.seen.clear()
    monkeypatch.setattr(fetching, "public_address", lambda name, port: "127.0.0.1")
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_downloads_connect_to_the_checked_address_only(host: int) -> None:
    base = f"http://videos.example:{host}"
    assert download(f"{base}/a?b=1#c", ["Videos.Example"], 1000) == b"xxxxx"
    for path, reason in [("redirect", "redirects"), ("large", "larger"), ("endless", "larger")]:
        with pytest.raises(ApiError, match=reason):
            download(f"{base}/{path}", ["videos.example"], 1000)
    assert _Host.seen[0] == f"videos.example:{host} /a?b=1"
    assert len(_Host.seen) == 4


@pytest.mark.parametrize("where", ["path", "url"])
def test_the_pages_api_reads_uploads_only(shared: Serving, media: Path, host: int, where: str) -> None:
    for target in (
        "/etc/passwd",
        str(media / "ok.mp4"),
        f"http://127.0.0.1:{host}/x",
        f"http://localhost:{host}/x",
    ):
        file = {"path": target, where: target, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [file, "What?", "16"]}
        joined = httpx.post(f"{shared[0]}/gradio_api/call/ask", json=body)
        if joined.status_code == 200:
            events = httpx.get(f"{shared[0]}/gradio_api/call/ask/{joined.json()['event_id']}").text
            assert "event: error" in events, (target, events)
            assert "root:" not in events
    assert _Host.seen == []


def test_an_allowed_host_through_the_api(
    host: int, tiny_model: VideoLanguageModel, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (media / "ok.mp4").read_bytes()
    monkeypatch.setattr(
        "app.server.media.resolver.fetch", lambda url, hosts, limit, into, cancelled: into.write(content)
    )
    options = LaunchOptions(page=False, server=ServerSettings(url_hosts=("videos.example",)))
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as (address, _):
        fetched = answer(ask(address, "What?", "http://videos.example/ok.mp4", max_tokens=6))
        assert fetched == answer(ask(address, "What?", data_url(media / "ok.mp4"), max_tokens=6))


# -- who comes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "localhost."]
)
def test_another_name_is_refused(shared: Serving, name: str) -> None:
    for path in ("/healthz", "/v1/models", "/"):
        assert httpx.get(f"{shared[0]}{path}", headers={"Host": name}).status_code in (400, 403)


def test_another_sites_page_is_refused(shared: Serving) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert httpx.get(f"{shared[0]}/v1/models", headers={"Origin": origin}).status_code == 403
    assert httpx.get(f"{shared[0]}/v1/models", headers={"Origin": shared[0]}).status_code == 200
    # What a page could send without asking first is not taken for a question.
    plain = httpx.post(
        f"{shared[0]}/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 415


def test_no_foreign_origin_is_allowed_by_the_page(shared: Serving) -> None:
    got = httpx.get(f"{shared[0]}/config", headers={"Origin": "http://evil.example"})
    assert "evil" not in got.headers.get("access-control-allow-origin", "")


@pytest.fixture(scope="module")
def locked(tiny_model: VideoLanguageModel) -> Iterator[str]:
    """A server with a key and a login."""
    options = LaunchOptions(credentials=Credentials("the-key", LOGIN), examples=[])
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as (address, _):
        yield address


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/v1/chat/completions",
        "/v1/files",
        "/v1",
        "/v1/x",
        "//v1/models",
        "/metrics",
        "/gradio_api/mcp/",
        "/gradio_api/mcp/sse",
        "/gradio_api//mcp",
    ],
)
def test_without_the_key_nothing_is_answered(locked: str, path: str) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "the-key"},
        {"Authorization": "Basic !!"},
        {"Authorization": "Basic " + base64.b64encode(b"ann:wrong").decode()},
    ):
        # From elsewhere each time: who guesses from one address must wait.
        address = str(ipaddress.ip_address(zlib.crc32(path.encode())))
        response = httpx.get(f"{locked}{path}", headers={**headers, "X-Forwarded-For": address})
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


def test_with_the_key_or_the_login(locked: str) -> None:
    key = {"Authorization": "Bearer the-key"}
    assert httpx.get(f"{locked}/v1/models", headers=key).status_code == 200
    assert httpx.get(f"{locked}/metrics", auth=LOGIN).status_code == 200
    body = question("What?", max_tokens=2)
    assert httpx.post(f"{locked}/v1/chat/completions", json=body, headers=key).status_code == 200
    assert httpx.get(f"{locked}/healthz").status_code == 200


def test_the_page_asks_for_the_login(locked: str) -> None:
    assert httpx.get(f"{locked}/config").status_code == 401
    assert httpx.post(f"{locked}/gradio_api/upload", files={"files": b"x"}).status_code == 401
    assert httpx.post(f"{locked}/gradio_api/queue/join", json={}).status_code == 401
    wrong = httpx.post(f"{locked}/login", data={"username": "ann", "password": "x"})
    assert wrong.status_code == 401
    with httpx.Client() as client:
        entered = client.post(f"{locked}/login", data={"username": LOGIN[0], "password": LOGIN[1]})
        assert entered.status_code == 200
        assert client.get(f"{locked}/config").status_code == 200
