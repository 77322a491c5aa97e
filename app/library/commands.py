"""`fluxchat index` and `fluxchat search`: their arguments, and what they print.

Exit status 0; 1 when some files could not be indexed, or `--check` finds something stale; 2 for a wrong
input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from app.printed import cut_line, on_a_line
from app.speech.command import speech_options
from encoder.errors import ConfigError

if TYPE_CHECKING:
    from app.library.indexing import IndexReport
    from app.library.library import Hit, Library
    from app.library.listening import HeardReport
    from app.library.ray_pool import RayPool
    from app.speech.listener import Listener

EXAMPLES = """\
examples:
  fluxchat index ~/Videos                              all videos in a folder; again: only what is new
  fluxchat index 'clips/**/*.mp4' list.txt --seconds 5
  fluxchat index --check                               which files are gone, changed or could not be read
  fluxchat index --repair                              mend what --check finds
  fluxchat search "a dog catches a disc" --top 3
  fluxchat search "a goal" --clip goal.mp4             cut the best hit out
"""


def add_library_commands(commands: Any) -> None:
    """Add both to the subparsers of `fluxchat`."""
    how: dict[str, Any] = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    index = commands.add_parser("index", help="a library of videos, to be searched by what they show", **how)
    index.add_argument(
        "sources", nargs="*", metavar="VIDEOS", help="folders, files, patterns in quotes, lists (.txt)"
    )
    index.add_argument("--seconds", type=float, metavar="N", help="length of a clip, of a new library (10)")
    index.add_argument("--check", action="store_true", help="say what is stale, and change nothing")
    index.add_argument("--repair", action="store_true", help="index anew what is stale, drop what is gone")
    index.add_argument("--speech", action="store_true", help="listen too, for `search --speech`")
    speech_options(index)
    ray_options(index)
    search = commands.add_parser("search", help="find clips in the library by what they show", **how)
    search.add_argument("text", help="what to look for, in quotes")
    search.add_argument("--top", type=int, default=10, metavar="N", help="how many clips (10)")
    search.add_argument("--speech", action="store_true", help="find lines by what is said in them")
    search.add_argument("--play", action="store_true", help="play the best one")
    search.add_argument("--clip", metavar="FILE", help="cut the best one out into this file")
    search.add_argument("--force", action="store_true", help="let --clip write over a file that exists")
    for command in (index, search):
        command.add_argument("--json", action="store_true", help="print as JSON")
        command.add_argument(
            "--library",
            metavar="DIR",
            help="folder of the index (default: $FLUXCHAT_LIBRARY, or one in the cache folder)",
        )
        command.add_argument(
            "--embedder",
            metavar="MODEL",
            help="a CLIP or SigLIP (hub id or folder), or a saved model with its alignment.safetensors "
            "(default: what the library was made with, else the shipped model)",
        )
        command.add_argument("--device", help="cpu, cuda, mps ... (default: the best there is)")


def ray_options(command: argparse.ArgumentParser) -> None:
    """Add what says on which machines it is done."""
    group = command.add_argument_group("more than one machine (extra: ray)")
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="by Ray: of a running cluster (auto, ray://host:10001); without one, several processes here",
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="actors (one per GPU, or per two CPU cores of the cluster)"
    )


def ray_pool(args: argparse.Namespace) -> contextlib.AbstractContextManager[RayPool | None]:
    """The workers that were asked for."""
    if args.ray is None:
        if args.workers is not None:
            raise ConfigError("--workers goes with --ray.")
        return contextlib.nullcontext()
    from app.library.ray_pool import RayPool

    return RayPool(args.ray or None, args.workers)


def _library(args: argparse.Namespace, seconds: float | None = None, pool: RayPool | None = None) -> Library:
    from app.library.library import Library

    return Library(args.library, embedder=args.embedder, seconds=seconds, device=args.device, pool=pool)


def run_index(args: argparse.Namespace) -> int:
    """Index, check or repair."""
    if args.check and args.repair:
        raise ConfigError("--check changes nothing and --repair does: give one of them.")
    if not args.speech and (args.language is not None or args.speech_model is not None):
        raise ConfigError("--language and --speech-model go with --speech.")
    if args.speech and not args.sources:
        raise ConfigError("--speech listens to the videos that are named: name them.")
    if args.sources and (args.check or args.repair):
        raise ConfigError("--check and --repair look at what is in the library: give no videos.")
    with ray_pool(args) as pool:
        return _index(args, _library(args, args.seconds, pool))


def _index(args: argparse.Namespace, library: Library) -> int:
    from app.ask_each import terminal

    listener = _listener(args, library) if args.speech else None
    if args.check:
        return _check(library, args.json)
    if args.repair:
        report = library.repair(progress=terminal())
    else:
        report = library.index(args.sources, progress=terminal())
    heard = None if listener is None else _listen(library, listener, args)
    _tell(report, args.json, heard)
    return 1 if report.failed or (heard is not None and heard.failed) else 0


def _listener(args: argparse.Namespace, library: Library) -> Listener:
    """Who listens; raises ConfigError or ModelError where that cannot be, before anything is done."""
    from app.speech.listener import Listener

    listener = Listener(args.speech_model)
    library.check_listener(listener, args.language)
    return listener


def _listen(library: Library, listener: Listener, args: argparse.Namespace) -> HeardReport:
    from app.ask_each import terminal

    return library.listen(args.sources, listener, language=args.language, progress=terminal())


def _check(library: Library, as_json: bool) -> int:
    stale = library.check()
    if as_json:
        print(json.dumps([asdict(row) for row in stale]))
    else:
        for row in stale:
            print(on_a_line(f"{row.what}: {row.path}" + (f" ({row.why})" if row.why else "")))
        print(
            f"{len(stale)} stale: `fluxchat index --repair` indexes them anew, and drops what is gone."
            if stale
            else "All is up to date."
        )
    return 1 if stale else 0


def _tell(report: IndexReport, as_json: bool, heard: HeardReport | None) -> None:
    if as_json:
        print(json.dumps(asdict(report) | ({} if heard is None else {"speech": asdict(heard)})))
        return
    for path, why in {**report.failed, **({} if heard is None else heard.failed)}.items():
        print(on_a_line(f"{path}: ! {why}"))
    parts = [f"{report.indexed} videos indexed ({report.clips} clips)", f"{report.unchanged} unchanged"]
    parts += [f"{report.removed} dropped"] * bool(report.removed)
    parts += [f"{len(report.failed)} could not be read"] * bool(report.failed)
    print(", ".join(parts) + ".")
    if heard is not None:
        spoken = "".join(f", {language} {count}" for language, count in heard.languages.items())
        print(f"{heard.heard} videos listened to ({heard.lines} lines{spoken}), {heard.unchanged} unchanged.")


def run_search(args: argparse.Namespace) -> int:
    """Find, and play or cut the best."""
    library = _library(args)
    found = (library.search_said if args.speech else library.search)(args.text, args.top)
    if args.json:
        print(json.dumps({"text": args.text, **asdict(found)}))
    else:
        for hit in found.hits:
            print(_line(hit))
        if not found.hits:
            print("Nothing was found.", file=sys.stderr)
    if count := len(found.left_out):
        were = "files were" if count > 1 else "file was"
        print(
            f"{count} {were} left out, gone or changed since: run `fluxchat index --repair`.", file=sys.stderr
        )
    if (args.clip or args.play) and not found.hits:
        do = "run `fluxchat index --repair`" if found.left_out else "index some videos first"
        raise ConfigError(f"There is no clip to play or cut out: {do}.")
    if args.clip:
        from encoder.video.cut import cut

        best = found.hits[0]
        part = cut(best.path, best.start_s, best.end_s, args.clip, overwrite=args.force)
        if not args.json:
            print(cut_line(args.clip, part))
    if args.play:
        from app.library.player import play

        play(found.hits[0].path, found.hits[0].start_s)
    return 0


def _line(hit: Hit) -> str:
    from encoder.video.clock import clock

    where = f"{clock(hit.start_s)}-{clock(hit.end_s)}"
    beside = f"  [{hit.thumbnail}]" if hit.thumbnail else ""
    said = f"  {hit.said} [{hit.language}]" if hit.said else ""
    return on_a_line(f"{hit.score:.3f}  {where.ljust(15)}  {hit.path}{beside}{said}")


LIBRARY_COMMANDS = {"index": run_index, "search": run_search}
