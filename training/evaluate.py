"""Evaluate a model on the demo world's held-out clips, beside the same language model without the video.

    python -m training.evaluate world --model app/pretrained --clips 200 --budget 128 --out runs/world.json

Clips, backgrounds and wordings of the test split were never trained on. Every clip gives one open caption (is
the main object named, is its motion told) and its questions, open and multiple choice. Greedy; shares with
95 % intervals. Several budgets and selectors in one run show what fewer tokens cost.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from encoder.checkpoint import save_json
from encoder.errors import FluxChatError
from encoder.preprocess import preprocess
from encoder.selection import Selector
from llm_bridge.cache import PrefixCache
from llm_bridge.generate import Generation, Sampling
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Message, Visual, render
from training.config import build
from training.data.world import WorldSource, render_clip
from training.demo_world.asking import Question
from training.demo_world.wording import QUESTIONS
from training.demo_world.world import Sample, World
from training.scoring import agrees, motion_in, names, wilson

MAX_NEW_TOKENS = 24
PREFIX_BYTES = 64 * 2**20


@dataclass
class Tally:
    """Right answers and trials of one task, and what guessing would give."""

    right: int = 0
    total: int = 0
    chance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Share with its interval."""
        low, high = wilson(self.right, self.total)
        share = self.right / self.total if self.total else 0.0
        rounded = {"accuracy": round(share, 4), "low": round(low, 4), "high": round(high, 4), "n": self.total}
        return rounded | ({} if self.chance is None else {"chance": self.chance})


@dataclass
class Watcher:
    """A model that answers questions about rendered clips; with `keep` None it is shown no video at all."""

    model: VideoLanguageModel
    frames: int
    resolution: int
    keep: int | None
    selector: Selector = "flux"
    _prefixes: PrefixCache = field(init=False)

    def __post_init__(self) -> None:
        self._prefixes = PrefixCache(PREFIX_BYTES, self.model.llm.kv_bytes_per_token)

    def answers(self, world: World, sample: Sample, number: int, questions: Sequence[str]) -> Iterator[str]:
        """The answer to each question, each asked on its own."""
        visuals, embeddings = self._look(world, sample, number)
        for question in questions:
            prompt = render(self.model.llm.tokenizer, [Message("user", (*visuals, question))])
            sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
            yield "".join(Generation(self.model.llm, prompt, embeddings, sampling, self._prefixes)).strip()

    @torch.inference_mode()
    def _look(
        self, world: World, sample: Sample, number: int
    ) -> tuple[tuple[Visual, ...], list[torch.Tensor]]:
        if self.keep is None:
            return (), []
        clip = render_clip(world, sample, str(number), self.frames, self.resolution)
        pixels = preprocess(clip, self.resolution, self.resolution)
        generator = torch.Generator().manual_seed(number)
        vision = self.model.encode(
            [pixels], [self.keep], [clip.times_s], selector=self.selector, generator=generator
        )
        embedding = self.model.project(vision)[0]
        key = f"{number}/{self.keep}/{self.selector}"
        return (Visual(len(embedding), key, clip.duration_s, clip.times_s),), [embedding]


def questions_of(sample: Sample, number: int) -> list[Question]:
    """The caption request, then every question of the sample."""
    asked = QUESTIONS["caption"]["test"]
    return [Question("caption", asked[number % len(asked)], sample.caption), *sample.questions]


def evaluate_world(watcher: Watcher, world: World, first: int, clips: int, label: str) -> dict[str, Any]:
    """Accuracy by task over `clips` samples from number `first` on, with some answers to read."""
    from tqdm.auto import tqdm

    tallies: dict[str, Tally] = {}
    shown: list[dict[str, Any]] = []

    def count(task: str, right: bool, chance: float | None = None) -> None:
        tally = tallies.setdefault(task, Tally(chance=chance))
        tally.right, tally.total = tally.right + right, tally.total + 1

    for number in tqdm(range(first, first + clips), desc=label, unit="clip"):
        sample = world.sample(number)
        questions = questions_of(sample, number)
        answers = list(watcher.answers(world, sample, number, [q.question for q in questions]))
        actor = sample.scene.actors[0]
        noun = world.nouns[actor.code]
        count("caption: main object", names(answers[0], noun.name, noun.plural), 1 / len(world.pool))
        count("caption: motion", motion_in(answers[0]) == actor.motions[0], 1 / len(world.level.motions))
        for question, answer in zip(questions[1:], answers[1:], strict=True):
            kind = "choice" if question.options else "open"
            chance = 1 / len(question.options) if question.options else None
            count(f"{question.task}, {kind}", agrees(question, answer), chance)
        if len(shown) < 12:
            rows = [[q.question, q.answer, a] for q, a in zip(questions, answers, strict=True)]
            shown.append({"number": number, "asked, expected, answered": rows[:4]})
    by_task = {task: tally.to_dict() for task, tally in sorted(tallies.items())}
    choices = [row["accuracy"] for task, row in by_task.items() if task.endswith(", choice")]
    mean = sum(choices) / len(choices) if choices else None
    return {"tasks": by_task, "multiple choice, mean over tasks": mean, "examples": shown}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Tasks down, runs across, as text."""
    runs = list(results)
    tasks = list(results[runs[0]]["tasks"])
    width = max(map(len, tasks)) + 2
    lines = ["task".ljust(width) + "".join(run.rjust(22) for run in runs) + "chance".rjust(9)]
    for task in tasks:
        cells = []
        for run in runs:
            row = results[run]["tasks"][task]
            cells.append(
                f"{100 * row['accuracy']:.1f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]".rjust(22)
            )
        chance = results[runs[0]]["tasks"][task].get("chance")
        lines.append(
            task.ljust(width) + "".join(cells) + ("" if chance is None else f"{100 * chance:.0f}").rjust(9)
        )
    return "\n".join(lines)


def run_world(args: argparse.Namespace) -> int:
    """The `world` command: every selector at every budget, and blind; a table, and JSON on request."""
    model = VideoLanguageModel.from_pretrained(args.model, device=args.device)
    source = build(WorldSource, {"split": args.split, "preset": args.preset, "count": args.clips}, "world")
    world = source.open()
    frames = max(range(*model.config.encoder.frames_range))
    resolution = max(range(*model.config.encoder.resolution_range))
    watchers = {
        f"{selector} {keep}": Watcher(model, frames, resolution, keep, selector)
        for selector in args.selector
        for keep in args.budget
    }
    if not args.no_blind:
        watchers["blind"] = Watcher(model, frames, resolution, None)
    results = {
        label: evaluate_world(watcher, world, args.first, args.clips, label)
        for label, watcher in watchers.items()
    }
    print(table(results))
    if args.out:
        save_json(
            {**provenance(model, args), "frames": frames, "resolution": resolution, "runs": results}, args.out
        )
    return 0


def provenance(model: VideoLanguageModel, args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on: weights, command, versions, machine."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "command": vars(args),
        "weights": model.revision(),
        "llm": Path(model.llm.name).name,
        "dtype": str(model.llm.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": done.stdout.strip(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("world", help="the demo world's held-out clips")
    world.add_argument("--model", required=True, help="a saved model, such as app/pretrained")
    world.add_argument("--clips", type=int, default=200)
    world.add_argument("--first", type=int, default=0, help="number of the first sample")
    world.add_argument("--split", choices=["test", "unseen"], default="test")
    world.add_argument("--preset", choices=["simple", "full"], default="full")
    world.add_argument(
        "--budget", type=int, nargs="+", default=[128], help="tokens to keep, one run for each"
    )
    world.add_argument(
        "--selector", nargs="+", default=["flux"], choices=["flux", "random", "uniform", "tube"]
    )
    world.add_argument("--no-blind", action="store_true", help="skip the run without video")
    world.add_argument("--device")
    world.add_argument("--out", help="JSON file for all figures")
    args = parser.parse_args(argv)
    try:
        return run_world(args)
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
