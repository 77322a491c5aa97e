"""Access control middleware: checks the host, the origin and the credentials of every request.

A page of another site can make a visitor's browser send requests to 127.0.0.1. It cannot read the responses,
but it must not be able to send them at all: hence the checks of Host (against DNS rebinding), Origin and
Sec-Fetch-Site (against cross-site requests). With an API key or a login, only `OPEN` is served without it.

An admitted request carries in its ASGI scope:
    fluxchat.client  the client's id, unguessable: one per key or login, else one per visitor, known by
                     a cookie that /v1 sets, or by the connection
    fluxchat.name    the key's or login's name, None for a visitor without
    fluxchat.key     whether it is a key's: a login may have the same name
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.server.errors import ApiError, error_response, shutting_down
from app.server.security.authentication import Authenticator, is_anonymous
from app.server.security.login import POLICY, login_page

LOG = logging.getLogger("fluxchat")
LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN = ("/healthz", "/login", "/logout", "/favicon.ico", "/robots.txt")  # without a key or login
FORM_BYTES = 8192


class AccessControl:
    """ASGI middleware. hosts: the names that may be asked for, None for any. framed: others may frame it.

    closing: whether the server is about to end. What the application does not answer is answered here, as an
    error in OpenAI's shape.
    """

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        hosts: Iterable[str] | None,
        *,
        framed: bool = False,
        closing: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app, self._framed, self._closing = app, framed, closing
        self._authenticator = authenticator
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
            response = await self._authorize(scope, receive)
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

    async def _authorize(self, scope: Scope, receive: Receive) -> Response | None:
        """None when the request is admitted, else the response to send; raises ApiError."""
        headers = Headers(scope=scope)
        path = scope["path"]
        if scope.get("method") == "CONNECT":  # after a 200, uvicorn would expect a tunnel
            raise ApiError(405, "This server is no proxy.", code="method_not_allowed")
        self._check_host(headers)
        self._check_origin(headers, scope, path)
        address = scope["client"][0][:64] if scope.get("client") else ""
        if path in ("/login", "/logout") and self._authenticator.credentials.needed:
            return await self._log_in_or_out(path, scope, headers, receive, address)
        if path in OPEN:
            return None
        if self._closing() and scope.get("method") == "POST":
            raise shutting_down()
        connection = scope.get("state", {}).get("fluxchat.connection")
        client = self._authenticator.client(headers, address, connection)
        if client is None:
            if _wants_page(scope, headers) and not path.startswith("/v1/"):
                target = quote(scope["path"].lstrip("/")[:500])
                return RedirectResponse(f"/login?next=/{target}", 303)
            raise ApiError(
                401,
                "The API key is missing or wrong: send it as a bearer token.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if client.key is not None and scope.get("method") == "POST":
            self._authenticator.keys.spend(client.key)
        if path.rstrip("/") == "/metrics" and client.key is not None and not client.key.metrics:
            raise ApiError(
                403, "This key may not read what the others use: give it `metrics`.", code="no_metrics"
            )
        scope["fluxchat.client"], scope["fluxchat.name"] = client.id, client.name
        scope["fluxchat.key"] = client.key is not None
        if (
            path.startswith("/v1/")
            and is_anonymous(client.id)
            and self._authenticator.visitor(headers) is None
        ):
            # OpenAI's clients close the connection after each streamed answer: the next one is known by this.
            scope["fluxchat.cookie"] = self._authenticator.cookies.issue(client.id)
        return None

    def _check_host(self, headers: Headers) -> None:
        if self._hosts is not None and _hostname(headers.get("host", "")) not in self._hosts:
            raise ApiError(
                403, "This server answers to the name it was started with only.", code="wrong_host"
            )

    def _check_origin(self, headers: Headers, scope: Scope, path: str) -> None:
        """Refuses requests from other sites' pages, except links to ours."""
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
        return f"{self._authenticator.cookies.name}={value}; Path=/; HttpOnly; SameSite={site}{ended}"

    # -- logging in and out ---------------------------------------------------------------------------------

    async def _log_in_or_out(
        self, path: str, scope: Scope, headers: Headers, receive: Receive, address: str
    ) -> Response:
        if path == "/logout":
            self._authenticator.cookies.revoke(self._authenticator.cookie(headers) or "")
            return RedirectResponse("/login", 303, {"Set-Cookie": self._cookie("", scope)})
        query = parse_qs(scope["query_string"].decode("latin-1")[:2000])
        target = _local_path(query.get("next", ["/"])[0])
        if scope["method"] != "POST":
            return self._form(target)
        form = parse_qs((await _read_form(receive)).decode("utf-8", "replace"), keep_blank_values=True)
        user, password = form.get("username", [""])[0], form.get("password", [""])[0]
        reads = "text/html" in headers.get("accept", "")
        try:
            value = self._authenticator.log_in(address, user, password)
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
        credentials = self._authenticator.credentials
        html = login_page(
            user=credentials.login is not None,
            keys=len(self._authenticator.keys) > 0,
            action=f"/login?next={quote(target)}",
            problem=problem,
        )
        return HTMLResponse(
            html, status, {"Content-Security-Policy": POLICY, "Cache-Control": "no-store", **(headers or {})}
        )


async def _read_form(receive: Receive) -> bytes:
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


def _wants_page(scope: Scope, headers: Headers) -> bool:
    """Whether a browser navigates to a page."""
    return scope.get("method") == "GET" and "text/html" in headers.get("accept", "")


def _local_path(target: str) -> str:
    """The target as a path of this server; "/" in place of another site's URL."""
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
