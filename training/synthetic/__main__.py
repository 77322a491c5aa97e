"""python -m training.synthetic fetch | preview | export: get the pictures, look at them, write videos."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.command_line import command_parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2 after a clear error)."""
    parser = command_parser("training.synthetic", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="download and convert the sprites and photographs")
    fetching.add_argument("--stills-only", action="store_true", help="skip the animated sprites (700 MB)")
    fetching.add_argument("--force", action="store_true", help="fetch and convert again")
    exporting = commands.add_parser("export", help="write videos and annotations")
    exporting.add_argument("--count", type=int, required=True, help="how many videos")
    exporting.add_argument("--out", type=Path, required=True, help="folder to write to")
    exporting.add_argument("--size", type=int, default=256, help="pixels per side (default 256)")
    exporting.add_argument("--fps", type=float, default=12.0, help="frames per second (default 12)")
    showing = commands.add_parser("preview", help="draw a contact sheet")
    showing.add_argument("--out", type=Path, required=True, help="PNG to write")
    showing.add_argument("--rows", type=int, default=12, help="how many samples (default 12)")
    showing.add_argument("--first", type=int, default=0, help="number of the first sample (default 0)")
    for command in (exporting, showing):
        command.add_argument("--split", choices=("train", "test", "unseen"), default="train")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--simple", action="store_true", help="one object, six motions, 60 nouns")
        command.add_argument("--stills-only", action="store_true", help="no animated sprites")
        command.add_argument(
            "--shapes", action="store_true", help="coloured shapes: needs no fetched sprites"
        )
    return run_command(parser, _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "fetch":
        from training.synthetic.assets import fetch

        print(f"sprites ready in {fetch(stills_only=arguments.stills_only, force=arguments.force)}")
        return
    from training.synthetic.assets import open_bank
    from training.synthetic.dataset import World
    from training.synthetic.sprites import procedural_bank
    from training.synthetic.world_config import WorldConfig

    bank = procedural_bank() if arguments.shapes else open_bank(stills_only=arguments.stills_only)
    level = WorldConfig.simple() if arguments.simple else WorldConfig()
    world = World(arguments.split, arguments.seed, level, bank)
    if arguments.command == "export":
        from training.synthetic.export import export

        print(export(world, arguments.count, arguments.out, size=arguments.size, fps=arguments.fps))
    else:
        from training.synthetic.export import contact_sheet, save_sheet

        save_sheet(contact_sheet(world, arguments.rows, arguments.first), arguments.out)
        print(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
