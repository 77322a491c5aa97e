"""What stands in front of every request: who is asked for, from where, and with which key.

A page of the web can make a visitor's browser send requests to 127.0.0.1. It cannot read the answers, but it
must not be able to ask at all: hence the checks of Host (names that point here by DNS) and Origin.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api_types import ApiError

ANONYMOUS = "anonymous-"
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Credentials:
    """api_key: for programs, as a bearer token. login: (user, password), for people and for programs too."""

    api_key: str | None = None
    login: tuple[str, str] | None = None

    @property
    def needed(self) -> bool:
        """Whether anything is asked for at all."""
        return self.api_key is not None or self.login is not None

    def admit(self, authorization: str) -> bool:
        """Whether an Authorization header shows one of them; takes the same time for all wrong ones."""
        scheme, _, value = authorization.partition(" ")
        value = value.strip()
        if scheme.lower() == "bearer" and self.api_key is not None:
            return hmac.compare_digest(value.encode(), self.api_key.encode())
        if scheme.lower() == "basic" and self.login is not None:
            try:
                given = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                return False
            return hmac.compare_digest(given, ":".join(self.login).encode())
        return False


class Guard:
    """ASGI middleware. hosts: the names that may be asked for, None for any."""

    def __init__(self, app: ASGIApp, credentials: Credentials, hosts: Iterable[str] | None) -> None:
        self._app, self._credentials = app, credentials
        self._hosts = None if hosts is None else {name.lower() for name in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        # gradio's login does not cover its MCP tools.
        protected = ("/v1", "/metrics", "/gradio_api/mcp")
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        host, path = headers.get("host", ""), re.sub("/+", "/", scope["path"]) + "/"
        if self._hosts is not None and _hostname(host) not in self._hosts:
            raise ApiError(
                403, "This server answers to the name it was started with only.", code="wrong_host"
            )
        if not path.startswith(tuple(f"{start}/" for start in protected)):
            return
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(403, "Other sites' pages may not use this server.", code="wrong_origin")
        if self._credentials.needed and not self._credentials.admit(headers.get("authorization", "")):
            raise ApiError(
                401,
                "The API key is missing or wrong: send it as a bearer token.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer" if self._credentials.login is None else "Basic"},
            )


def is_anonymous(client: str) -> bool:
    """Whether a `fluxchat.client` has neither key nor login."""
    return not client or client.startswith(ANONYMOUS)


def error_response(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body, error.status, error.headers)


def _hostname(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
