"""Browser login: the HTML form, session cookies, and growing delays after wrong passwords."""

from __future__ import annotations

import base64
import hashlib
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from html import escape

from app.server.errors import ApiError

LIFETIME_S = 7 * 86400.0
MAX_ENTRIES = 10_000  # cookies, and addresses that failed
FREE_ATTEMPTS = 5  # wrong guesses of an address before it must wait
MAX_DELAY_S = 60.0
RESET_S = 900.0

PAGE = """\
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>FluxChat: log in</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root{{color-scheme:light dark}}body{{font:16px system-ui,sans-serif;display:grid;place-items:center;
min-height:90vh;margin:0}}form{{display:grid;gap:.75rem;width:min(20rem,90vw)}}h1{{font-weight:600;margin:0}}
input,button{{font:inherit;padding:.55rem .7rem;border:1px solid #8886;border-radius:.5rem}}
button{{background:#0f766e;color:#fff;border:0;cursor:pointer}}p{{margin:0;color:#b91c1c}}label{{display:grid}}
</style></head><body><form method="post" action="{action}"><h1>FluxChat</h1>{problem}{fields}
<button>Log in</button></form><script>{script}</script></body></html>
"""
# What a link names behind its "#" never reaches a server: the form takes it along, and the redirect keeps it.
SCRIPT = "document.forms[0].action += location.hash"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)
USER = '<label>User<input name="username" autocomplete="username" required{focus}></label>'
PASSWORD = (
    '<label>{label}<input name="password" type="password" autocomplete="current-password" required{focus}>'
    "</label>"
)


def login_page(*, user: bool, keys: bool, action: str, problem: str = "") -> str:
    """The form as HTML, for POLICY. user: ask for a name too; keys: an API key does as a password."""
    label = "API key" if not user else "Password, or an API key" if keys else "Password"
    focus = " autofocus"
    fields = (USER.format(focus=focus) if user else "") + PASSWORD.format(
        label=label, focus="" if user else focus
    )
    shown = f'<p role="alert">{escape(problem)}</p>' if problem else ""
    return PAGE.format(action=escape(action, quote=True), problem=shown, fields=fields, script=SCRIPT)


class SessionCookies:
    """Session cookies and whom each belongs to; only their hashes are stored. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = f"fluxchat-{secrets.token_hex(4)}"  # cookies know no ports: another server has another
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    def issue(self, subject: str) -> str:
        """A new cookie's value for `subject`."""
        value = secrets.token_urlsafe(32)
        with self._lock:
            self._entries[_hash(value)] = (subject, self._clock() + LIFETIME_S)
            while len(self._entries) > MAX_ENTRIES:
                self._entries.popitem(last=False)
        return value

    def subject(self, value: str) -> str | None:
        """Whom a cookie was issued for; None when it is unknown or expired."""
        with self._lock:
            entry = self._entries.get(_hash(value))
        return entry[0] if entry is not None and self._clock() < entry[1] else None

    def revoke(self, value: str) -> None:
        """Make a cookie invalid."""
        with self._lock:
            self._entries.pop(_hash(value), None)


class LoginThrottle:
    """Slows guessing: after FREE_ATTEMPTS wrong ones an address waits 1, 2, 4 ... s. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Raises ApiError 429 while the address has to wait."""
        with self._lock:
            count, at = self._entries.get(address, (0, 0.0))
        wait = at + self._wait(count) - self._clock()
        if count >= FREE_ATTEMPTS and wait > 0:
            seconds = math.ceil(wait)
            raise ApiError(
                429,
                f"Too many wrong keys or passwords came from here: try again in {seconds} s.",
                kind="rate_limit_error",
                code="too_many_attempts",
                headers={"Retry-After": str(seconds)},
            )

    def add(self, address: str) -> None:
        """One more wrong guess."""
        now = self._clock()
        with self._lock:
            count, at = self._entries.pop(address, (0, now))
            self._entries[address] = (1 if now - at > RESET_S else count + 1, now)
            while len(self._entries) > MAX_ENTRIES:
                self._entries.popitem(last=False)

    @staticmethod
    def _wait(count: int) -> float:
        return min(MAX_DELAY_S, 2.0 ** max(0, min(count - FREE_ATTEMPTS, 10)))


def _hash(value: str) -> bytes:
    return hashlib.sha256(value.encode("utf-8", "surrogateescape")).digest()
