"""Logs of a run: metrics.jsonl, TensorBoard, and trackio or Weights & Biases where the recipe asks."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoder.checkpoint import atomic_path
from encoder.errors import ConfigError

PROJECT = "fluxchat"


class Figures:
    """Named figures of one step: each is the mean over the micro-batches, of all ranks, that reported it.

    Those that lie on a device stay there until `settle`, which waits for it once.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float | Tensor, int]] = {}

    def add(self, figures: Mapping[str, float | Tensor]) -> None:
        """The figures of one micro-batch: numbers, or tensors of one."""
        for name, value in figures.items():
            total, count = self._sums.get(name, (0.0, 0))
            own = value.detach().float().reshape(()) if isinstance(value, Tensor) else float(value)
            self._sums[name] = (total + own, count + 1)

    def settle(self) -> None:
        """Bring all figures here."""
        there = {name: total for name, (total, _) in self._sums.items() if isinstance(total, Tensor)}
        if there:
            for name, total in zip(there, torch.stack(list(there.values())).tolist(), strict=True):
                self._sums[name] = (total, self._sums[name][1])

    def merge(self, others: Sequence[Figures]) -> None:
        """Replace by what several ranks found together."""
        merged: dict[str, tuple[float | Tensor, int]] = {}
        for other in others:
            for name, (total, count) in other._sums.items():
                before, number = merged.get(name, (0.0, 0))
                merged[name] = (before + total, number + count)
        self._sums = merged

    def means(self) -> dict[str, float]:
        """By name."""
        return {name: float(total) / count for name, (total, count) in self._sums.items()}

    def total(self, name: str) -> float | None:
        """Sum over micro-batches and ranks; None when it was not reported."""
        return float(self._sums[name][0]) if name in self._sums else None


class RunLog:
    """Figures by step. When a run is resumed, lines after the step it continues from are dropped.

    trackers: "trackio" or "wandb"; raises ConfigError when one is not installed.
    """

    def __init__(self, out: Path, start: int, trackers: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._trackers = [_open_tracker(name, out, settings) for name in trackers]
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        earlier = [line for line in lines if _step_of(line) <= start]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in earlier))
        self._file = open(path, "a")  # noqa: SIM115  lives as long as the run
        self._board: Any = None
        self.warning: str | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.warning = "TensorBoard is not installed (pip install tensorboard): see metrics.jsonl."
        else:
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(
        self,
        step: int,
        figures: Mapping[str, float],
        *,
        skipped: int | None = None,
        flush: bool = False,
        echo: Callable[[str], object] | None = None,
    ) -> None:
        """One line of figures; echo also prints it."""
        line = {"step": step, **figures} | ({} if skipped is None else {"skipped": skipped})
        self._file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(dict(figures), step=step)
        if flush:
            self._file.flush()
            if self._board is not None:
                self._board.flush()
        if echo is not None:
            echo(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        for tracker in self._trackers:
            tracker.finish()


def _step_of(line: str) -> float:
    """Step of a line of metrics.jsonl; a line cut short by a kill belongs to no step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


def _open_tracker(name: str, out: Path, settings: Mapping[str, Any]) -> Any:
    try:
        tracker = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"loop.trackers asks for {name}, which is not installed: pip install {name}, or leave it out."
        ) from error
    # One run per folder, so that a resumed run goes on in the same curves.
    identity = {"id": out.name} if name == "wandb" else {}
    tracker.init(project=PROJECT, name=out.name, config=dict(settings), resume="allow", **identity)
    return tracker
