"""Downloads from hosts that the operator allows, safe against server-side request forgery (SSRF).

    fetch("https://videos.example/a.mp4", ["videos.example"], max_bytes, file, cancelled)

The host name is resolved once, every address must be public, and the connection goes to exactly that address,
so that DNS rebinding has no effect. Redirects are not followed; proxies are not used. The whole transfer,
from DNS look-up to last byte, ends within a time limit whatever the other side does.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from app.server.errors import ApiError, invalid_media

TIMEOUT_S = 10.0  # of silence; the whole transfer may take six times as long
BLOCK = 1 << 16
POLL_S = 0.2  # between checks whether the transfer was cancelled

# The public internet: IPv4 and IPv6's global unicast, each less what IANA's registries of special-purpose
# addresses take out of it. Forms of IPv6 that stand for an IPv4 address (mapped, compatible, 6to4, Teredo,
# NAT64) lie outside, whatever they stand for: no host that serves videos has only those.
_PUBLIC = tuple(map(ipaddress.ip_network, ("0.0.0.0/0", "2000::/3")))
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24"),
            *("192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
            *("224.0.0.0/4", "240.0.0.0/4"),
            *("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3ffe::/16", "3fff::/20"),
        ),
    )
)


class Sink(Protocol):
    """A writable target."""

    def write(self, block: bytes, /) -> Any:
        """Append a block."""


@dataclass(frozen=True)
class Target:
    """The parts of a URL. path: with the query, as sent in the request line."""

    host: str
    port: int
    path: str
    secure: bool


def fetch(
    url: str,
    hosts: Sequence[str],
    max_bytes: int,
    into: Sink,
    cancelled: threading.Event | None = None,
) -> None:
    """Write the content behind a URL to a file, as it is sent.

    cancelled: set it, from any thread, and the transfer ends. Raises ApiError when the host is not allowed,
    and when the transfer fails, is cancelled or takes longer than 6 x TIMEOUT_S.
    """
    target = parse_url(url, hosts)
    try:
        with _TransferWatch(6 * TIMEOUT_S, cancelled or threading.Event()) as watch:
            try:
                address = watch.call(public_address, target.host, target.port)
                _transfer(target, address, max_bytes, into, watch)
            except (OSError, http.client.HTTPException, ValueError) as error:
                watch.check(target.host)
                raise invalid_media(f"{target.host} could not be read ({type(error).__name__}).") from error
    except _TimeUp:
        raise invalid_media(
            f"{target.host} is too slow: the transfer took over {6 * TIMEOUT_S:g} s."
        ) from None


def download(
    url: str, hosts: Sequence[str], max_bytes: int, cancelled: threading.Event | None = None
) -> bytes:
    """The same, in memory."""
    content = io.BytesIO()
    fetch(url, hosts, max_bytes, content, cancelled)
    return content.getvalue()


def parse_url(url: str, hosts: Iterable[str]) -> Target:
    """A URL of one of the hosts; raises ApiError for every other text."""
    # urlsplit drops some of these silently; browsers read \ as /.
    if any(ord(sign) <= 32 or ord(sign) == 127 or sign == "\\" for sign in url):
        raise invalid_media(
            "A URL must not hold blanks, control characters or backslashes: percent-encode them."
        )
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = _ascii_host(parts.hostname or ""), parts.port
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    except ValueError:
        raise invalid_media("That is not a URL.") from None
    if "@" in parts.netloc:
        raise invalid_media("A URL must not hold a user or a password.")
    if parts.scheme not in ("http", "https") or not host or host not in set(map(_allowed_name, hosts)):
        raise invalid_media("This server does not fetch from that host.")
    if port == 0:
        raise invalid_media("A URL's port cannot be 0.")
    secure = parts.scheme == "https"
    return Target(host, port or (443 if secure else 80), f"{path}?{query}" if query else path, secure)


def _ascii_host(name: str) -> str:
    """A host's name in lower case, without the dot at its end, international ones as DNS has them."""
    name = name[:-1] if name.endswith(".") else name
    return name.lower() if name.isascii() else name.encode("idna").decode().lower()


def _allowed_name(name: str) -> str | None:
    try:
        return _ascii_host(name)
    except ValueError:
        return None


def public_address(host: str, port: int) -> str:
    """The address to connect to; raises ApiError unless every address of the host is public."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise invalid_media(f"There is no host {host}.") from None
    if not addresses or not all(map(is_public, addresses)):
        raise invalid_media("This server does not fetch from that host.")
    return min(addresses, key=lambda address: (":" in address, address))  # IPv4 first: it works everywhere


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet; False for what is no address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    # A zone belongs to a link; ISATAP's last half ends in an IPv4 address.
    zoned = isinstance(ip, ipaddress.IPv6Address) and ip.scope_id is not None
    if zoned or (ip.version == 6 and (int(ip) >> 32) & 0xFDFFFFFF == 0x00005EFE):
        return False
    inside = any(ip in network for network in _PUBLIC if network.version == ip.version)
    return inside and not any(ip in network for network in _SPECIAL if network.version == ip.version)


def _transfer(target: Target, address: str, max_bytes: int, into: Sink, watch: _TransferWatch) -> None:
    """One request, one response. Raises ApiError, or OSError and HTTPException as they come."""
    connection = _PinnedConnection(target, address, watch)
    try:
        headers = {"User-Agent": "FluxChat", "Accept": "video/*, image/*", "Accept-Encoding": "identity"}
        connection.request("GET", target.path, headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            raise invalid_media(f"{target.host} answered {response.status}; redirects are not followed.")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise invalid_media(
                f"{target.host} sent the file compressed: only what is sent as it is can be read."
            )
        length = response.length  # None where it is not said, or the content comes in chunks
        if length is not None and length > max_bytes:
            raise _too_large(max_bytes)
        got = 0
        while block := response.read1(BLOCK):
            watch.check(target.host)
            got += len(block)
            if got > max_bytes:
                raise _too_large(max_bytes)
            into.write(block)
        watch.check(target.host)  # an interrupted connection looks as if it had ended
        if length is not None and got < length:
            raise invalid_media(f"{target.host} sent {got} of {length} bytes: try again.")
        if not got:
            raise invalid_media(f"{target.host} sent nothing.")
    finally:
        connection.close()


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to a resolved address; the name is not resolved again."""

    def __init__(self, target: Target, address: str, watch: _TransferWatch) -> None:
        super().__init__(target.host, target.port, timeout=TIMEOUT_S)
        self._target, self._address, self._watch = target, address, watch
        if target.secure:
            self.default_port = 443  # else http.client names it in the Host header

    def connect(self) -> None:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self._watch.guard(self.sock)
        self.sock.connect((self._address, self._target.port))
        if self._target.secure:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self._target.host)


class _TimeUp(Exception):
    """The transfer took too long."""


class _TransferWatch:
    """A watchdog thread that interrupts a transfer when its time is up or it is cancelled."""

    def __init__(self, seconds: float, cancelled: threading.Event) -> None:
        self._end, self._cancelled = time.monotonic() + seconds, cancelled
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._interrupt: Callable[[], object] = lambda: None
        self._guarded: socket.socket | None = None

    def __enter__(self) -> _TransferWatch:
        self._thread = threading.Thread(target=self._run, name="fluxchat-download-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        self._thread.join()
        if self._guarded is not None:
            # The response may still hold its end of the connection, as long as someone keeps the error.
            with suppress(OSError):
                self._guarded.shutdown(socket.SHUT_RDWR)
            self._guarded.close()

    def check(self, host: str) -> None:
        """Raises ApiError or _TimeUp when the transfer must not go on."""
        if self._cancelled.is_set():
            raise ApiError(499, f"Nobody waits for the file of {host} any more.", code="cancelled")
        if self._over:
            raise _TimeUp

    def call(self, function: Callable[[str, int], str], host: str, port: int) -> str:
        """The result of a function that cannot be interrupted; its thread is left behind when time is up."""
        results: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                results.put(function(host, port))
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is waited for
                results.put(error)

        self._set(lambda: results.put(None))
        threading.Thread(target=work, name="fluxchat-resolve", daemon=True).start()
        result = results.get()
        if isinstance(result, BaseException):
            raise result
        if result is None:
            raise TimeoutError
        return result

    def guard(self, connection: socket.socket) -> None:
        """Shut this connection down when the time comes, also when TLS has taken it over."""
        self._guarded = guarded = connection.dup()

        def interrupt() -> None:
            with suppress(OSError):
                guarded.shutdown(socket.SHUT_RDWR)

        self._set(interrupt)

    @property
    def _over(self) -> bool:
        return time.monotonic() >= self._end

    def _set(self, interrupt: Callable[[], object]) -> None:
        with self._lock:
            self._interrupt = interrupt
            if self._over or self._cancelled.is_set():
                interrupt()

    def _run(self) -> None:
        while not self._finished.wait(min(POLL_S, max(0.0, self._end - time.monotonic()))):
            if self._over or self._cancelled.is_set():
                with self._lock:
                    self._interrupt()
                return


def _too_large(max_bytes: int) -> ApiError:
    message = f"That file is larger than {max_bytes / 2**20:g} MiB: cut or compress it."
    return ApiError(413, message, code="invalid_media", param="messages")
