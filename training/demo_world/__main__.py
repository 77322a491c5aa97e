"""python -m training.demo_world fetch | preview | export: get the pictures, look at the world, write it as files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from encoder.errors import FluxChatError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2 after a clear error)."""
    parser = argparse.ArgumentParser(prog="python -m training.demo_world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="download and convert the sprites and photographs")
    fetching.add_argument("--stills-only", action="store_true", help="skip the animated sprites (700 MB)")
    fetching.add_argument("--force", action="store_true", help="convert again")
    arguments = parser.parse_args(argv)
    try:
        _run(arguments)
    except FluxChatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "fetch":
        from training.demo_world.assets import fetch

        print(f"sprites ready in {fetch(stills_only=arguments.stills_only, force=arguments.force)}")


if __name__ == "__main__":
    sys.exit(main())
