"""Caches for follow-up questions, bounded in bytes, and the KV caches of transformers as plain tensors."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from llm_bridge.families import Memory, family_of

V = TypeVar("V")
Layers = tuple[tuple[Tensor, Tensor], ...]  # keys and values (1, heads, length, width) of each layer


class DecodingBatch(Protocol):
    """Answers that are decoded in one pass. lengths: their positions. full: a step needs larger buffers."""

    lengths: list[int]

    @property
    def capacity(self) -> int:
        """Positions that each row of the buffers has room for."""
        ...

    @property
    def full(self) -> bool: ...

    def step(self, tokens: Sequence[int], shifts: Sequence[int] = ()) -> Tensor:
        """Append one token to every answer; logits (B, V) of the next ones.

        shifts: how far each answer's positions run ahead of its length; none by default.
        """
        ...

    def views(self, row: int) -> Layers:
        """Views of one answer's keys and values, without what a step that failed may have added."""
        ...

    def copies(self, row: int) -> Layers:
        """Copies of one answer's keys and values, which do not keep the buffers alive."""
        ...


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

    def __contains__(self, key: Hashable) -> bool:
        """Whether the entry is there; counts as no use of it."""
        with self._lock:
            return key in self._entries

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


@dataclass(frozen=True)
class Piece:
    """The KV of a stretch of a prompt, as one forward pass after those before it computed it; never changed.

    layers: keys and values (1, heads, length, width) of each that keeps positions. states: what the others,
    by number, hold at the end of the stretch; None when they were not kept.
    """

    layers: Layers
    states: dict[int, dict[str, Any]] | None = None

    @property
    def length(self) -> int:
        """Positions that it holds."""
        return self.layers[0][0].shape[2]

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of its states."""
        return _tensor_bytes(self.states or {})

    @staticmethod
    def of(kv: Any, start: int, end: int, *, states: bool = False) -> Piece:
        """A copy of the positions from `start` to `end` of a KV cache; states: with those at its end."""
        parts = tuple(
            (layer.keys[:, :, start:end].clone(), layer.values[:, :, start:end].clone())
            for layer in kv.layers
            if _keeps_positions(layer)
        )
        return Piece(parts, _states(kv) if states else None)


def joined(pieces: Sequence[Piece]) -> Layers:
    """The keys and values of consecutive pieces as those of one."""
    if len(pieces) == 1:
        return pieces[0].layers
    columns = zip(*(piece.layers for piece in pieces), strict=True)
    return tuple(
        (torch.cat([keys for keys, _ in parts], dim=2), torch.cat([values for _, values in parts], dim=2))
        for parts in columns
    )


class PrefixCache:
    """KV of past prompts in pieces, keyed by all positions up to a piece's end and by where pieces were cut.

    So a piece is only ever used where computing it anew would give the same bits. Any number of generations
    may start from the same pieces.
    """

    def __init__(self, limit_bytes: int, bytes_per_token: int) -> None:
        self._limit, self._per_token = limit_bytes, bytes_per_token
        self._pieces: OrderedDict[tuple[str, bytes], Piece] = OrderedDict()  # least recently used first
        self._bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def take(self, keys: Sequence[int], ends: Sequence[int], scope: str = "") -> list[Piece]:
        """The scope's pieces that a prompt begins with, in order.

        keys: of its positions (see Prompt.cache_keys). ends: where its pieces end, ascending.
        """
        with self._lock:
            names: list[tuple[str, bytes]] = []
            for name in _names(keys, ends, scope):
                if name not in self._pieces:
                    break
                names.append(name)
            self._hits += bool(names)
            self._misses += not names
            self._touch(names)
            return [self._pieces[name] for name in names]

    def put(self, keys: Sequence[int], ends: Sequence[int], pieces: Sequence[Piece], scope: str = "") -> None:
        """Keep the pieces that a prompt begins with; drops the least recently used beyond the limit."""
        with self._lock:
            names = list(_names(keys, ends[: len(pieces)], scope))
            for name, piece in zip(names, pieces, strict=True):
                if name not in self._pieces:
                    self._pieces[name] = piece
                    self._bytes += self._size(piece)
            self._touch(names)
            while self._bytes > self._limit:
                self._bytes -= self._size(self._pieces.popitem(last=False)[1])

    def clear(self, scope: str | None = None) -> None:
        """Forget everything, or what one scope left."""
        with self._lock:
            for name in [name for name in self._pieces if scope is None or name[0] == scope]:
                self._bytes -= self._size(self._pieces.pop(name))

    def _touch(self, names: Sequence[tuple[str, bytes]]) -> None:
        # The first piece last: those that follow it are of no use without it, and are dropped before it.
        for name in reversed(names):
            self._pieces.move_to_end(name)

    def _size(self, piece: Piece) -> int:
        return piece.length * self._per_token + piece.state_bytes

    @property
    def stats(self) -> CacheStats:
        """Counters and content."""
        with self._lock:
            return CacheStats(self._hits, self._misses, len(self._pieces), self._bytes)


def _names(keys: Sequence[int], ends: Sequence[int], scope: str) -> Iterator[tuple[str, bytes]]:
    """Cache keys of the pieces: a hash of their positions' keys and of the name of the piece before."""
    name, start = b"", 0
    for end in ends:
        name = blake2b(name + repr(tuple(keys[start:end])).encode(), digest_size=16).digest()
        yield scope, name
        start = end


def layers_of(kv: Any) -> Layers:
    """Keys and values of a KV cache of transformers."""
    return tuple((layer.keys, layer.values) for layer in kv.layers)


def memory_of(config: Any) -> Memory:
    """What a model keeps of its prompt, by the configuration of transformers."""
    from transformers import DynamicCache

    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    if kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}:
        return "positions"
    family = family_of(config)
    known = family is not None and family.memory == "states"  # others may not go on from a state rightly
    return "states" if known else "whole"


def kv_from_layers(config: Any, layers: Layers = (), states: dict[int, dict[str, Any]] | None = None) -> Any:
    """A KV cache of one sequence that begins with these keys and values, which are not copied.

    config: of the transformers model. It keeps every position, beyond a window too, so that it can be
    rewound: the model's masks hide what a window hides. states: of a Piece; they are copied.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    holders: list[Any]
    if memory_of(config) != "positions":
        kv = DynamicCache(config=config)
        holders = [layer for layer in kv.layers if _keeps_positions(layer)]
        for number, state in (states or {}).items():
            vars(kv.layers[number]).update(copy.deepcopy(state))
    else:
        kv = DynamicCache()  # without the configuration no layer has a window
        holders = [DynamicLayer() for _ in layers]
        kv.layers = list(holders)
    if layers:
        for layer, (keys, values) in zip(holders, layers, strict=True):
            DynamicLayer.lazy_initialization(layer, keys, values)
            layer.keys, layer.values = keys, values
    return kv


def rewindable(kv: Any) -> bool:
    """Whether a KV cache keeps every position and nothing else: its beginning is that of a shorter prompt."""
    layers = getattr(kv, "layers", None) or []
    return bool(layers) and all(
        type(layer).__name__ == "DynamicLayer" and not getattr(layer, "is_sliding", False) for layer in layers
    )


def _keeps_positions(layer: Any) -> bool:
    return hasattr(layer, "keys")


def _states(kv: Any) -> dict[int, dict[str, Any]]:
    """Copies of what layers hold beside keys and values, by their number."""
    return {
        number: {name: copy.deepcopy(value) for name, value in vars(layer).items() if name not in _KEY_VALUE}
        for number, layer in enumerate(kv.layers)
        if hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states")
    }


_KEY_VALUE = ("keys", "values")


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_tensor_bytes, value.values())) if isinstance(value, dict) else 0
