"""`fluxchat map`: its arguments, and what it prints.

Exit status 0; 1 when some videos could not be answered; 2 for a wrong input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from app.library.commands import ray_options, ray_pool
from app.printed import on_a_line
from encoder.errors import ConfigError

NOT_SAMPLING = ("budget", "system", "speech", "language")
EXAMPLES = """\
examples:
  fluxchat map "Describe it in one sentence." ~/Videos --out answers.jsonl
  fluxchat map "What is in it?" 'clips/**/*.mp4' list.txt --out answers.parquet --schema schema.json
Run it again to go on where it was stopped; videos that are new, have changed or failed are asked about.
"""


def add_map_command(commands: Any, *options: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add it to the subparsers of `fluxchat`. options: add what it shares with `ask`."""
    command = commands.add_parser(
        "map",
        help="one question about many videos, an answer each into a file",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("question", help="what you want to know of each, in quotes")
    command.add_argument(
        "sources", nargs="+", metavar="VIDEOS", help="folders, files, patterns in quotes, lists (.txt)"
    )
    command.add_argument("--out", required=True, metavar="FILE", help="answers: .jsonl or .parquet")
    command.add_argument("--force", action="store_true", help="drop answers to another question in FILE")
    command.add_argument("--at-once", type=int, default=4, metavar="N", help="videos in work (4)")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    ray_options(command)
    for add in options:
        add(command)


def run_map(
    args: argparse.Namespace,
    open_chat: Callable[..., Any],
    generation: Callable[[argparse.Namespace], dict[str, Any]],
) -> int:
    """Ask about every video. open_chat, generation: make the model and the options that were given."""
    from app.ask_each import terminal
    from app.library.answers import AnswerFile, check_out
    from app.library.ask_all import Asker, LocalAsker, ask_all
    from app.library.video_files import find_videos
    from app.messages import question_text
    from encoder.budget import Budget
    from encoder.video.part import Part
    from llm_bridge.sampling import SamplingParams

    question_text(args.question)
    if args.at_once < 1:
        raise ConfigError(f"Cannot ask about {args.at_once} videos at once: give 1 or more.")
    out = Path(args.out).expanduser()
    check_out(out)
    options = generation(args)
    SamplingParams(**{name: value for name, value in options.items() if name not in NOT_SAMPLING})
    if args.budget is not None:
        Budget.of(args.budget)
    part, paths = Part.of(args.start, args.end, args.region), find_videos(args.sources)
    opened = partial(open_chat, args, batch=args.at_once, cache_mib=64)
    how: dict[str, Any] = {"part": part, "at_once": args.at_once}
    with contextlib.ExitStack() as stack:
        answers = stack.enter_context(AnswerFile(out, as_values=options.get("schema") is not None))
        pool = stack.enter_context(ray_pool(args))
        if pool is None:
            chat = stack.enter_context(opened())
            asker: Asker = LocalAsker(chat, args.question, options, **how)
        else:
            from app.library.ray_work import RayAsker

            asker = RayAsker(pool, opened, args.question, options, **how)
        report = ask_all(asker, paths, answers, force=args.force, progress=terminal())
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        for path, why in report.failed.items():
            print(on_a_line(f"{path}: ! {why}"))
        failed = f", {len(report.failed)} failed" if report.failed else ""
        print(f"{on_a_line(out)}: {report.answered} answered, {report.unchanged} were there{failed}.")
    if report.guessed:
        from app.note import guesses

        print(guesses(report.guessed, report.answered), file=sys.stderr)
    return 1 if report.failed else 0
