"""16 frames from a minute and ten minutes (1080p h264, GOP 250): read_clip against decord and PyAV directly.

    python -m tests.bench.decode [--n 5] [--seconds 60] [--size 1920 1080] [--smallest]

The direct readers do what a careful script does: decord's get_batch, decord frame by frame, and one PyAV
container with a seek per frame where that skips a key frame, with slice and with frame threads. All frames
are compared before anything is timed. The clips are made once, in the system's folder for temporary files.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

from encoder.video.frame_times import middle_times, shown_at
from encoder.video.reader import read_clip
from tests.bench.common import arguments, environment, interleave, print_json, summary

FRAMES, FPS, GOP = 16, 30, 250


def make_clip(path: Path, seconds: int, size: tuple[int, int]) -> None:
    """A moving pattern with a bright box; cheap to write, inter frames throughout."""
    width, height = size
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
                assert video.duration is not None
                shift = turn * video.duration
                for packet in container.demux(video):
                    if packet.dts is None or packet.pts is None:
                        continue
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = stream
                    target.mux(packet)
    partial.replace(path)


def clips(seconds: int, size: tuple[int, int]) -> dict[str, tuple[Path, float]]:
    """Path and length in seconds of a clip, and of one of ten times its length; made when missing."""
    folder = Path(tempfile.gettempdir()) / "fluxchat-bench"
    folder.mkdir(exist_ok=True)
    short, long = (folder / f"decode-{length}s-{size[0]}x{size[1]}.mp4" for length in (seconds, 10 * seconds))
    if not short.exists():
        make_clip(short, seconds, size)
    if not long.exists():
        repeat_clip(short, long, 10)
    return {f"{seconds}s": (short, float(seconds)), f"{10 * seconds}s": (long, 10.0 * seconds)}


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
        assert stream.time_base is not None
        tick = float(stream.time_base)
        shown: av.VideoFrame | None = None
        ahead: av.VideoFrame | None = None
        frames = container.decode(stream)
        for time in middle_times(0.0, length, FRAMES):
            if ahead is None or time - _pts(ahead) * tick > GOP / FPS:
                container.seek(int(time / tick), stream=stream)
                frames = container.decode(stream)
                ahead = next(frames)
            while ahead is not None and _pts(ahead) * tick <= time + 1e-6:
                shown, ahead = ahead, next(frames, None)
            assert shown is not None
            pictures.append(shown.to_ndarray(format="rgb24"))
    return np.stack(pictures)


def _pts(frame: av.VideoFrame) -> int:
    assert frame.pts is not None
    return frame.pts


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=5, help="reads of each reader, in turn")
    parser.add_argument(
        "--seconds", type=int, default=60, help="of the short clip; the long one has ten times"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(1920, 1080), metavar=("WIDTH", "HEIGHT"))
    args = arguments(parser, argv, n=1, seconds=1, size=(320, 240))
    result: dict[str, object] = {"bench": "decode", "frames": FRAMES, **environment("uint8")}
    medians: dict[str, float] = {}
    for name, (path, length) in clips(args.seconds, tuple(args.size)).items():
        readers = cases(path, length)
        ours = torch.as_tensor(readers["ours"]())
        for reader, read in readers.items():
            difference = (torch.as_tensor(read()).int() - ours.int()).abs().max().item()
            if difference > 2:  # two FFmpeg versions may round colours differently
                raise SystemExit(f"{reader} reads other frames of {path} (difference {difference})")
        samples = interleave(readers, args.n)
        direct = [statistics.median(s) for k, s in samples.items() if not k.startswith("ours")]
        medians[name] = statistics.median(samples["ours"])
        result[name] = {reader: summary(times) for reader, times in samples.items()}
        result[f"ratio_to_fastest_{name}"] = round(medians[name] / min(direct), 3)
    result["ratio_to_fastest"] = max(float(str(result[f"ratio_to_fastest_{name}"])) for name in medians)
    short, long = medians.values()
    result["long_over_short"] = round(long / short, 3)
    print_json(result, smallest=args.smallest)


if __name__ == "__main__":
    main()
