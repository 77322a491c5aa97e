"""Vision features of a frozen encoder: computed once per clip and plan, kept on disk, read back."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoder.checkpoint import save_tensors
from encoder.tokens import Grid, VisionTokens

SHARD_ENTRIES = 256


@dataclass(frozen=True)
class Features:
    """One clip after the encoder: tokens (K, C), cls (C,), kept (K,), when its frames were, and the pooled
    feature where the projector reads it."""

    tokens: Tensor
    cls: Tensor
    kept: Tensor
    grid: Grid
    times_s: tuple[float, ...]
    duration_s: float
    summary: Tensor | None = None

    @staticmethod
    def of(vision: VisionTokens, index: int, duration_s: float, dtype: torch.dtype) -> Features:
        """One clip of a batch, on the CPU."""
        one = vision.select(index)
        assert one.times_s is not None
        return Features(
            one.packed.to("cpu", dtype),
            one.cls[0].to("cpu", dtype),
            one.kept[0].to("cpu", torch.int32),
            one.grids[0],
            one.times_s[0],
            duration_s,
            None if one.summary is None else one.summary[0].to("cpu", dtype),
        )


def stack(features: Sequence[Features]) -> VisionTokens:
    """Several clips as one batch."""
    return VisionTokens(
        packed=torch.cat([f.tokens for f in features]),
        cls=torch.stack([f.cls for f in features]),
        kept=tuple(f.kept.long() for f in features),
        grids=tuple(f.grid for f in features),
        times_s=tuple(f.times_s for f in features),
        summary=torch.stack([f.summary for f in features]) if features[0].summary is not None else None,  # type: ignore[misc]
    )


class FeatureCache:
    """Features by key: in memory until a shard is full, then in one safetensors file per shard.

    folder None keeps nothing. Shards are written atomically; a run that died loses at most one shard's work.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._index: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        self._pending: dict[str, Features] = {}
        self._lock = threading.Lock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("shard_*.safetensors")):
                self._read_index(path)

    def __len__(self) -> int:
        return len(self._index) + len(self._pending)

    def __contains__(self, key: str) -> bool:
        return _short(key) in self._pending or _short(key) in self._index

    def get(self, key: str) -> Features | None:
        """The features, or None."""
        from safetensors import safe_open

        key = _short(key)
        with self._lock:
            if key in self._pending:
                return self._pending[key]
            if key not in self._index:
                return None
            path, number, facts = self._index[key]
        with safe_open(path, "pt") as file:
            tokens, cls, kept = (file.get_tensor(f"{number}/{part}") for part in ("tokens", "cls", "kept"))
            summary = file.get_tensor(f"{number}/summary") if facts.get("summary") else None
        grid, times = Grid(*facts["grid"]), tuple(facts["times_s"])
        return Features(tokens, cls, kept, grid, times, facts["duration_s"], summary)

    def put(self, key: str, features: Features) -> None:
        """Remember; writes a shard when enough have come."""
        if self._folder is None:
            return
        with self._lock:
            self._pending[_short(key)] = features
            if len(self._pending) >= SHARD_ENTRIES:
                self._write()

    def flush(self) -> None:
        """Write what is pending."""
        with self._lock:
            if self._pending and self._folder is not None:
                self._write()

    def _write(self) -> None:
        assert self._folder is not None
        tensors, entries = {}, {}
        for number, (key, features) in enumerate(self._pending.items()):
            for part in ("tokens", "cls", "kept"):
                tensors[f"{number}/{part}"] = getattr(features, part)
            if features.summary is not None:
                tensors[f"{number}/summary"] = features.summary
            facts = {
                "grid": list(features.grid),
                "times_s": list(features.times_s),
                "duration_s": features.duration_s,
                "summary": features.summary is not None,
            }
            entries[key] = {"number": number, **facts}
        name = hashlib.blake2b("".join(self._pending).encode(), digest_size=8).hexdigest()
        path = self._folder / f"shard_{os.getpid()}_{name}.safetensors"
        save_tensors(tensors, path, {"entries": json.dumps(entries)})
        self._pending.clear()
        self._read_index(path)

    def _read_index(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            entries = json.loads((file.metadata() or {}).get("entries", "{}"))
        for key, facts in entries.items():
            self._index[key] = (path, facts["number"], facts)


def _short(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
