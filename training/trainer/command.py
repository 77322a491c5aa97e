"""The command line that the stages share: a recipe in, a run, one line for whatever is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from encoder.errors import FluxChatError
from training.trainer.loop import Stage, train
from training.trainer.recipe import Command, parse_command, to_yaml


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
