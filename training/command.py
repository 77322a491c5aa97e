"""The command line that the stages share: a recipe in, a run, one line for whatever is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from encoder.errors import FluxChatError
from training.config import parse_command
from training.loop import Stage, train


def run_stage(
    recipe_kind: type[Any],
    stage_of: Callable[[Any], Stage],
    program: str,
    doc: str | None,
    argv: Sequence[str] | None = None,
) -> int:
    """Read the recipe that `argv` names, train its stage; the exit status, 2 after a clear error.

    recipe_kind: a dataclass with `optim` and `loop`. program: the module, for `--help`.
    """
    try:
        recipe, resume = parse_command(recipe_kind, argv, program, doc)
        train(stage_of(recipe), recipe.optim, recipe.loop, resume=resume)
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
