"""The command line that the stages share: a recipe in, a run, one line for whatever is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from encoder.errors import FluxChatError
from training.trainer.loop import Stage, train
from training.trainer.recipe import read_recipe, to_yaml

T = TypeVar("T")


def run_stage(
    recipe_kind: type[Any],
    stage_of: Callable[[Any], Stage],
    program: str,
    doc: str | None,
    argv: Sequence[str] | None = None,
    *,
    others: Mapping[str, tuple[str, Callable[[Any], object]]] | None = None,
) -> int:
    """Read the recipe that `argv` names, train its stage; the exit status, 2 after a clear error.

    recipe_kind: a dataclass with `optim` and `loop`. program: the module, for `--help`. others: what the
    stage's own flags do with the recipe instead of training, each with its help.
    """
    others = others or {}
    try:
        flags = {name: text for name, (text, _) in others.items()}
        command: Command[Any] = parse_command(recipe_kind, argv, program, doc, flags)
        if command.shown:
            print(to_yaml(command.recipe, f"python -m {program} --config THIS_FILE"), end="")
            return 0
        for name in command.flags:
            others[name][1](command.recipe)
            return 0
        recipe = command.recipe
        train(stage_of(recipe), recipe.optim, recipe.loop, resume=command.resume)
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


@dataclasses.dataclass(frozen=True)
class Command(Generic[T]):
    """What a stage's command line asks for. shown: only to print the recipe; flags: the stage's own."""

    recipe: T
    resume: bool
    shown: bool
    flags: frozenset[str]


def parse_command(
    kind: type[T],
    argv: Sequence[str] | None,
    program: str,
    doc: str | None,
    flags: Mapping[str, str] | None = None,
) -> Command[T]:
    """The command line shared by all stages. flags: more of them, with their help."""
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
    parser.add_argument(
        "--print", action="store_true", help="print the recipe with its base and all settings, and end"
    )
    for name, text in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    args = parser.parse_intermixed_args(argv)
    recipe = read_recipe(kind, args.config, args.overrides)
    chosen_flags = frozenset(name for name in flags or {} if getattr(args, name))
    return Command(recipe, args.resume, args.print, chosen_flags)
