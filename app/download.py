"""Fetching a video from a host that the operator allowed, and from nowhere else.

The name is resolved once, every address must be public, and the connection goes to exactly that address, so
that a name cannot point inside after it was checked. Redirects are not followed; proxies are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Sequence

from app.api_types import ApiError

TIMEOUT_S = 10.0  # for one step; the whole may take six times as long
BLOCK = 1 << 16


def download(url: str, hosts: Sequence[str], max_bytes: int) -> bytes:
    """The content behind a URL; raises ApiError when the host is not allowed or the transfer fails."""
    parts = urllib.parse.urlsplit(url)
    try:
        host, port = (parts.hostname or "").lower().rstrip("."), parts.port
    except ValueError:
        raise _refused("That is not a URL.") from None
    if parts.scheme not in ("http", "https") or host not in {name.lower() for name in hosts}:
        raise _refused("This server does not fetch from that host.")
    if parts.username is not None or parts.password is not None:
        raise _refused("A URL must not hold a password.")
    secure = parts.scheme == "https"
    port = port or (443 if secure else 80)
    address = public_address(host, port)
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    connection = _Pinned(host, port, address, secure)
    started = time.monotonic()
    try:
        connection.request("GET", path, headers={"User-Agent": "FluxChat", "Accept": "video/*, image/*"})
        response = connection.getresponse()
        if response.status != 200:
            raise _refused(f"{host} answered {response.status}; redirects are not followed.")
        if int(response.headers.get("Content-Length") or 0) > max_bytes:
            raise _refused(f"That file is larger than {max_bytes / 2**20:g} MiB.")
        content = bytearray()
        while block := response.read(BLOCK):
            content += block
            if len(content) > max_bytes:
                raise _refused(f"That file is larger than {max_bytes / 2**20:g} MiB.")
            if time.monotonic() - started > 6 * TIMEOUT_S:
                raise _refused(f"{host} is too slow.")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _refused(f"{host} could not be read ({type(error).__name__}).") from error
    finally:
        connection.close()
    return bytes(content)


def public_address(host: str, port: int) -> str:
    """The address to connect to; raises ApiError unless every address of the host is public."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise _refused(f"There is no host {host}.") from None
    for address in found:
        if not is_public(address):
            raise _refused("This server does not fetch from that host.")
    return sorted(found)[0]


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet; also looks through IPv6's wrappings of IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return ip.is_global and not ip.is_multicast


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, whatever the name resolves to by now."""

    def __init__(self, host: str, port: int, address: str, secure: bool) -> None:
        super().__init__(host, port, timeout=TIMEOUT_S)
        self._address, self._secure = address, secure

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


def _refused(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_media", param="messages")
