"""Token Optimization (supplement Tables 1 and 2): the best frames and resolution at each token count.

    python -m training.optimize_tokens --encoder runs/clip/encoder --alignment runs/clip --tokens 64 128 \\
        --frames 4 6 8 10 12 16 --resolutions 84 98 112 126 --clips 256 --out runs/tokens
    python -m training.optimize_tokens --encoder flux_s.pth --csv k400_val.csv --videos DIR --tokens 1024 ...
    python -m training.optimize_tokens ... --merge vid-tldr      merging beside the selector, with times

Measures the full grid and the linear search on the demo world's test clips (by attribute heads, or by the
answers of a chat model) or on a labelled csv, and writes result.json, and per count a csv and a heatmap.
plan_table.json holds the best input of each count: --install MODEL puts it into a model's config.json, where
budgets find it: one between two counts takes the input of the larger. Goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from encoder.budget import PlanRow, PlanTable
from encoder.checkpoint import save_json
from encoder.errors import ConfigError, FluxChatError
from encoder.selection import Selector
from llm_bridge.model import VideoLanguageModel, VLMConfig
from training.data.synthetic_source import WorldSource
from training.evaluation.alignment import read_alignment
from training.evaluation.benchmarks import Labelled, read_labelled, renamed
from training.evaluation.chat_evaluator import Watcher
from training.evaluation.classify import evaluate_classify
from training.evaluation.cli_arguments import INTERVAL, about_model, about_world, sharing_device
from training.evaluation.encoder_input import DTYPES, Setting, Viewer
from training.evaluation.heatmap import draw_heatmap, write_csv
from training.evaluation.metrics import Share
from training.evaluation.results import Journal, Sharing, table, weights_hash, write_result
from training.evaluation.run import Run, header, provenance
from training.evaluation.synthetic import WorldClips, answer_share, attribute_hits, evaluate_world
from training.evaluation.token_search import (
    Cell,
    Found,
    Grid,
    Measured,
    best_cell,
    full_search,
    linear_search,
)
from training.evaluation.views import Views

Score = Callable[[Setting], Share]


def encoder_score(args: argparse.Namespace, out: Path) -> tuple[Score, Viewer, dict[str, Any]]:
    """Accuracy of an encoder on the world or a csv, the encoder, and what the figures depend on."""
    viewer = Viewer(args.encoder, sharing_device(args.device), args.dtype)
    if args.csv is not None:
        classes = Path(args.classes) if args.classes else None
        data = read_labelled(args.dataset, Path(args.csv), Path(args.videos or "."), classes)
        data = Labelled(renamed(data.examples)[: args.limit], data.classes)
        told = header(
            viewer,
            Views(fit="crop"),
            args.pool,
            args.seed,
            dataset=args.dataset,
            annotations=Path(args.csv).name,
            preset=None,
        )
        run = Run(viewer, Journal(out, told), Views(fit="crop"), args.pool, args.seed, args.block)

        def by_class(setting: Setting) -> Share:
            first = evaluate_classify(run, data, setting)["top1"]
            return Share(round(first["value"] * first["n"]), first["n"])

        return by_class, viewer, {**told, "metric": "top-1"}
    if args.alignment is None:
        raise ConfigError("On the demo world an encoder is judged by its attribute heads: give --alignment.")
    alignment = read_alignment(args.alignment).to(viewer.device)
    source = _world(args)
    clips = WorldClips.of(source)
    beside = weights_hash(alignment.align, *alignment.heads.values())
    told = header(viewer, Views(), args.pool, args.seed, alignment=beside, **about_world(source))
    run = Run(viewer, Journal(out, told), Views(), args.pool, args.seed, args.block)

    def by_attribute(setting: Setting) -> Share:
        hits = attribute_hits(run, alignment, clips, setting)
        if args.metric == "joint":
            return Share.of(torch.stack(list(hits.values())).all(dim=0))
        return Share.of(hits[args.metric])

    return by_attribute, viewer, {**told, "metric": args.metric}


def model_score(args: argparse.Namespace, out: Path) -> tuple[Score, VideoLanguageModel, dict[str, Any]]:
    """Accuracy of a chat model's answers on the world, of multiple-choice or of open questions."""
    model = VideoLanguageModel.from_pretrained(args.model, device=sharing_device(args.device))
    source = _world(args)
    world = source.open()
    told = {
        **about_model(model),
        "seed": args.seed,
        **about_world(source),
    }
    journal = Journal(out, told)

    def score(setting: Setting) -> Share:
        watcher = Watcher(model, setting, args.seed)
        result = evaluate_world(watcher, world, source.first, source.count, journal)
        return answer_share(result, "open" if args.metric == "open" else "choice")

    return score, model, {**told, "metric": f"{args.metric} questions"}


def optimize(args: argparse.Namespace) -> int:
    """Everything the command does."""
    if (args.encoder is None) == (args.model is None):
        raise ConfigError("Give either --encoder or --model.")
    metrics = ("joint", "noun", "motion") if args.model is None else ("choice", "open")
    args.metric = args.metric or metrics[0]
    if args.metric not in metrics:
        raise ConfigError(f"--metric {args.metric} does not go with this: use one of {', '.join(metrics)}.")
    if args.install:
        model_config(Path(args.install))  # before hours of measuring
    out, sharing = Path(args.out), Sharing()
    result_file = out / "result.json"
    score: Score
    if args.model is not None:
        score, model, told = model_score(args, result_file)
        config, device, encoder = model.config.encoder, model.device, model.encoder
    else:
        score, viewer, told = encoder_score(args, result_file)
        config, device, encoder = viewer.config, viewer.device, viewer.encoder
    grid = Grid(
        tuple(args.frames or range(*config.frames_range)),
        tuple(args.resolutions or range(*config.resolution_range)),
        config.patch_size,
    )
    watch = Viewer.of(encoder)
    runs, rows = [], []
    ways = ["selector", "vid-tldr"] if args.merge else ["selector"]
    for keep in sorted(args.tokens):
        for way in ways:
            found = _search(args, grid, keep, score, merge=way == "vid-tldr")
            measured, full, linear = found
            times = {} if args.no_times else _times(watch, measured, keep, way == "vid-tldr")
            name = f"{keep}" if way == "selector" else f"{keep}_{way}"
            if sharing.first:
                write_csv(grid, keep, measured, out / f"grid_{name}.csv", times)
                title = f"K = {keep}, {way}, {told['metric']}, n = {next(iter(measured.values())).total}"
                draw_heatmap(grid, keep, measured, out / f"heatmap_{name}.png", title=title, linear=linear)
            best = best_cell(measured, grid)
            runs.append(_described(keep, way, grid, measured, times, full, linear))
            if way == "selector":
                rows.append(PlanRow(keep, *best))
    if sharing.first:
        print(runs_table(runs))
        save_json([asdict(row) for row in rows], out / "plan_table.json")
        if args.install:
            install(rows, Path(args.install))
    more = {"interval": INTERVAL, "frames": grid.frames, "resolutions": grid.resolutions, "runs": runs}
    write_result(result_file, {**provenance(args.told, device, args.recipe), **told, **more}, sharing)
    return 0


def _search(
    args: argparse.Namespace, grid: Grid, keep: int, score: Score, *, merge: bool
) -> tuple[dict[Cell, Share], Found | None, Found | None]:
    """All cells that were measured, and what each kind of search found."""
    selector: Selector = "flux" if merge else args.selector
    measured = Measured(lambda frames, side: score(Setting(frames, side, keep, selector, merge)))

    def measure(frames: int, side: int) -> Share:
        return measured((frames, side))

    linear = full = None
    if args.search in ("linear", "both"):
        start = Setting.parse(args.start) if args.start else None
        linear = linear_search(
            grid,
            keep,
            measure,
            gain=args.gain,
            patience=args.patience,
            start=None if start is None else (start.frames, start.resolution),
        )
    if args.search in ("full", "both"):
        full = full_search(grid, measure)
    return measured.cells, full, linear


def _times(viewer: Viewer, cells: dict[Cell, Share], keep: int, merge: bool) -> dict[Cell, float]:
    """Milliseconds of one clip for each cell."""
    return {(frames, side): viewer.ms(Setting(frames, side, keep, merge=merge)) for frames, side in cells}


def _described(
    keep: int,
    way: str,
    grid: Grid,
    measured: dict[Cell, Share],
    times: dict[Cell, float],
    full: Found | None,
    linear: Found | None,
) -> dict[str, Any]:
    """One search for the result file."""
    best = best_cell(measured, grid)

    def told(found: Found | None) -> dict[str, Any] | None:
        if found is None:
            return None
        frames, side = found.best
        path = [f"{f}x{r}" for f, r in found.path]
        return {
            "frames": frames,
            "resolution": side,
            **found.share.to_dict(),
            "evaluations": found.evaluations,
            "path": path,
        }

    unmasked = [cell for cell in grid.unmasked(keep) if cell in measured]
    top = max(unmasked, key=lambda cell: (grid.seen(cell), measured[cell].value), default=None)
    return {
        "K": keep,
        "by": way,
        "grid": len(grid.cells),
        "full": told(full),
        "linear": None if linear is None else {**(told(linear) or {}), "of": len(grid.cells)},
        "best": {"frames": best[0], "resolution": best[1], **measured[best].to_dict()},
        "unmasked": None if top is None else {"input": f"{top[0]}x{top[1]}", **measured[top].to_dict()},
        "ms of best": times.get(best),
        "cells": {f"{f}x{r}": share.to_dict() for (f, r), share in measured.items()},
        "ms": {f"{f}x{r}": round(value, 3) for (f, r), value in times.items()},
    }


def runs_table(runs: Sequence[dict[str, Any]]) -> str:
    """One line per count and way, in percent."""
    lines: list[list[object]] = []
    for run in runs:
        best, plain = run["best"], run["unmasked"]
        line: list[object] = [f"{run['K']}, {run['by']}"]
        for name in ("full", "linear"):
            found = run[name]
            line += (
                ["-", "-"]
                if found is None
                else [
                    f"{found['frames']}x{found['resolution']} {100 * found['value']:.1f}",
                    f"{found['evaluations']} of {run['grid']}",
                ]
            )
        line.append("-" if plain is None else f"{plain['input']} {100 * plain['value']:.1f}")
        line += [f"[{100 * best['low']:.1f}, {100 * best['high']:.1f}]", run["ms of best"]]
        lines.append(line)
    columns = ["tokens", "best of grid", "evaluated", "linear search", "evaluated", "unmasked"]
    return table([*columns, "interval of best", "ms"], lines)


def model_config(folder: Path) -> VLMConfig:
    """A model's config.json. Raises ConfigError when the folder is not a model's."""
    path = folder / "config.json"
    try:
        return VLMConfig.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read {path}: {error}.") from error


def install(rows: Sequence[PlanRow], folder: Path) -> None:
    """Put a plan table into a model's config.json. Raises ConfigError when that is not a model's."""
    table = PlanTable.of(rows).rows
    save_json(replace(model_config(folder), plan_table=table).to_dict(), folder / "config.json")


def _world(args: argparse.Namespace) -> WorldSource:
    return WorldSource(split="test", count=args.clips, first=args.first, preset=args.preset, nouns=args.nouns)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m training.optimize_tokens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--encoder", help="a folder, an official file, or a chat model's folder")
    top.add_argument("--alignment", help="of training.clip: attribute heads that judge on the demo world")
    top.add_argument("--model", help="a chat model, judged by its answers")
    top.add_argument(
        "--metric",
        choices=["joint", "noun", "motion", "choice", "open"],
        help="right by the heads for noun, motion or both (joint, default); with --model: right answers to "
        "multiple-choice (default) or open questions",
    )
    top.add_argument("--csv", help="a labelled test set instead of the world: class heads judge")
    top.add_argument("--videos", help="folder of the csv's videos")
    top.add_argument("--classes", help="file of class names")
    top.add_argument("--dataset", default="k400", help="layout of the csv, as in training.evaluate classify")
    top.add_argument("--limit", type=int, help="only so many videos of the csv")
    top.add_argument("--tokens", type=int, nargs="+", required=True, metavar="K")
    top.add_argument("--frames", type=int, nargs="+", help="default: the trained range")
    top.add_argument("--resolutions", type=int, nargs="+", help="default: the trained range")
    top.add_argument("--search", choices=["both", "full", "linear"], default="both")
    top.add_argument(
        "--start", metavar="4x224", help="of the linear search; default: K tokens, fewest frames"
    )
    top.add_argument(
        "--gain", type=float, default=0.0, help="accuracies rise from this much on, such as 0.002"
    )
    top.add_argument("--patience", type=int, default=1, help="steps without gain that end a climb")
    top.add_argument("--selector", choices=["flux", "random", "uniform", "tube"], default="flux")
    top.add_argument("--merge", choices=["vid-tldr"], help="also measure merging")
    top.add_argument("--no-times", action="store_true", help="do not time the encoder")
    top.add_argument("--install", metavar="MODEL", help="write the plan table into this model's config.json")
    top.add_argument("--clips", type=int, default=256, help="of the demo world")
    top.add_argument("--first", type=int, default=0)
    top.add_argument("--preset", choices=["simple", "solo", "full"], default="full")
    top.add_argument("--nouns", type=int)
    top.add_argument("--pool", type=int, help="pooling head; default: by the number of tokens")
    top.add_argument("--block", type=int, default=8)
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    top.add_argument("--device")
    top.add_argument("--recipe", help="what the weights were trained with, for the result file")
    top.add_argument("--out", required=True, metavar="DIR")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(given)
    args.told = ["python", "-m", "training.optimize_tokens", *given]
    try:
        return optimize(args)
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
