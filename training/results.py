"""Every table on the demo world for one model, and the page that shows them.

    python -m training.results --model app/pretrained --clip runs/cpu/clip --results runs/results
    python -m training.results --model app/pretrained --chat-clips 200 --chat-tokens 64 32 16 ...
    python -m training.results --results runs/results --page training/RESULTS.md   the page alone

Runs one command per table, each of which goes on where it stopped, then writes the page from their result
files: only what was measured, each table with its command. What people wrote under "Finding:" stays, and so
does a table whose result file is gone.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.checkpoint import atomic_path
from encoder.errors import DataError, FluxChatError
from training.evaluation.ability_metrics import goals_by_run
from training.evaluation.action import accuracy_table
from training.evaluation.mvbench import mvbench_table
from training.evaluation.retrieval import retrieval_table
from training.evaluation.run import setting_of
from training.evaluation.synthetic import encoder_table, world_table
from training.optimize_tokens import runs_table

Result = dict[str, Any]
NOT_MEASURED = "Not measured yet."
INTRODUCTION = """\
# Results

Measured on the demo world's test clips, whose backgrounds and wordings no training saw; the tables have the
shape of the paper's. Shares are percent; every result file holds the 95 % intervals, and the hash of the
weights, the commit, the machine and the seed. All of it again:

    {command}

On public sets the same commands take `--annotations` and `--videos` (`python -m training.evaluate --help`).
"""


def _by_setting(draw: Callable[[Any, Any], str]) -> Callable[[Result], str]:
    def text(result: Result) -> str:
        rows = result["settings"]
        return draw([setting_of(row) for row in rows], rows)

    return text


@dataclass(frozen=True)
class Section:
    """One table. stem: of its result file, which several may share; command: module and arguments, without
    the shared ones; needs: "model" or "clip"; of_paper: the table of which it has the shape."""

    title: str
    stem: str
    command: tuple[str, ...]
    needs: str
    of_paper: str
    show: Callable[[Result], str]


def _against_blind(runs: Mapping[str, Any]) -> str:
    """The first run beside the one without video; the other runs have a table of their own."""
    chosen = dict.fromkeys([next(iter(runs)), *(["blind"] if "blind" in runs else [])])
    return world_table({name: runs[name] for name in chosen})


_EVALUATE = "training.evaluate"
_CHAT = (_EVALUATE, "world", "--compare", "uniform", "random")
SECTIONS: tuple[Section, ...] = (
    Section(
        "What the chat model answers",
        "world_chat",
        _CHAT,
        "model",
        "the chat table (Table 10)",
        lambda result: _against_blind(result["runs"]),
    ),
    Section(
        "Fewer tokens and other selectors: what the chat model answers",
        "world_chat",
        _CHAT,
        "model",
        "the chat table (Table 10) and the selectors (Table 2); the same clips and questions in every line",
        lambda result: goals_by_run(result["runs"]),
    ),
    Section(
        "Multiple choice in MVBench's forms",
        "mvbench",
        (_EVALUATE, "mvbench", "--dataset", "world", "--prompt", "flash", "videochat2", "words"),
        "model",
        "the chat table (Table 10)",
        lambda result: mvbench_table(result["runs"]),
    ),
    Section(
        "What the encoder tells by itself",
        "world_encoder",
        (_EVALUATE, "world", "--selector", "flux", "random", "uniform", "tube"),
        "clip",
        "the selectors (Table 2)",
        _by_setting(encoder_table),
    ),
    Section(
        "Retrieval by caption",
        "retrieval",
        (_EVALUATE, "retrieval", "--dataset", "world"),
        "clip",
        "zero-shot retrieval (supplement Table 3)",
        _by_setting(retrieval_table),
    ),
    Section(
        "Zero-shot action: which motion",
        "action",
        (_EVALUATE, "action", "--dataset", "world"),
        "clip",
        "zero-shot action recognition (supplement Table 4)",
        _by_setting(accuracy_table),
    ),
    Section(
        "Classification: which object",
        "classify",
        (_EVALUATE, "classify", "--dataset", "world", "--attribute", "noun"),
        "clip",
        "the main tables (6 to 8)",
        _by_setting(accuracy_table),
    ),
    Section(
        "Token Optimization",
        "tokens/result",
        ("training.optimize_tokens", "--merge", "vid-tldr"),
        "clip",
        "supplement Tables 1 and 2",
        lambda result: runs_table(result["runs"]),
    ),
)


def commands(args: argparse.Namespace) -> list[list[str]]:
    """One command per result file whose model or training.clip run is given."""
    by_stem = {section.stem: section for section in SECTIONS}
    found = []
    for section in by_stem.values():
        out = Path(args.results) / f"{section.stem}.json"
        if section.needs == "model" and args.model:
            options = _chat_options(args, section)
        elif section.needs == "clip" and args.clip:
            options = _encoder_options(args, section)
        else:
            continue
        if _searches(section):
            out = out.parent
        recipe = ["--recipe", args.recipe] if args.recipe else []
        found.append(["-m", *section.command, *options, *recipe, "--out", str(out)])
    return found


def _searches(section: Section) -> bool:
    """Whether it is Token Optimization."""
    return section.command[0] == "training.optimize_tokens"


def _chat_options(args: argparse.Namespace, section: Section) -> list[str]:
    """MVBench's forms are measured at the first token count alone."""
    tokens = args.chat_tokens if section.command[1] == "world" else args.chat_tokens[:1]
    options = ["--model", args.model, "--clips", str(args.chat_clips), "--budget", *map(str, tokens)]
    return [*options, *(["--plan"] if args.plan else []), "--preset", args.chat_preset or args.preset]


def _encoder_options(args: argparse.Namespace, section: Section) -> list[str]:
    options = ["--encoder", str(Path(args.clip) / "encoder"), "--alignment", args.clip]
    options += ["--clips", str(args.clips)]
    options += ["--pool", str(args.pool)] if args.pool is not None else []
    options += ["--tokens" if _searches(section) else "--budget", *map(str, args.tokens)]
    if _searches(section):
        options += ["--frames", *map(str, args.frames)] if args.frames else []
        options += ["--resolutions", *map(str, args.resolutions)] if args.resolutions else []
        options += ["--install", args.install] if args.install else []
    return [*options, "--preset", args.preset]


def measure(args: argparse.Namespace) -> None:
    """Run all commands; raises DataError when one fails."""
    for number, command in enumerate(todo := commands(args), 1):
        print(f"[{number}/{len(todo)}] python {shlex.join(command)}", flush=True)
        if subprocess.run([sys.executable, *command]).returncode:
            raise DataError(f"python {shlex.join(command)} failed: its message is above.")


def page(results: Path, told: Sequence[str], old: str = "", pictures: Path | None = None) -> str:
    """Markdown of all result files that are there. old: the page before, whose findings are kept, and its
    tables where there is no file.

    pictures: folder beside the page that the heatmaps are copied to.
    """
    kept, before = findings(old), sections(old)
    parts = [INTRODUCTION.format(command=shlex.join(told))]
    for section in SECTIONS:
        path = results / f"{section.stem}.json"
        if not path.exists() and NOT_MEASURED not in before.get(section.title, NOT_MEASURED):
            parts.append(f"## {section.title}\n{before[section.title].rstrip()}\n")
            continue
        if not path.exists():
            command = shlex.join(["python", "-m", *section.command])
            lines = [f"## {section.title}", "", f"Of the shape of {section.of_paper}.", ""]
            parts.append("\n".join([*lines, f"    {command} ...", "", NOT_MEASURED]) + "\n")
            continue
        try:
            result = json.loads(path.read_text())
            lines = [f"## {section.title}", "", f"Of the shape of {section.of_paper}.", ""]
            lines += [f"    {result['command']}", "", "```", section.show(result), "```", "", about(result)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a result of {section.command[0]}: {error!r}.") from error
        if pictures is not None:
            for picture in sorted(path.parent.glob("heatmap_*.png")):
                lines += ["", f"![{picture.stem}]({_copied(picture, pictures)})"]
        if section.title in kept:
            lines += ["", kept[section.title]]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _copied(picture: Path, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(picture, folder / picture.name)
    return f"{folder.name}/{picture.name}"


def about(result: Result) -> str:
    """Where a table comes from, in one line."""
    machine = result["machine"]
    said = [f"weights `{result['weights']}`", f"commit `{result['commit']}`"]
    said += [f"language model {result['llm']}"] if "llm" in result else []
    said += [result["dtype"], f"{machine['device']}, {machine['cpu']}, {machine['threads']} threads"]
    said += [f"recipe {result['recipe']}"] if result.get("recipe") else []
    said += [f"preset {result['preset']}"] if result.get("preset") else []
    said += [f"seed {result['seed']}", f"intervals: {result['interval']}"]
    return "; ".join(said) + "."


def findings(text: str) -> dict[str, str]:
    """The paragraph that begins with "Finding:" under each heading of a page."""
    found = {}
    for title, body in sections(text).items():
        if said := re.search(r"^Finding:.*?(?=\n\s*\n|\Z)", body, flags=re.M | re.S):
            found[title] = said.group(0).strip()
    return found


def sections(text: str) -> dict[str, str]:
    """What stands under each heading of a page."""
    parts = (part.partition("\n") for part in re.split(r"^## ", text, flags=re.M)[1:])
    return {title.strip(): body for title, _, body in parts}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="a chat model: its tables")
    parser.add_argument("--clip", help="folder of a training.clip run: the encoder's tables")
    parser.add_argument("--results", required=True, metavar="DIR", help="where result files are or go")
    parser.add_argument("--page", metavar="FILE", help="Markdown to write, such as training/RESULTS.md")
    parser.add_argument("--clips", type=int, default=512, help="for the encoder")
    parser.add_argument("--chat-clips", type=int, default=200, help="for the chat model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 64, 32], help="of the encoder")
    parser.add_argument(
        "--chat-tokens",
        type=int,
        nargs="+",
        default=[64, 32, 16],
        help="of the chat model; at the first also other selectors and MVBench's forms",
    )
    parser.add_argument("--frames", type=int, nargs="+", help="of Token Optimization; default: trained range")
    parser.add_argument("--resolutions", type=int, nargs="+", help="of Token Optimization; likewise")
    parser.add_argument("--pool", type=int, help="pooling head that training.clip trained")
    parser.add_argument("--preset", choices=["simple", "solo", "full"], default="solo")
    parser.add_argument("--chat-preset", choices=["simple", "solo", "full"], help="default: --preset")
    parser.add_argument("--plan", action="store_true", help="the chat model's own input for each budget")
    parser.add_argument(
        "--install", metavar="MODEL", help="write the measured plan table into this model's config.json"
    )
    parser.add_argument("--recipe", help="what the weights were trained with")
    given = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(given)
    try:
        measure(args)
        if args.page:
            target = Path(args.page)
            old = target.read_text() if target.exists() else ""
            told = ["python", "-m", "training.results", *given]
            text = page(Path(args.results), told, old, target.parent / "results")
            with atomic_path(target) as temporary:
                temporary.write_text(text)
            print(f"{target}: {text.count('## ')} tables")
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
