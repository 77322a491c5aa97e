"""The grid of Token Optimization as a picture and as csv (supplement Table 1)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encoder.checkpoint import atomic_path
from encoder.errors import ModelError
from training.evaluation.metrics import Share
from training.evaluation.token_search import Cell, Grid, SearchResult


def write_csv(
    grid: Grid, keep: int, cells: Mapping[Cell, Share], path: Path, times: Mapping[Cell, float]
) -> None:
    """One line per measured cell: input, tokens seen and kept, share with its interval, ms per clip."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        ["frames", "resolution", "seen", "kept", "unmasked", "accuracy", "low", "high", "n", "ms_per_clip"]
    )
    for cell in grid.cells:
        if cell in cells:
            patches, row = grid.patches(cell), cells[cell].to_dict()
            kept = min(keep, patches)
            writer.writerow(
                [
                    *cell,
                    patches,
                    kept,
                    int(patches <= keep),
                    *(row[k] for k in ("value", "low", "high", "n")),
                    round(times[cell], 2) if cell in times else "",
                ]
            )
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue())


def draw_heatmap(
    grid: Grid,
    keep: int,
    cells: Mapping[Cell, Share],
    path: Path,
    *,
    title: str,
    linear: SearchResult | None = None,
) -> None:
    """Resolutions down, frames across, accuracy in percent; unmasked inputs are hatched, the best of each row
    is bold in a frame, the steps of the linear search are numbered. Raises ModelError without matplotlib."""
    figure, axes = figure_of((1.6 + 0.85 * len(grid.frames), 1.5 + 0.6 * len(grid.resolutions)))
    values = [
        [
            100 * cells[(frames, side)].value if (frames, side) in cells else float("nan")
            for frames in grid.frames
        ]
        for side in grid.resolutions
    ]
    picture = axes.imshow(values, cmap="viridis", aspect="auto")
    figure.colorbar(picture, ax=axes, label="accuracy, %")
    steps = {cell: number for number, cell in enumerate(linear.path, 1)} if linear else {}
    middle = sum(picture.get_clim()) / 2
    from matplotlib.patches import Rectangle

    for row, side in enumerate(grid.resolutions):
        measured = [frames for frames in grid.frames if (frames, side) in cells]
        best = max((cells[(frames, side)].value for frames in measured), default=None)
        for column, frames in enumerate(grid.frames):
            share = cells.get((frames, side))
            if share is None:
                continue
            dark = 100 * share.value < middle
            colour, top = "white" if dark else "black", share.value == best
            axes.text(
                column,
                row,
                f"{100 * share.value:.1f}",
                ha="center",
                va="center",
                color=colour,
                fontweight="bold" if top else "normal",
                fontsize=9,
            )
            corner = (column - 0.5, row - 0.5)
            if grid.patches((frames, side)) <= keep:
                axes.add_patch(
                    Rectangle(corner, 1, 1, fill=False, hatch="///", edgecolor=colour, linewidth=0, alpha=0.5)
                )
            if top:
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="crimson", linewidth=2))
            if (frames, side) in steps:
                axes.text(column - 0.44, row - 0.25, steps[(frames, side)], color=colour, fontsize=6)
    axes.set_xticks(range(len(grid.frames)), grid.frames)
    axes.set_yticks(range(len(grid.resolutions)), grid.resolutions)
    axes.set_xlabel("frames")
    axes.set_ylabel("resolution, pixels")
    axes.set_title(title, fontsize=9)
    save_figure(figure, path)


def figure_of(size: tuple[float, float], columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes (several side by side), without a display or global state; raises ModelError
    without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModelError("Pictures need matplotlib: pip install 'fluxchat[train]'.") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(ncols=columns, sharey=True)


def save_figure(figure: Any, path: Path) -> None:
    """As PNG, complete or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
