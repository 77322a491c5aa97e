"""What every benchmark shares: the smallest run, the machine's description, timing in turns, a JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil


def arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, **smallest: object
) -> argparse.Namespace:
    """The parsed command line, with `--smallest`: then the options `smallest` stand for those not given.

    argv: without the program's name; None for that of this process.
    """
    about = "the least work, to see that all of it runs: the figures say nothing"
    parser.add_argument("--smallest", action="store_true", help=about)
    if parser.parse_known_args(argv)[0].smallest:
        parser.set_defaults(**smallest)
    return parser.parse_args(argv)


def environment(dtype: str = "float32") -> dict[str, Any]:
    """Machine, threads, dtype, commit, versions and load average: what a figure depends on."""
    import torch

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    return {
        "machine": f"{platform.machine()} {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "accelerator": str(torch.accelerator.current_accelerator())
        if torch.accelerator.is_available()
        else None,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "load": round(os.getloadavg()[0], 2),
    }


def interleave(cases: Mapping[str, Callable[[], object]], n: int, warmup: int = 1) -> dict[str, list[float]]:
    """Wall seconds of every case, run in turn (A, B, A, B, ...) so that drift hits all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(-warmup, n):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if repeat >= 0:
                samples[name].append(time.perf_counter() - start)
    return samples


def cpu_s() -> float:
    """CPU seconds of this process and its children: what a core has to give, whoever else uses it."""
    me = psutil.Process()
    ended = me.cpu_times()
    total = float(ended.children_user + ended.children_system)
    for process in (me, *me.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def summary(samples: list[float]) -> dict[str, float]:
    """n, median, minimum and 90th percentile in ms; spread = (p90 - min) / median."""
    ordered = sorted(samples)
    median = statistics.median(ordered)
    p90 = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return {
        "n": len(ordered),
        "median_ms": round(1e3 * median, 3),
        "min_ms": round(1e3 * ordered[0], 3),
        "p90_ms": round(1e3 * p90, 3),
        "spread": round((p90 - ordered[0]) / median, 3),
    }


def print_json(result: dict[str, Any], *, smallest: bool = False) -> None:
    """One line on stdout, the last one. smallest: it says that its figures are those of the smallest run."""
    print(json.dumps({**result, "smallest": True} if smallest else result), flush=True)
