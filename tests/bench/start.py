"""From nothing to the first answer of the model in the box: seconds and memory of whole processes.

    python -m tests.bench.start [--n 5] [--smallest]

Each round is a fresh Python process that imports the package, opens `VideoChat()` and asks about a 10 s clip
that it has not seen, at the default budget; the file system's cache is warm after the first round, which does
not count. `interpreter` is the baseline: the same process with torch and transformers imported and nothing
else. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.common import arguments, environment, print_json, summary
from tests.encoder.video import video_files as vf

SECONDS, FPS = 10, 25.0


def ours(video: str) -> dict[str, float]:
    """One process's figures."""
    start = time.perf_counter()
    from app import VideoChat

    imported = time.perf_counter()
    with VideoChat() as chat:
        loaded = time.perf_counter()
        answer = chat.ask(video, "What happens in the video?")
        done = time.perf_counter()
    assert answer.text
    return {
        "import_s": imported - start,
        "load_s": loaded - imported,
        "answer_s": done - loaded,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def interpreter() -> dict[str, float]:
    """What importing the two big libraries takes by itself."""
    start = time.perf_counter()
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    took = time.perf_counter() - start
    return {"import_s": took, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def rounds(n: int, warmup: int, video: Path) -> dict[str, list[dict[str, float]]]:
    """Figures of `n` processes of each way, in turn, after `warmup` that do not count."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "interpreter": []}
    for number in range(-warmup, n):
        for way, rows in found.items():
            command = [sys.executable, "-m", "tests.bench.start", "--child", way, str(video)]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            if number >= 0:
                rows.append({**row, "process_s": time.perf_counter() - start})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "VIDEO"), help=argparse.SUPPRESS)
    args = arguments(parser, argv, n=1, warmup=0)
    if args.child:
        way, video = args.child
        print(json.dumps(ours(video) if way == "ours" else interpreter()))
        return
    with tempfile.TemporaryDirectory() as scratch:
        video = vf.write(Path(scratch) / "clip.mp4", vf.steady(round(SECONDS * FPS), FPS))
        found = rounds(args.n, args.warmup, video)
    result = {
        way: {
            name: summary([row[name] for row in rows])
            if name.endswith("_s")
            else round(statistics.median(row[name] for row in rows))
            for name in rows[0]
        }
        for way, rows in found.items()
    }
    print_json({"bench": "start", **environment("bfloat16"), "n": args.n, **result}, smallest=args.smallest)


if __name__ == "__main__":
    main()
