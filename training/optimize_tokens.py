"""Token Optimization (supplement Tables 1 and 2): the best frames and resolution at each token count.

    python -m training.optimize_tokens --encoder runs/clip/encoder --alignment runs/clip --tokens 64 128 \\
        --frames 4 6 8 10 12 16 --resolutions 84 98 112 126 --clips 256 --out runs/tokens
    python -m training.optimize_tokens --encoder flux_s.pth --csv k400_val.csv --videos DIR --tokens 1024 ...
    python -m training.optimize_tokens ... --merge vid-tldr      merging beside the selector, with times

Measures the full grid and the linear search on the synthetic world's test clips (by attribute heads, or by
the answers of a chat model) or on a labelled csv, and writes result.json, and per count a csv and a heatmap.
plan_table.json holds the best input of each count: --install MODEL puts it where budgets find it: a saved
model's config.json, a stock video model's folder, or for one of the hub this user's cache folder. With
`--plan FILE` the commands of `fluxchat` take one from elsewhere. A budget between two counts takes the input
of the larger. Goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from encoder.budget import InputSpace, PlanRow, PlanTable
from encoder.checkpoint import save_json, weights_hash
from encoder.cost import time_ms
from encoder.errors import ConfigError
from encoder.selection import Selector
from llm_bridge.chat_model import ChatModel, is_stock
from llm_bridge.clip_head import read_clip_head
from llm_bridge.model import VLMConfig
from llm_bridge.towers.measured_plans import plan_file
from llm_bridge.towers.tower import Stage, Tower
from training.command_line import at_least, command_parser, run_command, table
from training.evaluation.chat_evaluator import ChatEvaluator
from training.evaluation.classification import evaluate_classify
from training.evaluation.cli_arguments import (
    add_encoder_options,
    add_model_options,
    add_run_options,
    add_world_options,
    device_of_process,
    open_model,
    read_labelled_files,
    world_source,
)
from training.evaluation.encoder_input import SELECTORS, EncoderInput, VidTldr
from training.evaluation.encoder_run import EncoderRun
from training.evaluation.frozen_encoder import FrozenEncoder, chosen_pools
from training.evaluation.heatmap import draw_heatmap, write_csv
from training.evaluation.journal import Journal, Sharing
from training.evaluation.metrics import Share
from training.evaluation.provenance import (
    about_encoder,
    about_model,
    about_world,
    write_result,
)
from training.evaluation.synthetic_chat import answer_share, evaluate_world
from training.evaluation.synthetic_encoder import WorldClips, attribute_hits
from training.evaluation.token_search import (
    Cell,
    Grid,
    Measured,
    SearchResult,
    best_cell,
    full_search,
    linear_search,
)
from training.evaluation.views import Views

Score = Callable[[EncoderInput], Share]
Clock = Callable[[EncoderInput], float]  # milliseconds of one clip


def encoder_score(args: argparse.Namespace, out: Path) -> tuple[Score, FrozenEncoder, dict[str, Any]]:
    """Accuracy of an encoder on the synthetic world or a csv, the encoder, and what the figures depend on."""
    encoder = FrozenEncoder.open(args.encoder, device_of_process(args.device), args.dtype)
    if args.csv is not None:
        return _score_on_csv(args, out, encoder)
    if args.alignment is None:
        raise ConfigError("The synthetic world judges an encoder by its attribute heads: give --alignment.")
    clip_head = read_clip_head(args.alignment).to(encoder.device)
    source, views = world_source(args), Views()
    clips = WorldClips.of(source)
    about = {"alignment": weights_hash(*clip_head.modules), **about_world(source)}
    pools = chosen_pools(args.pool, clip_head, encoder)
    metadata = about_encoder(encoder, views, pools, args.seed, **about)
    run = EncoderRun(encoder, Journal(out, metadata), pools, views, args.seed, args.block)

    def score(encoder_input: EncoderInput) -> Share:
        hits = attribute_hits(run, clip_head, clips, encoder_input)
        if args.metric == "joint":
            return Share.of(torch.stack(list(hits.values())).all(dim=0))
        return Share.of(hits[args.metric])

    return score, encoder, {**metadata, "metric": args.metric}


def _score_on_csv(
    args: argparse.Namespace, out: Path, encoder: FrozenEncoder
) -> tuple[Score, FrozenEncoder, dict[str, Any]]:
    """Likewise, by the encoder's class heads."""
    data, views = read_labelled_files(args, Path(args.csv), Path(args.videos or ".")), Views(fit="crop")
    about = {"dataset": args.dataset, "annotations": Path(args.csv).name, "preset": None}
    pools = chosen_pools(args.pool, None, encoder)
    metadata = about_encoder(encoder, views, pools, args.seed, **about)
    run = EncoderRun(encoder, Journal(out, metadata), pools, views, args.seed, args.block)

    def score(encoder_input: EncoderInput) -> Share:
        first = evaluate_classify(run, data, encoder_input)["top1"]
        return Share(round(first["value"] * first["n"]), first["n"])

    return score, encoder, {**metadata, "metric": "top-1"}


def model_score(args: argparse.Namespace, out: Path) -> tuple[Score, ChatModel, dict[str, Any]]:
    """Accuracy of a chat model's answers on the world, of multiple-choice or of open questions."""
    model = open_model(args)
    source = world_source(args)
    world = source.open()
    metadata = {**about_model(model), "seed": args.seed, **about_world(source)}
    journal = Journal(out, metadata)

    def score(encoder_input: EncoderInput) -> Share:
        evaluator = ChatEvaluator(model, encoder_input, args.seed)
        result = evaluate_world(evaluator, world, source.first, source.count, journal)
        return answer_share(result, "open" if args.metric == "open" else "choice")

    return score, model, {**metadata, "metric": f"{args.metric} questions"}


def optimize(args: argparse.Namespace) -> int:
    """Everything the command does."""
    if (args.encoder is None) == (args.model is None):
        raise ConfigError("Give either --encoder or --model.")
    metrics = ("joint", "noun", "motion") if args.model is None else ("choice", "open")
    args.metric = args.metric or metrics[0]
    if args.metric not in metrics:
        raise ConfigError(f"--metric {args.metric} does not go with this: use one of {', '.join(metrics)}.")
    if args.install:
        check_install(args.install)  # before hours of measuring
    out, sharing = Path(args.out), Sharing()
    result_file = out / "result.json"
    score: Score
    clock: Clock
    if args.model is not None:
        score, model, metadata = model_score(args, result_file)
        space, device, clock = model.tower.space, model.tower.device, partial(tower_ms, model.tower)
    else:
        score, encoder, metadata = encoder_score(args, result_file)
        space, device, clock = InputSpace.of(encoder.config), encoder.device, encoder.ms
    grid = Grid(
        tuple(args.frames or space.frames),
        tuple(args.resolutions or space.sides),
        space.cell,
        space.frames_per_cell,
        space.sides,
    )
    runs, rows = [], []
    merging = VidTldr.parse(args.merge) if args.merge else None
    ways = {"selector": None} | ({str(merging): merging} if merging else {})
    for keep in sorted(args.tokens):
        for way, merge in ways.items():
            measured, full, linear = _search(args, grid, keep, score, merge=merge)
            times = {} if args.no_times else _times(clock, measured, keep, merge)
            name = f"{keep}" if way == "selector" else f"{keep}_{way.replace('/', '_')}"
            if sharing.first:
                write_csv(grid, keep, measured, out / f"grid_{name}.csv", times)
                title = f"K = {keep}, {way}, {metadata['metric']}, n = {next(iter(measured.values())).total}"
                draw_heatmap(grid, keep, measured, out / f"heatmap_{name}.png", title=title, linear=linear)
            best = best_cell(measured, grid)
            runs.append(_described(keep, way, grid, measured, times, full, linear))
            if way == "selector":
                rows.append(PlanRow(keep, *best))
    if sharing.first:
        print(runs_table(runs))
        save_json([asdict(row) for row in rows], out / "plan_table.json")
        if args.install:
            place = install(rows, args.install, args.select or "after")
            print(f"The plan table is in {place}.")
    figures = {"frames": grid.frames, "resolutions": grid.resolutions, "runs": runs}
    write_result(result_file, args.command_line, device, args.recipe, metadata, figures)
    return 0


def _search(
    args: argparse.Namespace, grid: Grid, keep: int, score: Score, *, merge: VidTldr | None
) -> tuple[dict[Cell, Share], SearchResult | None, SearchResult | None]:
    """All cells that were measured, and what each kind of search found."""
    selector: Selector = "flux" if merge else args.selector
    measured = Measured(lambda frames, side: score(EncoderInput(frames, side, keep, selector, merge)))

    def measure(frames: int, side: int) -> Share:
        return measured((frames, side))

    linear = full = None
    if args.search in ("linear", "both"):
        start = EncoderInput.parse(args.start) if args.start else None
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


def _times(clock: Clock, cells: dict[Cell, Share], keep: int, merge: VidTldr | None) -> dict[Cell, float]:
    """Milliseconds of one clip for each cell."""
    return {(frames, side): clock(EncoderInput(frames, side, keep, merge=merge)) for frames, side in cells}


def tower_ms(tower: Tower, encoder_input: EncoderInput) -> float:
    """Fastest of three times that a chat model's tower, its projector included, takes for one clip, in ms."""
    frames, side = encoder_input.frames, encoder_input.resolution
    pixels, plan = torch.zeros(3, frames, side, side), tower.space.square(frames, side, 1)
    plan = replace(plan, keep=min(encoder_input.keep or plan.grid.size, plan.grid.size))
    merging = encoder_input.merging(plan.patch_size)

    def run() -> None:
        if merging is None:
            tower.look(pixels, plan, encoder_input.selector)
        else:
            tower.merge(pixels, merging)

    return time_ms(run, tower.device)


def _described(
    keep: int,
    way: str,
    grid: Grid,
    measured: dict[Cell, Share],
    times: dict[Cell, float],
    full: SearchResult | None,
    linear: SearchResult | None,
) -> dict[str, Any]:
    """One search for the result file."""
    best = best_cell(measured, grid)

    def described(search: SearchResult | None) -> dict[str, Any] | None:
        if search is None:
            return None
        frames, side = search.best
        path = [f"{f}x{r}" for f, r in search.path]
        return {
            "frames": frames,
            "resolution": side,
            **search.share.to_dict(),
            "evaluations": search.evaluations,
            "path": path,
        }

    unmasked = [cell for cell in grid.unmasked(keep) if cell in measured]
    top = max(unmasked, key=lambda cell: (grid.patches(cell), measured[cell].value), default=None)
    return {
        "K": keep,
        "by": way,
        "grid": len(grid.cells),
        "full": described(full),
        "linear": None if linear is None else {**(described(linear) or {}), "of": len(grid.cells)},
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
            search = run[name]
            line += (
                ["-", "-"]
                if search is None
                else [
                    f"{search['frames']}x{search['resolution']} {100 * search['value']:.1f}",
                    f"{search['evaluations']} of {run['grid']}",
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


def check_install(name: str) -> None:
    """Raises ConfigError for what no plan table can be installed for."""
    if not is_stock(name):
        model_config(Path(name))


def install(rows: Sequence[PlanRow], name: str, stage: Stage) -> Path:
    """Put a plan table where budgets find it, and return where: a saved model's config.json, or the file of a
    stock model and its stage. Raises ConfigError when it is no model's folder."""
    table = PlanTable.of(rows).rows
    if is_stock(name):
        path = plan_file(name, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json([asdict(row) for row in table], path)
        return path
    path = Path(name) / "config.json"
    save_json(replace(model_config(Path(name)), plan_table=table).to_dict(), path)
    return path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = command_parser("training.optimize_tokens", __doc__)
    add_encoder_options(top, required=False)
    add_model_options(top, required=False)
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
    top.add_argument("--limit", type=at_least(1), help="only so many videos of the csv")
    top.add_argument("--tokens", type=at_least(1), nargs="+", required=True, metavar="K")
    top.add_argument("--frames", type=at_least(1), nargs="+", help="default: the trained range")
    top.add_argument("--resolutions", type=at_least(1), nargs="+", help="default: the trained range")
    top.add_argument("--search", choices=["both", "full", "linear"], default="both")
    top.add_argument(
        "--start", metavar="4x224", help="of the linear search; default: K tokens, fewest frames"
    )
    top.add_argument(
        "--gain", type=float, default=0.0, help="accuracies rise from this much on, such as 0.002"
    )
    top.add_argument("--patience", type=at_least(1), default=1, help="steps without gain that end a climb")
    top.add_argument("--selector", choices=SELECTORS, default="flux")
    top.add_argument(
        "--merge",
        metavar="vid-tldr",
        help="also measure merging; vid-tldr=1536,1024,512: tokens after each of the first blocks, "
        "vid-tldr/sum: likeness by the residual sum",
    )
    top.add_argument("--no-times", action="store_true", help="do not time the encoder")
    top.add_argument("--install", metavar="MODEL", help="keep the plan table for this model's budgets")
    add_world_options(top, clips=256)
    add_run_options(top)
    top.add_argument("--out", required=True, metavar="DIR")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_command(parser(), optimize, argv)


if __name__ == "__main__":
    sys.exit(main())
