"""The paper's training figures from the logs of runs (Figures 2-4).

    python -m training.plots gradnorm runs/umt --out runs/gradnorm.png
    python -m training.plots convergence runs/f8 runs/f16 --metric noun_flux_128 --out runs/convergence.png

gradnorm: the norm of the gradient of every part of the model, of the projectors above all, and of all parts
together, over steps. convergence: accuracy on held-out data over epochs, one line per run, such as frame
counts at the same number of tokens. Both read metrics.jsonl, and can write what they draw as csv.

norms: the same norms of several runs side by side, such as a plain ViT beside FluxViT, stored as a result
file from which training.results draws and tables them:

    python -m training.plots norms runs/cpu/umt_norms_plain runs/cpu/umt_norms --parts projector \
        --out runs/results/norms/result.json

    python -m training.plots budget runs/results/world_encoder.json --metric noun --out training/budget.png

budget: accuracy over tokens kept and over measured milliseconds per clip, one line per way to choose them:
each selector, fewer frames with all their patches, and the best frames and resolution at each count.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from encoder.checkpoint import atomic_path, load_encoder, weights_hash
from encoder.errors import DataError
from training.command_line import at_least, command_parser, run_command, table
from training.evaluation.heatmap import figure_of, save_figure
from training.evaluation.provenance import write_result

NORM = "grad_norm"
PATCH = 14  # of every FluxViT
FEWER_FRAMES, BEST_INPUT = "fewer frames", "best frames x resolution"


@dataclass
class Curve:
    """Values over steps (or epochs); what was not finite is left out."""

    name: str
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """One point."""
        if math.isfinite(y):
            self.x.append(x)
            self.y.append(y)


def read_run(run: Path) -> dict[str, Curve]:
    """Every figure of a run's metrics.jsonl over its steps; raises DataError.

    A line cut short by a stop is skipped; of a step that was repeated after one, the last counts.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DataError(f"Cannot read the log {path}: {error.strerror}.") from error
    by_step: dict[str, dict[int, float]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (ValueError, KeyError, AttributeError):
            continue
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                by_step.setdefault(name, {})[step] = float(value)
    if not by_step:
        raise DataError(f"{path} holds no figures yet.")
    curves = {name: Curve(name) for name in by_step}
    for name, values in by_step.items():
        for step in sorted(values):
            curves[name].add(step, values[step])
    return curves


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values (fewer at the start)."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def gradnorm_curves(run: Path, pattern: str = "") -> list[Curve]:
    """The norm over all parts, and of each part whose name matches; raises DataError when none was logged."""
    logged = read_run(run)
    if NORM not in logged:
        raise DataError(f"{run} has no gradient norms in its log.")
    parts = [curve for name, curve in logged.items() if name.startswith(NORM + "/")]
    chosen = [part for part in parts if re.search(pattern, part.name.removeprefix(NORM + "/"))]
    if pattern and not chosen:
        names = ", ".join(part.name.removeprefix(NORM + "/") for part in parts) or "none"
        raise DataError(f"No part of {run} matches {pattern!r}: logged are {names}.")
    overall = Curve("all parts", logged[NORM].x, logged[NORM].y)
    return [overall, *(Curve(part.name.removeprefix(NORM + "/"), part.x, part.y) for part in chosen)]


def norm_comparison(runs: Sequence[Path], pattern: str = "") -> dict[str, dict[str, Any]]:
    """By run: every logged norm, the last loss and the last held-out figures. Raises DataError."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        curves = {curve.name: curve for curve in gradnorm_curves(run, pattern)}
        logged = read_run(run)
        last = {name: curve.y[-1] for name, curve in logged.items() if name.startswith("eval/") and curve.y}
        if run.name in found:
            raise DataError(f"Two runs are named {run.name}: give folders of different names.")
        found[run.name] = {
            "norms": {name: {"step": curve.x, "value": curve.y} for name, curve in curves.items()},
            "last": {"loss": logged["loss"].y[-1], **{k.removeprefix("eval/"): v for k, v in last.items()}},
        }
    return found


def norms_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Norm of each part over the first and last quarter of the steps, a line per run: median and largest."""
    parts = list(dict.fromkeys(name for run in runs.values() for name in run["norms"]))
    lines: list[list[object]] = []
    for part in parts:
        for name, run in runs.items():
            if part not in run["norms"]:
                continue
            values = run["norms"][part]["value"]
            quarter = max(1, len(values) // 4)
            line: list[object] = [part.removeprefix("encoder."), name, len(values)]
            for some in (values[:quarter], values[-quarter:]):
                line += [f"{statistics.median(some):.3g}", f"{max(some):.3g}"]
            lines.append([*line, f"{statistics.pstdev(values[-quarter:]):.2g}"])
    columns = ["run", "steps", "first quarter", "largest", "last quarter", "largest", "spread"]
    losses = "\n".join(
        f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in run["last"].items())
        for name, run in runs.items()
    )
    return f"{table(['part', *columns], lines)}\n\nat the end\n{losses}"


def draw_norms(runs: Mapping[str, Mapping[str, Any]], folder: Path, width: int = 8) -> None:
    """`norms_PART.png` for each part that all runs have, one line per run."""
    first, *others = runs.values()
    for part in [name for name in first["norms"] if all(name in run["norms"] for run in others)]:
        of_part = {name: run["norms"][part] for name, run in runs.items()}
        curves = [Curve(name, norms["step"], norms["value"]) for name, norms in of_part.items()]
        out = folder / f"norms_{part.removeprefix('encoder.').replace(' ', '_').replace('.', '_')}.png"
        draw(curves, out, x="step", y="gradient norm", title=part, width=width, log=True)


def convergence_curves(
    runs: Sequence[Path], metric: str, steps_per_epoch: Sequence[float] | None = None
) -> list[Curve]:
    """A held-out figure of every run over epochs (over steps without `steps_per_epoch`). Raises DataError."""
    curves = []
    for number, run in enumerate(runs):
        logged = read_run(run)
        curve = logged.get(f"eval/{metric}") or logged.get(metric)
        if curve is None:
            held = [name.removeprefix("eval/") for name in logged if name.startswith("eval/")]
            raise DataError(
                f"{run} has no figure {metric!r}: it has {', '.join(held) or 'no held-out ones'}."
            )
        scale = steps_per_epoch[number] if steps_per_epoch else 1.0
        curves.append(Curve(run.name, [x / scale for x in curve.x], curve.y))
    return curves


def draw(
    curves: Sequence[Curve], out: Path, *, x: str, y: str, title: str, width: int = 1, log: bool = False
) -> None:
    """One line per curve, smoothed over `width` points, the first one in black when it stands for all."""
    figure, axes = figure_of((7, 4))
    for curve in curves:
        colour = "black" if curve.name == "all parts" else None
        marker = "o" if len(curve.x) < 40 else None
        axes.plot(
            curve.x, smooth(curve.y, width), label=curve.name, color=colour, marker=marker, markersize=3
        )
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    save_figure(figure, out)


@dataclass(frozen=True)
class _Point:
    """One encoder input of a result file."""

    grid: tuple[int, int]
    selector: str
    patches: int
    tokens: int
    ms: float
    value: float


def _points(result: Path, metric: str) -> list[_Point]:
    """Every encoder input, by tokens kept; raises DataError."""
    try:
        points = []
        for row in json.loads(result.read_text())["settings"]:
            patches = row["frames"] * (row["resolution"] // PATCH) ** 2
            grid, value = (row["frames"], row["resolution"]), 100 * row[metric]["top1"]["value"]
            ms, tokens = row["ms_per_clip"], row["K"] or patches
            points.append(_Point(grid, row["selector"], patches, tokens, ms, value))
        return sorted(points, key=lambda point: point.tokens)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{result} holds no settings with ms_per_clip and {metric}: "
            "it must be written by training.evaluate world --encoder."
        ) from error


def budget_curves(result: Path, metric: str) -> dict[str, tuple[Curve, Curve]]:
    """By way to choose tokens: accuracy in percent over tokens, and over milliseconds. Raises DataError.

    All start from the setting that keeps the most patches of which it drops none. Other inputs that drop none
    are FEWER_FRAMES; those that do are BEST_INPUT, at each count the best of all that flux chose from.
    """
    points = _points(result, metric)
    whole = [point for point in points if point.tokens >= point.patches]
    if not whole:
        raise DataError(f"{result} holds no setting that keeps every token: measure one.")
    most = whole[-1]
    curves: dict[str, tuple[Curve, Curve]] = {}

    def add(name: str, point: _Point) -> None:
        over_tokens, over_ms = curves.setdefault(name, (Curve(name), Curve(name)))
        over_tokens.add(point.tokens, point.value)
        over_ms.add(point.ms, point.value)

    searched = [p for p in points if p.selector == "flux" and p.tokens < p.patches]
    for point in points:
        if point.grid == most.grid:
            add(point.selector, point)
        elif point.tokens >= point.patches:
            add(FEWER_FRAMES, point)
    if any(point.grid != most.grid for point in searched):
        for tokens in sorted({point.tokens for point in searched}):
            same = [point for point in searched if point.tokens == tokens]
            add(BEST_INPUT, max(same, key=lambda point: point.value))
    for name, (over_tokens, _) in curves.items():  # all of them end where every token is kept
        if name != most.selector and over_tokens.x[-1] < most.tokens:
            add(name, most)
    return curves


def draw_budget(curves: Mapping[str, tuple[Curve, Curve]], out: Path, metric: str) -> None:
    """Two panels that share their accuracy axis."""
    figure, panels = figure_of((9, 3.6), columns=2)
    for number, (axes, x) in enumerate(zip(panels, ("tokens kept", "ms per clip"), strict=True)):
        for name, pair in curves.items():
            style = {"linewidth": 2.5} if name == "flux" else {"linewidth": 1.2, "linestyle": "--"}
            axes.plot(pair[number].x, pair[number].y, marker="o", markersize=4, label=name, **style)
        axes.set_xscale("log", base=2)
        ticks = sorted({x for pair in curves.values() for x in pair[0].x}) if number == 0 else []
        if ticks:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        else:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(x)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"{metric}, percent right")
    panels[0].legend(fontsize=8)
    save_figure(figure, out)


def write_csv(curves: Sequence[Curve], out: Path, x: str) -> None:
    """One line per point: curve, x, value."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["curve", x, "value"])
    writer.writerows(
        [curve.name, at, value] for curve in curves for at, value in zip(curve.x, curve.y, strict=True)
    )
    with atomic_path(out) as temporary:
        temporary.write_text(text.getvalue())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = command_parser("training.plots", __doc__)
    commands = top.add_subparsers(dest="command", required=True)
    gradnorm = commands.add_parser("gradnorm", help="gradient norm of every part, over steps")
    gradnorm.add_argument("run", nargs="+", type=Path, help="folder of a run; of several, one file each")
    gradnorm.add_argument("--parts", default="", metavar="REGEX", help="only these, such as projector")
    gradnorm.add_argument("--smooth", type=at_least(1), default=20, help="steps to average over")
    convergence = commands.add_parser("convergence", help="held-out accuracy over epochs")
    convergence.add_argument("run", nargs="+", type=Path, help="folders of runs, one line each")
    convergence.add_argument("--metric", required=True, help="a held-out figure of the log, without eval/")
    convergence.add_argument(
        "--steps-per-epoch", type=float, nargs="+", help="one number, or one per run; default: show steps"
    )
    budget = commands.add_parser("budget", help="accuracy over tokens and over time")
    budget.add_argument("result", type=Path, help="result file of training.evaluate world --encoder")
    budget.add_argument("--metric", default="noun", help="an attribute: noun or motion")
    norms = commands.add_parser("norms", help="gradient norms of several runs side by side")
    norms.add_argument("run", nargs="+", type=Path, help="folders of runs whose result is there")
    norms.add_argument("--parts", default="", metavar="REGEX", help="only these, such as projector")
    norms.add_argument("--recipe", help="what they were trained with")
    norms.add_argument("--out", required=True, type=Path, help="JSON; pictures beside it")
    for command in (gradnorm, convergence, budget):
        command.add_argument("--out", required=True, type=Path, help="PNG; a csv of the same name beside it")
    return top


def _seed(run: Path) -> int:
    """Of a run, from its newest checkpoint; raises DataError without one."""
    states = sorted(run.glob("checkpoints/*/state.json"))
    try:
        return int(json.loads(states[-1].read_text())["seed"])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{run} has no readable checkpoint: give the folder of a finished run.") from error


def compare_norms(args: argparse.Namespace) -> None:
    """The result file of several runs' norms, and its pictures."""
    runs = norm_comparison(args.run, args.parts)
    seeds = dict.fromkeys(str(_seed(path)) for path in args.run)
    metadata = {
        "weights": ", ".join(weights_hash(load_encoder(path / "encoder")) for path in args.run),
        "dtype": "float32",  # of all parameters that learn, hence of their gradients
        "seed": ", ".join(seeds),
    }
    figures = {"interval": "none, one run each", "runs": runs}
    command = ["python", "-m", *args.command_line[2:]]
    write_result(args.out, command, torch.device("cpu"), args.recipe, metadata, figures)
    draw_norms(runs, args.out.parent)
    print(norms_table(runs))


def run(args: argparse.Namespace) -> None:
    """Draw one of the figures."""
    if args.command == "gradnorm":
        for folder in args.run:
            out = args.out if len(args.run) == 1 else args.out.with_stem(f"{args.out.stem}_{folder.name}")
            curves = gradnorm_curves(folder, args.parts)
            draw(curves, out, x="step", y="gradient norm", title=folder.name, width=args.smooth, log=True)
            write_csv(curves, out.with_suffix(".csv"), "step")
            print(f"{out}: {len(curves)} curves, {len(curves[0].x)} steps")
    elif args.command == "norms":
        compare_norms(args)
    elif args.command == "budget":
        by_way = budget_curves(args.result, args.metric)
        draw_budget(by_way, args.out, args.metric)
        write_csv([tokens for tokens, _ in by_way.values()], args.out.with_suffix(".csv"), "tokens")
        print(f"{args.out}: {len(by_way)} ways to choose tokens")
    else:
        scales = args.steps_per_epoch
        if scales is not None and len(scales) == 1:
            scales *= len(args.run)
        if scales is not None and len(scales) != len(args.run):
            raise DataError(f"{len(scales)} steps per epoch were given for {len(args.run)} runs.")
        curves = convergence_curves(args.run, args.metric, scales)
        x = "step" if scales is None else "epoch"
        draw(curves, args.out, x=x, y=args.metric, title=f"{args.metric} on held-out data")
        write_csv(curves, args.out.with_suffix(".csv"), x)
        for curve in curves:
            print(f"{curve.name}: {curve.y[-1]:.4f} after {curve.x[-1]:g} {x}s, best {max(curve.y):.4f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
