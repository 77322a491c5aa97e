"""Long videos: seconds per hour of video, seconds to the first word and memory, beside bare decoding.

    python -m tests.bench.long_video [--hours 0.17 1 10] [--cases whole parts moment decode] [--smallest]

Without `--hours` they last ten minutes and one hour. The videos are one minute of film, repeated packet by
packet. Each case runs in a process of its own, with the shipped model; memory is the most that the process
had beyond what it had with the model loaded. Seconds per hour count up to the first word (of "decode": all).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from app.long_video import LONG_S, LongVideo
from tests.bench.common import arguments, environment, print_json
from training.synthetic.export import write_video

FPS, HEIGHT, WIDTH, SHOTS = 12, 180, 320, 6
MOST_DECODED = 60  # minutes: bare decoding of all frames is measured up to here
CASES = ("whole", "parts", "moment", "decode")
QUESTION = "What happens in the video?"


def minute(path: Path) -> None:
    """One minute of shots: each has a ground of its own, over which a square moves."""
    rng, frames = np.random.default_rng(0), []
    for _ in range(SHOTS):
        ground = rng.integers(0, 255, (HEIGHT // 20, WIDTH // 20, 3), np.uint8).repeat(20, 0).repeat(20, 1)
        for step in range(60 // SHOTS * FPS):
            picture = ground.copy()
            left = 2 * step % (WIDTH - 40)
            picture[70:110, left : left + 40] = 255
            frames.append(picture)
    write_video(path, np.stack(frames), FPS)


def loop(source: Path, out: Path, times: int) -> None:
    """A video repeated, its packets copied."""
    import av

    with av.open(str(source)) as file:
        stream = file.streams.video[0]
        packets = [
            (bytes(p), p.pts, p.dts, p.is_keyframe)
            for p in file.demux(stream)
            if p.dts is not None and p.pts is not None
        ]
        assert stream.time_base is not None
        length = stream.duration
        assert length is not None
        with av.open(str(out), "w") as target:
            copy = target.add_stream_from_template(stream)
            for turn in range(times):
                for content, pts, dts, is_key in packets:
                    packet = av.Packet(content)
                    packet.pts, packet.dts = pts + turn * length, dts + turn * length
                    packet.time_base, packet.stream, packet.is_keyframe = stream.time_base, copy, is_key
                    target.mux(packet)


def peak_mib() -> float:
    """The most memory that this process and its children had."""
    kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kib / 1024


def case(name: str, path: str) -> dict[str, Any]:
    """One measurement, in this process."""
    if name == "decode":
        import av

        start, count = time.perf_counter(), 0
        with av.open(path) as file:
            file.streams.video[0].thread_type = "AUTO"
            for _ in file.decode(video=0):
                count += 1
        return {"decode_s": round(time.perf_counter() - start, 2), "frames": count}
    from app.chat import VideoChat

    with VideoChat(device="cpu") as chat:
        chat.ask(None, "Hello.", max_new_tokens=1)
        before, start = peak_mib(), time.perf_counter()
        if name == "whole":
            answer = chat.ask(path, QUESTION, max_new_tokens=16)
        else:
            film = LongVideo(chat, path)
            if name == "parts":
                answer = film.ask(QUESTION, max_new_tokens=16)
            else:
                answer = film.ask("What happens at 7:30?", max_new_tokens=16)
        seconds = time.perf_counter() - start
        first_s = seconds - answer.timings.total_s + answer.timings.first_token_s
        return {
            "first_token_s": round(first_s, 2),
            "kept_tokens": answer.usage.kept_tokens,
            "frames": sum(kept.grid.frames for kept in answer.kept),
            "added_mib": round(peak_mib() - before),
        }


def per_hour(rows: dict[int, dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Seconds per hour of video, of each case at its longest video; and what an hour more adds to "parts".

    rows: cases by minutes.
    """
    figures: dict[str, float] = {}
    for minutes, cases in sorted(rows.items()):
        for name, row in cases.items():
            seconds = row["decode_s" if name == "decode" else "first_token_s"]
            figures[name] = round(60 * seconds / minutes, 2)
    low, high = min(rows), max(rows)
    if low < high and "parts" in rows[low]:
        added = rows[high]["parts"]["first_token_s"] - rows[low]["parts"]["first_token_s"]
        figures["parts_each_hour_more"] = round(60 * added / (high - low), 2)
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.long_video")
    parser.add_argument("--hours", type=float, nargs="+", default=[1 / 6, 1], help="at least 10 minutes each")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = arguments(parser, argv, hours=[1 / 6], cases=["parts", "decode"])
    if args.case:
        print(json.dumps(case(*args.case)))
        return
    lengths = [round(60 * hours) for hours in args.hours]
    if min(lengths) < LONG_S / 60:
        parser.error("a video is long from ten minutes on: say --hours 0.17 or more.")
    rows: dict[int, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as place:
        minute(Path(place) / "minute.mp4")
        for minutes in lengths:
            path = Path(place) / f"{minutes}.mp4"
            loop(Path(place) / "minute.mp4", path, minutes)
            rows[minutes] = {}
            for name in args.cases:
                if name == "decode" and minutes > MOST_DECODED:
                    continue
                command = [sys.executable, "-m", "tests.bench.long_video", "--case", name, str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows[minutes][name] = json.loads(done.stdout.splitlines()[-1])
    cases = {f"{minutes}_min": row for minutes, row in rows.items()}
    result = {"bench": "long_video", "s_per_hour": per_hour(rows), **cases, **environment()}
    print_json(result, smallest=args.smallest)


if __name__ == "__main__":
    main()
