"""What confining itself adds to a child that decodes one untrusted file: wall clock and CPU time.

    python -m tests.bench.sandbox [--n 40] [--smallest]

The same read (one frame of a small h264 file in a new child), confined and not, in turns; the children that
are not confined have their rlimits only. Prints one JSON line, milliseconds.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from encoder.video.confine import report
from encoder.video.reader import probe
from tests.bench.common import arguments, environment, print_json
from tests.encoder.video import video_files as vf
from tests.encoder.video.hijack import hijacked


def cost(read: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU of this process and its child) of one read, milliseconds."""
    usage = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)

    def cpu() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in usage)

    wall, used = time.perf_counter(), cpu()
    read()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (cpu() - used)


def spread(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4)
    return dict(zip(("q1", "median", "q3"), (round(q, 2) for q in quartiles), strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=40, help="reads of each way, in turn: two or more")
    args = arguments(parser, argv, n=2)
    found: dict[str, list[tuple[float, float]]] = {"confined": [], "free": []}
    with tempfile.TemporaryDirectory() as folder:
        path = vf.write(Path(folder) / "v.mp4", vf.steady(25), size=(320, 240))
        for _ in range(args.n + 1):
            for name, costs in found.items():
                with hijacked("", Path(folder), confined=name == "confined"):
                    costs.append(cost(lambda: probe(path, trusted=False)))
    columns = {
        f"{what}_{name}_ms": [pair[i] for pair in costs[1:]]  # the first fills the caches of the disk
        for name, costs in found.items()
        for i, what in enumerate(("wall", "cpu"))
    }
    added = {
        f"{what}_added_ms": [
            a - b for a, b in zip(columns[f"{what}_confined_ms"], columns[f"{what}_free_ms"], strict=True)
        ]
        for what in ("wall", "cpu")
    }
    figures = {name: spread(values) for name, values in {**columns, **added}.items()}
    result = {"bench": "sandbox", "in_force": str(report()), "n": args.n, **figures, **environment()}
    print_json(result, smallest=args.smallest)


if __name__ == "__main__":
    main()
