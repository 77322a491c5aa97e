"""Recipes: a YAML file and `key=value` overrides become a frozen dataclass, or one clear error.

python -m training.STAGE --config training/recipes/STAGE.yaml optim.lr=5e-4 loop.out=runs/mine
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from encoder.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine decay. batch_size is global: all ranks and accumulation together.

    layer_decay: factor by which the rate shrinks from each encoder block to the one below (see
    `schedule.parameter_groups`). scale_lr: lr, min_lr and warmup_lr are meant for a batch of 256 and grow
    with batch_size. warmup_lr: where the warm-up starts; None starts one step above zero.
    """

    lr: float
    batch_size: int
    micro_batch: int
    epochs: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    min_lr: float = 0.0
    clip_grad: float | None = 1.0
    layer_decay: float = 1.0
    scale_lr: bool = False
    warmup_lr: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "batch_size", "micro_batch", "epochs", "eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optim.{name} must be positive, not {getattr(self, name)}.")
        if self.batch_size % self.micro_batch:
            raise ConfigError(
                f"optim.batch_size {self.batch_size} must be a multiple of micro_batch {self.micro_batch}."
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"optim.warmup_ratio must lie from 0 to below 1, not {self.warmup_ratio}.")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay must lie above 0 and up to 1, not {self.layer_decay}.")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Where a run writes, how it computes, and when it saves, logs and stops.

    modules: dotted names whose gradient norms are logged besides those of the top-level parts.
    trackers: where figures go besides metrics.jsonl and TensorBoard.
    """

    out: str
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 10
    evaluate_every: int = 0
    max_steps: int | None = None
    stop_after_s: float | None = None
    modules: tuple[str, ...] = ()
    trackers: tuple[Literal["trackio", "wandb"], ...] = ()


def build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass from nested plain values; raises ConfigError for unknown keys and wrong types."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a table of settings, not {values!r}.")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := [key for key in values if key not in fields]:
        raise ConfigError(f"{where} has the unknown setting {unknown[0]!r}: known are {', '.join(fields)}.")
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks the setting {missing[0]!r}.")
    converted = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return kind(**converted)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """One value as its declared type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} must be one of {', '.join(map(str, arguments))}, not {value!r}.")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {value!r}.")
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise ConfigError(f"{where} must hold {len(kinds)} values, not {len(value)}.")
        return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table, not {value!r}.")
        return dict(value)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, not {value!r}.")
    return value


def read_recipe(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """A recipe file with `dotted.key=value` overrides; raises ConfigError naming file and key."""
    return build(kind, read_values(path, overrides), str(path))


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a recipe file with its overrides; raises ConfigError."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a table of settings.")
    for override in overrides:
        key, found, text = override.partition("=")
        if not found:
            raise ConfigError(f"An override is written key=value, not {override!r}.")
        table: Any = values
        *parents, last = key.split(".")
        for parent in parents:
            table = _enter(table, parent)
            if not isinstance(table, (dict, list)):
                raise ConfigError(f"{override!r} does not fit: {parent!r} is not a table.")
        if not isinstance(table, dict):
            raise ConfigError(f"{override!r} does not fit: {parents[-1]!r} is not a table.")
        table[last] = yaml.safe_load(text)
    return values


def _enter(table: Any, key: str) -> Any:
    """What `key` names in a table or, as a number from 0, in a list; None when a list has no such place."""
    if isinstance(table, list):
        return table[int(key)] if key.isdigit() and int(key) < len(table) else None
    return table.setdefault(key, {})


def parse_command(kind: type[T], argv: Sequence[str] | None, program: str, doc: str | None) -> tuple[T, bool]:
    """The command line shared by all stages: (recipe, resume)."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any setting can be overridden: optim.lr=5e-4 loop.out=runs/mine. On several GPUs: accelerate "
        f"launch -m {program} --config ...",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe from training/recipes")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in loop.out"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    args = parser.parse_args(argv)
    return read_recipe(kind, args.config, args.overrides), args.resume
