"""How well the price before the purchase matches the bill: predicted against measured time to first word.

    python -m tests.bench.estimate [--model DIR] [--n 5] [--smallest]

On videos of several sizes and at several budgets, cold caches. Prints one JSON line; `median_error` is the
median over cases of |predicted - measured| / measured.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import gradio

from app.chat import VideoChat
from llm_bridge.model import VideoLanguageModel
from tests.bench.common import arguments, environment, print_json
from tests.encoder.video.video_files import steady, write

QUESTION = "What is in the video?"


def videos(folder: Path, count: int) -> dict[str, Path]:
    """So many of: the real clip that comes with gradio, and two made ones."""
    made = {"made_360p_10s": (640, 360, 10), "made_720p_5s": (1280, 720, 5)}
    found = {"world_270p_30s": Path(gradio.__file__).parent / "media_assets" / "videos" / "world.mp4"}
    for name, (width, height, seconds) in list(made.items())[: max(0, count - 1)]:
        found[name] = folder / f"{name}.mp4"
        write(found[name], steady(30 * seconds, 30.0), size=(width, height), rate=30)
    return found


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="a saved model (default: the shipped one)")
    parser.add_argument("--n", type=int, default=5, help="measurements per case, in turn")
    about = "(default: 64, 128, 256 and the model's own)"
    parser.add_argument("--budgets", type=int, nargs="+", help=f"visual tokens {about}")
    parser.add_argument("--videos", type=int, default=3, help="how many of them")
    args = arguments(parser, argv, n=1, budgets=[64], videos=1)
    with tempfile.TemporaryDirectory() as folder, VideoChat(args.model) as chat:
        files = videos(Path(folder), args.videos)
        own = chat.model.encoder.config if isinstance(chat.model, VideoLanguageModel) else None
        budgets = args.budgets or sorted({64, 128, 256, chat.model.default_tokens})
        cases = [(name, budget) for name in files for budget in budgets]
        measured: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
        for repeat in range(-1, args.n):
            for name, budget in cases:
                chat.forget()
                answer = chat.ask(files[name], QUESTION, budget=budget, max_new_tokens=1)
                if repeat >= 0:
                    measured[name, budget].append(answer.timings.first_token_s)
        rows: list[dict[str, Any]] = []
        for (name, budget), seconds in measured.items():
            predicted, actual = chat.estimate(files[name], budget).first_token_s, statistics.median(seconds)
            rows.append(
                {
                    "video": name,
                    "budget": budget,
                    "predicted_s": round(predicted, 3),
                    "measured_s": round(actual, 3),
                    "error": round(abs(predicted - actual) / actual, 3),
                    "spread": round((max(seconds) - min(seconds)) / actual, 3),
                }
            )
        errors = [row["error"] for row in rows]
        print_json(
            {
                "bench": "estimate",
                **environment(str(chat.model.llm.dtype).removeprefix("torch.")),
                "encoder": own and [own.embed_dim, own.depth],
                "n": args.n,
                "median_error": statistics.median(errors),
                "worst_error": max(errors),
                "cases": rows,
            },
            smallest=args.smallest,
        )


if __name__ == "__main__":
    main()
