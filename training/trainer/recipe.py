"""Recipes: a YAML file, the one it is based on, and `key=value` overrides become a frozen dataclass, or one
clear error.

    stage: finetune
    base: finetune_k400_small.yaml      # this file holds only what differs
    optim: {epochs: 3}

python -m training.STAGE --config training/recipes/STAGE.yaml optim.lr=5e-4 loop.out=runs/mine
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from encoder.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

# Each is a command, python -m training.STAGE.
STAGES = ("umt", "finetune", "clip", "projector_warmup", "chat_stage1", "chat_lora")
RENAMED_STAGES = {"warm_start": "projector_warmup"}
# The seed of a step is a multiple of it, which must fit into 64 bits.
MOST_SEED = 2**32 - 1
# Settings that count from the end where they are negative; no other number may be.
SIGNED = ("vision_depth",)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine decay. batch_size is global: all ranks and accumulation together.

    layer_decay: factor by which the rate shrinks from each encoder block to the one below (see
    `optim.parameter_groups`). scale_lr: lr, min_lr and warmup_lr are meant for a batch of 256 and grow
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
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas must lie from 0 to below 1, not {list(self.betas)}.")
        for name in ("weight_decay", "min_lr"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name} must not be negative, not {getattr(self, name)}.")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ConfigError(f"optim.clip_grad must be positive, or null for none, not {self.clip_grad}.")
        for name in ("min_lr", "warmup_lr"):
            if (value := getattr(self, name)) is not None and value > self.lr:
                raise ConfigError(f"optim.{name} must not exceed optim.lr {self.lr}, not be {value}.")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay must lie above 0 and up to 1, not {self.layer_decay}.")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Where a run writes, how it computes, and when it saves, logs and stops.

    modules: dotted names whose gradient norms are logged besides those of the top-level parts.
    trackers: where figures go besides metrics.jsonl and TensorBoard. compile: have torch.compile make the
    encoder's kernels, and those of an InternVideo2 teacher, which takes a minute for the first sizes.
    """

    out: str
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: bool = False
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 10
    evaluate_every: int = 0
    max_steps: int | None = None
    stop_after_s: float | None = None
    modules: tuple[str, ...] = ()
    trackers: tuple[Literal["trackio", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise ConfigError("loop.out must name the folder of the run, such as runs/mine.")
        if not 0 <= self.seed <= MOST_SEED:
            raise ConfigError(f"loop.seed must lie from 0 to {MOST_SEED}, not {self.seed}.")
        for name in ("checkpoint_every", "keep_checkpoints", "log_every", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"loop.{name} must be at least 1, not {value}.")
        if self.evaluate_every < 0:
            raise ConfigError(f"loop.evaluate_every must not be negative, not {self.evaluate_every}.")


# -- values to dataclasses ----------------------------------------------------------------------------------


def build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass from nested plain values; raises ConfigError for unknown keys, wrong types and bounds.

    A recipe's `stage`, where it is named, must be that of the dataclass (its class variable `stage`). A class
    variable `renamed` tells the new names of settings that had others.
    """
    from pydantic import ValidationError  # read here: a dataclass made by hand needs no validation

    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a table of settings, not {values!r}.")
    if (stage := getattr(kind, "stage", None)) is not None:
        values = dict(values)
        check_stage(values.pop("stage", stage), stage, where)
    try:
        # As JSON, whose lists serve as tuples, and whose numbers and texts are never taken for each other.
        text = json.dumps([values], default=str)
        built = _adapter(kind).validate_json(text, strict=True)[0]  # type: ignore[arg-type]
    except ValidationError as error:
        # An unknown key tells more than the one that is lacking in its place.
        first = min(error.errors(), key=lambda one: one["type"] != "unexpected_keyword_argument")
        raise ConfigError(_explain(kind, first, values, where)) from None
    except ConfigError as error:
        raise ConfigError(f"{': '.join((where, *_place(kind, values)))}: {error}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} holds something that is no setting: {error}.") from None
    if negative := next(_negative(values), None):
        place, value = negative
        raise ConfigError(f"{where}: {place} must not be negative, not {value}.")
    return built


def _negative(values: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Places and values of the negative numbers among plain values."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name not in SIGNED:
                yield from _negative(value, f"{place}.{name}" if place else str(name))
    elif isinstance(values, (list, tuple)):
        for number, value in enumerate(values):
            yield from _negative(value, f"{place}[{number}]")
    elif isinstance(values, (int, float)) and values < 0:
        yield place, values


def check_least(config: Any, least: int, *names: str) -> None:
    """Raises ConfigError for a setting, or an entry of one, that is below `least`; None is none."""
    for name in names:
        value = getattr(config, name)
        if any(one < least for one in (value if isinstance(value, tuple) else (value,)) if one is not None):
            shown = list(value) if isinstance(value, tuple) else value
            raise ConfigError(f"{name} must be at least {least}, not {shown}.")


def check_share(config: Any, *names: str) -> None:
    """Raises ConfigError for a setting that does not lie from 0 to 1."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name} must lie from 0 to 1, not {getattr(config, name)}.")


def check_stage(named: Any, stage: str, where: str) -> None:
    """Raises ConfigError when a recipe of the stage `named` is read as one of `stage`."""
    if new := RENAMED_STAGES.get(named if isinstance(named, str) else ""):
        raise ConfigError(f"{where}: the stage {named} is now called {new}: write `stage: {new}`.")
    if named not in STAGES:
        near = _nearest(named, STAGES)
        raise ConfigError(f"{where}: stage must be one of {', '.join(STAGES)}, not {named!r}{near}.")
    if named != stage:
        raise ConfigError(
            f"{where} is a recipe of the stage {named}: run it with python -m training.{named}."
        )


@cache
def _adapter(kind: type[T]) -> TypeAdapter[tuple[T]]:
    from pydantic import ConfigDict, TypeAdapter

    # In a tuple: the settings of an adapter do not reach a dataclass that stands alone.
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    return TypeAdapter(tuple[kind], config=config)  # type: ignore[valid-type, arg-type]


NAMES = {"int_type": "int", "float_type": "float", "bool_type": "bool", "string_type": "str"}


def _explain(kind: type[Any], error: Any, values: Any, where: str) -> str:
    """One sentence about what pydantic found."""
    _, *keys = error["loc"]
    kind_of_error = error["type"]
    if kind_of_error in ("unexpected_keyword_argument", "missing"):
        *keys, last = keys
    place, hint, value = where, kind, values
    for key in keys:
        place += f"[{key}]" if isinstance(key, int) else f": {key}"
        hint, value = _inner(hint, key), _value_at(value, key)
    if kind_of_error == "unexpected_keyword_argument":
        if new := getattr(hint, "renamed", {}).get(last):
            return f"{place}: the setting {last!r} is now named {new}."
        known = [field.name for field in dataclasses.fields(hint)]
        near = _nearest(last, known)
        return f"{place} has the unknown setting {last!r}{near}: known are {', '.join(known)}."
    if kind_of_error == "missing" and isinstance(last, str):
        return f"{place} lacks the setting {last!r}."
    if kind_of_error in ("missing", "too_long", "too_short"):
        return f"{place} must hold {len(get_args(hint))} values, not {len(value)}."
    if kind_of_error == "literal_error":
        return f"{place} must be one of {', '.join(map(str, get_args(hint)))}, not {value!r}."
    if kind_of_error in ("dataclass_type", "dict_type"):
        return f"{place} must be a table of settings, not {value!r}."
    if kind_of_error == "tuple_type":
        return f"{place} must be a list, not {value!r}."
    if kind_of_error in NAMES:
        return f"{place} must be {NAMES[kind_of_error]}, not {value!r}."
    return f"{place} is {value!r}: {error['msg'][:1].lower()}{error['msg'][1:]}."


def _nearest(name: Any, known: Iterable[str]) -> str:
    """In brackets, the known name that `name` may be meant for."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f" (nearest is {near[0]!r})" if near else ""


def _inner(hint: Any, key: str | int) -> Any:
    """The declared type of a part of a value, without None."""
    if dataclasses.is_dataclass(hint):
        return _some(get_type_hints(hint)[str(key)])
    arguments = get_args(hint)
    if get_origin(hint) is tuple:
        return _some(arguments[0] if arguments[-1] is Ellipsis else arguments[int(key)])
    return _some(arguments[-1]) if arguments else Any


def _some(hint: Any) -> Any:
    """A type without None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _value_at(value: Any, key: str | int) -> Any:
    return value[key] if isinstance(value, (Mapping, list, tuple)) else value  # type: ignore[index]


def _place(kind: type[Any], values: Mapping[str, Any]) -> list[str]:
    """The keys that lead to the first table of which its dataclass says that it is wrong."""
    for name, hint in get_type_hints(kind).items():
        hint, value = _some(hint), values.get(name)
        parts = [(name, hint, value)]
        if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
            parts = [(f"{name}[{place}]", _some(get_args(hint)[0]), one) for place, one in enumerate(value)]
        for place, inner, one in parts:
            if dataclasses.is_dataclass(inner) and isinstance(one, Mapping):
                try:
                    _adapter(inner).validate_json(json.dumps([one], default=str), strict=True)  # type: ignore[arg-type]
                except ConfigError:
                    return [place, *_place(inner, one)]  # type: ignore[arg-type]
                except ValueError:  # pydantic's
                    continue
    return []


def to_yaml(recipe: Any) -> str:
    """A recipe with all its settings, as a file that reads back as the same recipe."""
    values = json.loads(json.dumps({"stage": recipe.stage, **dataclasses.asdict(recipe)}))
    heading = f"# python -m training.{recipe.stage} --config THIS_FILE\n"
    return heading + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


# -- files to values ----------------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # libyaml's is faster
    """YAML in which 1e-3 is a number, and no key stands twice in a table."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises ConstructorError for a key that is there already."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    """A text; a path that begins with ~/ is spelled out, which no shell does in a file or after `=`."""
    text = loader.construct_scalar(node)
    return os.path.expanduser(text) if text.startswith("~/") else text


_Loader.add_constructor("tag:yaml.org,2002:str", _text)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_recipe(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """A recipe file with `dotted.key=value` overrides; raises ConfigError naming file and key."""
    return build(kind, read_values(path, overrides), str(path))


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a recipe file on top of those of its base, with overrides; raises ConfigError."""
    values = _read(Path(path), ())
    for override in overrides:
        _override(values, override)
    return values


def _read(path: Path, heirs: tuple[Path, ...]) -> dict[str, Any]:
    """heirs: the recipes that are based on this one, nearest last."""
    if path.resolve() in [heir.resolve() for heir in heirs]:
        way = " and ".join(str(heir) for heir in heirs)
        raise ConfigError(f"The recipe {path} is its own base, by way of {way}.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except OSError as error:
        whose = f", the base of {heirs[-1]}" if heirs else ""
        raise ConfigError(f"Cannot read the recipe {path}{whose}: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a table of settings.")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must name a recipe, not {base!r}.")
    return _merge(_read(path.parent / base, (*heirs, path)), values)


def _merge(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged, everything else replaces what the base has."""
    merged = dict(base)
    for key, value in values.items():
        before = merged.get(key)
        both = isinstance(before, dict) and isinstance(value, dict)
        merged[key] = _merge(before, value) if both else value  # type: ignore[arg-type]
    return merged


def _override(values: dict[str, Any], override: str) -> None:
    """Put `dotted.key=value` into place."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"An override is written key=value, not {override!r}.")
    table: Any = values
    *parents, last = key.split(".")
    for parent in parents:
        table = _enter(table, parent)
        if not isinstance(table, (dict, list)):
            raise ConfigError(f"{override!r} does not fit: {parent!r} is not a table.")
    place: Any = last
    if isinstance(table, list):
        if not (last.isdigit() and int(last) < len(table)):
            raise ConfigError(
                f"{override!r} does not fit: the list {parents[-1]!r} has {len(table)} entries, from 0 on."
            )
        place = int(last)
    elif not isinstance(table, dict):
        raise ConfigError(f"{override!r} does not fit: {parents[-1]!r} is not a table.")
    try:
        table[place] = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{override!r} is not valid YAML: {' '.join(str(error).split())}.") from error


def _enter(table: Any, key: str) -> Any:
    """What `key` names in a table or, as a number from 0, in a list; None when a list has no such place."""
    if isinstance(table, list):
        return table[int(key)] if key.isdigit() and int(key) < len(table) else None
    return table.setdefault(key, {})


def maker_of(result: str, path: Path, heirs: Sequence[Path] = ()) -> Path | None:
    """The recipe whose run writes `result`: in the folder of the recipe `path`, or in one beside it.

    heirs: recipes that are not looked at.
    """
    beside = sorted(path.parent.glob("*.yaml")), sorted(path.parent.parent.glob("*/*.yaml"))
    for other in dict.fromkeys(chain.from_iterable(beside)):
        if other == path or other in heirs:
            continue
        try:
            loop = read_values(other).get("loop")
        except ConfigError:  # a neighbour that is no recipe
            continue
        if isinstance(loop, dict) and Path(result).parent == Path(str(loop.get("out"))):
            return other
    return None
