"""The recipe in a run's folder: what the run was made with, and what a resumed one may change of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from encoder.checkpoint import atomic_path
from encoder.errors import CheckpointError
from training.trainer.checkpoints import checkpoints
from training.trainer.recipe import read_recipe, to_yaml

RECIPE_FILE = "recipe.yaml"
SHOWN = 60  # characters of a value

# Where a run writes, when it saves, logs, measures and stops, and how it uses time and memory: the weights
# after a step do not depend on these, but for rounding. Every other setting stays as the run began with it.
CHANGEABLE = {
    *(f"loop.{name}" for name in ("out", "checkpoint_every", "keep_checkpoints", "log_every", "modules")),
    *(f"loop.{name}" for name in ("evaluate_every", "stop_after_s", "trackers", "compile")),
    *("gradient_checkpointing", "model.gradient_checkpointing", "recompute_cheap", "passes_in_turn"),
    *("threads", "max_missing", "feature_cache", "text_cache", "teacher.cache"),
}
# A figure means one thing in a run: these change where the old recipe or the new one measures nothing.
MEASURED_ON = {
    *("held_out", "held_out_batches", "evaluate_clips", "evaluate_examples", "evaluate_records"),
    "test",  # the views that fine-tuning is measured on, also during training
}


def keep_recipe(recipe: Any) -> None:
    """Write a recipe with all its settings into the folder of its run, atomically. Raises OSError."""
    with atomic_path(Path(recipe.loop.out) / RECIPE_FILE) as temporary:
        temporary.write_text(to_yaml(recipe), encoding="utf-8")


def check_resumed(recipe: Any) -> None:
    """Raises CheckpointError when the run in `loop.out` began with other settings, ConfigError when what it
    kept of them cannot be read. A run of an earlier version kept nothing, and one without a checkpoint begins
    anew.
    """
    out = Path(recipe.loop.out)
    if not checkpoints(out) or not (out / RECIPE_FILE).exists():
        return
    before = read_recipe(type(recipe), out / RECIPE_FILE)
    may_change = CHANGEABLE
    if not (before.loop.evaluate_every and recipe.loop.evaluate_every):
        may_change = CHANGEABLE | MEASURED_ON
    changed = [
        f"{key} {_shown(old)}, not {_shown(new)}"
        for key, old, new in _differences(asdict(before), asdict(recipe), may_change)
    ]
    if changed:
        moved = "" if before.loop.out == recipe.loop.out else f" loop.out={out}"
        raise CheckpointError(
            f"The run in {out} began with {'; '.join(changed)}: go on with what it began with (--config "
            f"{out / RECIPE_FILE}{moved}), or begin another run in another loop.out, from the result of this "
            "one if it is to learn more."
        )


def _differences(old: Any, new: Any, may_change: set[str], place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys, as overrides name them, whose values differ, and both values; None where there is none."""
    if place in may_change:
        return
    pairs: Iterator[tuple[Any, Any, Any]] | None = None
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = ((name, old.get(name), new.get(name)) for name in {**old, **new})
    elif all(isinstance(one, (list, tuple)) and any(isinstance(o, dict) for o in one) for one in (old, new)):
        pairs = ((number, *both) for number, both in enumerate(zip_longest(old, new)))
    if pairs is None:
        if old != new:
            yield place, old, new
        return
    for name, before, after in pairs:
        yield from _differences(before, after, may_change, f"{place}.{name}" if place else str(name))


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
