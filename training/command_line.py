"""What the commands of this room share: a parser, one line for whatever is wrong, tables as text."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from encoder.errors import FluxChatError

# A number of a process may come again; what was said longer ago was of another launch.
SAME_LAUNCH_S = 60


def command_parser(module: str, doc: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
    )


def at_least(least: int) -> Callable[[str], int]:
    """What argparse reads a count by."""

    def count(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {number}")
        return number

    return count


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    *,
    intermixed: bool = False,
) -> int:
    """Parse and run; the exit status, 2 after an error of this project or of a file, which is one line.

    argv: default, those of the process. intermixed: arguments without a dash may stand on either side of
    options, which argparse does not offer beside subcommands. `run` also gets `command_line`, the words that
    were typed.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_intermixed_args(words) if intermixed else parser.parse_args(words)
    args.command_line = [*parser.prog.split(), *words]
    try:
        return run(args) or 0
    except FluxChatError as error:
        return _told(str(error))
    except OSError as error:
        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
            raise  # of a network: no file
        name = f" {error.filename}" if error.filename else " a file"
        return _told(
            f"Cannot read or write{name}: {error.strerror}; check the path, its rights and the disk's room."
        )


def _told(sentence: str) -> int:
    if _says_it_first(sentence):
        print(sentence, file=sys.stderr)
    return 2


def _says_it_first(sentence: str) -> bool:
    """Whether no other process of the same launch has said it: what is wrong is mostly so for all of them."""
    store = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or None in store:
        return True
    key = hashlib.blake2b(f"{store}{os.getppid()}{sentence}".encode(), digest_size=12).hexdigest()
    mark = Path(tempfile.gettempdir()) / f"fluxchat-said-{key}"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        said_s = time.time() - mark.stat().st_mtime
        mark.touch()
        return said_s > SAME_LAUNCH_S
    except OSError:
        pass
    return True


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1, rule: bool = False
) -> str:
    """Text in columns; None is a dash, numbers with a fraction have one decimal.

    left: so many columns are left-aligned, the others right-aligned; rule: dashes below the heads.
    """

    def cell(value: object) -> str:
        return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

    cells = [[cell(value) for value in row] for row in (columns, *rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    if rule:
        cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            text.ljust(width) if place < left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
