"""`fluxchat transcribe`: what is said in a video, as text, subtitles or JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from app.printed import on_a_line, printable
from encoder.errors import ConfigError

if TYPE_CHECKING:
    from app.speech.listener import Progress

SUFFIXES = {".srt": "srt", ".vtt": "vtt"}


def add_transcribe_command(commands: Any) -> None:
    """Add it to the subparsers of `fluxchat`."""
    command = commands.add_parser("transcribe", help="what is said in a video, as subtitles (extra: speech)")
    command.add_argument("video", help="a video file")
    command.add_argument("--out", metavar="FILE", help="subtitles: .srt or .vtt; else the lines are printed")
    command.add_argument("--force", action="store_true", help="write over a file that exists")
    command.add_argument("--json", action="store_true", help="print the lines as JSON")
    speech_options(command)


def speech_options(command: argparse._ActionsContainer) -> None:
    """Add what says how it is listened."""
    command.add_argument(
        "--language", metavar="CODE", help="what is spoken, as en or de (default: recognised)"
    )
    command.add_argument(
        "--speech-model",
        metavar="MODEL",
        help="a folder of faster-whisper's, or one of its names, as small (default: $FLUXCHAT_SPEECH_MODEL, "
        "or what `fluxchat fetch --speech` got)",
    )


@contextmanager
def _percents(out: TextIO | None) -> Iterator[Progress]:
    """A bar on a terminal that leaves no trace, and what moves it."""
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(
        total=1.0, desc="listening", file=out, disable=out is None, leave=False, bar_format=form,
        dynamic_ncols=True,
    ) as bar:  # fmt: skip
        yield lambda share: bar.update(share - bar.n)


def run_transcribe(args: argparse.Namespace) -> int:
    """Listen, and write or print."""
    from app.ask_each import terminal
    from app.speech.listener import Listener
    from encoder.checkpoint import atomic_path
    from encoder.video.clock import clock

    out = None if args.out is None else Path(args.out).expanduser()
    if out is not None:
        if out.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"Subtitles go into a file {' or '.join(SUFFIXES)}, not {out.name!r}.")
        if out.exists() and not args.force:
            raise ConfigError(f"{out} is there already: choose another name, or --force to write over it.")
        if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
            raise ConfigError(
                f"Cannot write {out}: name a file in a folder that is there and can be written."
            )
    listener = Listener(args.speech_model)
    listener.ready(args.language)
    with _percents(terminal()) as told:
        transcript = listener.listen(args.video, language=args.language, progress=told)
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(getattr(transcript, SUFFIXES[out.suffix.lower()]), encoding="utf-8")
    if args.json:
        print(json.dumps(transcript.to_dict()))
    elif out is None:
        if transcript.lines:
            print(f"Language: {transcript.language}", file=sys.stderr)
        for line in transcript.lines:
            print(f"{clock(line.start_s)}-{clock(line.end_s)}  {printable(line.text)}")
    if not transcript.lines and not args.json:
        print("Nothing is said in it." if transcript.sound else "It has no sound.")
    elif out is not None and not args.json:
        print(f"{on_a_line(out)}: {len(transcript.lines)} lines, {transcript.language}")
    return 0
