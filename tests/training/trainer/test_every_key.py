"""Every key of every recipe has a reader: what nothing reads would be set in vain."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tests import ROOT
from training.data.datasets import NEEDS

ROOMS = ("training", "llm_bridge", "encoder")


def recipe_of(stage: str) -> Any:
    module = importlib.import_module(f"training.{stage}")
    return next(
        kind
        for kind in vars(module).values()
        if getattr(kind, "stage", None) == stage and kind.__module__ == module.__name__
    )


def tables(kind: Any) -> Iterator[Any]:
    """A recipe's dataclass and those inside it."""
    yield kind
    for hint in get_type_hints(kind).values():
        for inner in (hint, *get_args(hint)):
            for part in (inner, *get_args(inner)):
                if dataclasses.is_dataclass(part) and isinstance(part, type):
                    yield from tables(part)


@cache
def readings() -> dict[str, set[str]]:
    """Names that are read as attributes or by getattr, and the places where: file and class."""
    found: dict[str, set[str]] = {}

    def visit(node: ast.AST, place: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = place
            if isinstance(child, ast.FunctionDef) and child.name == "__post_init__":
                inner = f"{place} check"  # a check alone has no effect
            if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
                found.setdefault(child.attr, set()).add(inner)
            visit(child, inner)

    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            visit(ast.parse(path.read_text()), str(path.relative_to(ROOT)))
    return found


KINDS = {kind for stage in NEEDS for kind in tables(recipe_of(stage))}
KEYS = sorted({(kind.__name__, f.name) for kind in KINDS for f in dataclasses.fields(kind)})
# Turned into another key where the recipe is read (num_tokens, see the tests of Flux-UMT).
ONLY_CHECKED = {("UmtRecipe", "mask_ratio")}


@pytest.mark.parametrize(("table", "key"), KEYS, ids=lambda value: value)
def test_every_key_is_read(table: str, key: str) -> None:
    places = {place for place in readings().get(key, ()) if not place.endswith(" check")}
    if (table, key) in ONLY_CHECKED:
        assert readings()[key]
        return
    # What fills a table is no reader of it, and neither is the estimate of costs.
    assert places - {"training/cost.py", "training/trainer/recipe.py"}, f"nothing reads {table}.{key}"


def test_the_search_finds_what_nothing_reads(tmp_path: Path) -> None:
    assert len(KEYS) > 100
    assert "no_such_key" not in readings()
