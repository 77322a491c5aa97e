"""A library: clips per second to index and videos per second to ask beside bare decoding, and searching among
100,000 clips.

    python -m tests.bench.library [--rows N] [--smallest]

Videos are made: 20 s of 640 x 360, ten clips of 2 s each. The rows that are searched are random unit vectors
with bytes of a thumbnail; the text tower is left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.chat import VideoChat
from app.library.ask_all import LocalAsker
from app.library.clip_reader import read_clips
from app.library.clip_table import ClipRow, ClipTable
from app.library.embedders import open_embedder
from app.library.indexing import LocalIndexer, index_files
from encoder.video.reader import read_clip
from tests.bench.common import arguments, cpu_s, environment, interleave, print_json, summary
from training.synthetic.export import write_video

CLIP_S, FPS, HEIGHT, WIDTH = 2.0, 12, 360, 640


def make_videos(folder: Path, count: int, seconds: int) -> list[str]:
    """A pattern that moves over noise."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 255, (HEIGHT // 8, 2 * WIDTH // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    paths = []
    for number in range(count):
        shifts = [(number + 3 * i) % WIDTH for i in range(seconds * FPS)]
        path = folder / f"{number}.mp4"
        write_video(path, np.stack([ground[:, shift : shift + WIDTH] for shift in shifts]), FPS)
        paths.append(str(path))
    return paths


def indexing(folder: Path, videos: int, seconds: int, n: int) -> dict[str, float]:
    """Clips: decoded alone, and indexed."""
    paths, embedder = make_videos(folder, videos, seconds), open_embedder(device="cpu")
    clips = videos * round(seconds / CLIP_S)
    runs = iter(range(100))

    def decode() -> None:
        for path in paths:
            for _ in read_clips(path, CLIP_S, embedder.frames):
                pass

    def index() -> None:
        table = ClipTable(folder / f"index-{next(runs)}", "bench")
        assert index_files(table, LocalIndexer(embedder, CLIP_S), paths).clips == clips

    return _rates({"decode": decode, "index": index}, n, clips, "clips")


def asking(folder: Path, videos: int, seconds: int, n: int) -> dict[str, float]:
    """Videos: one question about each, and their bare decoding at the same frames."""
    paths = make_videos(folder, videos, seconds)
    options: dict[str, Any] = {"budget": 64, "max_new_tokens": 32}
    with VideoChat(device="cpu", cache_mib=0) as chat:
        frames = chat.plan(paths[0], 64).frames

        def decode() -> None:
            for path in paths:
                read_clip(path, frames)

        def ask() -> None:
            rows = list(LocalAsker(chat, "What is in the video?", options).rows(paths))
            assert len(rows) == videos
            assert not any(row.error for row in rows)

        return _rates({"decode": decode, "ask": ask}, n, videos, "videos")


def _rates(cases: dict[str, Callable[[], object]], n: int, count: int, what: str) -> dict[str, float]:
    """Of each case how many a second, and a CPU second, which other load changes little."""
    used: dict[str, list[float]] = {name: [] for name in cases}

    def counting(name: str) -> None:
        before = cpu_s()
        cases[name]()
        used[name].append(cpu_s() - before)

    samples = interleave({name: partial(counting, name) for name in cases}, n)
    rates = {f"{name}_{what}_per_s": count / min(times) for name, times in samples.items()}
    rates |= {f"{name}_{what}_per_cpu_s": count / min(times[1:]) for name, times in used.items()}
    return {name: round(rate, 2) for name, rate in rates.items()}


def searching(folder: Path, rows: int) -> dict[str, float]:
    """Milliseconds of a search for ten clips."""
    rng, dim, each = np.random.default_rng(0), 384, 5000
    table = ClipTable(folder / "large", "bench")
    thumbnail = rng.bytes(4000)
    for first in range(0, rows, each):
        count = min(each, rows - first)
        vectors = rng.standard_normal((count, dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        path = f"/videos/{first}.mp4"
        table.add(
            [
                ClipRow(path, 1, 1, "", i, count, 2.0 * i, 2.0 * i + 2, "bench", thumbnail, vector.tolist())
                for i, vector in enumerate(vectors)
            ]
        )
    table.tidy()
    query = vectors[7].tolist()
    assert table.nearest(query, 10)[0][0].number == 7
    times = []
    for _ in range(20):
        start = time.perf_counter()
        table.nearest(query, 10)
        times.append(time.perf_counter() - start)
    return summary(times)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.library")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=20, help="of a video, in clips of two")
    parser.add_argument("--n", type=int, default=3, help="runs of each case, in turn")
    args = arguments(parser, argv, rows=100, videos=1, seconds=4, n=1)
    with tempfile.TemporaryDirectory() as place:
        result = {
            "indexing": indexing(Path(place), args.videos, args.seconds, args.n),
            "asking": asking(Path(place), args.videos, args.seconds, args.n),
            "rows": args.rows,
            "search": searching(Path(place), args.rows),
        }
    whole = {"bench": "library", **result, "cores": torch.get_num_threads(), **environment()}
    print_json(whole, smallest=args.smallest)


if __name__ == "__main__":
    main()
