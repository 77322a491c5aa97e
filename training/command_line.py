"""What the commands of this room share: a parser, one line for whatever is wrong, tables as text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from encoder.errors import FluxChatError


def command_parser(module: str, doc: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
    )


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    *,
    intermixed: bool = False,
) -> int:
    """Parse and run; the exit status, 2 after an error of this project, which is one line.

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
        print(error, file=sys.stderr)
        return 2


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
