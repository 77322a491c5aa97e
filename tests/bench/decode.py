"""16 frames from a 60 s and a 10 min clip (1080p h264, GOP 250): read_clip against decord and PyAV directly.

    python -m tests.bench.decode [repeats]

The direct readers do what a careful script does: decord's get_batch, decord frame by frame, and one PyAV
container with a seek per frame where that skips a key frame, with slice and with frame threads. All frames
are compared before anything is timed. The clips are made once, in the system's folder for temporary files.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

from encoder.video.frame_times import middle_times, shown_at
from encoder.video.reader import read_clip
from tests.bench.common import environment, interleave, print_json, summary

FRAMES, FPS, GOP, SIZE = 16, 30, 250, (1920, 1080)


def make_clip(path: Path, seconds: int) -> None:
    """A moving pattern with a bright box; cheap to write, inter frames throughout."""
    width, height = SIZE
    tiles = np.random.default_rng(0).integers(0, 255, (height // 60 + 2, width // 60 + 2), dtype=np.uint8)
    ground = np.kron(tiles, np.ones((60, 60), np.uint8))
    colour = np.full((height // 2, width), 128, np.uint8)
    partial = path.with_suffix(".part.mp4")
    with av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "30", "g": str(GOP), "sc_threshold": "0"}
        for i in range(seconds * FPS):
            shift, left = i % 60, (i * 8) % (width - 80)
            picture = ground[shift : shift + height, shift : shift + width].copy()
            picture[100:160, left : left + 60] = 255
            frame = av.VideoFrame.from_ndarray(np.concatenate([picture, colour]), format="yuv420p")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    partial.replace(path)


def repeat_clip(source: Path, path: Path, times: int) -> None:
    """The same packets several times over, without encoding again."""
    partial = path.with_suffix(".part.mp4")
    with av.open(str(partial), "w") as target:
        stream = None
        for turn in range(times):
            with av.open(str(source)) as container:
                video = container.streams.video[0]
                stream = stream or target.add_stream_from_template(video)
                shift = turn * video.duration
                for packet in container.demux(video):
                    if packet.dts is None:
                        continue
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = stream
                    target.mux(packet)
    partial.replace(path)


def clips() -> dict[str, tuple[Path, float]]:
    """Path and length in seconds of the two clips, made when missing."""
    folder = Path(tempfile.gettempdir()) / "fluxchat-bench"
    folder.mkdir(exist_ok=True)
    short, long = folder / "decode-60s.mp4", folder / "decode-600s.mp4"
    if not short.exists():
        make_clip(short, 60)
    if not long.exists():
        repeat_clip(short, long, 10)
    return {"60s": (short, 60.0), "600s": (long, 600.0)}


def by_decord(path: Path, length: float, batch: bool) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path))
    pts = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].tolist()
    chosen = shown_at([t - pts[0] for t in pts], middle_times(0.0, length, FRAMES))
    if batch:
        return reader.get_batch(chosen).asnumpy()
    return np.stack([reader[i].asnumpy() for i in chosen])


def by_pyav(path: Path, length: float, threads: str) -> np.ndarray:
    pictures = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = threads
        tick = float(stream.time_base)
        shown = ahead = None
        frames = container.decode(stream)
        for time in middle_times(0.0, length, FRAMES):
            if ahead is None or time - ahead.pts * tick > GOP / FPS:
                container.seek(int(time / tick), stream=stream)
                frames = container.decode(stream)
                ahead = next(frames)
            while ahead is not None and ahead.pts * tick <= time + 1e-6:
                shown, ahead = ahead, next(frames, None)
            pictures.append(shown.to_ndarray(format="rgb24"))
    return np.stack(pictures)


def cases(path: Path, length: float) -> dict[str, Callable[[], np.ndarray | torch.Tensor]]:
    readers: dict[str, Callable[[], np.ndarray | torch.Tensor]] = {
        "ours": lambda: read_clip(path, FRAMES).frames,
        "ours_untrusted": lambda: read_clip(path, FRAMES, trusted=False).frames,
        "pyav_slice": lambda: by_pyav(path, length, "SLICE"),
        "pyav_auto": lambda: by_pyav(path, length, "AUTO"),
    }
    try:
        import decord  # noqa: F401
    except ImportError:
        return readers
    readers["decord_batch"] = lambda: by_decord(path, length, True)
    readers["decord_each"] = lambda: by_decord(path, length, False)
    return readers


def main(repeats: int = 5) -> None:
    result: dict[str, object] = {"bench": "decode", "frames": FRAMES, **environment("uint8")}
    medians: dict[str, float] = {}
    for name, (path, length) in clips().items():
        readers = cases(path, length)
        ours = torch.as_tensor(readers["ours"]())
        for reader, read in readers.items():
            difference = (torch.as_tensor(read()).int() - ours.int()).abs().max().item()
            if difference > 2:  # two FFmpeg versions may round colours differently
                raise SystemExit(f"{reader} reads other frames of {path} (difference {difference})")
        samples = interleave(readers, repeats)
        direct = [statistics.median(s) for k, s in samples.items() if not k.startswith("ours")]
        medians[name] = statistics.median(samples["ours"])
        result[name] = {reader: summary(times) for reader, times in samples.items()}
        result[f"ratio_to_fastest_{name}"] = round(medians[name] / min(direct), 3)
    result["ratio_to_fastest"] = max(float(str(result[f"ratio_to_fastest_{name}"])) for name in medians)
    result["ten_min_over_sixty_s"] = round(medians["600s"] / medians["60s"], 3)
    print_json(result)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
