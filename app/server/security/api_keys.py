"""API keys: their owners, rate limits, daily quotas and usage.

    # NAME  KEY or sha256:HEX                        options
    ann     sha256:4a44dc15364204a80fe80e9039455cc1…  rate=60 quota=2000
    ben     a-long-random-text
    watch   another-one                               metrics

rate: requests a minute; quota: requests a day (UTC), counted since the server's start. Without: no limit.
metrics: may read /metrics, which shows the usage of every key; --api-key and a login always may.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.server.errors import ApiError
from encoder.errors import ConfigError

LOG = logging.getLogger("fluxchat")
DAY_S = 86400.0
POLL_S = 1.0  # how often the file is looked at, at most
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Key:
    """One key. digest: SHA-256 of it. rate: requests a minute, quota: a day; None for no limit.

    metrics: may read what all keys have used.
    """

    name: str
    digest: bytes
    rate: int | None = None
    quota: int | None = None
    metrics: bool = False


def digest(secret: str) -> bytes:
    """SHA-256 of a key, as the server keeps it."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: Path) -> list[Key]:
    """The keys of a file (see above); raises ConfigError naming the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"The file of API keys {path} cannot be read ({reason}).") from None
    keys: list[Key] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            key = _key(words)
            if any(key.name == other.name or key.digest == other.digest for other in keys):
                raise ConfigError("its name or its key is there already")
        except ConfigError as error:
            raise ConfigError(
                f"Line {number} of {path} is wrong: {error}; write NAME KEY [rate=N] [quota=N] [metrics]."
            ) from None
        keys.append(key)
    if not keys:
        raise ConfigError(
            f"There is no key in {path}: write NAME KEY [rate=N] [quota=N] [metrics], one a line."
        )
    return keys


def _key(words: Sequence[str]) -> Key:
    if len(words) < 2:
        raise ConfigError("a name and a key are needed")
    name, secret, *options = words
    if not _NAME.fullmatch(name):
        raise ConfigError("a name consists of up to 64 letters, digits and . _ - @")
    hashed = _HASHED.fullmatch(secret)
    if hashed is None and secret.startswith("sha256:"):
        raise ConfigError("sha256: needs 64 hexadecimal digits")
    metrics = "metrics" in options
    limits: dict[str, int] = {}
    for option in (option for option in options if option != "metrics"):
        what, _, number = option.partition("=")
        if what not in ("rate", "quota") or what in limits or not number.isdecimal() or not int(number[:18]):
            raise ConfigError("options are metrics, and rate=N and quota=N with a number of at least 1")
        limits[what] = int(number[:18])
    return Key(name, bytes.fromhex(hashed[1]) if hashed else digest(secret), **limits, metrics=metrics)


@dataclass
class _Usage:
    """Usage of a key. tokens: of its token bucket, as of `at`. day: which one `today` counts."""

    tokens: float
    at: float
    day: int
    today: int = 0
    total: int = 0
    refused: int = 0


class KeyRing:
    """All keys: those given, and those of a file that is read again when it changes. Thread-safe.

    clock: seconds since 1970. Raises ConfigError when the file cannot be used.
    """

    def __init__(
        self, keys: Sequence[Key] = (), file: Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._fixed, self._file, self._clock = tuple(keys), file, clock
        self._lock = threading.Lock()
        self._usage: dict[str, _Usage] = {}
        self._stamp, self._stat_at = self._stat(), clock()
        self._keys = self._all()

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, secret: str) -> Key | None:
        """The key of that secret; the comparison takes the same time for any or none."""
        self._refresh()
        wanted, match = digest(secret), None
        for key in self._keys:
            if hmac.compare_digest(wanted, key.digest):
                match = key
        return match

    def named(self, name: str) -> Key | None:
        """The key of that name, if it is still there."""
        self._refresh()
        return next((key for key in self._keys if key.name == name), None)

    def spend(self, key: Key) -> None:
        """Count a request; raises ApiError 429 past the key's rate or quota."""
        now = self._clock()
        with self._lock:
            use = self._usage.setdefault(key.name, _Usage(float(key.rate or 0), now, int(now // DAY_S)))
            if int(now // DAY_S) != use.day:
                use.day, use.today = int(now // DAY_S), 0
            if key.quota is not None and use.today >= key.quota:
                use.refused += 1
                raise _refused(f"{key.quota} requests a day", DAY_S - now % DAY_S, "quota_exceeded")
            if key.rate is not None:
                use.tokens = min(key.rate, use.tokens + max(0.0, now - use.at) * key.rate / 60)
                use.at = now
                if use.tokens < 1:
                    use.refused += 1
                    wait = (1 - use.tokens) * 60 / key.rate
                    raise _refused(f"{key.rate} requests a minute", wait, "rate_limit_exceeded")
                use.tokens -= 1
            use.today += 1
            use.total += 1

    def requests(self) -> dict[str, float]:
        """Requests that were let in, by key name."""
        with self._lock:
            return {name: use.total for name, use in self._usage.items()}

    def refusals(self) -> dict[str, float]:
        """Requests past a key's rate or quota, by key name."""
        with self._lock:
            return {name: use.refused for name, use in self._usage.items()}

    def _refresh(self) -> None:
        now = self._clock()
        with self._lock:
            if self._file is None or 0 <= now - self._stat_at < POLL_S:
                return
            self._stat_at, stamp = now, self._stat()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                self._keys = self._all()
            except ConfigError as error:
                LOG.warning("The keys stay as they were: %s", error)

    def _stat(self) -> tuple[int, int, int] | None:
        """A stamp of the file that differs when the file has changed."""
        try:
            info = self._file.stat() if self._file is not None else None
        except OSError:
            return None
        return None if info is None else (info.st_mtime_ns, info.st_size, info.st_ino)

    def _all(self) -> tuple[Key, ...]:
        return (*self._fixed, *(read_keys(self._file) if self._file is not None else ()))


def _refused(limit: str, wait: float, code: str) -> ApiError:
    seconds = max(1, math.ceil(wait))
    return ApiError(
        429,
        f"This key may make {limit}: try again in {seconds} s.",
        kind="rate_limit_error",
        code=code,
        headers={"Retry-After": str(seconds)},
    )
