"""Clips that the training loader decodes, beside bare decord on the same files: CPU time and clips a second.

    python -m tests.bench.load [--n 5] [--clips 8] [--smallest]

Clips of 10 s (340 x 256, h264, GOP 250, as K400 is kept on disks), 8 frames of each at random places of
equal segments. `decord` opens a reader with one thread and takes a batch; `decord_squared` has it scale to
224 x 224, too. `media` is what an example of the loader gives: a child process, exact times, a hash, decoded
in one thread, as where clips are read side by side; `media_alone` in several. `loader` is a whole micro-batch
with crop, flip and normalisation. CPU time is that of this process and its children: what a core has to give.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np

from encoder.video.reader import share_cores
from tests.bench.common import arguments, cpu_s, environment, print_json
from training.data.augment import AugmentConfig, segment_moments
from training.data.examples import Example
from training.data.flexible_grids import FlexibleGrid
from training.data.media import FileMedia
from training.data.video_batches import VideoBatches

SECONDS, FPS, SIZE, FRAMES, SIDE = 10, 25, (340, 256), 8, 224


def make_clips(count: int) -> list[Path]:
    """The clips, made when missing: a moving texture, so that frames differ everywhere."""
    folder = Path(tempfile.gettempdir()) / "fluxchat-bench" / "load"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        if path.exists():
            continue
        width, height = SIZE
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 255, (height // 8 + 40, width // 8 + 40, 3), dtype=np.uint8)
        ground = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
        partial = path.with_suffix(".part.mp4")
        with av.open(str(partial), "w") as container:
            stream = container.add_stream("libx264", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "23", "g": "250"}
            for i in range(SECONDS * FPS):
                down, right = i % 60, (2 * i) % 200
                picture = ground[down : down + height, right : right + width]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))))
            container.mux(stream.encode())
        partial.replace(path)
    return paths


class Files:
    """The clips as a source of examples."""

    def __init__(self, paths: list[Path]) -> None:
        self._examples = [Example(path.name, FileMedia((path,))) for path in paths]
        self.name, self.classes = "bench", tuple[str, ...]()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def by_decord(path: Path, moments: list[float], **size: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1, **size)
    count = len(reader)
    return reader.get_batch([min(count - 1, int(moment * count)) for moment in moments]).asnumpy()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=5, help="runs of each case, in turn")
    parser.add_argument("--clips", type=int, default=8)
    args = arguments(parser, argv, n=1, clips=1)
    paths = make_clips(args.clips)
    rng = random.Random(0)
    moments = [segment_moments(FRAMES, rng) for _ in paths]
    augment = AugmentConfig(crop="multiscale", flip=0.5)
    grid = FlexibleGrid((FRAMES, FRAMES + 1, 1), (SIDE, SIDE + 1, 14), (1, 10**6))
    with tempfile.TemporaryDirectory() as out:
        batches = VideoBatches(Files(paths), grid, augment, args.clips, 0, out=out)
        beside = ThreadPoolExecutor(1, initializer=share_cores)

        def media() -> object:
            return [
                FileMedia((p,)).load(FRAMES, SIDE, moments=m) for p, m in zip(paths, moments, strict=True)
            ]

        cases: dict[str, Callable[[], object]] = {
            "decord": lambda: [by_decord(p, m) for p, m in zip(paths, moments, strict=True)],
            "decord_squared": lambda: [
                by_decord(p, m, width=SIDE, height=SIDE) for p, m in zip(paths, moments, strict=True)
            ],
            "media_alone": media,
            "media": lambda: beside.submit(media).result(),
            "loader": lambda: batches.get(0),
        }
        walls: dict[str, list[float]] = {name: [] for name in cases}
        cpus: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(-1, args.n):
            for name, run in cases.items():
                cpu, wall = cpu_s(), time.perf_counter()
                run()
                if turn >= 0:
                    walls[name].append((time.perf_counter() - wall) / args.clips)
                    cpus[name].append((cpu_s() - cpu) / args.clips)
    cpu_ms = {name: 1e3 * statistics.median(values) for name, values in cpus.items()}
    print_json(
        {
            "bench": "load",
            "clips": f"{SIZE[0]} x {SIZE[1]}, {SECONDS} s, {FRAMES} frames at {SIDE}",
            "n": args.n,
            **environment("uint8"),
            "cpu_ms_per_clip": {name: round(value, 2) for name, value in cpu_ms.items()},
            "clips_per_s": {name: round(1 / statistics.median(v), 1) for name, v in walls.items()},
            "over_decord": {name: round(value / cpu_ms["decord"], 2) for name, value in cpu_ms.items()},
        },
        smallest=args.smallest,
    )


if __name__ == "__main__":
    main()
