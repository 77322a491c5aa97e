"""What stands in front of every request: who is asked for, from where, and with which key.

A page of the web can make a visitor's browser send requests to 127.0.0.1. It cannot read the answers, but it
must not be able to ask at all: hence the checks of Host (names that point here by DNS), Origin and
Sec-Fetch-Site. With an API key or a login, nothing but `OPEN` is served without it.

What is let in carries in its ASGI scope:
    fluxchat.client  whose it is: unguessable; one per key or login, else one per visitor, who is known by
                     a cookie that /v1 sets, or by the connection
    fluxchat.name    the key's or login's name, None for a visitor without
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.server.keys import Key, KeyRing, digest
from app.server.login import Cookies, Failures, page
from app.server.replies import ApiError

LOG = logging.getLogger("fluxchat")
LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN = ("/healthz", "/login", "/logout", "/favicon.ico", "/robots.txt")  # without a key or login
FORWARDED = ("x-forwarded-for", "forwarded", "x-real-ip", "via", "cf-connecting-ip", "true-client-ip")
FORM_BYTES = 8192
ANONYMOUS = "anonymous-"


@dataclass(frozen=True)
class Credentials:
    """api_key: a bearer token. login: (user, password). keys_file: more keys, see `keys.py`.

    Each of them opens every door: programs send a key as a bearer token (or user and password, or any user
    and a key, as Basic); people log in on a page.
    """

    api_key: str | None = None
    login: tuple[str, str] | None = None
    keys_file: Path | None = None

    @property
    def needed(self) -> bool:
        """Whether anything is asked for at all."""
        return self.api_key is not None or self.login is not None or self.keys_file is not None

    def __str__(self) -> str:
        named = (
            (self.api_key, "an API key"),
            (self.login, "a login"),
            (self.keys_file, f"the keys of {self.keys_file}"),
        )
        return " or ".join(text for given, text in named if given is not None) or "nobody has to log in"


@dataclass(frozen=True)
class Client:
    """Who asks. id: unguessable. name: None for a visitor without. key: what limits them."""

    id: str
    name: str | None = None
    key: Key | None = None


class Lock:
    """Checks credentials. Raises ConfigError when the file of keys cannot be used."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        own = credentials.api_key
        fixed = [] if own is None else [Key("api-key", digest(own), metrics=True)]
        self.keys = KeyRing(fixed, credentials.keys_file)
        self.cookies, self.failures = Cookies(), Failures()
        self._secret = secrets.token_bytes(32)

    def client(self, headers: Headers, address: str, connection: str | None) -> Client | None:
        """Who sends these headers; None when credentials are needed and missing.

        address: where from. connection: an unguessable name of it. Raises ApiError 429 to who guesses.
        """
        if not self.credentials.needed:
            if (visitor := self.visitor(headers)) is not None:
                return Client(visitor)
            # Behind a proxy one connection carries many people's requests.
            shared = connection is None or any(name in headers for name in FORWARDED)
            own = secrets.token_urlsafe(16) if shared else connection
            return Client(f"{ANONYMOUS}{own}")
        who = self.cookies.who(self.cookie(headers) or "")
        if who is not None:
            return self._named(who)
        authorization = headers.get("authorization")
        if authorization is None:
            return None
        scheme, _, value = authorization.partition(" ")
        value = value.strip()
        if scheme.lower() == "bearer":
            return self._tried(address, None, value)
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(value, validate=True).decode("utf-8", "surrogateescape")
            except (binascii.Error, ValueError):
                return None
            user, _, password = given.partition(":")
            return self._tried(address, user, password)
        return None

    def enter(self, address: str, user: str, password: str) -> str | None:
        """A new cookie for who logs in, None when user or password are wrong; raises ApiError 429."""
        client = self._tried(address, user, password)
        if client is None:
            return None
        return self.cookies.new(f"login {client.name}" if client.key is None else _who(client.key))

    def visitor(self, headers: Headers) -> str | None:
        """The id of who has neither key nor login, by our cookie; else None."""
        return self.cookies.who(self.cookie(headers) or "")

    def cookie(self, headers: Headers) -> str | None:
        """The value of our cookie."""
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookies.name)
        except CookieError:
            return None
        return None if found is None else found.value[:128]

    def _tried(self, address: str, user: str | None, secret: str) -> Client | None:
        self.failures.check(address)
        key = self.keys.find(secret)
        login = self.credentials.login
        if login is not None and user is not None:
            right = hmac.compare_digest(digest(user), digest(login[0]))
            right &= hmac.compare_digest(digest(secret), digest(login[1]))
            if right:
                return self._named(f"login {login[0]}")
        if key is not None:
            return self._named(_who(key), key)
        self.failures.add(address)
        return None

    def _named(self, who: str, key: Key | None = None) -> Client | None:
        kind, _, name = who.partition(" ")
        if kind == "key" and key is None:
            name = name.partition(" ")[0]
            key = self.keys.named(name)
            if key is None or _who(key) != who:  # taken out of the file, or changed since
                return None
        name = name if key is None else key.name
        text = f"{kind} {name}".encode("utf-8", "surrogateescape")
        return Client(hmac.new(self._secret, text, hashlib.sha256).hexdigest(), name, key)


class Guard:
    """ASGI middleware. hosts: the names that may be asked for, None for any. framed: others may frame it.

    closing: whether the server is about to end. What the application does not answer is answered here, as an
    error in OpenAI's shape.
    """

    def __init__(
        self,
        app: ASGIApp,
        lock: Lock,
        hosts: Iterable[str] | None,
        *,
        framed: bool = False,
        closing: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app, self._lock, self._framed, self._closing = app, lock, framed, closing
        self._hosts = None if hosts is None else {name.lower() for name in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._add_headers(MutableHeaders(scope=message))
                if (cookie := scope.get("fluxchat.cookie")) is not None:
                    MutableHeaders(scope=message).append("Set-Cookie", self._cookie(cookie, scope))
            await send(message)

        try:
            response = await self._admit(scope, receive)
            await (self._app if response is None else response)(scope, receive, answer)
        except ApiError as error:
            await self._refuse(error, started, scope, receive, answer)
        except asyncio.CancelledError:  # the server ends, or the client has left
            await self._refuse(shutting_down(), started, scope, receive, answer)
        except Exception as error:
            LOG.error("A request failed", exc_info=error)
            await self._refuse(ApiError.of(error), started, scope, receive, answer)

    @staticmethod
    async def _refuse(error: ApiError, started: bool, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif not started:
            await error_response(error)(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive) -> Response | None:
        """What the guard answers itself; None when the request may go on. Raises ApiError."""
        headers = Headers(scope=scope)
        path = scope["path"]
        if scope.get("method") == "CONNECT":  # after an answer of 200, uvicorn would expect a tunnel
            raise ApiError(405, "This server is no proxy.", code="method_not_allowed")
        self._check_host(headers)
        self._check_origin(headers, scope, path)
        address = scope["client"][0][:64] if scope.get("client") else ""
        if path in ("/login", "/logout") and self._lock.credentials.needed:
            return await self._log(path, scope, headers, receive, address)
        if path in OPEN:
            return None
        if self._closing() and scope.get("method") == "POST":
            raise shutting_down()
        connection = scope.get("state", {}).get("fluxchat.connection")
        client = self._lock.client(headers, address, connection)
        if client is None:
            if _is_reading(scope, headers) and not path.startswith("/v1/"):
                asked = quote(scope["path"].lstrip("/")[:500])
                return RedirectResponse(f"/login?next=/{asked}", 303)
            raise ApiError(
                401,
                "The API key is missing or wrong: send it as a bearer token.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if client.key is not None and scope.get("method") == "POST":
            self._lock.keys.spend(client.key)
        if path.rstrip("/") == "/metrics" and client.key is not None and not client.key.metrics:
            raise ApiError(
                403, "This key may not read what the others use: give it `metrics`.", code="no_metrics"
            )
        scope["fluxchat.client"], scope["fluxchat.name"] = client.id, client.name
        if path.startswith("/v1/") and is_anonymous(client.id) and self._lock.visitor(headers) is None:
            # OpenAI's clients close the connection after each streamed answer: the next one is known by this.
            scope["fluxchat.cookie"] = self._lock.cookies.new(client.id)
        return None

    def _check_host(self, headers: Headers) -> None:
        if self._hosts is not None and _hostname(headers.get("host", "")) not in self._hosts:
            raise ApiError(
                403, "This server answers to the name it was started with only.", code="wrong_host"
            )

    def _check_origin(self, headers: Headers, scope: Scope, path: str) -> None:
        """Nothing for another site's page; it may only link to ours."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "").lower()
        own = _authority(f"//{headers.get('host', '')}")
        foreign = origin is not None and (own is None or _authority(origin) != own)
        if site in ("cross-site", "same-site"):
            link = scope.get("method") == "GET" and headers.get("sec-fetch-mode", "").lower() == "navigate"
            foreign |= not link or path.startswith(("/v1/", "/gradio_api/", "/logout"))
        if foreign:
            raise ApiError(403, "Other sites' pages may not use this server.", code="wrong_origin")

    def _add_headers(self, headers: MutableHeaders) -> None:
        headers.setdefault("X-Content-Type-Options", "nosniff")
        headers.setdefault("Referrer-Policy", "same-origin")
        if not self._framed:
            headers.setdefault("X-Frame-Options", "SAMEORIGIN")

    def _cookie(self, value: str, scope: Scope) -> str:
        secure = "https" in (scope.get("scheme"), Headers(scope=scope).get("x-forwarded-proto"))
        ended = "; Max-Age=0" if not value else ""
        # A page in another site's frame (as a Space is) keeps a cookie only so.
        site = "None; Secure" if self._framed and secure else "Lax; Secure" if secure else "Lax"
        return f"{self._lock.cookies.name}={value}; Path=/; HttpOnly; SameSite={site}{ended}"

    # -- logging in and out ---------------------------------------------------------------------------------

    async def _log(
        self, path: str, scope: Scope, headers: Headers, receive: Receive, address: str
    ) -> Response:
        if path == "/logout":
            self._lock.cookies.end(self._lock.cookie(headers) or "")
            return RedirectResponse("/login", 303, {"Set-Cookie": self._cookie("", scope)})
        query = parse_qs(scope["query_string"].decode("latin-1")[:2000])
        target = _local(query.get("next", ["/"])[0])
        if scope["method"] != "POST":
            return self._form(target)
        form = parse_qs((await _short_body(receive)).decode("utf-8", "replace"), keep_blank_values=True)
        user, password = form.get("username", [""])[0], form.get("password", [""])[0]
        reads = "text/html" in headers.get("accept", "")
        try:
            value = self._lock.enter(address, user, password)
        except ApiError as error:
            if not reads:
                raise
            return self._form(target, str(error), error.status, error.headers)
        if value is None:
            if reads:
                return self._form(target, "That is not right: try again.", 401)
            raise ApiError(401, "The user or the password is wrong.", code="invalid_login")
        cookie = {"Set-Cookie": self._cookie(value, scope)}
        if reads:
            return RedirectResponse(target, 303, cookie)
        return JSONResponse({"success": True}, headers=cookie)  # as gradio's own clients expect

    def _form(
        self, target: str, problem: str = "", status: int = 200, headers: dict[str, str] | None = None
    ) -> Response:
        credentials = self._lock.credentials
        html = page(
            user=credentials.login is not None,
            keys=len(self._lock.keys) > 0,
            action=f"/login?next={quote(target)}",
            problem=problem,
        )
        policy = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"
        return HTMLResponse(
            html, status, {"Content-Security-Policy": policy, "Cache-Control": "no-store", **(headers or {})}
        )


def _who(key: Key) -> str:
    """What a cookie stands for: a key's name and which key that was."""
    return f"key {key.name} {key.digest.hex()}"


def is_anonymous(client: str) -> bool:
    """Whether a `fluxchat.client` has neither key nor login."""
    return not client or client.startswith(ANONYMOUS)


def shutting_down() -> ApiError:
    """503: the server is about to end."""
    return ApiError(
        503,
        "The server is shutting down: ask it again in a moment.",
        kind="server_error",
        code="shutting_down",
        headers={"Retry-After": "5", "Connection": "close"},
    )


def error_response(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body, error.status, error.headers)


async def _short_body(receive: Receive) -> bytes:
    body = b""
    while True:
        message: Any = await receive()
        if message["type"] != "http.request":
            return body
        body += message.get("body", b"")
        if len(body) > FORM_BYTES:
            raise ApiError(413, "That is too long for a login.", headers={"Connection": "close"})
        if not message.get("more_body", False):
            return body


def _is_reading(scope: Scope, headers: Headers) -> bool:
    """Whether a person's browser asks for a page."""
    return scope.get("method") == "GET" and "text/html" in headers.get("accept", "")


def _local(target: str) -> str:
    """A path of this server to go to; never another site's."""
    bad = not target.startswith("/") or target[1:2] in ("/", "\\") or not target.isprintable()
    return "/" if bad else target


def _hostname(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _authority(url: str) -> tuple[str, int | None] | None:
    """(name, port) of an origin or a //host; None when it is none. The schemes' usual ports are no port."""
    try:
        parts = urlsplit(url)
        name, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        return None
    usual = port in {"http": (80,), "https": (443,), "": (80, 443)}.get(parts.scheme, ())
    return (name, None if usual else port) if name else None
