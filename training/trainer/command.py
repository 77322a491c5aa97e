"""The command line that the stages share: a recipe in, a run, one line for whatever is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training.command_line import command_parser, run_command
from training.trainer.loop import Stage, train
from training.trainer.recipe import read_recipe, to_yaml
from training.trainer.run_recipe import check_resumed


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

    def run(args: argparse.Namespace) -> None:
        recipe = read_recipe(recipe_kind, args.config, args.overrides)
        if args.print:
            print(to_yaml(recipe), end="")
            return
        for name, (_, instead) in others.items():
            if getattr(args, name):
                instead(recipe)
                return
        if args.resume:
            check_resumed(recipe)  # before anything loads
        train(stage_of(recipe), recipe.optim, recipe.loop, resume=args.resume, recipe=recipe)

    parser = stage_parser(program, doc, {name: text for name, (text, _) in others.items()})
    return run_command(parser, run, argv, intermixed=True)


def stage_parser(program: str, doc: str | None, flags: Mapping[str, str]) -> argparse.ArgumentParser:
    """The options of every stage. flags: the stage's own, with their help."""
    parser = command_parser(
        program,
        doc,
        "Any setting can be overridden: optim.lr=5e-4 loop.out=runs/mine. On several GPUs: accelerate "
        f"launch -m {program} --config ...",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe from training/recipes")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint in loop.out, with the settings that the run began with",
    )
    parser.add_argument(
        "--print", action="store_true", help="print the recipe with its base and all settings, and end"
    )
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    return parser
