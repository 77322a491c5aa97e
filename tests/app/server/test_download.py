"""Fetching: from allowed hosts at public addresses only, with an end whatever the other side does."""

from __future__ import annotations

import io
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from app.server.errors import ApiError
from app.server.media import download as fetching
from app.server.media.download import download, fetch, is_public, parse_url, public_address
from tests.patience import PATIENCE_S

HOSTS = ["videos.example", "Bücher.example"]


# -- addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "93.184.216.34",
        "1.1.1.1",
        "11.0.0.1",
        "100.63.255.255",
        "100.128.0.1",
        "172.32.0.1",
        "192.0.1.1",
        "198.20.0.1",
        "223.255.255.254",
        "2606:2800:220:1::1",
        "2a00:1450:4001:81b::200e",
        "2400:cb00::1",
        "2001:4860:4860::8888",
    ],
)
def test_addresses_of_the_public_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    # this network, private, shared, loopback, link-local
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.1.2.3",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        # protocol assignments, documentation, relays, benchmarks, multicast, reserved, broadcast
        "192.0.0.1",
        "192.0.0.10",
        "192.0.0.170",
        "192.0.2.1",
        "192.88.99.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        # IPv6: unspecified, loopback, link-local, site-local, unique local, multicast, discard
        "::",
        "::1",
        "fe80::1",
        "fec0::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "ff0e::1",
        "100::1",
        # documentation, benchmarks, ORCHID, segment routing, 6bone
        "2001:db8::1",
        "3fff::1",
        "2001:2::1",
        "2001:10::1",
        "2001:20::1",
        "5f00::1",
        "3ffe::1",
        "4000::1",
        # IPv4 inside of IPv6: mapped, compatible, translated, NAT64, 6to4, Teredo, ISATAP; public ones too
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "::127.0.0.1",
        "::8.8.8.8",
        "::ffff:0:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::7f00:1",
        "64:ff9b:1::808:808",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "2001::5ef5:79fb",
        "2001:0:0:0:0:0:807f:fffe",
        "2606:4700::5efe:127.0.0.1",
        "2606:4700::200:5efe:10.0.0.1",
        # zones, and what is no address
        "fe80::1%eth0",
        "2606:2800:220:1::1%1",
        "2606:2800:220:1::1%25eth0",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "127.0.0.1.",
        "localhost",
        "",
        "[::1]",
        "1.1.1.1/32",
    ],
)
def test_every_other_address_is_not_public(address: str) -> None:
    assert not is_public(address)


def resolving(*addresses: str) -> Callable[..., list[Any]]:
    return lambda *_, **__: [(socket.AF_INET, 1, 6, "", (address, 80)) for address in addresses]


def test_all_addresses_of_a_name_must_be_public(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["2606:2800:220:1::1", "::ffff:1.2.3.4"], []):
        monkeypatch.setattr(socket, "getaddrinfo", resolving(*found))
        with pytest.raises(ApiError, match="does not fetch from that host"):
            public_address("videos.example", 80)
    monkeypatch.setattr(socket, "getaddrinfo", resolving("2606:2800:220:1::1", "93.184.216.34"))
    assert public_address("videos.example", 80) == "93.184.216.34"


# -- URLs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://videos.example", ("videos.example", 80, "/", False)),
        ("HTTPS://Videos.EXAMPLE./a.mp4", ("videos.example", 443, "/a.mp4", True)),
        ("http://videos.example:8080/a?b=1&c=%20#d", ("videos.example", 8080, "/a?b=1&c=%20", False)),
        ("http://videos.example/grün é.mp4".replace(" ", "%20"), None),
        ("http://bücher.example/", ("xn--bcher-kva.example", 80, "/", False)),
        ("http://xn--bcher-kva.example/", ("xn--bcher-kva.example", 80, "/", False)),
        ("http://videos.example:/a//b", ("videos.example", 80, "/a//b", False)),
    ],
)
def test_urls_of_allowed_hosts(url: str, expected: tuple[str, int, str, bool] | None) -> None:
    target = parse_url(url, HOSTS)
    if expected is None:
        assert target.path == "/gr%C3%BCn%20%C3%A9.mp4"
    else:
        assert (target.host, target.port, target.path, target.secure) == expected


@pytest.mark.parametrize(
    "url",
    # names that look like an allowed one
    [
        "http://videos.example.evil.example/",
        "http://evilvideos.example/",
        "http://videos.example../",
        "http://.videos.example/",
        "http://videos%2eexample/",
        "http://videos.exam\u00adple.evil/",
        # names and numbers that are this machine
        "http://localhost/",
        "http://LOCALHOST./",
        "http://localhost.evil.com/",
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://0/",
        "http://①②⑦.⓪.⓪.①/",
        # users, passwords, what different readers read differently
        "http://videos.example@127.0.0.1/",
        "http://user:word@videos.example/",
        "http://@videos.example/",
        "http://127.0.0.1#videos.example",
        "http://127.0.0.1?@videos.example",
        "http://127.0.0.1\\@videos.example",
        "http:\\\\videos.example/",
        "http://videos.example\\@127.0.0.1/",
        "http:///videos.example/",
        "http://",
        "http:videos.example",
        "//videos.example/",
        "videos.example/a.mp4",
        # blanks and control characters
        "http://videos.example/a b",
        "http://videos.example/\r\nHost: evil",
        "ht\ntp://videos.example/",
        " http://videos.example/",
        "http://videos.example/\0",
        "http://videos.exam\tple/",
        "http://videos.example/\x7f",
        # ports and schemes
        "http://videos.example:0/",
        "http://videos.example:65536/",
        "http://videos.example:-1/",
        "http://videos.example:x/",
        "http://videos.example:８０/",
        "ftp://videos.example/",
        "file://videos.example/",
        "gopher://videos.example/",
        "javascript://videos.example/",
        "http://[videos.example]/",
        "http://[/",
    ],
)
def test_urls_that_are_not_fetched(url: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_url(url, HOSTS)
    assert (caught.value.status, caught.value.body["error"]["code"]) == (400, "invalid_media")


# -- transfers ----------------------------------------------------------------------------------------------


class Host:
    """A host that answers each connection by a function, on a thread."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self._answer, self.connections = answer, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://videos.example:{self.listener.getsockname()[1]}/a.mp4"
        self.closed = threading.Event()  # the other side went away
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections += 1
                with connection, suppress(OSError):
                    self._answer(connection)
                self.closed.set()

    def close(self) -> None:
        """Ends the thread first: it could accept on the number that the next host's socket is given."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)
        self.listener.close()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Host]]:
    """Makes hosts of this machine that count as videos.example, with a public address."""
    monkeypatch.setattr(fetching, "public_address", lambda name, port: "127.0.0.1")
    made: list[Host] = []

    def make(*answers: bytes, then: Callable[[socket.socket], None] = lambda _: None) -> Host:
        def answer(connection: socket.socket) -> None:
            connection.recv(65536)
            for block in answers:
                connection.sendall(block)
            then(connection)

        made.append(Host(answer))
        return made[-1]

    yield make
    for one in made:
        one.close()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answers",
    [
        [OK, b"Content-Length: 5\r\n\r\n", b"video"],
        [OK, b"\r\nvideo"],
        [OK, b"Transfer-Encoding: chunked\r\n\r\n2\r\nvi\r\n3\r\ndeo\r\n0\r\n\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n", OK, b"Content-Length: 5\r\n\r\nvideo"],
        [OK, b"Content-Encoding: identity\r\nContent-Length: 5\r\n\r\nvideo"],
    ],
)
def test_downloads_arrive(host: Callable[..., Host], answers: list[bytes]) -> None:
    into = io.BytesIO()
    fetch(host(*answers).url, HOSTS, 100, into)
    assert into.getvalue() == b"video"


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n"], "redirects"),
        ([b"HTTP/1.1 206 Partial Content\r\nContent-Length: 2\r\n\r\nvi"], "answered 206"),
        ([b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno"], "answered 404"),
        ([OK, b"Content-Length: 101\r\n\r\n"], "larger"),
        ([OK, b"\r\n", b"x" * 101], "larger"),
        ([OK, b"Transfer-Encoding: chunked\r\n\r\n", b"65\r\n" + b"x" * 101 + b"\r\n0\r\n\r\n"], "larger"),
        ([OK, b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nvideo"], "compressed"),
        ([OK, b"Content-Length: 9\r\n\r\nvideo"], "5 of 9 bytes"),
        ([OK, b"Transfer-Encoding: chunked\r\n\r\n9\r\nvideo"], "could not be read"),
        ([OK, b"Content-Length: 0\r\n\r\n"], "sent nothing"),
        ([b"nonsense\r\n\r\n"], "could not be read"),
        ([OK, b"X: " + b"x" * 70_000 + b"\r\n\r\n"], "could not be read"),
        ([OK, b"".join(b"X%d: y\r\n" % n for n in range(300)), b"\r\n"], "could not be read"),
        ([], "could not be read"),
    ],
)
def test_other_responses_are_refused(host: Callable[..., Host], answers: list[bytes], reason: str) -> None:
    made = host(*answers)
    with pytest.raises(ApiError, match=reason):
        download(made.url, HOSTS, 100)
    assert made.connections == 1


def until_closed(connection: socket.socket) -> None:
    """Waits until the other side goes away."""
    while connection.recv(100):
        continue


def test_a_connection_ends_with_its_transfer_while_its_error_is_kept(host: Callable[..., Host]) -> None:
    made = host(OK, b"\r\n" + b"x" * 101, then=until_closed)
    with pytest.raises(ApiError, match="larger") as kept:
        download(made.url, HOSTS, 100)
    assert made.closed.wait(PATIENCE_S)
    assert kept.value.status == 413


def forever(block: bytes) -> Callable[[socket.socket], None]:
    """Sends a little now and then until the other side goes away."""

    def send(connection: socket.socket) -> None:
        connection.settimeout(0.02)
        while True:
            connection.sendall(block)
            with suppress(TimeoutError):
                if connection.recv(100) == b"":
                    return

    return send


@pytest.mark.parametrize(
    ("answers", "block"),
    [
        ([], b""),
        ([], b"x"),
        ([OK], b"X: y\r\n"),
        ([OK, b"X: "], b"y"),
        ([], b"HTTP/1.1 100 Continue\r\n\r\n"),
        ([OK, b"Content-Length: 60000\r\n\r\n"], b"x"),
        ([OK, b"\r\n"], b"x"),
        ([OK, b"Transfer-Encoding: chunked\r\n\r\n"], b"1\r\nx\r\n"),
        ([OK, b"Transfer-Encoding: chunked\r\n\r\n1"], b";x"),
        ([OK, b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"], b"X: y\r\n"),
    ],
    ids=[
        "nothing",
        "status",
        "headers",
        "header",
        "continue",
        "length",
        "end",
        "chunks",
        "chunk",
        "trailers",
    ],
)
def test_a_dripping_transfer_times_out(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, answers: list[bytes], block: bytes
) -> None:
    # Between the bytes there is less than the first limit; the whole is held by the second.
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.1)
    made = host(*answers, then=forever(block))
    with pytest.raises(ApiError, match=r"too slow|TimeoutError"):
        download(made.url, HOSTS, 10**6)
    assert made.closed.wait(PATIENCE_S)


def test_a_silent_tls_handshake_times_out(host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.1)
    # A record that promises 16 KiB and comes byte by byte.
    made = host(b"\x16\x03\x03\x40\x00", then=forever(b"\0"))
    with pytest.raises(ApiError, match=r"too slow|could not be read"):
        download(made.url.replace("http:", "https:"), HOSTS, 10**6)
    assert made.closed.wait(PATIENCE_S)


def test_a_slow_dns_lookup_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def never(*_: Any) -> str:
        released.wait(PATIENCE_S)
        return "127.0.0.1"

    monkeypatch.setattr(fetching, "public_address", never)
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.02)
    with pytest.raises(ApiError, match="too slow"):
        download("http://videos.example/a", HOSTS, 100)
    released.set()


@pytest.mark.parametrize("when", ["name", "headers", "body"])
def test_a_transfer_can_be_cancelled_in_every_phase(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    cancelled, waiting, released = threading.Event(), threading.Event(), threading.Event()

    def wait(connection: socket.socket) -> None:
        waiting.set()
        until_closed(connection)

    made = host(*([OK, b"\r\nx"] if when == "body" else []), then=wait)
    if when == "name":

        def never(*_: Any) -> str:
            waiting.set()
            released.wait(PATIENCE_S)
            return "127.0.0.1"

        monkeypatch.setattr(fetching, "public_address", never)
    told: list[BaseException] = []

    def run() -> None:
        try:
            fetch(made.url, HOSTS, 100, io.BytesIO(), cancelled)
        except ApiError as error:
            told.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert waiting.wait(PATIENCE_S)
    cancelled.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    released.set()
    assert "Nobody waits" in str(told[0])


def test_tls_verifies_the_host_name(host: Callable[..., Host]) -> None:
    names: list[str | None] = []

    def hello(connection: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sni_callback = lambda _, name, __: names.append(name)
        with suppress(ssl.SSLError, OSError):
            context.wrap_socket(connection, server_side=True)

    made = Host(hello)
    with pytest.raises(ApiError, match="could not be read"):
        download(made.url.replace("http:", "https:"), HOSTS, 100)
    made.listener.close()
    assert names == ["videos.example"]
