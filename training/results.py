"""The page of results on the synthetic world, and the commands that measure them for one model.

    python -m training.results                       training/RESULTS.md from training/result_files/, no model
    python -m training.results --model app/pretrained --clip runs/cpu/clip --results runs/results
    python -m training.results --model app/pretrained --chat-clips 200 --chat-tokens 64 32 16 --results ...
    python -m training.results --results runs/results --page training/RESULTS.md   store them, write the page

With --model or --clip it runs one command per table, each of which goes on where it stopped. The page is made
of the result files in `result_files` beside it, where those of --results are copied to: only what was
measured, each table with its command. What people found is written in `result_files/findings.md`, under the
same headings.
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
from encoder.errors import ConfigError, DataError
from training.command_line import at_least, command_parser, run_command
from training.evaluation.ability_metrics import abilities_by_run
from training.evaluation.chat_runs import TEXT_ONLY
from training.evaluation.classification import accuracy_table
from training.evaluation.cli_arguments import PRESETS
from training.evaluation.mvbench import mvbench_table
from training.evaluation.retrieval import retrieval_table
from training.evaluation.synthetic_chat import world_table
from training.evaluation.synthetic_encoder import encoder_table
from training.optimize_tokens import runs_table
from training.plots import draw_norms, norms_table

Result = dict[str, Any]
NOT_MEASURED = "Not measured yet."
PAGE = Path(__file__).parent / "RESULTS.md"
STORE = "result_files"  # the folder beside the page
INTRODUCTION = """\
# Results

Measured on the synthetic world's test clips, whose backgrounds and wordings no training saw; the tables have
the shape of the paper's. Shares are percent; every result file holds the 95 % intervals, and the hash of the
weights, the commit, the machine and the seed. Each table names the command that measured it. This page is
written from the files in `{store}` by

    python -m training.results

which with `--model MODEL --clip RUN --results DIR` measures the tables of another model. On public sets the
same commands take `--annotations` and `--videos` (`python -m training.evaluate --help`).
"""


@dataclass(frozen=True)
class Section:
    """One table. stem: of its result file, which several may share; command: module and arguments, without
    the shared ones; needs: "model", "clip" or "runs" (of training: by hand); of_paper: the table of which it
    has the shape; draw: pictures of the result into its folder."""

    title: str
    stem: str
    command: tuple[str, ...]
    needs: str
    of_paper: str
    show: Callable[[Result], str]
    draw: Callable[[Result, Path], None] | None = None


def _against_text_only(runs: Mapping[str, Any]) -> str:
    """The first run beside the one without the video; the other runs have a table of their own."""
    without = [name for name in (TEXT_ONLY, "blind") if name in runs]
    return world_table({name: runs[name] for name in dict.fromkeys([next(iter(runs)), *without])})


_EVALUATE = "training.evaluate"
_CHAT = (_EVALUATE, "world", "--compare", "uniform", "random")
SECTIONS: tuple[Section, ...] = (
    Section(
        "What the chat model answers",
        "world_chat",
        _CHAT,
        "model",
        "the chat table (Table 10)",
        lambda result: _against_text_only(result["runs"]),
    ),
    Section(
        "Fewer tokens and other selectors: what the chat model answers",
        "world_chat",
        _CHAT,
        "model",
        "the chat table (Table 10) and the selectors (Table 2); the same clips and questions in every line",
        lambda result: abilities_by_run(result["runs"]),
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
        lambda result: encoder_table(result["settings"]),
    ),
    Section(
        "Retrieval by caption",
        "retrieval",
        (_EVALUATE, "retrieval", "--dataset", "world"),
        "clip",
        "zero-shot retrieval (supplement Table 3)",
        lambda result: retrieval_table(result["settings"]),
    ),
    Section(
        "Zero-shot action: which motion",
        "action",
        (_EVALUATE, "action", "--dataset", "world"),
        "clip",
        "zero-shot action recognition (supplement Table 4)",
        lambda result: accuracy_table(result["settings"]),
    ),
    Section(
        "Classification: which object",
        "classify",
        (_EVALUATE, "classify", "--dataset", "world", "--attribute", "noun"),
        "clip",
        "the main tables (6 to 8)",
        lambda result: accuracy_table(result["settings"]),
    ),
    Section(
        "Token Optimization",
        "tokens/result",
        ("training.optimize_tokens", "--merge", "vid-tldr"),
        "clip",
        "supplement Tables 1 and 2",
        lambda result: runs_table(result["runs"]),
    ),
    Section(
        "Gradient norms of Flux-UMT, beside a plain ViT",
        "norms/result",
        ("training.plots", "norms"),
        "runs",
        "the figures of gradient norms (supplement Figures 2 and 4)",
        lambda result: norms_table(result["runs"]),
        lambda result, folder: draw_norms(result["runs"], folder),
    ),
)


def commands(args: argparse.Namespace) -> list[list[str]]:
    """One command per result file whose model or training.clip run is given."""
    by_stem = {section.stem: section for section in SECTIONS}
    lines = []
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
        lines.append(["-m", *section.command, *options, *recipe, "--out", str(out)])
    return lines


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


def store(results: Path, folder: Path) -> None:
    """Copy the result files of a folder, and the pictures beside them, to where the page is written from."""
    for stem in {section.stem for section in SECTIONS}:
        source = results / f"{stem}.json"
        if source.exists():
            target = folder / f"{stem}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            for file in (source, *_pictures(source.parent)):
                if file.resolve() != (target.parent / file.name).resolve():
                    shutil.copyfile(file, target.parent / file.name)


def _pictures(folder: Path) -> list[Path]:
    """Those beside a result file."""
    return sorted(path for kind in ("heatmap", "norms") for path in folder.glob(f"{kind}_*.png"))


def draw(folder: Path) -> None:
    """Pictures of stored results that lack theirs. Raises DataError."""
    for section in SECTIONS:
        path = folder / f"{section.stem}.json"
        if section.draw is not None and path.exists() and not _pictures(path.parent):
            try:
                section.draw(json.loads(path.read_text()), path.parent)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is not a result of {section.command[0]}: {error!r}.") from error


def page(folder: Path) -> str:
    """Markdown of all result files of a folder, which lies beside the page. Raises DataError."""
    notes = folder / "findings.md"
    findings = sections(notes.read_text()) if notes.exists() else {}
    parts = [INTRODUCTION.format(store=folder.name)]
    for section in SECTIONS:
        path = folder / f"{section.stem}.json"
        lines = [f"## {section.title}", "", f"Of the shape of {section.of_paper}.", ""]
        if not path.exists():
            command = shlex.join(["python", "-m", *section.command])
            parts.append("\n".join([*lines, f"    {command} ...", "", NOT_MEASURED]) + "\n")
            continue
        try:
            result = json.loads(path.read_text())
            lines += [f"    {result['command']}", "", "```", section.show(result), "```", "", about(result)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a result of {section.command[0]}: {error!r}.") from error
        for picture in _pictures(path.parent):
            lines += ["", f"![{picture.stem}]({picture.relative_to(folder.parent).as_posix()})"]
        if section.title in findings:
            lines += ["", findings[section.title]]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def about(result: Result) -> str:
    """Where a table comes from, in one line."""
    machine = result["machine"]
    facts = [f"weights `{result['weights']}`", f"commit `{result['commit']}`"]
    facts += [f"language model {result['llm']}"] if "llm" in result else []
    facts += [result["dtype"], f"{machine['device']}, {machine['cpu']}, {machine['threads']} threads"]
    facts += [f"recipe {result['recipe']}"] if result.get("recipe") else []
    facts += [f"preset {result['preset']}"] if result.get("preset") else []
    facts += [f"seed {result['seed']}", f"intervals: {result['interval']}"]
    facts += [f"source: {result['source']}"] if "source" in result else []
    return "; ".join(facts) + "."


def sections(text: str) -> dict[str, str]:
    """What stands under each heading of a page."""
    parts = (part.partition("\n") for part in re.split(r"^## ", text, flags=re.M)[1:])
    return {title.strip(): body.strip() for title, _, body in parts}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command_parser("training.results", __doc__)
    parser.add_argument("--model", help="a chat model: its tables")
    parser.add_argument("--clip", help="folder of a training.clip run: the encoder's tables")
    parser.add_argument("--results", metavar="DIR", help="where measured result files are or go")
    parser.add_argument(
        "--page",
        metavar="FILE",
        help="Markdown to write from result_files beside it; default: training/RESULTS.md, and none after "
        "measuring",
    )
    parser.add_argument("--clips", type=at_least(1), default=512, help="for the encoder")
    parser.add_argument("--chat-clips", type=at_least(1), default=200, help="for the chat model")
    parser.add_argument("--tokens", type=at_least(1), nargs="+", default=[128, 64, 32], help="of the encoder")
    parser.add_argument(
        "--chat-tokens",
        type=at_least(1),
        nargs="+",
        default=[64, 32, 16],
        help="of the chat model; at the first also other selectors and MVBench's forms",
    )
    parser.add_argument(
        "--frames", type=at_least(1), nargs="+", help="of Token Optimization; default: trained range"
    )
    parser.add_argument("--resolutions", type=at_least(1), nargs="+", help="of Token Optimization; likewise")
    parser.add_argument("--pool", type=at_least(0), help="pooling head; default: as the alignment says")
    parser.add_argument("--preset", choices=PRESETS, default="solo")
    parser.add_argument("--chat-preset", choices=PRESETS, help="default: --preset")
    parser.add_argument("--plan", action="store_true", help="the chat model's own input for each budget")
    parser.add_argument(
        "--install", metavar="MODEL", help="write the measured plan table into this model's config.json"
    )
    parser.add_argument("--recipe", help="what the weights were trained with")
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> None:
    """Measure what is to be measured, then write the page."""
    measuring = args.model or args.clip
    if measuring:
        if not args.results:
            raise ConfigError("Name the folder for the result files: --results DIR.")
        measure(args)
    if measuring and not args.page:
        return
    target = Path(args.page) if args.page else PAGE
    folder = target.parent / STORE
    if args.results:
        store(Path(args.results), folder)
    if not folder.is_dir():
        raise DataError(
            f"There are no result files in {args.results or folder}: measure some, "
            "or name their folder (--results)."
        )
    draw(folder)
    text = page(folder)
    with atomic_path(target) as temporary:
        temporary.write_text(text)
    print(f"{target}: {text.count('## ')} tables")


if __name__ == "__main__":
    sys.exit(main())
