"""What a second question need not pay for: visual embeddings and KV prefixes, bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

V = TypeVar("V")


@dataclass(frozen=True)
class CacheStats:
    """Counters since the cache was made, and what it holds now."""

    hits: int
    misses: int
    entries: int
    bytes: int


class ByteLRU(Generic[V]):
    """A thread-safe mapping that drops the least recently used entries beyond `limit_bytes`."""

    def __init__(self, limit_bytes: int, size_of: Callable[[V], int]) -> None:
        self._limit, self._size_of = limit_bytes, size_of
        self._entries: OrderedDict[Hashable, V] = OrderedDict()
        self._bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        """The entry, now the most recently used, or None."""
        with self._lock:
            if key not in self._entries:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: Hashable, value: V) -> None:
        """Add or replace; a value beyond the whole limit is not kept."""
        with self._lock:
            if key in self._entries:
                self._bytes -= self._size_of(self._entries.pop(key))
            self._entries[key] = value
            self._bytes += self._size_of(value)
            while self._bytes > self._limit:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= self._size_of(dropped)

    def clear(self) -> None:
        """Forget everything."""
        self.discard(lambda _: True)

    def discard(self, unwanted: Callable[[Hashable], bool]) -> None:
        """Forget the entries whose key is unwanted."""
        with self._lock:
            for key in [key for key in self._entries if unwanted(key)]:
                self._bytes -= self._size_of(self._entries.pop(key))

    @property
    def stats(self) -> CacheStats:
        """Counters and content."""
        with self._lock:
            return CacheStats(self._hits, self._misses, len(self._entries), self._bytes)


@dataclass
class Prefix:
    """A KV cache and the keys (see Prompt.cache_keys) of the positions it holds; scope: who may use it."""

    keys: tuple[int, ...]
    kv: Any
    scope: str = ""


class PrefixCache:
    """KV caches of past prompts, found by their longest common prefix with a new one.

    An entry is taken out while it is in use, rewound to the common prefix, extended, and put back; so no two
    generations ever write to one KV cache.
    """

    def __init__(self, limit_bytes: int, bytes_per_token: int) -> None:
        self._limit, self._per_token = limit_bytes, bytes_per_token
        self._entries: list[Prefix] = []  # least recently used first
        self._hits = self._misses = 0
        self._lock = threading.Lock()

    def take(self, keys: Sequence[int], minimum: int = 16, scope: str = "") -> Prefix | None:
        """The scope's entry sharing the longest prefix with `keys`, rewound; None if none shares `minimum`.

        An entry that would lose more than half, video and all, stays: a chat template that all prompts begin
        with is not worth another conversation. At least one position is left to compute, since the next
        token's scores come from it.
        """
        with self._lock:
            best, shared = None, minimum - 1
            for entry in self._entries:
                if entry.scope != scope:
                    continue
                common = _common(entry.keys, keys, len(keys) - 1)
                worth = 2 * common >= len(entry.keys) or any(key < 0 for key in entry.keys[:common])
                if common > shared and worth:
                    best, shared = entry, common
            if best is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.remove(best)
        if (excess := best.kv.get_seq_length() - shared) > 0:
            best.kv.crop(-excess)
        return Prefix(tuple(keys[:shared]), best.kv, scope)

    def put(self, prefix: Prefix) -> None:
        """Keep a KV cache for later; drops the least recently used beyond the limit."""
        if not rewindable(prefix.kv):
            return
        with self._lock:
            self._entries.append(prefix)
            while self._entries and self._size() > self._limit:
                self._entries.pop(0)

    def clear(self, scope: str | None = None) -> None:
        """Forget everything, or what one scope left."""
        with self._lock:
            self._entries = [] if scope is None else [e for e in self._entries if e.scope != scope]

    def _size(self) -> int:
        return sum(len(entry.keys) for entry in self._entries) * self._per_token

    @property
    def stats(self) -> CacheStats:
        """Counters and content."""
        with self._lock:
            return CacheStats(self._hits, self._misses, len(self._entries), self._size())


def rewindable(kv: Any) -> bool:
    """Whether a KV cache keeps every position, so that cropping gives what a shorter prompt would have."""
    layers = getattr(kv, "layers", None) or []
    return bool(layers) and all(
        type(layer).__name__ == "DynamicLayer" and not getattr(layer, "is_sliding", False) for layer in layers
    )


def _common(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    count = min(len(first), len(second), limit)
    if first[:count] == tuple(second[:count]):
        return count
    return next(i for i in range(count) if first[i] != second[i])
