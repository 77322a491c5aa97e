"""The encoder that a stage starts from: new or from weights, which pooling head serves which token count, and
class heads for other classes.

A model trained on Kinetics-710 already knows the 400 classes of Kinetics-400: their rows are kept, in the new
order, in all three heads (the released script handles a single `head.weight` only, and leaves a FluxViT's
heads random).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from encoder.checkpoint import load_encoder
from encoder.config import SIZES, FluxViTConfig
from encoder.errors import CheckpointError, ConfigError, DataError
from encoder.fluxvit import FluxViT

# Settings that change no weight's shape or start.
BESIDE_WEIGHTS = ("drop_path", "gelu", "image_positions", "frames_range", "resolution_range")


def _size(name: str) -> FluxViTConfig:
    if name not in SIZES:
        raise ConfigError(f"encoder.size must be one of {', '.join(SIZES)}, not {name!r}.")
    return SIZES[name]


@dataclass(frozen=True)
class EncoderSource:
    """A size with changed settings, or weights to start from (official file or saved folder).

    size: "micro" for a new encoder; weights have their own, which may be named. settings: beside weights only
    those that no weight depends on. Drop path belongs to the run, not to the weights: 0 unless it is said.
    """

    size: str | None = None
    init: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> FluxViTConfig:
        """Dimensions of a new encoder; raises ConfigError."""
        return FluxViTConfig.from_dict({**_size(self.size or "micro").to_dict(), **self.settings})

    def build(self) -> FluxViT:
        """The encoder; raises ConfigError or CheckpointError."""
        if self.init is None:
            return FluxViT(self.config())
        start = load_encoder(self.init)
        encoder = FluxViT(self._beside(start.config))
        encoder.load_state_dict(start.state_dict())
        return encoder

    def _beside(self, stored: FluxViTConfig) -> FluxViTConfig:
        """The weights' configuration with what may be set beside them; raises ConfigError for the rest."""
        size = _size(self.size) if self.size is not None else stored
        if (size.embed_dim, size.depth) != (stored.embed_dim, stored.depth):
            raise ConfigError(
                f"encoder.size is {self.size!r}, but {self.init} is {stored.embed_dim} wide and "
                f"{stored.depth} blocks deep: leave encoder.size out."
            )
        wanted = FluxViTConfig.from_dict({**stored.to_dict(), "drop_path": 0.0, **self.settings})
        for name in self.settings:
            if name not in BESIDE_WEIGHTS and getattr(wanted, name) != getattr(stored, name):
                raise ConfigError(
                    f"encoder.settings.{name} is {self.settings[name]!r}, but the weights of encoder.init "
                    f"have {getattr(stored, name)!r}: leave it out."
                )
        return wanted


def check_token_counts(num_tokens: Sequence[int], **per_count: Sequence[Any] | None) -> None:
    """Raises ConfigError unless counts are positive and largest first.

    per_count: settings that must hold one value for each count, or be None.
    """
    if not num_tokens or min(num_tokens) < 1 or list(num_tokens) != sorted(num_tokens, reverse=True):
        raise ConfigError(f"num_tokens must be positive, largest first, not {list(num_tokens)}.")
    for name, values in per_count.items():
        if values is not None and len(values) != len(num_tokens):
            raise ConfigError(f"{name} must hold one value for each of {len(num_tokens)} token counts.")


def pool_heads(num_tokens: Sequence[int], pools: tuple[int, ...] | None) -> tuple[int, ...]:
    """Pooling head of each token count: `pools`, or 0 for the first, 1 for the second; 1 for a single one."""
    if pools is not None:
        return pools
    return (1,) if len(num_tokens) == 1 else tuple(range(len(num_tokens)))


def read_head_map(path: str | Path, classes: Sequence[str]) -> list[int]:
    """Row of the old head for each new class.

    path: a JSON list of row numbers, one per new class (the released label_map files), or a text file of the
    old classes' names, one per line, among which `classes` are looked up. Raises DataError when a class is
    not there or the file is malformed.
    """
    try:
        text = Path(path).read_text()
        if Path(path).suffix == ".json":
            rows = json.loads(text)
            if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
                raise ValueError("it must be a list of row numbers")
            return rows
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the class map {path}: {error}.") from error
    if not classes:
        raise DataError(f"Names in {path} need the names of the new classes: give the data a classes file.")
    known = {plain_name(name): row for row, name in enumerate(text.splitlines()) if name.strip()}
    unknown = [name for name in classes if plain_name(name) not in known]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(classes)} classes are not in {path}: the first is {unknown[0]!r}."
        )
    return [known[plain_name(name)] for name in classes]


def plain_name(name: str) -> str:
    """As Kinetics releases spell one class in several ways: "Playing_guitar", '"playing guitar"'."""
    return " ".join(name.strip().strip("\"'").replace("_", " ").lower().split())


def slice_heads(tensors: Mapping[str, Tensor], rows: Sequence[int], heads: int) -> dict[str, Tensor]:
    """Tensors of an encoder whose `heads` class heads hold the given rows of the old ones.

    A file with one `head.weight` gives its rows to all heads. Raises CheckpointError when the file has no
    head, or too few rows.
    """
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    for number in range(heads):
        for kind in ("weight", "bias"):
            old = tensors.get(f"head.{number}.{kind}", tensors.get(f"head.{kind}"))
            if old is None:
                raise CheckpointError(f"The weights have no head.{number}.{kind} to take classes from.")
            if rows and max(rows) >= len(old):
                raise CheckpointError(
                    f"The class map asks for row {max(rows)} of a head that has {len(old)} classes."
                )
            result[f"head.{number}.{kind}"] = old[list(rows)].clone()
    return result
