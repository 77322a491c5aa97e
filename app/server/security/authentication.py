"""Who sends a request: by API key, HTTP Basic login, session cookie, or as an anonymous visitor."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from starlette.datastructures import Headers

from app.server.security.api_keys import Key, KeyRing, digest
from app.server.security.login import LoginThrottle, SessionCookies

FORWARDED = ("x-forwarded-for", "forwarded", "x-real-ip", "via", "cf-connecting-ip", "true-client-ip")
ANONYMOUS = "anonymous-"


@dataclass(frozen=True)
class Credentials:
    """api_key: a bearer token. login: (user, password). keys_file: more keys, see api_keys.py.

    Each of them opens every route: programs send a key as a bearer token (or user and password, or any user
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
        return " or ".join(text for value, text in named if value is not None) or "nobody has to log in"


@dataclass(frozen=True)
class Client:
    """Who sends a request. id: unguessable. name: None for an anonymous one. key: has its rate and quota."""

    id: str
    name: str | None = None
    key: Key | None = None


class Authenticator:
    """Checks credentials. Raises ConfigError when the file of keys cannot be used."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        own = credentials.api_key
        fixed = [] if own is None else [Key("api-key", digest(own), metrics=True)]
        self.keys = KeyRing(fixed, credentials.keys_file)
        self.cookies, self.throttle = SessionCookies(), LoginThrottle()
        self._secret = secrets.token_bytes(32)

    def client(self, headers: Headers, address: str, connection: str | None) -> Client | None:
        """The client that sends these headers; None when credentials are needed and missing or wrong.

        address: its IP address. connection: an unguessable id of its connection. Raises ApiError 429 after
        many wrong attempts from the address.
        """
        if not self.credentials.needed:
            if (visitor := self.visitor(headers)) is not None:
                return Client(visitor)
            # Behind a proxy one connection carries many people's requests.
            shared = connection is None or any(name in headers for name in FORWARDED)
            own_id = secrets.token_urlsafe(16) if shared else connection
            return Client(f"{ANONYMOUS}{own_id}")
        who = self.cookies.subject(self.cookie(headers) or "")
        if who is not None:
            return self._client_named(who)
        authorization = headers.get("authorization")
        if authorization is None:
            return None
        scheme, _, value = authorization.partition(" ")
        value = value.strip()
        if scheme.lower() == "bearer":
            return self._client_with_secret(address, None, value)
        if scheme.lower() == "basic":
            try:
                pair = base64.b64decode(value, validate=True).decode("utf-8", "surrogateescape")
            except (binascii.Error, ValueError):
                return None
            user, _, password = pair.partition(":")
            return self._client_with_secret(address, user, password)
        return None

    def log_in(self, address: str, user: str, password: str) -> str | None:
        """A new session cookie, None when user or password are wrong; raises ApiError 429."""
        client = self._client_with_secret(address, user, password)
        if client is None:
            return None
        return self.cookies.issue(
            f"login {client.name}" if client.key is None else _cookie_subject(client.key)
        )

    def visitor(self, headers: Headers) -> str | None:
        """The client id of an anonymous visitor by its cookie, None without one."""
        return self.cookies.subject(self.cookie(headers) or "")

    def cookie(self, headers: Headers) -> str | None:
        """The value of the session cookie."""
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self.cookies.name)
        except CookieError:
            return None
        return None if morsel is None else morsel.value[:128]

    def _client_with_secret(self, address: str, user: str | None, secret: str) -> Client | None:
        self.throttle.check(address)
        key = self.keys.find(secret)
        login = self.credentials.login
        if login is not None and user is not None:
            right = hmac.compare_digest(digest(user), digest(login[0]))
            right &= hmac.compare_digest(digest(secret), digest(login[1]))
            if right:
                return self._client_named(f"login {login[0]}")
        if key is not None:
            return self._client_named(_cookie_subject(key), key)
        self.throttle.add(address)
        return None

    def _client_named(self, who: str, key: Key | None = None) -> Client | None:
        kind, _, name = who.partition(" ")
        if kind == "key" and key is None:
            name = name.partition(" ")[0]
            key = self.keys.named(name)
            if key is None or _cookie_subject(key) != who:  # taken out of the file, or changed since
                return None
        name = name if key is None else key.name
        text = f"{kind} {name}".encode("utf-8", "surrogateescape")
        return Client(hmac.new(self._secret, text, hashlib.sha256).hexdigest(), name, key)


def _cookie_subject(key: Key) -> str:
    """What a session cookie is issued for: a key's name and its digest."""
    return f"key {key.name} {key.digest.hex()}"


def is_anonymous(client: str) -> bool:
    """Whether a client id (`fluxchat.client`) is that of a visitor without key or login."""
    return not client or client.startswith(ANONYMOUS)
