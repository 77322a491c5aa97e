"""How many clips a second this machine decodes for a recipe, against how many a GPU would train on.

The first is measured on the recipe's own files, the second computed: the recipe's multiply-accumulates per
sample (training/cost.py) at a share of a card's published peak.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from encoder.errors import ConfigError, FluxChatError
from encoder.video.reader import share_cores
from training.data.augment import segment_moments
from training.data.datasets import NEEDS, DatasetConfig
from training.data.video_batches import own_cores

H100_TFLOPS = 989.0  # published, bf16 without sparsity
H100_SHARE = 0.35  # of that, as training.cost takes for other cards
GRID = (16, 224)  # frames and side where a recipe has no grid of its own


@dataclass(frozen=True)
class Speed:
    """clips read in `seconds` on `cores`, at `cpu_s` of this process and its children for each."""

    clips: int
    seconds: float
    cpu_s: float
    cores: int
    frames: int
    side: int

    @property
    def clips_per_s(self) -> float:
        """Of this machine."""
        return self.clips / self.seconds


def measure(dataset: DatasetConfig, stage: str | None, grid: tuple[int, int], clips: int) -> Speed | None:
    """Read `clips` examples as the loader does, drawn at random but always the same; None without any.

    grid: frames and side. Those that cannot be read are left out. Raises FluxChatError.
    """
    source, cores = dataset.open(NEEDS.get(stage or "")), own_cores()
    rng, (frames, side) = random.Random(0), grid
    numbers = [rng.randrange(len(source)) for _ in range(clips if len(source) else 0)]
    moments = [segment_moments(frames, rng) for _ in numbers]

    def read(number: int, at: Sequence[float]) -> int:
        try:
            example = source[number]
            if not example.has_media:
                return 0
            example.media.load(frames, side, moments=at)
        except (FluxChatError, OSError):
            return 0
        return 1

    with ThreadPoolExecutor(cores, initializer=share_cores) as pool:
        warm = min(len(numbers), cores)
        list(pool.map(read, numbers[:warm], moments[:warm]))  # starts the decoding children
        cpu, began = _cpu_s(), time.perf_counter()
        done = sum(pool.map(read, numbers, moments))
        seconds, cpu = time.perf_counter() - began, _cpu_s() - cpu
    return Speed(done, seconds, cpu / done, cores, frames, side) if done else None


def _cpu_s() -> float:
    """CPU seconds of this process and its children, those that have ended included."""
    me = psutil.Process()
    ended = me.cpu_times()
    total = getattr(ended, "children_user", 0.0) + getattr(ended, "children_system", 0.0)
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def grid_of(recipe: object) -> tuple[int, int]:
    """Frames and side of a middle one of a recipe's grids."""
    pairs = getattr(getattr(recipe, "grid", None), "pairs", None)
    if not callable(pairs):
        return GRID
    found = sorted(pairs(), key=lambda pair: pair[0] * pair[1] ** 2)
    return (int(found[len(found) // 2][0]), int(found[len(found) // 2][1]))


def report_speed(
    recipe: str,
    overrides: Sequence[str],
    values: dict[str, Any],
    datasets: Sequence[tuple[str, DatasetConfig]],
    clips: int,
) -> list[str]:
    """Lines for people: what was measured for each dataset, and what an H100 would need."""
    from training.cost import OPERATIONS, Assumptions, read_workload, stage_of
    from training.trainer.recipe import build

    name, kind = stage_of(values, Path(recipe))
    grid = grid_of(build(kind, values, recipe))
    lines, cpu, samples = [""], [], 0
    for where, dataset in datasets:
        if where.startswith("held_out"):
            continue
        samples += len(dataset.open(NEEDS.get(str(values["stage"]))))
        speed = measure(dataset, str(values["stage"]), grid, clips)
        if speed is None:
            lines.append(f"{where}: no clip to measure.")
            continue
        cpu.append(speed.cpu_s)
        lines.append(
            f"{where}: {speed.clips_per_s:.1f} clips/s on {speed.cores} cores, {1e3 * speed.cpu_s:.1f} "
            f"CPU-ms each ({speed.frames} frames at {speed.side}; {speed.clips} clips measured now)."
        )
    try:
        macs = read_workload(recipe, overrides, Assumptions(samples or None)).macs_per_sample
    except ConfigError as error:
        return [*lines, f"What a GPU needs cannot be computed: {error}"]
    need = H100_TFLOPS * 1e12 * H100_SHARE / (OPERATIONS * macs)
    lines.append(
        f"An H100 at {H100_SHARE:.0%} of {H100_TFLOPS:g} TFLOPS trains on {need:.1f} samples/s of {name} "
        f"({macs / 1e9:,.1f} giga multiply-accumulates each; computed, not measured)."
    )
    if cpu:
        lines.append(f"That takes {need * sum(cpu) / len(cpu):.1f} cores like these for each H100.")
    return lines
